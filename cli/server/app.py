"""The web application: routes, the API key, limits, and the life of a request."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from layerskip_core.checkpoint.loaded import Decoder
from layerskip_core.config.packing import PackingConfig
from layerskip_core.config.serving import ServeConfig
from layerskip_core.decoding import DecodeStats, check_prompt
from layerskip_core.errors import LayerSkipError
from layerskip_core.prompting import CHAT, RAW, encode_conversation
from layerskip_core.serving import Engine, Update
from layerskip_core.serving import Request as Job

from ..failure import tell
from .answers import DONE, ChatForm, CompletionForm, Document, Form, event, usage_of
from .bodies import Asked, Prompt, chat_asked, completion_asked, only_user_turn
from .errors import ApiError, api_error, invalid
from .metrics import CONTENT_TYPE, Metrics

_BODY_SECONDS = 30.0  # for a body to arrive
_STARTED = int(time.time())


class _Gone(Exception):
    """The client went away."""


class Submitted(NamedTuple):
    """A request that the engine has, and how many tokens its prompts have."""

    asked: Asked
    jobs: list[Job]
    prompt_tokens: int


class Service:
    """One model behind the API."""

    def __init__(
        self, decoder: Decoder, packing: PackingConfig, config: ServeConfig, engine: Engine, name: str, key: str | None
    ) -> None:
        """`name`: of the model in the API. `key`: the API key; None if none is needed."""
        # A tokenizer is not for two threads at once: the engine decodes with one, and this copy encodes in a thread of its own.
        self._decoder = decoder = replace(decoder, tokenizer=deepcopy(decoder.tokenizer))
        self._raw = decoder if decoder.template.text != CHAT else decoder.with_template(RAW, None)
        self._packing = packing
        self._config = config
        self._engine = engine
        self._name = name
        self._key = None if key is None else key.encode()
        self._encoding = ThreadPoolExecutor(1, "layerskip-encoding")
        self.metrics = Metrics(engine)

    def app(self) -> Starlette:
        routes = [
            Route("/v1/completions", _Endpoint(self, "completions", CompletionForm(), completion_asked), methods=["POST"]),
            Route("/v1/chat/completions", _Endpoint(self, "chat", ChatForm(), chat_asked), methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._model),
            Route("/metrics", self._metrics),
            Route("/health", self._health),
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _of_starlette, ApiError: _of_api, 500: _unexpected})
        app.router.redirect_slashes = False  # to an address that the client's Host header names
        return app

    def authorize(self, request: Request) -> None:
        """Raises ApiError without the API key."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
        if self._key is not None and not secrets.compare_digest(given, self._key):
            raise invalid("the API key is missing or wrong", code="invalid_api_key", status=401)

    async def body(self, request: Request) -> bytes:
        """Raises ApiError for a body that is too long, too slow or of another type."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise invalid("the content type must be application/json", status=415)
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > self._config.body_limit:
                        limit = self._config.body_limit
                        raise invalid(f"the body must be at most {limit} bytes", code="body_too_large", status=413)
        except TimeoutError:
            raise invalid(f"the body did not arrive within {_BODY_SECONDS:g} seconds", status=408) from None
        return bytes(body)

    async def submitted(self, body: bytes, parse: Callable[..., Asked], deliver: Callable[[int, Update], None]) -> Submitted:
        """What a body asks for, handed to the engine. Its answers have places in the queue before any work is done for them.

        Raises QueueFull, ApiError and LayerSkipError for what is wrong or does not fit.
        """
        engine, held = self._engine, 1
        engine.hold(held)
        try:
            asked = parse(body, self._name, self._config.decoding, self._config.token_limit)
            engine.hold(asked.answers - held)
            held = asked.answers
            configs = [self._decoder.resolve(asked.seeded(place), self._packing) for place in range(held)]
            loop = asyncio.get_running_loop()
            encoded = [await loop.run_in_executor(self._encoding, self._encoded, prompt) for prompt in asked.prompts]
            jobs = []
            for place, config in enumerate(configs):
                alone = asked.seed is not None and config.temperature > 0
                jobs.append(Job(encoded[place // asked.n], config, partial(deliver, place), alone))
            engine.submit(*jobs)
        except BaseException:
            engine.release(held)
            raise
        return Submitted(asked, jobs, sum(map(len, encoded)))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Without effect on those that are finished."""
        for job in jobs:
            self._engine.cancel(job)
            self.metrics.decoded(job.stats)

    def document(self, form: Form) -> Document:
        return Document(form, self._name)

    def _encoded(self, prompt: Prompt) -> list[int]:
        """Token ids. A chat template is for conversations; a text that continues is put into any other template."""
        decoder = self._decoder
        if isinstance(prompt, list):
            ids = decoder.known_ids(prompt)
        elif isinstance(prompt, str):
            ids = self._raw.encode_prompt(prompt)
        elif decoder.template.text != CHAT:
            ids = decoder.encode_prompt(only_user_turn(prompt))
        else:
            system = decoder.template.system
            turns = prompt if system is None or prompt[0][0] == "system" else (("system", system), *prompt)
            ids = decoder.known_ids(encode_conversation(decoder.tokenizer, turns))
        check_prompt(ids, decoder.backend.max_positions)
        return ids

    async def _models(self, request: Request) -> Response:
        self.authorize(request)
        return JSONResponse({"object": "list", "data": [self._listed]})

    async def _model(self, request: Request) -> Response:
        self.authorize(request)
        if request.path_params["model"] != self._name:
            raise invalid(f"this server has no such model, only {self._name}", "model", "model_not_found", 404)
        return JSONResponse(self._listed)

    @property
    def _listed(self) -> Mapping[str, Any]:
        return {"id": self._name, "object": "model", "created": _STARTED, "owned_by": "layerskip"}

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def _health(self, request: Request) -> Response:
        stopped = self._engine.is_stopped
        return JSONResponse({"status": "stopped" if stopped else "ok"}, status_code=503 if stopped else 200)


