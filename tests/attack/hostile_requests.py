"""Requests that a server may get from anyone: hostile bodies, broken HTTP, clients that go away. As raw bytes."""

import json
from collections.abc import Callable
from random import Random

from .damage import DEEP, ODD_VALUES, RAW_VALUES, spoil_bytes, spoil_json

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODY_LIMIT = 65_536  # of the server that is attacked, in bytes
_KEYS = (
    *("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed", "stop"),
    *("n", "stream", "stream_options", "logprobs", "echo", "best_of", "suffix", "tools", "response_format", "unknown"),
)
_PROMPTS = (
    *("call mom", "", " ", "\0", "\ud800", "<s></s><pad>", "{prompt}", "x" * 20_000, "word " * 300, "\u202e\u2028"),
    *([], [5], [5, 7, 9], [300], [-1], [2**63], [0.5], ["a", "b"], [[5], [6]], [[]], [5, "a"], ["a"] * 200, None, {}, 5),
)
_MESSAGES = (
    *(
        [],
        [{}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "tool", "content": "a"}],
        "x",
        [["user", "a"]],
    ),
    *(
        [{"role": "user", "content": "call mom"}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
        [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}],
    ),
)


def honest(model: str, prompt: object = "call mom", **settings: object) -> dict[str, object]:
    """A body that must be answered."""
    return {"model": model, "prompt": prompt, "max_tokens": 6, **settings}


def post(path: str, body: bytes, headers: str = "Content-Type: application/json\r\n") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode() + body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()


def hostile_request(model: str, random: Random) -> bytes:
    """Anything but an honest request."""
    kinds: tuple[Callable[[str, Random], bytes], ...] = (_settings, _prompts, _bodies, _http, _paths, _chunks)
    return random.choices(kinds, (40, 20, 15, 12, 6, 7))[0](model, random)


def _settings(model: str, random: Random) -> bytes:
    """Values of the wrong type or outside their range, for one to three keys."""
    path, body = random.choice(
        ((COMPLETIONS, honest(model)), (CHAT, {"model": model, "messages": _MESSAGES[7], "max_tokens": 6}))
    )
    for key in random.choices(_KEYS, k=random.choice((1, 1, 2, 3))):
        body[key] = random.choice((*ODD_VALUES, *_OF_KEYS.get(key, ())))
    return post(path, json.dumps(body).encode())


_OF_KEYS: dict[str, tuple[object, ...]] = {
    "stop": ("a", ["a", ""], ["a"] * 100, "\ud800", [" "]),
    "n": (2, 5, 128, 129, 10**6),
    "max_tokens": (1, 100, 101, 4096),
    "temperature": (0.0, 1.0, 2.0, 1e-50, 1e308),
    "stream": (True,),
    "stream_options": ({"include_usage": True}, {"include_usage": "x"}, {"x": 1}),
    "model": ("embedded", "", "a/b", "../../etc/passwd"),
    "logprobs": (0, 5, True),
}


def _prompts(model: str, random: Random) -> bytes:
    if random.random() < 0.6:
        body = honest(model, random.choice(_PROMPTS), stream=random.random() < 0.3)
        return post(COMPLETIONS, json.dumps(body).encode())
    return post(CHAT, json.dumps({"model": model, "messages": random.choice(_MESSAGES), "max_tokens": 4}).encode())


def _bodies(model: str, random: Random) -> bytes:
    """Damaged JSON, other encodings, other types, and bodies beyond the limit."""
    text = json.dumps(honest(model, stream_options={"include_usage": True}, stop=["a", "b"]))
    bodies = (
        *(b"", b"null", b"[]", b"5", b'"x"', b"{", b"[" * DEEP, b'{"a":' * 5000, b"\xff\xfe" + text.encode("utf-16-le")),
        *(text.encode("utf-16"), text.encode() + b"\0", b"\xef\xbb\xbf" + text.encode(), text.encode() * 2, b"\xed\xa0\x80"),
        *(b'{"model": %s}' % raw.encode() for raw in RAW_VALUES),
        *(b"x" * (BODY_LIMIT + extra) for extra in (-1, 0, 1, 3_000_000)),
        json.dumps(honest(model, "x" * BODY_LIMIT)).encode(),
        spoil_json(text, random)[0].encode(errors="surrogatepass"),
        spoil_json(text, random)[0].encode(errors="surrogatepass"),
        spoil_bytes(text.encode(), random),
    )
    kinds = (
        "application/json",
        "application/json",
        "application/json; charset=utf-16",
        "text/plain",
        "multipart/form-data",
        "",
    )
    kind = random.choice(kinds)
    return post(random.choice((COMPLETIONS, CHAT)), random.choice(bodies), f"Content-Type: {kind}\r\n" if kind else "")


def _http(model: str, random: Random) -> bytes:
    """What is not HTTP, or not quite."""
    body = json.dumps(honest(model)).encode()
    whole = post(COMPLETIONS, body)
    start = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
    return random.choice(
        (
            *(b"\r\n\r\n", b"\0" * 100, b"\x16\x03\x01\x02\x00\x01\x00", b"GET /\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"),
            *(b"X" * 100_000, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 9000 + b"\r\n", b"GET / HTTP/1.1\r\nA: " + b"x" * 200_000),
            *(start + b"Content-Length: %s\r\n\r\n" % length + body for length in (b"-1", b"x", b"99999999999999999999", b"0")),
            start + b"Content-Length: %d\r\nContent-Length: 3\r\n\r\n" % len(body) + body,
            start + b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % len(body) + body,
            start + b"Expect: 100-continue\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body,
            start + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
            whole + whole + get("/health"),
            whole[: random.randrange(1, len(whole))],
            spoil_bytes(whole, random),
        )
    )


def _paths(_: str, random: Random) -> bytes:
    paths = (
        *("/", "/v1", "/v1/models", "/v1/models/", "/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2fetc%2fpasswd", "/%00"),
        *("/v1/completions", "/v1/chat/completions/", "//v1//models", "/metrics", "/health?x=" + "y" * 5000, "*", "http://x/y"),
        *("/v1/models/" + "a" * 9000, "/v1/models/%ff", "/docs", "/openapi.json"),
    )
    method = random.choice(("GET", "GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "PATCH", "X" * 50))
    return f"{method} {random.choice(paths)} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()


def _chunks(model: str, random: Random) -> bytes:
    """Bodies in chunks: whole, too long, and with sizes that are none."""
    start = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n".encode()
    )
    body = json.dumps(honest(model)).encode()
    pieces = random.choice(([body], [body[:9], body[9:]], [b"x" * 9000] * 40, [b"x"] * 3000))
    sizes = random.choice((None, None, None, b"-1", b"x", b"f" * 40, b""))
    chunks = b"".join((b"%x" % len(piece) if sizes is None else sizes) + b"\r\n" + piece + b"\r\n" for piece in pieces)
    return start + b"Connection: close\r\n\r\n" + chunks + random.choice((b"0\r\n\r\n", b"0\r\n\r\n", b""))
