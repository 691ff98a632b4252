from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from torch import tensor

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding.sampling import Sampler, draw, probabilities, verify
from layerskip_core.model.vocabulary import most_probable


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawing(seeds):
    """Rows that draw from these seeds."""
    return [SimpleNamespace(generator=generator(seed), processor=None) for seed in seeds]


def p_value(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Pearson's chi-square test of counts against probabilities, all of them above zero."""
    expected = probs.double() * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(tensor((len(probs) - 1) / 2, dtype=torch.double), statistic / 2))


# softmax of these logits is (8, 4, 2, 1, 1) / 16
LOGITS = tensor([8.0, 4.0, 2.0, 1.0, 1.0]).log()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
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
    ],
)
def test_probabilities_after_temperature_top_k_and_top_p(config, expected):
    torch.testing.assert_close(probabilities(LOGITS, config), tensor(expected, dtype=torch.float32))


SMALL = (1e-3, 1e-30, 1e-45, 5e-324)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [0.1, *SMALL])
def test_a_small_temperature_gives_the_exact_distribution(temperature, dtype):
    """Logits a few temperatures apart, so that more than one token has mass; held against exact arithmetic."""
    from decimal import Decimal, getcontext

    getcontext().prec = 60
    steps = tensor([0.0, -0.5, -1.0, -3.0, -1e4, -1e9])
    logits = (torch.tensor(1.0) + steps * max(temperature, 1e-3)).to(dtype)
    apart = [Decimal(float(one)) - Decimal(float(logits.max())) for one in logits]
    weights = [(one / Decimal(temperature)).exp() if one / Decimal(temperature) > -2000 else Decimal(0) for one in apart]
    expected = tensor([float(weight / sum(weights)) for weight in weights], dtype=torch.float64)
    found = probabilities(logits, DecodingConfig(temperature=temperature)).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("vocabulary", [3, 49, 49152])
def test_top_p_among_equals_keeps_one_at_least(vocabulary):
    found = probabilities(torch.zeros(2, vocabulary), DecodingConfig(temperature=1, top_p=1e-50))
    assert (found > 0).sum(-1).tolist() == [1, 1] and found.sum(-1).tolist() == [1, 1]
    tied = probabilities(tensor([2.0, 2.0, 1.0]), DecodingConfig(temperature=1e-50))
    assert tied.tolist() == [0.5, 0.5, 0.0]


def test_draws_follow_their_weights_and_never_fall_on_zero():
    weights = tensor([0.0, 0.3, 0.0, 0.1, 0.6, 0.0])
    counts = draw(weights.expand(20_000, -1), generator()).bincount(minlength=6)
    assert counts[weights == 0].tolist() == [0, 0, 0]
    assert p_value(counts[weights > 0], weights[weights > 0]) > 1e-3
    assert p_value(counts[weights > 0], tensor([0.33, 0.1, 0.57])) < 1e-6


def test_an_empty_residual_falls_back_to_the_target():
    """As rounding can leave it: the draft is rejected, and no token has more mass in the target than in the draft."""
    for seed in range(20):
        assert verify(tensor([0]), tensor([[0.5, 0.5]]), tensor([[0.0, 0.5], [1.0, 0.0]]), generator(seed)).tolist() == [0, 1]


def one_hot(*ids: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(tensor(ids), 10).float()


def test_greedy_keeps_each_row_s_drafts_that_the_target_would_choose():
    drafts, choices = [[7, 8], [7, 8], [7, 8], [7], []], [[7, 8, 9], [7, 5, 9], [6, 8, 9], [7, 8], [7]]
    logits, counts = one_hot(*chain(*choices)), list(map(len, choices))
    tokens = tensor([*chain(*([3, *own] for own in drafts))])
    verified = Sampler(DecodingConfig()).verify(tokens, counts, None, logits, drawing(range(5)))
    assert verified == [[7, 8, 9], [7, 5], [6], [7, 8], [7]]
    assert Sampler(DecodingConfig()).verify(tokens[:3], [3], None, logits[3:6], drawing([0])) == [[7, 5]]


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