class _Endpoint:
    """Answers prompts: an ASGI application, so that one coroutine has the request from its first byte to its last."""

    def __init__(self, service: Service, name: str, form: Form, parse: Callable[..., Asked]) -> None:
        self._service = service
        self._name = name
        self._form = form
        self._parse = parse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome = "cancelled"  # also by the server's shutdown
        try:
            await self._answer(Request(scope, receive), receive, send, scope)
            outcome = "finished"
        except (_Gone, ClientDisconnect, OSError):
            pass
        except ApiError as error:
            outcome = "refused" if error.status < 500 else "failed"
            raise
        except LayerSkipError as error:
            refused = api_error(error)
            outcome = "refused" if refused.status < 500 else "failed"
            raise refused from None
        except Exception:
            outcome = "failed"
            raise
        finally:
            self._service.metrics.ended(self._name, outcome)

    async def _answer(self, request: Request, receive: Receive, send: Send, scope: Scope) -> None:
        service, started = self._service, time.monotonic()
        service.authorize(request)
        updates = _Updates(asyncio.get_running_loop())
        asked, jobs, prompt_tokens = await service.submitted(await service.body(request), self._parse, updates.deliver)
        watch = asyncio.create_task(_watch(receive, updates))
        try:
            arriving = self._timed(updates.all(len(jobs)), started)
            document = service.document(self._form)
            if asked.stream:
                await self._stream(arriving, document, jobs, prompt_tokens, asked, send)
            else:
                await self._whole(arriving, document, jobs, prompt_tokens, scope, receive, send)
        finally:
            watch.cancel()
            service.cancel(jobs)
        service.metrics.finished(time.monotonic() - started)

    async def _whole(
        self,
        arriving: AsyncIterator[tuple[int, Update]],
        document: Document,
        jobs: Sequence[Job],
        prompt_tokens: int,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        texts, reasons = [""] * len(jobs), [""] * len(jobs)
        async for place, update in arriving:
            texts[place] += update.text
            reasons[place] = update.finish_reason or ""
        usage = usage_of(prompt_tokens, _total(jobs))
        await JSONResponse(document.whole(texts, reasons, usage))(scope, receive, send)

    async def _stream(
        self,
        arriving: AsyncIterator[tuple[int, Update]],
        document: Document,
        jobs: Sequence[Job],
        prompt_tokens: int,
        asked: Asked,
        send: Send,
    ) -> None:
        """As server-sent events. The status is sent with the first token, so that an error before it is one of HTTP."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        begun = False
        try:
            async for place, update in arriving:
                if not begun:
                    begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                if update.text or update.is_last:
                    await _send_part(send, document.chunk(place, update.text, update.finish_reason))
            if asked.include_usage:
                await _send_part(send, document.usage_chunk(usage_of(prompt_tokens, _total(jobs))))
            await _send_part(send, DONE)
        except ApiError as error:
            if not begun:
                raise
            await _send_part(send, event(error.document))
        await send({"type": "http.response.body", "body": b""})

    async def _timed(self, arriving: AsyncIterator[tuple[int, Update]], started: float) -> AsyncIterator[tuple[int, Update]]:
        """Notes when the first token came."""
        is_first = True
        async for item in arriving:
            if is_first:
                is_first = False
                self._service.metrics.first_token(time.monotonic() - started)
            yield item


class _Updates:
    """Updates of the engine's thread, as the event loop reads them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[tuple[int, Update] | None] = asyncio.Queue()

    def deliver(self, place: int, update: Update) -> None:
        """In the engine's thread."""
        with suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (place, update))

    def disconnect(self) -> None:
        self._queue.put_nowait(None)

    async def all(self, count: int) -> AsyncIterator[tuple[int, Update]]:
        """Until `count` answers are finished. Raises _Gone if the client goes away, ApiError if one of them fails."""
        while count:
            item = await self._queue.get()
            if item is None:
                raise _Gone
            place, update = item
            if update.error is not None:
                refused = api_error(update.error)
                if refused.status == 500:
                    tell(update.error, debug=True)
                raise refused
            count -= update.is_last
            yield place, update


async def _watch(receive: Receive, updates: _Updates) -> None:
    """Waits until the client goes away: after the body nothing else is received."""
    while (await receive())["type"] != "http.disconnect":
        pass
    updates.disconnect()


async def _send_part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _total(jobs: Sequence[Job]) -> DecodeStats:
    return sum((job.stats for job in jobs), DecodeStats())


async def _of_api(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {"Retry-After": "1"} if error.status == 429 else {}
    # The rest of a body that is too long is not read: the connection cannot be used again.
    headers |= {"Connection": "close"} if error.status in (408, 413) else {}
    return JSONResponse(error.document, error.status, headers)


async def _of_starlette(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refused = invalid(f"{request.method} {request.url.path:.200}: {error.detail}", status=error.status_code)
    return JSONResponse(refused.document, error.status_code, error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    refused = api_error(error)
    return JSONResponse(refused.document, refused.status)
