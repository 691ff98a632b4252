"""A text in whose layers a token sees a window gives back the pages before it, and gets the same
tokens.
"""

from dataclasses import replace
from math import inf

import pytest
import torch
from decodings import WIDE, backend_on, ids_of, prompt_of
from evaluating import tiny_loaded
from exit_block_models import random_blocks

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding import DecodingLoop, Prefixes, decode
from layerskip_core.model import repacked
from layerskip_core.model.exit_blocks import ExitBlock
from layerskip_core.model.pages import PAGE, PagedCache, PagePool
from layerskip_core.serving import Dispatcher, Request

# Pages: of the window, of a page more, at both of their ends, and for drafts
WINDOW = 100
MOST = 100 // PAGE + 5
STRATEGIES = {
    "plain": DecodingConfig("autoregressive"),
    "exit": DecodingConfig("self-speculative", 3, 5),
    "block": DecodingConfig("self-speculative", 2, 5),
    "adaptive": DecodingConfig("adaptive", exits=(2, 3), num_draft_tokens=5),
    "depth per token": DecodingConfig("early-exit", exits=(3,), exit_confidence=0.05),
}


def sliding(window=WINDOW):
    shape = {**WIDE, "max_position_embeddings": 2000, "sliding_window": window}
    blocks = {"blocks_of": lambda model: random_blocks(model, ExitBlock(2))}
    return backend_on("native", model_type="mistral", **blocks, **shape)


@pytest.fixture
def most_used(monkeypatch):
    used = [0]
    take = PagePool.take

    def counted(pool):
        page = take(pool)
        used[0] = max(used[0], pool.used)
        return page

    monkeypatch.setattr(PagePool, "take", counted)
    return used


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_long_text_takes_a_bounded_number_of_pages(strategy, most_used, monkeypatch):
    """Also where entries of tokens that left early are written long after them."""
    backend = sliding()
    config = replace(STRATEGIES[strategy], max_new_tokens=900, ignore_eos=True)
    ids = ids_of(decode(backend, prompt_of(20), config))
    assert most_used[0] <= MOST and backend._pool.used == 0
    monkeypatch.setattr(PagedCache, "_forget", lambda *_: None)
    assert ids == ids_of(decode(backend, prompt_of(20), config))
    assert most_used[0] > 900 // PAGE


def test_no_page_is_given_back_where_a_layer_sees_all(most_used):
    backend = backend_on(
        "native", model_type="olmo3", **WIDE, max_position_embeddings=500, sliding_window=40
    )
    ids_of(
        decode(
            backend,
            prompt_of(20),
            DecodingConfig("autoregressive", max_new_tokens=400, ignore_eos=True),
        )
    )
    assert most_used[0] == 420 // PAGE + 1


def test_a_long_prompt_in_pieces_takes_a_bounded_number_of_pages(most_used):
    told = []
    backend = sliding()
    request = Request(prompt_of(1500), replace(STRATEGIES["block"], max_new_tokens=60), told.append)
    scheduler = Dispatcher(replace(tiny_loaded(), backend=backend), 1)
    scheduler.add(request)
    while scheduler.held:
        scheduler.step()
    assert most_used[0] <= MOST + 256 // PAGE
    answer = DecodingLoop(backend, [request.ids], request.config)
    assert sum(len(step.ids) for steps in answer for step in steps) == request.stats.new_tokens
    assert "".join(update.text for update in told) == tiny_loaded().detokenize(
        answer.rows[0].output
    )


def test_a_pass_in_several_calls_keeps_the_pages_of_its_first_tokens(monkeypatch):
    """The first two layers run over all calls of 256 tokens, then the others."""
    backend = sliding()
    last = []
    for most_bytes in (repacked.MOST_BYTES, 1):
        monkeypatch.setattr(repacked, "MOST_BYTES", most_bytes)
        loop = decode(
            backend,
            prompt_of(600),
            replace(STRATEGIES["block"], max_new_tokens=20, ignore_eos=True),
        )
        next(loop)
        last.append(loop.engine.cache._pages[0][-1].content.clone())
    assert torch.equal(*last)


def test_a_prompt_goes_on_only_from_what_a_text_still_has():
    """The prompt of an answer is kept beside the answer, which has lost the prompt's pages."""
    backend = sliding()
    config = replace(STRATEGIES["plain"], max_new_tokens=400, ignore_eos=True)
    prefixes = Prefixes(inf)
    prompt = prompt_of(150)
    text = [*prompt, *ids_of(decode(backend, prompt, config, prefixes=prefixes))]
    short = replace(config, max_new_tokens=30)
    for following, reused in (
        ([*text, 5, 6], 549),
        ([*text[:530], 7], 530),
        ([*text[:300], 7], 150),
        ([*prompt, 9, 9], 150),
    ):
        again = decode(backend, following, short, prefixes=prefixes)
        assert (
            ids_of(again) == ids_of(decode(backend, following, short))
            and again.reused_tokens == reused
        )
