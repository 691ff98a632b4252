"""Scores of answers (exact match, ROUGE, pass@k), perplexity through every exit, and figures with
95% intervals.

The variance is the jackknife estimate over prompts (Efron and Tibshirani, 1993, chapter 11), paired
in comparisons, plus the variance over repeats. Student's t allows for few of either: a bootstrap
over 12 prompts covers 90% instead of 95%.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist, fmean, pvariance
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from ..checkpoint.folder import quiet_transformers
from ..checkpoint.loaded import Decoder
from ..data import Example, spread
from ..losses import summed_losses
from ..model.backend import Backend, states_at_exits
from ..prompting import PromptTemplate, encode_prompt
from .results import Bounds, Result

ROUGES = ("rouge1", "rouge2", "rougeL")
_HARNESS_LOWER = (
    "perplexity",
    "word_perplexity",
    "byte_perplexity",
    "bits_per_byte",
    "ter",
    "brier_score",
)
SHARE = (0.0, 1.0)
_NO_LIMITS = (-math.inf, math.inf)
_ANGLES = 100_001  # points of a numerical integral
_ROUNDING = 1e-9  # times max(1, |value|): a smaller standard error is rounding
_OF_A_MEDIAN = math.pi / 2  # variance of a median over a mean's, at most (normal values)
_WINDOW_TOKENS = 512
MOST_NATS = 700.0  # exp overflows at 710


@dataclass(frozen=True)
class Scores:
    """A metric by prompt: values in 0..1, or for a perplexity the nats and the number of `tokens`
    of each text.
    """

    values: tuple[float, ...]
    tokens: tuple[int, ...] | None = None

    @property
    def columns(self) -> tuple[Sequence[float], Sequence[float]]:
        """Values and their weights; `mean_of` takes the sums of both."""
        return self.values, self.tokens or (1.0,) * len(self.values)

    def mean_of(self, total: Tensor, count: Tensor) -> Tensor:
        return total / count if self.tokens is None else (total / count).exp()

    def of(self, prompts: Sequence[int]) -> "Scores":
        """The scores of some of the prompts."""
        tokens = self.tokens and tuple(self.tokens[prompt] for prompt in prompts)
        return Scores(tuple(self.values[prompt] for prompt in prompts), tokens)


def lower_is_better(name: str) -> bool:
    """Whether a lower value is better. The metrics of lm-evaluation-harness are named `TASK
    METRIC`.
    """
    return name == "perplexity" or any(f" {metric}" in name for metric in _HARNESS_LOWER)


def is_share(name: str) -> bool:
    """Whether a metric is in 0..1 and shown in percent. Metrics of lm-eval, `TASK METRIC`, have
    scales of their own.
    """
    return not lower_is_better(name) and " " not in name


def frontier(results: Sequence[Result], name: str) -> list[int]:
    """The indices of measured results on the Pareto frontier of quality and speed."""
    measured = [index for index, result in enumerate(results) if result.metrics]
    sign = -1 if lower_is_better(name) else 1
    points = [
        (
            sign * results[index].metrics.get(name, -sign * math.inf),
            results[index].tokens_per_second or 0.0,
        )
        for index in measured
    ]
    beaten = [
        any(other != own and other[0] >= own[0] and other[1] >= own[1] for other in points)
        for own in points
    ]
    return [index for index, is_beaten in zip(measured, beaten, strict=True) if not is_beaten]


def exact_match(
    predictions: Sequence[str], references: Sequence[Sequence[str]], fold_whitespace: bool = False
) -> list[float]:
    """1 for each prediction that equals one of its references, outer whitespace stripped (or all
    whitespace folded).
    """

    def normalized(text: str) -> str:
        return " ".join(text.split()) if fold_whitespace else text.strip()

    pairs = zip(predictions, references, strict=True)
    return [float(normalized(prediction) in map(normalized, texts)) for prediction, texts in pairs]


def rouge(
    predictions: Sequence[str], references: Sequence[Sequence[str]], kinds: Sequence[str] = ROUGES
) -> dict[str, list[float]]:
    """ROUGE F-measures of each prediction, with stemming (Lin, 2004); the best of several
    references, 0 without any.
    """
    pairs = {
        "predictions": list(predictions),
        "references": [list(texts) or [""] for texts in references],
    }
    return _metrics()["rouge"](**pairs, kinds=tuple(kinds))


def pass_at_k(verdicts: Sequence[Sequence[bool]], ks: Sequence[int]) -> dict[str, list[float]]:
    """`pass@k` of each problem for each k: 1 - C(n - c, k) / C(n, k) if c of n answers passed (Chen
    et al., 2021, eq. 1).
    """
    return _metrics()["pass_at_k"](
        predictions=[list(answers) for answers in verdicts], ks=tuple(ks)
    )


@cache
def _metrics() -> dict[str, Callable[..., dict[str, list[float]]]]:
    """Metrics of the evaluate package, defined here because `evaluate.load` fetches scripts from
    the hub. Imports take 2 s.
    """
    import datasets
    import evaluate
    from rouge_score.rouge_scorer import RougeScorer

    def info(about: str, **features: Any) -> Any:
        return evaluate.MetricInfo(
            about, citation="", inputs_description="", features=datasets.Features(features)
        )

    class Rouge(evaluate.Metric):  # type: ignore[misc]
        def _info(self) -> Any:
            text = datasets.Value("string")
            return info("ROUGE F-measures", predictions=text, references=datasets.Sequence(text))

        def _compute(
            self, predictions: list[str], references: list[list[str]], kinds: tuple[str, ...]
        ) -> Any:
            scorer = RougeScorer(list(kinds), use_stemmer=True)
            best = [
                scorer.score_multi(texts, text)
                for texts, text in zip(references, predictions, strict=True)
            ]
            return {kind: [float(scores[kind].fmeasure) for scores in best] for kind in kinds}

    class PassAtK(evaluate.Metric):  # type: ignore[misc]
        def _info(self) -> Any:
            return info("Unbiased pass@k", predictions=datasets.Sequence(datasets.Value("bool")))

        def _compute(self, predictions: list[list[bool]], ks: tuple[int, ...]) -> Any:
            def estimate(answers: list[bool], k: int) -> float:
                return 1.0 - math.comb(answers.count(False), k) / math.comb(len(answers), k)

            return {f"pass@{k}": [estimate(answers, k) for answers in predictions] for k in ks}

    return {
        "rouge": Rouge(keep_in_memory=True).compute,
        "pass_at_k": PassAtK(keep_in_memory=True).compute,
    }


Losses = tuple[int, dict[int, float]]
"""The number of a text's reference tokens, and their summed cross-entropy in nats by exit."""


