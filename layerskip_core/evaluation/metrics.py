"""Scores of answers (exact match, ROUGE, pass@k), and perplexity through every exit."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.folder import quiet_transformers
from ..checkpoint.loaded import Decoder
from ..data import Example, spread
from ..losses import summed_losses
from ..model.backend import Backend, states_at_exits
from ..prompting import PromptTemplate, encode_prompt
from .results import Result

ROUGES = ("rouge1", "rouge2", "rougeL")
# Metrics of lm-evaluation-harness of which a lower value is better
_HARNESS_LOWER = (
    "perplexity",
    "word_perplexity",
    "byte_perplexity",
    "bits_per_byte",
    "ter",
    "brier_score",
)
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
    def is_perplexity(self) -> bool:
        return self.tokens is not None

    @property
    def columns(self) -> Tensor:
        """Values and their weights, (2, 1, prompts); `mean_of` takes the sums of both."""
        weights = self.tokens or (1,) * len(self.values)
        return torch.tensor([self.values, weights], dtype=torch.float64)[:, None]

    def mean_of(self, total: Tensor, count: Tensor) -> Tensor:
        mean = total / count
        return mean.exp() if self.is_perplexity else mean

    def of(self, prompts: Sequence[int]) -> "Scores":
        """The scores of some of the prompts."""
        values = tuple(self.values[prompt] for prompt in prompts)
        if self.tokens is None:
            return Scores(values)
        return Scores(values, tuple(self.tokens[prompt] for prompt in prompts))


def frontier(results: Sequence[Result], name: str) -> list[int]:
    """The indices of measured results on the Pareto frontier of quality and speed."""
    sign = -1 if metric_named(name).lower_is_better else 1
    points: dict[int, tuple[float, float]] = {}
    for index, result in enumerate(results):
        if result.metrics:
            quality = sign * result.metrics.get(name, -sign * math.inf)
            points[index] = quality, result.tokens_per_second or 0.0

    def is_beaten(quality: float, speed: float) -> bool:
        for other_quality, other_speed in points.values():
            as_good = other_quality >= quality and other_speed >= speed
            if as_good and (other_quality, other_speed) != (quality, speed):
                return True
        return False

    return [index for index, point in points.items() if not is_beaten(*point)]


def exact_match(
    predictions: Sequence[str], references: Sequence[Sequence[str]], fold_whitespace: bool = False
) -> list[float]:
    """1 for each prediction that equals one of its references, outer whitespace stripped (or all
    whitespace folded).
    """

    def normalized(text: str) -> str:
        return " ".join(text.split()) if fold_whitespace else text.strip()

    scores = []
    for prediction, texts in zip(predictions, references, strict=True):
        scores.append(float(normalized(prediction) in map(normalized, texts)))
    return scores


def rouge(
    predictions: Sequence[str], references: Sequence[Sequence[str]], kinds: Sequence[str]
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
        columns = datasets.Features(features)
        return evaluate.MetricInfo(about, citation="", inputs_description="", features=columns)

    class Rouge(evaluate.Metric):  # type: ignore[misc]
        def _info(self) -> Any:
            text = datasets.Value("string")
            return info("ROUGE F-measures", predictions=text, references=datasets.Sequence(text))

        def _compute(
            self, predictions: list[str], references: list[list[str]], kinds: tuple[str, ...]
        ) -> dict[str, list[float]]:
            scorer = RougeScorer(list(kinds), use_stemmer=True)
            measures: dict[str, list[float]] = {kind: [] for kind in kinds}
            for texts, prediction in zip(references, predictions, strict=True):
                best = scorer.score_multi(texts, prediction)
                for kind in kinds:
                    measures[kind].append(float(best[kind].fmeasure))
            return measures

    class PassAtK(evaluate.Metric):  # type: ignore[misc]
        def _info(self) -> Any:
            return info("Unbiased pass@k", predictions=datasets.Sequence(datasets.Value("bool")))

        def _compute(
            self, predictions: list[list[bool]], ks: tuple[int, ...]
        ) -> dict[str, list[float]]:
            def share(answers: list[bool], k: int) -> float:
                return 1.0 - math.comb(answers.count(False), k) / math.comb(len(answers), k)

            shares = {}
            for k in ks:
                shares[f"pass@{k}"] = [share(answers, k) for answers in predictions]
            return shares

    return {
        "rouge": Rouge(keep_in_memory=True).compute,
        "pass_at_k": PassAtK(keep_in_memory=True).compute,
    }


@dataclass(frozen=True)
class Metric:
    """A metric of answers, and how reports show it. In 0..1 unless a lower value is better."""

    short_name: str  # heads its column
    legend: str = ""
    # Takes predictions, the references of each, and the names of the metrics that are wanted of it.
    # None: texts alone do not give it
    score: Callable[..., dict[str, list[float]]] | None = None
    lower_is_better: bool = False
    is_share: bool = True  # shown in percent


METRICS = {
    "exact_match": Metric(
        "EM",
        "exact match",
        lambda predictions, references, _: {"exact_match": exact_match(predictions, references)},
    ),
    "rouge1": Metric("R1", "ROUGE-1", rouge),
    "rouge2": Metric("R2", "ROUGE-2", rouge),
    "rougeL": Metric("RL", "ROUGE-L", rouge),
    "perplexity": Metric("ppl", "perplexity", lower_is_better=True, is_share=False),
}
"""All that is said of a metric, by its name. `--metric` takes the names that config/evaluation.py lists."""


def metric_named(name: str) -> Metric:
    """One of METRICS, `pass@K`, or a metric of lm-evaluation-harness, `TASK METRIC`, with a scale of
    its own.
    """
    if name in METRICS:
        return METRICS[name]
    is_lower = any(f" {metric}" in name for metric in _HARNESS_LOWER)
    return Metric(name.replace("pass@", "p@"), lower_is_better=is_lower, is_share=" " not in name)


def text_scores(
    names: Sequence[str], references: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, list[float]]:
    """These metrics of each prediction; the best of its references counts. ROUGEs share a pass."""
    scores: dict[str, list[float]] = {}
    for score in dict.fromkeys(METRICS[name].score for name in names):
        if score is not None:
            own = [name for name in names if METRICS[name].score is score]
            scores |= score(predictions, references, own)
    return scores


class Losses(NamedTuple):
    """Of a text: the number of its reference tokens, and their summed cross-entropy by exit."""

    tokens: int
    nats: dict[int, float]


def scores_by_exit(losses: Iterable[Losses]) -> dict[int, Scores]:
    """The perplexity through each exit, where it is finite. Texts without tokens do not count."""
    counted = [text for text in losses if text.tokens]
    if not counted:
        return {}
    tokens = tuple(text.tokens for text in counted)
    scores = {}
    for exit_layer in counted[0].nats:
        values = tuple(text.nats[exit_layer] for text in counted)
        if sum(values) / sum(tokens) < MOST_NATS:
            scores[exit_layer] = Scores(values, tokens)
    return scores


def reference_losses(loaded: Decoder, example: Example, exit_layers: Sequence[int]) -> Losses:
    """Losses of the reference and its EOS, given the prompt. Rows are cut at the model's
    context.
    """
    tokenizer = loaded.tokenizer
    prompt = loaded.encode_prompt(example.prompt)
    reference = list(tokenizer(example.completion, add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id is not None:
        reference.append(tokenizer.eos_token_id)
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
    # A given number of windows are whole ones; all windows include the last, shorter one
    end = max(len(ids) - size, 0) + 1 if windows else len(ids)
    for offset in spread(range(0, end, size), windows):
        yield _losses(loaded.backend, start, ids[offset : offset + size], exit_layers)


@torch.inference_mode()
def _losses(
    model: Backend, prompt: list[int], reference: list[int], exit_layers: Sequence[int]
) -> Losses:
    ids = (prompt + reference)[: model.spec.context]
    first = max(len(prompt), 1)  # no token predicts the very first one
    targets = torch.tensor(ids[first:], device=model.device)
    if not len(targets):
        return Losses(0, {})
    tokens = torch.tensor(ids[:-1], device=model.device)
    places = model.new_cache(1, len(ids)).span(0, len(ids) - 1)
    nats = {}
    for exit_layer, states, head in states_at_exits(model, tokens, places, exit_layers):
        predicting = [states[first - 1 :]]
        loss = summed_losses(head, predicting, targets, model.spec.vocab, [(1.0, 0.0)])
        nats[exit_layer] = float(loss[0])
    return Losses(len(targets), nats)
