"""Scores of answers against references (exact match, ROUGE, pass@k), and which metrics are better when lower."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

ROUGES = ("rouge1", "rouge2", "rougeL")
LOWER_IS_BETTER = ("perplexity",)
_HARNESS_LOWER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "ter", "brier_score")


@dataclass(frozen=True)
class Scores:
    """A metric by prompt: its values in 0..1, or of a perplexity nats per text and how many `tokens` each text has."""

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
    """Whether a lower value is better. The metrics of lm-evaluation-harness are named `TASK METRIC`."""
    return name in LOWER_IS_BETTER or any(f" {metric}" in name for metric in _HARNESS_LOWER)


def is_share(name: str) -> bool:
    """Whether a metric is in 0..1 and shown in percent. Metrics of lm-eval, `TASK METRIC`, have scales of their own."""
    return not lower_is_better(name) and " " not in name


def quality(metrics: Mapping[str, float], name: str) -> float:
    """The metric, negated if lower is better, so that more is always better. Minus infinity if it is missing."""
    value = metrics.get(name)
    if value is None:
        return -math.inf
    return -value if lower_is_better(name) else value


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]], fold_whitespace: bool = False) -> list[float]:
    """1 for each prediction equal to one of its references, without outer whitespace, else 0.

    `fold_whitespace` also treats each run of whitespace as one space.
    """

    def normalized(text: str) -> str:
        return " ".join(text.split()) if fold_whitespace else text.strip()

    pairs = zip(predictions, references, strict=True)
    return [float(normalized(prediction) in map(normalized, texts)) for prediction, texts in pairs]


def rouge(
    predictions: Sequence[str], references: Sequence[Sequence[str]], kinds: Sequence[str] = ROUGES
) -> dict[str, list[float]]:
    """ROUGE F-measures of each prediction, with stemming (Lin, 2004), by the rouge-score package.

    With several references the best counts; without any the score is 0.
    """
    pairs = {"predictions": list(predictions), "references": [list(texts) or [""] for texts in references]}
    computed: dict[str, list[float]] = _metrics()["rouge"].compute(**pairs, kinds=tuple(kinds))
    return computed


def pass_at_k(verdicts: Sequence[Sequence[bool]], ks: Sequence[int]) -> dict[str, list[float]]:
    """`pass@k` of each problem for each k, from whether each of the n answers to it passed.

    The unbiased estimator 1 - C(n - c, k) / C(n, k), where c answers passed (Chen et al., 2021, equation 1). n must be at least
    k.
    """
    computed: dict[str, list[float]] = _metrics()["pass_at_k"].compute(
        predictions=[list(answers) for answers in verdicts], ks=tuple(ks)
    )
    return computed


@cache
def _metrics() -> dict[str, Any]:
    """Metrics of the evaluate package, defined here because `evaluate.load` fetches scripts from the hub. Imports take 2 s."""
    import datasets
    import evaluate
    from rouge_score.rouge_scorer import RougeScorer

    def info(description: str, **features: Any) -> Any:
        return evaluate.MetricInfo(
            description=description, citation="", inputs_description="", features=datasets.Features(features)
        )

    class Rouge(evaluate.Metric):  # type: ignore[misc]
        def _info(self) -> Any:
            text = datasets.Value("string")
            return info("ROUGE F-measures", predictions=text, references=datasets.Sequence(text))

        def _compute(self, predictions: list[str], references: list[list[str]], kinds: tuple[str, ...]) -> Any:
            scorer = RougeScorer(list(kinds), use_stemmer=True)
            best = [scorer.score_multi(texts, text) for texts, text in zip(references, predictions, strict=True)]
            return {kind: [float(scores[kind].fmeasure) for scores in best] for kind in kinds}

    class PassAtK(evaluate.Metric):  # type: ignore[misc]
        def _info(self) -> Any:
            return info("Unbiased pass@k", predictions=datasets.Sequence(datasets.Value("bool")))

        def _compute(self, predictions: list[list[bool]], ks: tuple[int, ...]) -> Any:
            def estimate(answers: list[bool], k: int) -> float:
                return 1.0 - math.comb(answers.count(False), k) / math.comb(len(answers), k)

            return {f"pass@{k}": [estimate(answers, k) for answers in predictions] for k in ks}

    return {"rouge": Rouge(keep_in_memory=True), "pass_at_k": PassAtK(keep_in_memory=True)}
