"""Choices by noise: their distribution, and the quality of the noise."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from decodings import probabilities
from torch import tensor

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding import sampling
from layerskip_core.decoding.sampling import (
    ChoiceRun,
    Scores,
    best_of,
    choose,
    verify,
)
from layerskip_core.model import noise as noises
from layerskip_core.model.native import noise as native_noise
from layerskip_core.model.native.noise import perturbed
from layerskip_core.model.noise import Noise, key_of
from layerskip_core.model.vocabulary import most_probable

GREEDY = DecodingConfig()


def drawing(seeds, config=GREEDY, ids=(), counts=None):
    """Runs of rows that draw by these seeds, one token each or so many."""
    rows = [SimpleNamespace(seed=seed, processor=None, ids=ids, config=config) for seed in seeds]
    return [
        ChoiceRun(row, count) for row, count in zip(rows, counts or [1] * len(rows), strict=True)
    ]


def p_value(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Pearson's chi-square test of counts against probabilities, all of them above zero."""
    expected = probs.double() * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(
        torch.special.gammaincc(tensor((len(probs) - 1) / 2, dtype=torch.double), statistic / 2)
    )


# softmax of these logits is (8, 4, 2, 1, 1) / 16
LOGITS = tensor([8.0, 4.0, 2.0, 1.0, 1.0]).log()
DISTRIBUTIONS = [
    (DecodingConfig(temperature=1), [8 / 16, 4 / 16, 2 / 16, 1 / 16, 1 / 16]),
    (DecodingConfig(temperature=0.5), [64 / 86, 16 / 86, 4 / 86, 1 / 86, 1 / 86]),
    (DecodingConfig(temperature=1, top_k=2), [8 / 12, 4 / 12, 0, 0, 0]),
    (DecodingConfig(temperature=1, top_k=9), [8 / 16, 4 / 16, 2 / 16, 1 / 16, 1 / 16]),
    (DecodingConfig(temperature=1, top_p=0.7), [8 / 12, 4 / 12, 0, 0, 0]),
    (DecodingConfig(temperature=1, top_p=0.4), [1, 0, 0, 0, 0]),
    (DecodingConfig(temperature=1, top_p=0.01), [1, 0, 0, 0, 0]),
    # top-p counts the mass after top-k: 8/14 is under 0.6, 12/14 is not
    (DecodingConfig(temperature=1, top_k=3, top_p=0.6), [8 / 12, 4 / 12, 0, 0, 0]),
    (DecodingConfig(temperature=1e-30), [1, 0, 0, 0, 0]),
    (DecodingConfig(temperature=1, min_p=0.25), [8 / 14, 4 / 14, 2 / 14, 0, 0]),
    (DecodingConfig(temperature=0.5, min_p=0.25), [64 / 80, 16 / 80, 0, 0, 0]),
    (DecodingConfig(temperature=1, min_p=0.2, top_p=0.6), [8 / 12, 4 / 12, 0, 0, 0]),
    (DecodingConfig(temperature=1, min_p=0.25, top_k=2), [8 / 12, 4 / 12, 0, 0, 0]),
]


@pytest.mark.parametrize("config, expected", DISTRIBUTIONS)
def test_probabilities_after_temperature_top_k_and_top_p(config, expected):
    torch.testing.assert_close(probabilities(LOGITS, config), tensor(expected, dtype=torch.float32))


SMALL = (1e-3, 1e-30, 1e-45, 5e-324)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [0.1, *SMALL])
def test_a_small_temperature_gives_the_exact_distribution(temperature, dtype):
    """Logits a few temperatures apart, so that more than one token has mass; held against exact
    arithmetic.
    """
    from decimal import Decimal, getcontext

    getcontext().prec = 60
    steps = tensor([0.0, -0.5, -1.0, -3.0, -1e4, -1e9])
    logits = (torch.tensor(1.0) + steps * max(temperature, 1e-3)).to(dtype)
    apart = [Decimal(float(one)) - Decimal(float(logits.max())) for one in logits]
    weights = [
        (one / Decimal(temperature)).exp() if one / Decimal(temperature) > -2000 else Decimal(0)
        for one in apart
    ]
    expected = tensor([float(weight / sum(weights)) for weight in weights], dtype=torch.float64)
    found = probabilities(logits, DecodingConfig(temperature=temperature)).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("vocabulary", [3, 49, 49152])
