"""How good answers are: exact match, ROUGE, pass@k, perplexity through every exit, and where two decodings part."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch

from ..checkpoint.loaded import Decoder
from ..checkpoint.quiet import quiet_transformers
from ..data.examples import Example
from ..losses import summed_cross_entropy
from ..model.backend import Backend

# A top-2 gap below this is a near-tie: kernels for one row and for several may round to either side of it. In bf16 logits of
# 16 to 32 are 1/8 apart, so the bound is two steps; in fp32 it is a thousand times the spread seen between kernels' sums.
NEAR_TIE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.25}


ROUGES = ("rouge1", "rouge2", "rougeL")
LOWER_IS_BETTER = ("perplexity",)
_WINDOW_TOKENS = 512


def quality(metrics: Mapping[str, float], name: str) -> float:
    """A metric such that more is better; minus infinity where it is missing."""
    value = metrics.get(name)
    if value is None:
        return -math.inf
    return -value if name in LOWER_IS_BETTER else value


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]], fold_whitespace: bool = False) -> float:
    """Share of predictions equal to one of their references, all stripped; `fold_whitespace` takes every run of it as one
    space.
    """

    def normal(text: str) -> str:
        return " ".join(text.split()) if fold_whitespace else text.strip()

    pairs = list(zip(predictions, references, strict=True))
    return sum(normal(prediction) in map(normal, texts) for prediction, texts in pairs) / len(pairs)


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]], kinds: Sequence[str] = ROUGES) -> dict[str, float]:
    """Mean F-measure of each kind of ROUGE with stemming (Lin, 2004), by the rouge-score package; the best of a prediction's
    references counts.
    """
    pairs = {"predictions": list(predictions), "references": [list(texts) for texts in references]}
    return {kind: float(value) for kind, value in _metrics()["rouge"].compute(**pairs, kinds=tuple(kinds)).items()}


def pass_at_k(verdicts: Sequence[Sequence[bool]], ks: Sequence[int]) -> dict[str, float]:
    """`pass@k` for each k, from whether each of n answers to each problem passed: the mean of the unbiased estimator
    1 - C(n - c, k) / C(n, k), where c passed (Chen et al., 2021, equation 1). n must be at least k.
    """
    computed = _metrics()["pass_at_k"].compute(predictions=[list(answers) for answers in verdicts], ks=tuple(ks))
    return {name: float(value) for name, value in computed.items()}


@cache
def _metrics() -> dict[str, Any]:
    """Metrics of our own, for `evaluate.load` fetches a script from the hub. Made late: the imports take 2 s."""
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
            def chance(answers: list[bool], k: int) -> float:
                return 1.0 - math.comb(answers.count(False), k) / math.comb(len(answers), k)

            return {f"pass@{k}": sum(chance(answers, k) for answers in predictions) / len(predictions) for k in ks}

    return {"rouge": Rouge(keep_in_memory=True), "pass_at_k": PassAtK(keep_in_memory=True)}


@dataclass(frozen=True)
class ReferenceLosses:
    """Summed cross-entropy of `tokens` reference tokens through each exit, in nats."""

    tokens: int
    summed: dict[int, float]

    def __add__(self, other: "ReferenceLosses") -> "ReferenceLosses":
        layers = self.summed | other.summed
        return ReferenceLosses(
            self.tokens + other.tokens, {layer: self.summed.get(layer, 0.0) + other.summed.get(layer, 0.0) for layer in layers}
        )

    def perplexity(self, exit_layer: int) -> float | None:
        """exp of the mean; None where there is no token, or the value is no finite number."""
        mean = self.summed.get(exit_layer, math.nan) / max(self.tokens, 1)
        return math.exp(mean) if self.tokens and mean < 700 else None


def reference_losses(loaded: Decoder, example: Example, exit_layers: Sequence[int]) -> ReferenceLosses:
    """The reference and the end of text, teacher-forced behind the prompt (which is not counted), through each exit at once.

    A row beyond the context limit is cut there, as in training.
    """
    tokenizer = loaded.tokenizer
    prompt = loaded.encode_prompt(example.prompt)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    reference = list(tokenizer(example.completion, add_special_tokens=False)["input_ids"]) + end
    return _losses(loaded.backend, prompt, reference, exit_layers)


def text_losses(
    loaded: Decoder, text: str, windows: int, exit_layers: Sequence[int], window_tokens: int = _WINDOW_TOKENS
) -> Iterator[ReferenceLosses]:
    """Of `windows` (0: all) at even distances, of those that a text falls into: windows that do not overlap, of
    `window_tokens` or what the context allows. Each begins with what the tokenizer puts before a text; where that is nothing,
    its first token is not counted.
    """
    with quiet_transformers():  # which would say that the text is longer than the context
        ids = list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
    start = loaded.encode_prompt("", raw=True)
    size = min(window_tokens, loaded.backend.max_positions - len(start))
    places = range(0, max(len(ids) - size, 0) + 1, size)
    count = min(windows or len(places), len(places))
    for number in range(count):
        place = places[number * len(places) // count]
        yield _losses(loaded.backend, start, ids[place : place + size], exit_layers)


@torch.inference_mode()
def _losses(model: Any, prompt: list[int], reference: list[int], exit_layers: Sequence[int]) -> ReferenceLosses:
    ids = (prompt + reference)[: model.max_positions]
    first = max(len(prompt), 1)  # nothing predicts the first token of all
    targets = torch.tensor(ids[first:], device=model.device)
    if not len(targets):
        return ReferenceLosses(0, {})
    tokens = torch.tensor([ids[:-1]], device=model.device)
    positions = torch.arange(len(ids) - 1)[None]
    hidden, cache, summed = model.embed(tokens), model.new_cache(1, len(ids)), {}
    for start, stop in pairwise([0, *sorted(set(exit_layers))]):
        hidden = model.run_layers(hidden, start, stop, positions, cache)
        loss = summed_cross_entropy(model.unembed, hidden[0, first - 1 :], targets, model.vocab_size)
        summed[stop] = float(loss)
    return ReferenceLosses(len(targets), summed)


@dataclass(frozen=True)
class Difference:
    """Where a sample's output first differs from the autoregressive one, and the target's top-2 logit gap at that position."""

    sample: int
    position: int
    top2_gap: float


def first_difference(ids: Sequence[int], expected: Sequence[int]) -> int | None:
    """The first position where two outputs differ, one of them ending counted as a difference; None when they are equal."""
    if list(ids) == list(expected):
        return None
    shorter = min(len(ids), len(expected))
    return next((place for place in range(shorter) if ids[place] != expected[place]), shorter)


@torch.inference_mode()
def top2_gap(model: Backend, ids: Sequence[int]) -> float:
    """How far the most probable next token after `ids` is before the second, in logits of the full model."""
    tokens = torch.tensor([list(ids)], device=model.device)
    positions, cache = torch.arange(len(ids))[None], model.new_cache(1, len(ids))
    hidden = model.run_layers(model.embed(tokens), 0, model.num_layers, positions, cache)
    best, second = model.unembed(hidden[:, -1:])[0, -1].double().topk(2).values.tolist()
    return float(best - second)
