"""A drafter of one module and one line: it decodes, in batches and sampled too, and its name is a
strategy everywhere.
"""

import pytest
from conftest import tiny_model
from decodings import ids_of, plainly
from repeating_drafter import RepeatingDrafter

from layerskip_core.config.decoding import STRATEGIES, DecodingConfig, Strategy
from layerskip_core.decoding import DecodeStats, DecodingLoop, decode
from layerskip_core.model import TransformersBackend

PROMPTS = [[5, 6, 7, 8, 5, 6], [9, 10, 9], [3]]


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "repeating", Strategy("repeating_drafter"))  # the line


@pytest.fixture(scope="module")
def backend():
    return TransformersBackend(tiny_model())


def test_it_is_a_strategy_with_the_tokens_of_autoregressive_decoding(registered, backend):
    config = DecodingConfig("repeating", 1, 4, 40)
    drafted = accepted = 0
    for prompt in PROMPTS:
        decoding = decode(backend, prompt, config)
        assert ids_of(decoding) == plainly(backend, prompt)
        drafted = drafted + decoding.stats.drafted
        accepted = accepted + decoding.stats.accepted
    assert 0 < accepted < drafted


def test_it_hears_of_every_verdict(backend):
    drafter = RepeatingDrafter()
    config = DecodingConfig(temperature=1, num_draft_tokens=3, max_new_tokens=30)
    loop = DecodingLoop(backend, PROMPTS, config, drafter=drafter)
    list(loop)
    for row in loop.rows:
        stats = sum(row.steps, DecodeStats())
        verdicts = drafter.verdicts.get(row, [])
        assert sum(drafted > 0 for drafted, _ in verdicts) == stats.rounds
        assert sum(drafted for drafted, _ in verdicts) == stats.drafted
        assert sum(accepted for _, accepted in verdicts[:-1]) <= stats.accepted
