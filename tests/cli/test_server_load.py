"""What a server stands: threads, a full queue, wrong keys, and a crowd of which a part goes
away.
"""

import asyncio
import copy
import gc
import json
import threading
from dataclasses import replace
from math import inf

import pytest
from decodings import WIDE, backend_on
from evaluating import tiny_loaded

from layerskip_core.serving import Request

NEEDED = "needs the extras dev and serve"
httpx, openai = (pytest.importorskip(name, reason=NEEDED) for name in ("httpx", "openai"))
server = pytest.importorskip("test_server", reason=NEEDED)
PROMPT = server.PROMPT
complete = server.complete
expected = server.expected
serving = server.serving


def test_an_api_key_keeps_others_out_and_a_stopped_engine_is_not_healthy():
    with serving(tiny_loaded(), key="sésame\udcff") as api:
        for key in ("wrong", "none"):
            with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
                api.client(api_key=key).models.list()
        assert httpx.post(f"{api.url}/v1/completions", json={}).status_code == 401
        # As in the environment: any bytes
        right = {"authorization": "Bearer sésame".encode() + b"\xff"}
        assert httpx.get(f"{api.url}/v1/models", headers=right).status_code == 200
        assert httpx.get(f"{api.url}/health").json() == {"status": "ok"}
        api.engine.stop()
        health = httpx.get(f"{api.url}/health")
        assert (health.status_code, health.json()) == (503, {"status": "stopped"})
        request = {"model": "tiny", "prompt": "a"}
        assert (
            httpx.post(f"{api.url}/v1/completions", json=request, headers=right).status_code == 503
        )


class Watched:
    """A tokenizer that notes which threads use each copy of it."""

    def __init__(self, tokenizer, users):
        self._tokenizer = tokenizer
        self._users = users

    def __deepcopy__(self, memo):
        return Watched(copy.deepcopy(self._tokenizer, memo), self._users)

    def __len__(self):
        return len(self._tokenizer)

    def __getattr__(self, name):
        self._users.setdefault(id(self), set()).add(threading.current_thread().name)
        return getattr(self._tokenizer, name)

    def __call__(self, *arguments, **keywords):
        return self.__getattr__("__call__")(*arguments, **keywords)


def watched():
    users = {}
    return users, replace(tiny_loaded(), tokenizer=Watched(tiny_loaded().tokenizer, users))


def test_no_tokenizer_is_used_by_two_threads():
    users, decoder = watched()
    with serving(decoder) as api:
        users.clear()  # so far it was used by this thread alone
        choice = complete(api.client(), stop=["never there"]).choices[0]
        assert choice.text == expected(PROMPT)[0]
    assert len(users) == 2 and all(len(threads) == 1 for threads in users.values())


def test_a_full_queue_refuses_before_any_work():
    users, decoder = watched()
    with serving(decoder, batch_size=1, queue_size=1) as api:
        users.clear()
        api.engine.hold(1)
        with pytest.raises(openai.RateLimitError, match="this server holds 2; try again later"):
            complete(api.client(), ["a", "b"])
        api.engine.hold(1)
        full = httpx.post(f"{api.url}/tokenize", json={"prompt": "a"})
        assert (full.status_code, full.headers["retry-after"], full.json()["error"]["code"]) == (
            429,
            "1",
            "queue_full",
        )
        api.engine.release(2)
        # It would never fit
        with pytest.raises(openai.BadRequestError, match="at most 2 answers or texts, got 3"):
            complete(api.client(), ["a", "b", "c"])
        assert not users
        for wrong in ({"top_p": 0}, {"prompt": "wake " * 200}):
            with pytest.raises(openai.BadRequestError):
                api.client().post(
                    "/completions", cast_to=object, body={"model": "tiny", "prompt": "a", **wrong}
                )
        for wrong in ({"prompt": "wake " * 200}, {"prompt": ["a", "b"]}, {}):
            assert httpx.post(f"{api.url}/tokenize", json=wrong).status_code == 400
        assert httpx.post(f"{api.url}/tokenize", json={"prompt": "a"}).status_code == 200
        assert api.engine.num_reserved == 0
        with pytest.raises(
            openai.BadRequestError, match="input must ask for at most 2 answers or texts, got 3"
        ):
            api.client().embeddings.create(model="tiny", input=["a", "b", "c"])
        api.engine.hold(1)
        with pytest.raises(openai.RateLimitError, match="this server holds 2; try again later"):
            api.client().embeddings.create(model="tiny", input=["a", "b"])
        api.engine.release(1)
        assert len(api.client().embeddings.create(model="tiny", input=["a", "b"]).data) == 2
        assert complete(api.client(), ["a", "b"]).choices[1].text == expected("b")[0]


