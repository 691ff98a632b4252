"""Drafts copied from the text so far."""

import pytest
import torch
from conftest import tiny_model
from decodings import WIDE, context_of, ids_of, native_or_skip, plainly, prompt_of

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import Scheduler, decode, decode_batch, new_row, without_failure
from layerskip_core.decoding.drafters import Draft, DrafterSetup, drafter_for
from layerskip_core.decoding.drafters.lookup import EarlierAnswers, History
from layerskip_core.decoding.drafters.lookup_drafter import LookupDrafter
from layerskip_core.model import TransformersBackend


@pytest.fixture(scope="module")
def backend():
    return TransformersBackend(tiny_model())


@pytest.mark.parametrize(
    "shortest, ids, most, expected",
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
        (20, [9, *range(30), 9, *range(20)], 2, ([20, 21], 20)),
        (20, [8, *range(30), 9, *range(19)], 2, ([], 0)),
    ],
)
def test_what_followed_the_longest_match_is_copied(shortest, ids, most, expected):
    assert History(shortest).continuation(ids, most) == expected


def test_an_index_grows_with_the_text():
    ids = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    growing = History(2)
    for end in range(1, 200, 3):
        assert growing.continuation(ids[:end], 5) == History(2).continuation(ids[:end], 5)


class Scripted:
    """Drafts token 9, and takes note of what it hears."""

    def __init__(self):
        self.heard = []

    def draft(self, context, most):
        return Draft(torch.tensor([int(context.newest), 9]), (1,), source="scripted")

    def observe(self, row, drafted, verified):
        self.heard.append((row, drafted, verified))


def test_another_drafter_drafts_where_nothing_is_found():
    other = Scripted()
    drafter = LookupDrafter(2, other)

    def drafted(ids):
        draft = drafter.draft(
            context_of([ids], torch.tensor(ids[-1:]), None, [0], [len(ids) - 1], eos_ids={4}), [8]
        )
        drafter.observe(0, 1, [draft.source])
        return draft.tokens.tolist(), draft.counts, draft.source

    assert drafted([1, 2, 3]) == ([3, 9], (1,), "scripted")
    assert drafted([1, 2, 3, 4, 1, 2]) == ([2, 3, 4], (2,), "lookup")  # up to the EOS 4
    assert other.heard == [(0, 1, ["scripted"])]


def test_the_shortest_match_is_two_tokens_unless_told_otherwise(backend):
    def found(**settings):
        config = DecodingConfig("lookup", **settings)
        drafter = drafter_for(DrafterSetup(backend, config))
        return drafter.find(context_of([[1, 2, 3, 2]], None, None, [0], [3]), [1])

    assert found() == [([], 0)] and found(lookup=1) == [([3], 1)]


# --- earlier answers
# -----------------------------------------------------------------------------------------------------


def remembering(*answers, most=1000, prompt=(1, 2, 3)):
    earlier = EarlierAnswers(most)
    for answer in answers:
        earlier.add([*prompt, *answer], len(prompt))
    return earlier


@pytest.mark.parametrize(
    "answers, ids, expected",
    [
        ([[4, 5, 6, 7, 8]], [9, 4, 5, 6], ([7, 8], 3)),
        ([[4, 5, 6, 7, 8]], [9, 9, 5, 6], ([], 0)),  # two tokens are no match
        ([[4, 5, 6, 7]], [1, 2, 3], ([4, 5, 6, 7], 3)),  # after the prompt's last tokens
        # The latest of two; an answer's end ends the draft
        ([[4, 5, 6, 7, 8], [9]], [7, 8, 9, 1, 2, 3], ([9], 0)),
        ([[4, 5, 6, 7], [8, 9]], [3, 8, 9], ([], 0)),
        ([[4, 5, 6, 7], [8, 5, 6, 7]], [3, 4, 5, 6], ([7], 4)),  # both go on in the same way
        # The longer match, by one token
        ([[9, 4, 5, 6, 7], [8, 4, 5, 6, 2]], [9, 4, 5, 6], ([7], 1)),
    ],
)
def test_what_followed_in_an_earlier_answer_is_copied(answers, ids, expected):
    assert remembering(*answers).continuation(ids, 9) == expected


