"""Drafts copied from the text so far."""

import pytest
import torch
from conftest import tiny_model
from decodings import ids_of, plainly

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding import decode, decode_batch
from layerskip_core.decoding.drafters import Context, Draft, DrafterSetup
from layerskip_core.decoding.drafters.lookup import History, LookupDrafter
from layerskip_core.decoding.engine import drafter_for
from layerskip_core.decoding.sampling import Sampler
from layerskip_core.model import TransformersBackend


@pytest.fixture(scope="module")
def backend():
    return TransformersBackend(tiny_model())


@pytest.mark.parametrize(
    ("shortest", "ids", "most", "expected"),
    [
        (2, [1, 2, 3, 4, 5, 1, 2], 3, ([3, 4, 5], 2)),
        (2, [1, 2, 3, 4, 5, 1, 2], 9, ([3, 4, 5, 1, 2, 3, 4, 5, 1], 2)),  # goes on with itself
        (2, [7, 7, 7], 4, ([7, 7, 7, 7], 2)),
        (3, [1, 2, 3, 4, 5, 1, 2], 3, ([], 0)),
        (1, [1, 2, 1, 3, 1], 2, ([3, 1], 0)),  # the latest of two, which say different things
        (1, [8, 1, 2, 9, 1, 3, 8, 1], 2, ([2, 9], 1)),  # the longest, by one token
        (2, [9, 1, 2, 3, 5, 1, 2, 3, 9, 1, 2], 1, ([3], 3)),  # both say the same
        (2, [1, 2], 3, ([], 0)),
        (2, [1], 3, ([], 0)),
        (2, [1, 2, 3, 1, 2], 0, ([], 2)),
    ],
)
def test_what_followed_the_longest_match_is_copied(shortest, ids, most, expected):
    assert History(shortest).continuation(ids, most) == expected


def test_an_index_grows_with_the_text():
    """Step by step the answers are those of a new index of the whole text."""
    ids = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    growing = History(2)
    for end in range(1, 200, 3):
        assert growing.continuation(ids[:end], 5) == History(2).continuation(ids[:end], 5)


class Scripted:
    """Drafts token 9, and takes note of what it hears."""

    def __init__(self):
        self.heard = []

    def draft(self, context, most):
        return Draft(torch.tensor([[int(context.newest), 9]]), (1,), source="scripted")

    def observe(self, row, drafted, verified):
        self.heard.append((row, drafted, verified))


def test_another_drafter_drafts_where_nothing_is_found():
    other = Scripted()
    drafter = LookupDrafter(2, frozenset({4}), other)

    def drafted(ids):
        draft = drafter.draft(Context([0], [ids], torch.tensor([[ids[-1]]]), torch.arange(9)[None], None), [8])
        drafter.observe(0, 1, [draft.source])
        return draft.tokens.tolist(), draft.counts, draft.source

    assert drafted([1, 2, 3]) == ([[3, 9]], (1,), "scripted")
    assert drafted([1, 2, 3, 4, 1, 2]) == ([[2, 3, 4]], (2,), "lookup")  # up to the EOS 4
    assert other.heard == [(0, 1, ["scripted"])]


@pytest.mark.parametrize(
    "settings", [{"strategy": "lookup"}, {"exit_layer": 3, "lookup": 2}, {"exit_layer": 3, "lookup": 1}], ids=str
)
@pytest.mark.parametrize("length", [1, 2, 30])
def test_the_output_is_that_of_plain_decoding(backend, settings, length):
    """The tiny model soon repeats itself, so that drafts are found and accepted."""
    prompt = [5, 11, 23] * length
    plain, config = plainly(backend, prompt, 30), DecodingConfig(max_new_tokens=30, num_draft_tokens=4, **settings)
    decoding = decode(backend, prompt, config)
    assert ids_of(decoding) == plain
    sources = decoding.stats.steps_by_drafter
    assert sources["lookup"] > 0 and set(sources) <= {"lookup", "plain", "exit 3"}
    assert sum(count for source, count in sources.items() if source != "plain") == decoding.stats.rounds
    assert ("exit 3" in sources) == ("exit_layer" in settings)
    together = [one.ids for one in decode_batch(backend, [prompt, prompt[1:] or prompt], config)]
    assert plain in together


def test_sampled_output_is_reproducible_and_drafts_are_certain(backend):
    config = DecodingConfig("lookup", max_new_tokens=40, temperature=0.3, seed=4, lookup=1)
    first, second = decode(backend, [5, 11, 23] * 3, config), decode(backend, [5, 11, 23] * 3, config)
    assert ids_of(first) == ids_of(second) and first.stats.accepted > 0


def test_the_shortest_match_is_two_tokens_unless_told_otherwise(backend):
    def found(**settings):
        config = DecodingConfig("lookup", **settings)
        drafter = drafter_for(DrafterSetup(backend, Sampler(config, backend.device), config))
        return drafter.find(Context([0], [[1, 2, 3, 2]], None, None, None), [1])

    assert found() == [([], 0)] and found(lookup=1) == [([3], 1)]