def scores_by_exit(losses: Iterable[Losses]) -> dict[int, Scores]:
    """The perplexity through each exit, where it is finite. Texts without tokens do not count."""
    counted = [(tokens, nats) for tokens, nats in losses if tokens]
    total = sum(tokens for tokens, _ in counted)
    scores = {}
    for exit_layer in counted[0][1] if counted else ():
        values = tuple(nats[exit_layer] for _, nats in counted)
        if sum(values) / total < MOST_NATS:
            scores[exit_layer] = Scores(values, tuple(tokens for tokens, _ in counted))
    return scores


def reference_losses(loaded: Decoder, example: Example, exit_layers: Sequence[int]) -> Losses:
    """Losses of the reference and its EOS, given the prompt. Rows are cut at the model's
    context.
    """
    tokenizer = loaded.tokenizer
    prompt = loaded.encode_prompt(example.prompt)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    reference = list(tokenizer(example.completion, add_special_tokens=False)["input_ids"]) + end
    return _losses(loaded.backend, prompt, reference, exit_layers)


def text_losses(
    loaded: Decoder, text: str, windows: int, exit_layers: Sequence[int]
) -> Iterator[Losses]:
    """Losses of `windows` windows (0: all) of 512 tokens, evenly spaced over the text, each after
    the tokenizer's BOS.
    """
    tokenizer = loaded.tokenizer
    with quiet_transformers():  # else transformers warns that the text is longer than the context
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    start = encode_prompt(tokenizer, PromptTemplate(), "")
    size = min(_WINDOW_TOKENS, loaded.backend.spec.context - len(start))
    for offset in spread(
        range(0, max(len(ids) - size, 0) + 1 if windows else len(ids), size), windows
    ):
        yield _losses(loaded.backend, start, ids[offset : offset + size], exit_layers)