def test_a_full_memory_is_the_server_s_fault_and_clients_try_again(monkeypatch):
    """Before the first token by the status, later by an event that ends the stream."""
    decoder = replace(tiny_loaded(), backend=backend_on("native", **WIDE, vocab_size=300))
    pool = decoder.backend._pool
    refused = list[int]()
    take = pool.take

    def full():
        pool.most = 0 if refused and refused.pop() else inf
        try:
            return take()
        finally:
            pool.most = inf

    monkeypatch.setattr(pool, "take", full)
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 100}
    with serving(decoder) as api:
        for stream in (False, True):
            refused[:] = [True]
            with pytest.raises(
                openai.InternalServerError, match=r"keys and values is full: .*; try again later"
            ) as failed:
                api.client().completions.create(**asked, stream=stream)
            error = failed.value
            assert (error.status_code, error.code, error.type) == (
                503,
                "memory_full",
                "server_error",
            )
            assert error.response.headers["retry-after"] == "1"
        refused[:] = [True, False]  # its second page, after some 50 tokens
        with pytest.raises(openai.APIError) as failed:
            for chunk in api.client().completions.create(**asked, stream=True):
                assert chunk.choices[0].finish_reason is None
        assert (failed.value.code, failed.value.type) == ("memory_full", "server_error")
        refused[:] = [True]
        again = api.client().with_options(max_retries=1).completions.create(**asked)
        assert again.choices[0].text == expected(PROMPT, 100, decoder)[0] and not refused
        counts = api.metrics()
        assert counts['layerskip_requests_total{endpoint="completions",outcome="failed"}'] == 4
        decoder.backend.limit_memory(pool.page_bytes)
        try:
            # Not even alone
            with pytest.raises(openai.BadRequestError, match="has room for 64 tokens") as failed:
                complete(api.client(), [5] * 70)
            assert failed.value.code == "context_length_exceeded"
        finally:
            pool.most = inf


async def _ask(client, place, answers):
    """Every fourth client goes away: in the middle of a stream, or while it waits for a whole
    answer.
    """
    prompt = f"wake me at {place % 12} {'today' if place % 2 else 'am'}"
    if place % 4 == 0:
        long = complete(client, prompt, max_tokens=60, stream=place % 8 == 0)
        if place % 8:
            with pytest.raises((TimeoutError, openai.APIConnectionError)):
                async with asyncio.timeout(0.02 * (place % 5)):
                    await long
            return
        stream = await long
        async for _ in stream:
            await stream.close()
            return
    elif place % 4 == 1:
        chunks = [
            chunk
            async for chunk in await client.completions.create(
                model="tiny", prompt=prompt, stream=True
            )
        ]
        answers[place] = prompt, "".join(chunk.choices[0].text for chunk in chunks)
    else:
        answers[place] = (
            prompt,
            (await client.completions.create(model="tiny", prompt=prompt)).choices[0].text,
        )


CROWD = 64  # of whom a quarter vanish


async def _crowd(url):
    answers = {}
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=300
    ) as client:
        await asyncio.gather(*(_ask(client, place, answers) for place in range(CROWD)))
    return answers


def test_a_crowd_of_whom_a_quarter_vanishes():
    lookups = {"strategy": "lookup", "num_draft_tokens": 4, "max_new_tokens": 6}
    with serving(tiny_loaded(), decoding=lookups) as api:
        answers = asyncio.run(_crowd(api.url))
        assert sorted(answers) == [place for place in range(CROWD) if place % 4]
        alone = {prompt: expected(prompt, 6)[0] for prompt, _ in answers.values()}
        assert all(text == alone[prompt] for prompt, text in answers.values())
        state = api.server.server_state
        for _ in range(3000):  # until the connections that were closed are noticed
            if not (api.engine.num_reserved or state.tasks or state.connections):
                break
            threading.Event().wait(0.02)
        assert not (api.engine.num_reserved or state.tasks or state.connections)
        counts = api.metrics()
        ended = {
            key: value
            for key, value in counts.items()
            if key.startswith("layerskip_requests_total")
        }
        # A streamed answer can be finished before its client, one of those that go away after the
        # first piece, is gone.
        finished = ended['layerskip_requests_total{endpoint="completions",outcome="finished"}']
        assert CROWD * 6 / 8 <= finished <= CROWD * 7 / 8
        assert set(ended) <= {
            f'layerskip_requests_total{{endpoint="completions",outcome="{name}"}}'
            for name in ("finished", "cancelled")
        }
        assert counts["layerskip_answers_running"] == counts["layerskip_answers_waiting"] == 0
        # What was given up was not finished.
        assert (
            counts['layerskip_tokens_total{kind="generated"}'] < CROWD * 3 / 4 * 6 + CROWD / 4 * 60
        )
        gc.collect()
        assert not [kept for kept in gc.get_objects() if type(kept) is Request]
        assert json.loads(httpx.get(f"{api.url}/health").text)["status"] == "ok"