def test_a_long_match_in_an_answer_is_followed_further_and_a_prompt_is_not_drafted():
    answer = list(range(10, 110))
    earlier = remembering(answer)
    assert [len(earlier.continuation(answer[:count], 50)[0]) for count in (3, 10, 30, 90)] == [
        6,
        20,
        50,
        10,
    ]
    assert [earlier.continuation(answer[:count], 50)[1] for count in (10, 30, 64, 90)] == [
        10,
        30,
        64,
        64,
    ]
    assert remembering([50, 51], prompt=range(40)).continuation([20, 21, 22, 23], 9) == ([], 0)


def test_the_oldest_answers_go_first_and_no_more_than_told_are_kept():
    earlier = EarlierAnswers(100)
    for number in range(40):
        earlier.add([1, 2, *range(10 * number + 10, 10 * number + 20)], 2)
        assert len(earlier) <= 100
    assert earlier.continuation([400, 401, 402], 2) == ([403, 404], 3) and earlier.continuation(
        [10, 11, 12], 2
    ) == ([], 0)
    earlier.add(range(1000, 1060), 5)  # longer than half of all
    assert len(earlier) <= 100 and earlier.continuation([1000, 1001, 1002], 2) == ([], 0)
    nothing = remembering([4, 5, 6, 7], most=0)
    assert not nothing and nothing.continuation([4, 5, 6], 2) == ([], 0)


@pytest.fixture(scope="module")
def invariant():
    return native_or_skip(
        tiny_model("llama", torch.float32, **WIDE), PackingConfig(draft_weights=("int8",))
    )


STRATEGIES = [
    {"strategy": "lookup"},
    {"exit_layer": 3, "lookup": 2},
    {"strategy": "adaptive", "exits": (2, 4)},
]


@pytest.mark.parametrize("settings", STRATEGIES, ids=str)
def test_a_repeated_prompt_is_answered_by_lookups_with_the_same_output(invariant, settings):
    prompts = [prompt_of(9), prompt_of(12), prompt_of(9)]
    config = DecodingConfig(max_new_tokens=40, num_draft_tokens=8, **settings)
    earlier = EarlierAnswers()
    rounds = []
    for prompt in prompts:
        decoding = decode(invariant, prompt, config, earlier=earlier)
        assert ids_of(decoding) == plainly(invariant, prompt)
        rounds.append(decoding.stats)
    assert len(earlier) == 40 * 3 + 9 + 12 + 9 + 3  # with the prompts' last tokens, and an end each
    if settings.get("strategy") != "adaptive":  # which may know something better
        # 39 tokens, 9 a round
        assert rounds[2].accepted > rounds[0].accepted and rounds[2].steps_by_drafter["lookup"] == 5


def test_rows_of_a_batch_are_remembered_as_they_finish(invariant):
    prompts = [prompt_of(9), prompt_of(12)]
    earlier = EarlierAnswers()
    config = DecodingConfig("lookup", max_new_tokens=30, num_draft_tokens=8)
    plain = [plainly(invariant, prompt, 30) for prompt in prompts]
    first = decode_batch(invariant, prompts, config, earlier=earlier)
    again = decode_batch(invariant, prompts, config, earlier=earlier)
    for answers in (first, again):
        assert [answer.ids for answer in answers] == plain
    assert sum(answer.stats.accepted for answer in again) > sum(
        answer.stats.accepted for answer in first
    )
    scheduler = Scheduler(invariant, earlier=(given_up := EarlierAnswers()))
    row = new_row(invariant, prompt_of(5), config)
    scheduler.add(row)
    without_failure(scheduler.step())
    assert scheduler.remove(row) and scheduler.is_idle and not given_up


@pytest.mark.parametrize("settings", STRATEGIES, ids=str)
def test_what_is_recalled_changes_no_sample(invariant, settings):
    config = DecodingConfig(max_new_tokens=40, temperature=0.4, seed=5, **settings)
    earlier = EarlierAnswers()
    seen = []
    accepted = []
    for _ in range(2):
        decoding = decode(invariant, prompt_of(9), config, earlier=earlier)
        seen.append(ids_of(decoding))
        accepted.append(decoding.stats.accepted)
    assert seen[0] == seen[1]
    assert settings.get("strategy") != "lookup" or accepted[1] > accepted[0]


def test_where_drafts_may_change_how_passes_round_nothing_is_recalled(backend):
    earlier = EarlierAnswers()
    config = DecodingConfig("lookup", max_new_tokens=20)
    first, second = (decode(backend, prompt_of(9), config, earlier=earlier) for _ in range(2))
    assert (
        ids_of(first) == ids_of(second)
        and first.stats.steps_by_drafter == second.stats.steps_by_drafter
    )