@torch.inference_mode()
def _losses(
    model: Backend, prompt: list[int], reference: list[int], exit_layers: Sequence[int]
) -> Losses:
    ids = (prompt + reference)[: model.spec.context]
    first = max(len(prompt), 1)  # no token predicts the very first one
    targets = torch.tensor(ids[first:], device=model.device)
    if not len(targets):
        return 0, {}
    tokens = torch.tensor(ids[:-1], device=model.device)
    places = model.new_cache(1, len(ids)).span(0, len(ids) - 1)
    through = states_at_exits(model, tokens, places, exit_layers)
    return len(targets), {
        exit_layer: float(
            summed_losses(head, [states[first - 1 :]], targets, model.spec.vocab, [(1.0, 0.0)])[0]
        )
        for exit_layer, states, head in through
    }


class Estimate(NamedTuple):
    """A figure (None: not finite), its 95% interval, and the `rows` that would halve it (0: only
    repeats would).
    """

    value: float | None
    bounds: Bounds | None = None
    rows: int | None = None


def finite(value: float) -> float | None:
    """The value, or None for NaN and infinities, which JSON does not have."""
    return value if math.isfinite(value) else None


@cache
def t_quantile(freedom: int, level: float = 0.95) -> float:
    """Student's t with n degrees of freedom lies between plus and minus this with probability
    `level`.
    """
    # Of t = sqrt(n) tan(a), whose density is proportional to cos(a)^(n-1)
    angles = numpy.linspace(0, math.pi / 2, _ANGLES)
    density = numpy.cos(angles) ** (freedom - 1)
    below = numpy.concatenate([[0.0], numpy.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(numpy.interp(level, below / below[-1], angles))


def bounds_of(
    value: float,
    parts: Sequence[tuple[float, int]],
    limits: tuple[float, float] = _NO_LIMITS,
    logarithmic: bool = False,
    level: float = 0.95,
) -> Bounds | None:
    """Student's t interval around a value. `parts`: terms of its variance, each with its degrees of
    freedom (Welch).

    None if all spread is rounding. `logarithmic`: value and parts are of a logarithm; the returned
    ends are exponentiated.
    """
    total = sum(variance for variance, _ in parts)
    if not total > (_ROUNDING * max(1.0, abs(value))) ** 2:  # NaN included
        return None
    # 2 can be computed as 1.9999999
    freedom = int(total**2 / sum(variance**2 / own for variance, own in parts) + 1e-6)
    half = t_quantile(max(1, freedom), level) * math.sqrt(total)
    low, high = (
        math.exp(min(end, MOST_NATS)) if logarithmic else end
        for end in (value - half, value + half)
    )
    return Bounds(max(low, limits[0]), min(high, limits[1]))


def estimate(
    figure: Callable[..., Tensor],
    columns: Tensor | Sequence[Sequence[float]],
    answers_per_prompt: int = 1,
    limits: tuple[float, float] = _NO_LIMITS,
    logarithmic: bool = False,
    level: float = 0.95,
) -> Estimate:
    """A `figure` of sums over the prompts, such as a ratio; it takes one sum per column.

    `columns`: (columns, prompts), or (columns, repeats, prompts) for the median over the repeats.
    `limits` clip the interval. `logarithmic`: the interval is symmetric in the logarithm.
    """
    values = torch.as_tensor(columns, dtype=torch.float64)
    values = values.reshape(
        len(values), -1, values.shape[-1] // answers_per_prompt, answers_per_prompt
    ).sum(-1)
    sums, (repeats, prompts) = values.sum(-1, keepdim=True), values.shape[1:]
    # (repeats, 1 + prompts): all prompts, then all but one
    replicates = figure(*torch.cat([sums, sums - values], dim=-1))
    value = replicates[:, 0].quantile(0.5).item()
    if not math.isfinite(value) or prompts < 2:
        return Estimate(finite(value))
    replicates = replicates.log() if logarithmic else replicates
    influence = (prompts - 1) * (replicates[:, :1] - replicates[:, 1:]).mean(0)
    of_prompts = influence.var().item() / prompts
    of_repeats = _OF_A_MEDIAN * replicates[:, 0].var().item() / repeats if repeats > 1 else 0.0
    parts = (of_prompts, prompts - 1), (of_repeats, max(repeats - 1, 1))
    bounds = bounds_of(math.log(value) if logarithmic else value, parts, limits, logarithmic, level)
    # Variance left for the prompts in an interval half as wide
    left = (of_prompts + of_repeats) / 4 - of_repeats
    return Estimate(
        value, bounds, bounds and (math.ceil(prompts * of_prompts / left) if left > 0 else 0)
    )


def speed_ratio(slower: Tensor, faster: Tensor, level: float = 0.95) -> Estimate:
    """The ratio of seconds per token; both arguments are (2, repeats, prompts), seconds and
    tokens.
    """
    columns = torch.cat([slower, faster])
    return estimate(
        lambda seconds, tokens, own, new: seconds / tokens / (own / new),
        columns,
        logarithmic=True,
        level=level,
    )


def metric(scores: Scores) -> Estimate:
    """The mean over the prompts, or the perplexity per token of all texts."""
    is_perplexity = scores.tokens is not None
    limits = _NO_LIMITS if is_perplexity else SHARE
    return estimate(scores.mean_of, scores.columns, limits=limits, logarithmic=is_perplexity)


def change(scores: Scores, full_depth: Scores) -> Estimate:
    """A metric minus its value at full depth, on the same prompts."""
    columns = [*scores.columns, *full_depth.columns]
    return estimate(
        lambda *sums: scores.mean_of(*sums[:2]) - full_depth.mean_of(*sums[2:]), columns
    )


class Margin(NamedTuple):
    """By how much a metric exceeds the required share of full depth's, as a mean over the
    prompts.
    """

    mean: float
    low: float  # end of its interval
    prompts: int
    # Prompts with which `low` would reach 0 at this mean and spread; None if the mean is not above
    # 0
    needed: int | None


def margin(
    scores: Scores, full_depth: Scores, share: float, name: str, compared: int = 1
) -> Margin:
    """Compares a metric with this share of full depth's, paired by prompt. A perplexity may grow by
    1 / share.

    `compared`: how many settings are compared so; the intervals of all hold jointly at 95%
    (Bonferroni).

    Few prompts may show no spread, so metrics in 0..1 get two pseudo-observations: a prompt that
    only the setting gets right, and one that only full depth does (Bonett and Price, 2012, Journal
    of Educational and Behavioral Statistics 37).
    """
    pairs = list(zip(scores.values, full_depth.values, strict=True))
    if lower_is_better(name):
        allowed = -math.log(share)
        added = list[float]()
        tokens = scores.tokens or (1,) * len(pairs)
        values = [
            full + count * allowed - nats for (nats, full), count in zip(pairs, tokens, strict=True)
        ]
    else:
        values = [value - share * full for value, full in pairs]
        added = [1.0, -share]
    level = 1 - 0.05 / compared
    ends = estimate(torch.div, Scores((*values, *added)).columns, level=level).bounds
    mean = fmean(values)
    needed = None
    if mean > 0:
        # Normal approximation: the n with n * mean = z * sqrt(n * variance + sum of the squared
        # pseudo-observations).
        square = NormalDist().inv_cdf((1 + level) / 2) ** 2
        spread = square * pvariance(values)
        extra = square * sum(value**2 for value in added)
        enough = math.ceil((spread + math.sqrt(spread**2 + 4 * mean**2 * extra)) / (2 * mean**2))
        needed = max(enough, len(values) + 1)
    return Margin(mean, -math.inf if ends is None else ends.low, len(values), needed)
