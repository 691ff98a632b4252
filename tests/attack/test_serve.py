"""`layerskip serve` with hostile clients: it refuses what is wrong, goes on answering, and ends
cleanly.
"""

import json
import re
import select
import signal
import socket
import struct
import time
from contextlib import suppress

import pytest
from attacking import ODD, examples
from command_line import start
from hypothesis import given
from hypothesis import strategies as st

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
BODY_LIMIT = 65_536
PATIENCE = 20.0
REFUSALS = (400, 401, 404, 405, 408, 411, 413, 414, 415, 422, 426, 429, 431, 501, 503, 505)
NUMBERS = (3, 2**31, 2**63, 2**64, 10**30)
VALUES = (*ODD, *NUMBERS, "\ud800", [5, 7], ["a"] * 100, [5, "a"], "word " * 300, "{prompt}")
KEYS = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed",
    "stop", "n", "stream", "stream_options", "logprobs", "echo", "best_of", "suffix", "tools", "response_format",
    "unknown",
)  # fmt: skip


def honest(**settings):
    return {"model": "tiny", "prompt": "call mom", "max_tokens": 6, "temperature": 0, **settings}


def post(path, body, headers="Content-Type: application/json\r\n"):
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


def get(path):
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()


WHOLE = post(COMPLETIONS, json.dumps(honest()).encode())
START = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
RAW = (
    b"\r\n\r\n",
    b"\0" * 100,
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"GET /\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"X" * 100_000,
    b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 9000 + b"\r\n",
    b"GET / HTTP/1.1\r\nA: " + b"x" * 200_000,
    WHOLE + WHOLE,
    *(
        START + b"Content-Length: %s\r\n\r\n{}" % length
        for length in (b"-1", b"x", b"99999999999999999999", b"0")
    ),
    START + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    START + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    START + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\nx",
    START + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
)
BODIES = (
    b"",
    b"null",
    b"[]",
    b"5",
    b"{",
    b"[" * 100_000,
    b'{"a":' * 5000,
    b"\xff\xfe{\0}\0",
    b"\xed\xa0\x80",
    b'{"n": NaN}',
    *(b"x" * (BODY_LIMIT + extra) for extra in (-1, 0, 1, 3_000_000)),
)
PATHS = (
    "/",
    "/v1",
    "/v1/models/",
    "/v1/models/../../etc/passwd",
    "/v1/models/%2e%2e%2fetc%2fpasswd",
    "/%00",
    "//v1//models",
    "/v1/completions/",
    "/metrics",
    "/health?x=" + "y" * 5000,
    "*",
    "http://x/y",
    "/docs",
)


@st.composite
def requests(draw):
    """Anything but an honest request; or one that streams a long answer."""
    kind = draw(st.sampled_from(["settings", "settings", "stream", "body", "raw", "path"]))
    if kind == "settings":
        path = draw(st.sampled_from([COMPLETIONS, CHAT]))
        body = (
            honest()
            if path == COMPLETIONS
            else {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
        )
        body |= draw(
            st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), min_size=1, max_size=3)
        )
        return post(path, json.dumps(body).encode())
    if kind == "stream":
        return post(
            COMPLETIONS,
            json.dumps(honest(stream=True, max_tokens=100, n=draw(st.integers(1, 3)))).encode(),
        )
    if kind == "body":
        return post(draw(st.sampled_from([COMPLETIONS, CHAT])), draw(st.sampled_from(BODIES)))
    if kind == "path":
        return get(draw(st.sampled_from(PATHS)))
    return draw(st.sampled_from(RAW) | st.integers(1, len(WHOLE) - 1).map(lambda end: WHOLE[:end]))


ANSWERS = {}  # the first honest answer of each server


@pytest.fixture(scope="module")
def port(checkpoint):
    """The port of a server, which must end cleanly after all that was sent."""
    limits = (
        "--body-limit",
        str(BODY_LIMIT),
        "--token-limit",
        "100",
        "--batch-size",
        "2",
        "--queue",
        "8",
    )
    server = start(
        "serve",
        "--model",
        checkpoint,
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--threads",
        "1",
        *limits,
    )
    said = ""
    while not (found := re.search(r"at http://127\.0\.0\.1:(\d+)/v1", said)):
        line = server.stderr.readline()
        assert line, said
        said += line
    yield int(found[1])
    server.send_signal(signal.SIGTERM)
    out, err = server.communicate(timeout=PATIENCE)
    assert (server.returncode, out) == (0, "") and "Traceback" not in err, err


def ask(port, request, silence=PATIENCE):
    """The status and body of the first answer; status 0 if there was none.

    After so many seconds of `silence` the client says that it sends no more: some requests have no
    end.
    """
    data = b""
    until = time.monotonic() + PATIENCE
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection, suppress(OSError):
        connection.sendall(request)
        while time.monotonic() < until:
            if not select.select([connection], [], [], silence)[0]:
                connection.shutdown(socket.SHUT_WR)
            elif part := connection.recv(1 << 16):
                data += part
            else:
                break
    assert time.monotonic() < until, "no answer in time"
    head, _, body = data.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.1 (\d{3})", head)
    return int(status[1]) if status else 0, body


def leave(port, request, seconds):
    """A client that goes away without reading its answer."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection, suppress(OSError):
        connection.sendall(request)
        time.sleep(seconds)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def held(port):
    """How many answers the server says that it works on or keeps waiting."""
    _, body = ask(port, get("/metrics"))
    return sum(
        float(count)
        for count in re.findall(
            rb"^layerskip_answers_(?:running|waiting) (\S+)$", body, re.MULTILINE
        )
    )


@pytest.mark.slow
@examples(10)
@given(
    sent=st.lists(requests(), min_size=1, max_size=4),
    left=st.lists(requests(), max_size=2),
    after=st.floats(0, 0.1),
)
def test_hostile_clients_are_refused_and_honest_ones_served(port, sent, left, after):
    for request in left:
        leave(port, request, after)
    for request in sent:
        status, body = ask(port, request, silence=0.3)
        assert status in (0, 200, *REFUSALS), body
        # Else it is the HTTP server's, before it knows what is asked
        if status in REFUSALS and body.startswith(b"{"):
            error = json.loads(body)["error"]
            assert error["message"] and error["type"] and "Traceback" not in error["message"]
    status, body = ask(port, WHOLE)
    assert status == 200
    answer = [choice["text"] for choice in json.loads(body)["choices"]]
    assert answer == ANSWERS.setdefault(port, answer)
    until = time.monotonic() + PATIENCE
    while held(port) and time.monotonic() < until:
        time.sleep(0.05)
    assert held(port) == 0
