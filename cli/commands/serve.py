"""Serve a model over an OpenAI-compatible API."""

import os
import signal
import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from layerskip_core.config.decoding import KEY, ServeConfig
from layerskip_core.config.model import MachineConfig, PackingConfig, PromptingConfig
from layerskip_core.errors import LayerSkipError, refused, require

from ..console import narrate
from ..loading import DecoderFlags, load_to_decode, of_answers
from ..options import command

# Seconds that requests have to finish when the server is stopped; container engines wait for 10
_GRACE = 8
_BACKLOG = 2048  # connections that the system holds until they are accepted
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@command
def serve(
    serving: ServeConfig, prompting: PromptingConfig, packing: PackingConfig, machine: MachineConfig
) -> None:
    """Serve one model over an OpenAI-compatible API: completions, chat completions and responses,
    with streaming.

    Decoding flags are the defaults of requests. Needs the extra `serve`: pip install
    'layerskip[serve]'.

    Example: layerskip serve --port 8000
    """
    key = serving.api_key or os.environ.get(KEY)
    require(key != "", KEY, "a text that is not empty", "an empty one")
    try:
        import uvicorn

        from ..server.app import Service
    except ModuleNotFoundError as error:
        raise LayerSkipError(
            f"serve needs the extra `serve`, whose package {error.name} is missing: pip install 'layerskip[serve]'"
        ) from None
    from layerskip_core.decoding import Prefixes
    from layerskip_core.decoding.drafters.lookup import EarlierAnswers
    from layerskip_core.model import NativeBackend
    from layerskip_core.processor import memory_budget
    from layerskip_core.serving.thread import DecodingThread

    with _bound(serving.host, serving.port) as listener:
        kv_bytes, memory = memory_budget(serving.kv_memory)
        flags = DecoderFlags(serving.model, serving.decoding, prompting, packing, machine)
        loaded, _ = load_to_decode(flags, memory=memory)
        serving = replace(serving, decoding=of_answers(loaded, serving.decoding))
        if isinstance(loaded.backend, NativeBackend):
            loaded.backend.limit_memory(kv_bytes)
            needed = "megabytes that hold the keys and values of at least 64 tokens"
            require(loaded.backend.context_length() > 0, "kv_memory", needed, kv_bytes // 2**20)
        elif serving.kv_memory is not None:
            implementation = loaded.backend.implementation
            needed = f"left out: nothing bounds the KV entries of {implementation}"
            raise refused("kv_memory", needed, str(serving.kv_memory))
        path = Path(serving.model)  # clients see its last part only
        name = path.resolve().name if path.exists() else serving.model
        engine = DecodingThread(
            loaded,
            serving.batch_size,
            serving.queue_size,
            earlier=EarlierAnswers(serving.remember),
            prefixes=Prefixes(serving.prefix_cache * 2**20),
        )
        try:
            app = Service(loaded, packing, serving, engine, name, key).app()
            config = uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=_GRACE,
                server_header=False,
            )
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            # Uvicorn finishes its work after either signal, and raises it again
            with suppress(KeyboardInterrupt):
                listener.listen(_BACKLOG)  # now, so that whoever reads the next line can connect
                _announce(name, listener, serving, key)
                uvicorn.Server(config).run([listener])
        finally:
            engine.stop()


def _announce(name: str, listener: socket.socket, serving: ServeConfig, key: str | None) -> None:
    host, port = listener.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    source = "`api_key`" if serving.api_key else KEY
    with_key = "" if key is None else f", with the key of {source}"
    narrate(f"{name} at http://{address}:{port}/v1{with_key}; Ctrl-C stops it")
    if key is None and serving.host not in _LOOPBACK:
        narrate("warning: without `api_key` everyone who reaches this address can use the model")


def _bound(host: str, port: int) -> socket.socket:
    """A bound socket: a port in use is an error before the model is loaded."""
    listener = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise LayerSkipError(f"`host` {host} with `port` {port} cannot be used: {reason}") from None
    return listener
