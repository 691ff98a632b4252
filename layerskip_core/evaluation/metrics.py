"""Scores of answers against references (exact match, ROUGE, pass@k), and which metrics are better when lower."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

ROUGES = ("rouge1", "rouge2", "rougeL")
LOWER_IS_BETTER = ("perplexity",)
_HARNESS_LOWER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "ter", "brier_score")


def lower_is_better(name: str) -> bool:
    """Of a metric, or of `TASK METRIC` of lm-evaluation-harness."""
    return name in LOWER_IS_BETTER or any(f" {metric}" in name for metric in _HARNESS_LOWER)


def is_share(name: str) -> bool:
    """Whether a metric is in 0..1, and shown in percent. Those of lm-eval, `TASK METRIC`, have a scale of their own."""
    return not lower_is_better(name) and " " not in name


def quality(metrics: Mapping[str, float], name: str) -> float:
    """The metric, negated if lower is better, so that more is always better. Minus infinity if it is missing."""
    value = metrics.get(name)
    if value is None:
        return -math.inf
    return -value if lower_is_better(name) else value


def keeps(value: float, full_depth: float, share: float, name: str) -> bool:
    """Whether a metric keeps this share of its value at full depth: where lower is better, it may grow by 1 / share."""
    return value <= full_depth / share if lower_is_better(name) else value >= share * full_depth


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]], fold_whitespace: bool = False) -> float:
    """The share of predictions equal to one of their references, without outer whitespace.

    `fold_whitespace` also treats each run of whitespace as one space.
    """

    def normalized(text: str) -> str:
        return " ".join(text.split()) if fold_whitespace else text.strip()

    pairs = list(zip(predictions, references, strict=True))
    return sum(normalized(prediction) in map(normalized, texts) for prediction, texts in pairs) / len(pairs)


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]], kinds: Sequence[str] = ROUGES) -> dict[str, float]:
    """Mean ROUGE F-measure with stemming (Lin, 2004), by the rouge-score package.

    With several references the best counts; without any the score is 0.
    """
    pairs = {"predictions": list(predictions), "references": [list(texts) or [""] for texts in references]}
    return {kind: float(value) for kind, value in _metrics()["rouge"].compute(**pairs, kinds=tuple(kinds)).items()}


def pass_at_k(verdicts: Sequence[Sequence[bool]], ks: Sequence[int]) -> dict[str, float]:
    """`pass@k` for each k, from whether each of the n answers to a problem passed.

    The mean over the problems of the unbiased estimator 1 - C(n - c, k) / C(n, k), where c answers passed (Chen et al., 2021,
    equation 1). n must be at least k.
    """
    computed = _metrics()["pass_at_k"].compute(predictions=[list(answers) for answers in verdicts], ks=tuple(ks))
    return {name: float(value) for name, value in computed.items()}


@cache
def _metrics() -> dict[str, Any]:
    """Our own metric classes, because `evaluate.load` fetches scripts from the hub. Built on first use: imports take 2 s."""
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
            return info("Mean ROUGE F-measures", predictions=text, references=datasets.Sequence(text))

        def _compute(self, predictions: list[str], references: list[list[str]], kinds: tuple[str, ...]) -> dict[str, float]:
            scorer = RougeScorer(list(kinds), use_stemmer=True)
            best = [scorer.score_multi(texts, text) for texts, text in zip(references, predictions, strict=True)]
            return {kind: sum(scores[kind].fmeasure for scores in best) / len(best) for kind in kinds}

    class PassAtK(evaluate.Metric):  # type: ignore[misc]
        def _info(self) -> Any:
            return info("Unbiased pass@k", predictions=datasets.Sequence(datasets.Value("bool")))

        def _compute(self, predictions: list[list[bool]], ks: tuple[int, ...]) -> dict[str, float]:
            def estimate(answers: list[bool], k: int) -> float:
                return 1.0 - math.comb(answers.count(False), k) / math.comb(len(answers), k)

            return {f"pass@{k}": sum(estimate(answers, k) for answers in predictions) / len(predictions) for k in ks}

    return {"rouge": Rouge(keep_in_memory=True), "pass_at_k": PassAtK(keep_in_memory=True)}