def test_top_p_among_equals_keeps_one_at_least(vocabulary):
    found = probabilities(torch.zeros(2, vocabulary), DecodingConfig(temperature=1, top_p=1e-50))
    assert (found > 0).sum(-1).tolist() == [1, 1] and found.sum(-1).tolist() == [1, 1]
    tied = probabilities(tensor([2.0, 2.0, 1.0]), DecodingConfig(temperature=1e-50))
    assert tied.tolist() == [0.5, 0.5, 0.0]


def drawn(config, logits, draws):
    """How often each token is chosen by so many seeds."""
    tokens, _ = choose(logits.expand(draws, -1).clone(), drawing(range(draws), config))
    return tokens.bincount(minlength=len(logits))


@pytest.fixture(params=["kernels", "torch"])
def made_by(request, monkeypatch):
    """Noise by the C kernels, if they are built, and by torch."""
    if request.param == "torch":
        monkeypatch.setattr(native_noise, "can_perturb", lambda scores: False)


@pytest.mark.parametrize(
    "config", [*(config for config, _ in DISTRIBUTIONS), DecodingConfig(temperature=1e-45)], ids=str
)
def test_choices_follow_their_probabilities_and_never_fall_on_zero(config, made_by):
    """By 10,000 seeds, of tokens with and without mass; the tied ones of tiny temperatures share
    it.
    """
    draws = 10_000
    for logits in (LOGITS.clone(), tensor([0.3, -torch.inf, 1.0, 1.0, -torch.inf, -2.0])):
        counts = drawn(config, logits, draws)
        probs = probabilities(logits, config)
        has_mass = probs > 1e-12
        assert counts[~has_mass].sum() == 0
        if has_mass.sum() > 1:
            assert p_value(counts[has_mass], probs[has_mass]) > 1e-4
            wrong = probs[has_mass] * torch.linspace(1, 1.5, int(has_mass.sum()))
            assert p_value(counts[has_mass], wrong / wrong.sum()) < 1e-6


def test_noise_by_the_kernels_is_that_of_torch(monkeypatch):
    """Alone, in a batch, of some tokens in any order, and in pieces; the tokens of all rows, or of
    each row its own.
    """
    vocabulary = 5_003
    keys = [key_of(seed, place) for seed, place in ((0, 0), (0, 1), (2**64 - 1, 7), (5, 1 << 20))]
    logits = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(0)) * 3
    whole = perturbed(logits.clone(), Noise(0.8, keys))
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(1))[:999]
    by_row = torch.stack([order.roll(row) for row in range(4)])
    cases = {
        "some": (logits[:, order].contiguous(), order, whole[:, order]),
        "by row": (logits.gather(1, by_row), by_row, whole.gather(1, by_row)),
    }
    apart = {
        name: expected - expected.amax(-1, keepdim=True) for name, (_, _, expected) in cases.items()
    }
    for _ in range(2):
        for row in range(4):
            assert torch.equal(
                perturbed(logits[row : row + 1].clone(), Noise(0.8, keys[row : row + 1]))[0],
                whole[row],
            )
        for name, (given, ids, _) in cases.items():
            found = perturbed(given.clone(), Noise(0.8, keys), ids)
            torch.testing.assert_close(
                found - found.amax(-1, keepdim=True), apart[name], atol=2e-2, rtol=1e-5
            )
        exact = perturbed(logits.double(), Noise(0.8, keys))
        torch.testing.assert_close(whole.double(), exact, atol=2e-2, rtol=0)
        likely = exact > exact.median()  # noise of the least likely has fewer bits
        torch.testing.assert_close(whole.double()[likely], exact[likely], atol=1e-4, rtol=0)
        monkeypatch.setattr(native_noise, "can_perturb", lambda scores: False)
        monkeypatch.setattr(noises, "_PIECE", 2 * vocabulary)
        whole = perturbed(logits.clone(), Noise(0.8, keys))


