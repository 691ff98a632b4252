"""`layerskip serve` with hostile clients on 127.0.0.1: it must refuse what is wrong, go on answering, and end cleanly."""

import json
import re
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

from .campaign import Case
from .command import Command, start
from .forked import Child
from .hostile_requests import BODY_LIMIT, COMPLETIONS, get, honest, hostile_request, post
from .outcome import Miss, misses_of

CASES, SHORT = 120, range(2)
_ROUNDS, _MOST_CLIENTS = 12, 6
_PATIENCE = 20.0  # seconds for an answer, beside other attacks
_SILENCE = 1.0  # seconds after which a client that waits sends no more
_REFUSALS = (400, 401, 404, 405, 408, 411, 413, 414, 415, 422, 426, 429, 431, 501, 505)
_WHERE = re.compile(r"at http://127\.0\.0\.1:(\d+)/v1")
_HELD = re.compile(rb"^layerskip_answers_(?:running|waiting) (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Reply:
    """What came back on a connection: the first response's status, 0 if there was none, and what followed its headers."""

    status: int
    body: bytes

    @classmethod
    def of(cls, data: bytes) -> "Reply":
        head, _, body = data.partition(b"\r\n\r\n")
        while head.startswith(b"HTTP/1.1 100"):
            head, _, body = body.partition(b"\r\n\r\n")
        status = re.match(rb"HTTP/1\.1 (\d{3})", head)
        return cls(int(status[1]) if status else 0, body)


def attack(case: Case) -> Iterator[Miss]:
    """Starts a server, sends rounds of requests from several clients at once, and stops it."""
    random, model = case.random, case.random.choice(("llama", "measured", "blocks", "chat"))
    flags = random.choice(((), ("--exit", "2", "--spec", "3"), ("--strategy", "lookup"), ("--temperature", "1")))
    few = ("--batch-size", str(random.choice((1, 2, 8))), "--queue", str(random.choice((0, 2, 64))))
    limits = ("--body-limit", str(BODY_LIMIT), "--token-limit", "100")
    address = ("--host", "127.0.0.1", "--port", "0")
    command = Command(("serve", "--model", str(case.material.model(model)), *address, *few, *limits, *flags))
    case.say(command)
    home = case.folder / "home"
    home.mkdir()
    server = start(command, home, case.logs)
    port = _port(server, case.logs / "stderr")
    if port is None:
        server.send(signal.SIGKILL)
        outcome = server.wait()
        yield Miss("wrong", f"the server did not start; {outcome.tail if outcome else ''}")
        return
    try:
        expected = _ask(port, model)
        if expected.status != 200:
            yield Miss("wrong", f"an honest request got {expected}")
        for _ in range(_ROUNDS):
            yield from _round(case, port, model, random)
        yield from _afterwards(port, model, expected)
    finally:
        server.send(random.choice((signal.SIGINT, signal.SIGTERM)))
        outcome = server.wait(_PATIENCE)
        if outcome is None:
            server.send(signal.SIGKILL)
            server.wait()
    case.counted.append(_ROUNDS)
    if outcome is None:
        yield Miss("hang", "the server did not end after a signal")
        return
    yield from misses_of(outcome)
    if outcome.status:
        yield Miss("wrong", f"the server ended with {outcome.status}; {outcome.tail}")
    if left := list(home.iterdir()):
        yield Miss("wrong", f"the server wrote {left}")


def _port(server: Child, log: Path) -> int | None:
    """Once it listens."""
    until = time.monotonic() + 3 * _PATIENCE
    while server.running() and time.monotonic() < until:
        if found := _WHERE.search(log.read_text(errors="replace")):
            return int(found[1])
        time.sleep(0.02)
    return None


def _round(case: Case, port: int, model: str, random: Random) -> Iterator[Miss]:
    """Several requests at once; some clients go away before their answer, or in its middle."""
    connections: list[tuple[socket.socket, bytes, str]] = []
    for _ in range(random.randint(1, _MOST_CLIENTS)):
        request = _streaming(model, random) if random.random() < 0.25 else hostile_request(model, random)
        way = random.choices(("read", "half-closed", "reset", "reset after a part"), (6, 1, 1, 2))[0]
        case.say(f"{way}: {request[:300]!r} ({len(request)} bytes)")
        connection = socket.create_connection(("127.0.0.1", port), _PATIENCE)
        connections.append((connection, request, way))
        with suppress(OSError):  # the server may close before it has read all
            connection.sendall(request)
    for connection, request, way in connections:
        with connection:
            if way.startswith("reset"):
                if way != "reset":
                    select.select([connection], [], [], 0.5)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                continue
            reply = _read(connection, 0.0 if way == "half-closed" else _SILENCE)
        if reply is None:
            yield Miss("hang", f"no answer to {request[:200]!r}")
        elif fault := _fault_of(reply):
            yield Miss("wrong", f"{fault}: {reply.status} {reply.body[:300]!r} to {request[:300]!r}")


def _streaming(model: str, random: Random) -> bytes:
    body = honest(model, stream=True, max_tokens=random.choice((1, 30, 100)), n=random.choice((1, 1, 3)))
    return post(COMPLETIONS, json.dumps(body | {"temperature": random.choice((0, 1))}).encode())


def _read(connection: socket.socket, silence: float = _PATIENCE) -> Reply | None:
    """All that comes until the server closes; None if it takes too long.

    After so many seconds of `silence` the client says that nothing more will come: some requests have no end.
    """
    data, until = b"", time.monotonic() + _PATIENCE
    with suppress(OSError):  # reset: the request was refused before it was read
        if not select.select([connection], [], [], silence)[0]:
            connection.shutdown(socket.SHUT_WR)
        while time.monotonic() < until:
            if not select.select([connection], [], [], silence or _PATIENCE)[0]:
                connection.shutdown(socket.SHUT_WR)
            elif part := connection.recv(1 << 16):
                data += part
            else:
                break
        else:
            return None
    return Reply.of(data)


def _fault_of(reply: Reply) -> str | None:
    """What is wrong with an answer to a hostile request. No answer at all is right for a client that is done."""
    if reply.status in (0, 200):
        return None
    if reply.status not in (*_REFUSALS, 503):
        return "an unexpected status"
    if not reply.body.startswith(b"{"):  # of the HTTP server, before it knows what is asked
        return None
    try:
        error = json.loads(reply.body)["error"]
        texts = [error["message"], error["type"]]
    except (ValueError, KeyError, TypeError):
        return "an error that is not in OpenAI's form"
    if not all(isinstance(text, str) and text for text in texts) or "Traceback" in texts[0]:
        return "an error that says nothing"
    return None


def _ask(port: int, model: str) -> Reply:
    with socket.create_connection(("127.0.0.1", port), _PATIENCE) as connection:
        connection.sendall(post(COMPLETIONS, json.dumps(honest(model, temperature=0)).encode()))
        return _read(connection) or Reply(0, b"nothing")


def _afterwards(port: int, model: str, expected: Reply) -> Iterator[Miss]:
    """The server answers as before, and holds no request of clients that went away."""
    until = time.monotonic() + _PATIENCE
    held = None
    while held != [0.0, 0.0] and time.monotonic() < until:
        with socket.create_connection(("127.0.0.1", port), _PATIENCE) as connection:
            connection.sendall(get("/metrics"))
            reply = _read(connection)
        held = [float(count) for count in _HELD.findall(reply.body)] if reply else None
        time.sleep(0.05)
    if held != [0.0, 0.0]:
        yield Miss("wrong", f"requests that nobody waits for are held: {held}")
    again = _ask(port, model)
    texts = [_texts(reply) for reply in (expected, again)]
    if texts[0] != texts[1]:
        yield Miss("wrong", f"an honest request got {texts[0]} before and {texts[1]} after")


def _texts(reply: Reply) -> object:
    try:
        return [choice["text"] for choice in json.loads(reply.body)["choices"]]
    except (ValueError, KeyError, TypeError):
        return reply
