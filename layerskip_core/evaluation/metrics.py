"""How good answers are: exact match, ROUGE-2, perplexity through every exit, and where two decodings part."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch

from ..checkpoint import LoadedModel
from ..data import Example
from ..decoding.drafting import SpanModel
from ..training.exit_loss import summed_cross_entropy

# A top-2 gap below this is a near-tie: kernels for one row and for several may round to either side of it. In bf16 logits of
# 16 to 32 are 1/8 apart, so the bound is two steps; in fp32 it is a thousand times the spread seen between kernels' sums.
NEAR_TIE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.25}


def exact_match(predictions: Sequence[str], references: Sequence[str], fold_whitespace: bool = False) -> float:
    """Share of predictions equal to their reference, both stripped; `fold_whitespace` takes every run of it as one space."""

    def normal(text: str) -> str:
        return " ".join(text.split()) if fold_whitespace else text.strip()

    pairs = list(zip(predictions, references, strict=True))
    return sum(normal(prediction) == normal(reference) for prediction, reference in pairs) / len(pairs)


def rouge2(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean F-measure of ROUGE-2 with stemming (Lin, 2004), by the rouge-score package."""
    return float(_rouge2_metric().compute(predictions=list(predictions), references=list(references))["rouge2"])


@cache
def _rouge2_metric() -> Any:
    """A metric of our own, for `evaluate.load("rouge")` fetches a script from the hub. Made late: the import takes 2 s."""
    import datasets
    import evaluate
    from rouge_score.rouge_scorer import RougeScorer

    class Rouge2(evaluate.Metric):  # type: ignore[misc]
        def _info(self) -> Any:
            text = datasets.Value("string")
            return evaluate.MetricInfo(
                description="Mean ROUGE-2 F-measure",
                citation="",
                inputs_description="",
                features=datasets.Features({"predictions": text, "references": text}),
            )

        def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
            scorer = RougeScorer(["rouge2"], use_stemmer=True)
            pairs = zip(references, predictions, strict=True)
            scores = [scorer.score(reference, prediction)["rouge2"].fmeasure for reference, prediction in pairs]
            return {"rouge2": sum(scores) / len(scores)}

    return Rouge2(keep_in_memory=True)


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


@torch.inference_mode()
def reference_losses(loaded: LoadedModel, example: Example, exit_layers: Sequence[int]) -> ReferenceLosses:
    """The reference and the end of text, teacher-forced behind the prompt (which is not counted), through each exit at once.

    A row beyond the context limit is cut there, as in training.
    """
    model, tokenizer = loaded.depth, loaded.tokenizer
    prompt = loaded.encode_prompt(example.prompt)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    reference = list(tokenizer(example.completion, add_special_tokens=False)["input_ids"]) + end
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
def top2_gap(model: SpanModel, ids: Sequence[int]) -> float:
    """How far the most probable next token after `ids` is before the second, in logits of the full model."""
    tokens = torch.tensor([list(ids)], device=model.device)
    positions, cache = torch.arange(len(ids))[None], model.new_cache(1, len(ids))
    hidden = model.run_layers(model.embed(tokens), 0, model.num_layers, positions, cache)
    best, second = model.unembed(hidden[:, -1:])[0, -1].double().topk(2).values.tolist()
    return float(best - second)