def uniforms(seeds, positions, tokens):
    """The noise as uniform numbers (seed x position, token)."""
    keys = [key_of(seed, position) for seed in seeds for position in positions]
    mixed = noises._mixed32(torch.tensor(list(tokens), dtype=torch.int32))
    return (-(-noises.gumbel(keys, mixed, torch.float64)).exp()).exp()


LEAST_P = 1e-4  # of each test of the noise: with some sixty of them, one in 170 sets of keys fails


def test_noise_is_uniform():
    """Of all numbers, of each of their bits' halves, and of each token and key over the others, by
    chi-square of 64 cells.
    """
    found = uniforms(range(64), range(64), range(1024))
    assert found.min() > 0 and found.max() < 1
    cells = (found * 64).long().clamp_(max=63)
    assert (
        p_value(cells.flatten().bincount(minlength=64).double(), torch.full((64,), 1 / 64))
        > LEAST_P
    )
    tail = found[found > 1 - 2.0**-12]  # those by which rare tokens are chosen
    deep = ((1 - tail) * 2.0**12 * 16).long().clamp_(max=15)
    assert p_value(deep.bincount(minlength=16).double(), torch.full((16,), 1 / 16)) > LEAST_P
    # The statistic of each line has 63 degrees of freedom: their sum is nearly normal
    for across in (cells, cells.T):
        counts = torch.zeros(len(across), 64, dtype=torch.double).scatter_add_(
            1, across, torch.ones(across.shape, dtype=torch.double)
        )
        mean = across.shape[1] / 64
        statistics = ((counts - mean) ** 2 / mean).sum(-1)
        score = (statistics.mean() - 63) / (2 * 63 / len(across)) ** 0.5
        assert abs(float(score)) < 4


@pytest.mark.parametrize("apart", ["positions", "seeds", "tokens", "both", "far"])
def test_noise_of_neighbours_is_independent(apart):
    """Pairs of numbers fill 32 x 32 cells evenly: of adjacent positions, seeds, ids, and of those a
    power of two apart.
    """
    steps = {
        "positions": (0, 1, 0),
        "seeds": (1, 0, 0),
        "tokens": (0, 0, 1),
        "both": (1, -1, 0),
        "far": (0, 0, 0),
    }[apart]
    for shift in range(6) if apart != "far" else (16, 31, 32, 33):
        seed, position, token = (step << shift for step in steps)
        if apart == "far":
            seed = 1 << shift
        here = uniforms(range(32), range(64, 96), range(512))
        there = uniforms(
            range(seed, 32 + seed), range(64 + position, 96 + position), range(token, 512 + token)
        )
        pairs = (here * 32).long() * 32 + (there * 32).long()
        counts = pairs.flatten().clamp_(max=1023).bincount(minlength=1024).double()
        assert p_value(counts, torch.full((1024,), 1 / 1024)) > LEAST_P, shift


def test_winners_of_adjacent_positions_are_independent():
    """Of eight equally likely tokens the one that is chosen says nothing about the next, nor about
    that of the next seed.
    """
    winners = uniforms(range(200), range(200), range(8)).argmax(-1).view(200, 200)
    for one, other in ((winners[:, :-1], winners[:, 1:]), (winners[:-1], winners[1:])):
        counts = (one * 8 + other).flatten().bincount(minlength=64).double()
        assert p_value(counts, torch.full((64,), 1 / 64)) > LEAST_P


def test_seeds_and_positions_have_keys_of_their_own():
    keys = {
        key_of(seed, position)
        for seed in (*range(300), 2**32, 2**63, 2**64 - 1)
        for position in range(300)
    }
    assert len(keys) == 303 * 300


def test_the_same_noise_makes_likely_drafts():
    """A drafter's choice is the target's with probability (1 - d) / (1 + d) or more, and no more
    than 1 - d.
    """
    generator = torch.Generator().manual_seed(2)
    draws = 4_000
    spans = drawing(range(draws), DecodingConfig(temperature=1.0))
    for spread in (0.2, 1.0, 3.0):
        target = torch.randn(50, generator=generator) * 2
        draft = target + spread * torch.randn(50, generator=generator)
        choices = [choose(one.expand(draws, -1).clone(), spans)[0] for one in (target, draft)]
        agreement = float((choices[0] == choices[1]).double().mean())
        distance = float((target.softmax(-1) - draft.softmax(-1)).abs().sum()) / 2
        error = 4 * (0.25 / draws) ** 0.5  # four standard deviations
        assert (1 - distance) / (1 + distance) - error < agreement < 1 - distance + error


def one_hot(*ids: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(tensor(ids), 10).float()


def test_greedy_keeps_each_row_s_drafts_that_the_target_would_choose():
    drafts = [[7, 8], [7, 8], [7, 8], [7], []]
    choices = [[7, 8, 9], [7, 5, 9], [6, 8, 9], [7, 8], [7]]
    logits = one_hot(*chain(*choices))
    counts = list(map(len, choices))
    tokens = tensor([*chain(*([3, *own] for own in drafts))])
    assert verify(tokens, drawing(range(5), counts=counts), logits) == [
        [7, 8, 9],
        [7, 5],
        [6],
        [7, 8],
        [7],
    ]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.8}, {"top_k": 5, "min_p": 0.01}], ids=str)
def test_logits_are_copied_in_pieces_which_change_nothing(options, monkeypatch):
    """A piece is a part of a row, or of several: choices and accepted drafts are those of one
    piece.
    """
    config = DecodingConfig(temperature=0.9, **options)
    vocabulary = 211
    counts = [4, 1, 6, 3]
    spans = drawing([3, 4, 5, 3], config, [1, 2, 3], counts)
    logits = torch.randn(sum(counts), vocabulary, generator=torch.Generator().manual_seed(3)) * 3
    likely, _ = choose(logits.clone(), spans)
    # Every draft is right, those of rows but the first begin after
    tokens = torch.cat((tensor([0]), likely[:-1]))
    expected = verify(tokens, spans, logits.clone())
    assert [len(own) for own in expected] == counts
    sizes = []
    honest = sampling.choose

    def watched(part, spans):
        sizes.append(part.numel())
        return honest(part, spans)

    monkeypatch.setattr(sampling, "choose", watched)
    for positions in (1, 3, 5):
        monkeypatch.setattr(sampling, "_PIECE", positions * vocabulary)
        sizes.clear()
        assert verify(tokens, spans, logits.clone()) == expected
        assert max(sizes) == positions * vocabulary and sum(sizes) == logits.numel()


def test_scores_of_columns_choose_their_token_ids():
    values = tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert best_of(Scores(values)).tolist() == [1, 0]
    assert best_of(Scores(values, tensor([7, 8, 9]))).tolist() == [8, 7]
    assert best_of(Scores(values, tensor([[7, 8, 9], [4, 5, 6]]))).tolist() == [8, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1000, 8192, 8192 + 7, 3 * 8192])
def test_the_most_probable_token_is_the_first_of_the_largest_logits(vocabulary, dtype):
    logits = torch.randn(2, 5, vocabulary, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[0, 1, [700, 900]] = 9
    logits[1, 2, [3, vocabulary - 1]] = 9
    found = most_probable(logits)
    assert found[0, 1] == 700 and found[1, 2] == 3
    assert (logits.gather(-1, found[..., None]) == logits.amax(-1, keepdim=True)).all()
    assert torch.equal(most_probable(logits[0, 1]), found[0, 1])
