"""Predicts what drafts that are drafted themselves would gain, and what trees of drafts would, by replay.

    python examples/drafts_of_drafts.py --model MODEL --dtype bf16 --prompts examples/kinds.jsonl

The low-bit copy of all layers is a target that can be drafted for: lookups draft for the copy, and the model verifies what the
copy has verified (ML-SpecQD: Georganas et al., 2025). The model writes its answers once, with the copy's prediction at every
token. Then rounds are replayed at stated costs, in passes of the model over one token, with the best lengths of each way.

A leaf, the second-best token beside a draft, pays only where P(draft rejected) x P(second is right) > cost of a row x speedup.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import product
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from layerskip_core.checkpoint.loaded import Decoder
from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import decode
from layerskip_core.decoding.drafters.lookup import History


class Answer(NamedTuple):
    """`copy`: at each token of the answer, the two tokens that the copy finds most probable; `probs`: of the first of them."""

    kind: str
    prompt: list[int]
    new: list[int]
    copy: list[list[int]]
    probs: list[float]
    lookups: dict[int, tuple[list[int], int]]  # by token, what follows in the text before it; filled when it is asked for


_LEAST_SURVIVAL = 0.6


class Costs(NamedTuple):
    """In passes of the model over one token: a step of the copy, and each further row of the model's pass and of the copy's."""

    step: float
    row: float
    copy_row: float


class Way(NamedTuple):
    """Least evidence of a lookup and the longest draft; for lookups that draft for the copy the same, 0: none."""

    evidence: int
    most: int
    inner_evidence: int = 0
    inner_most: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--copy", default="int8")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    arguments = parser.parse_args()
    loaded = for_decoding(arguments.model, "cpu", arguments.dtype, PackingConfig(draft_weights=(arguments.copy,)))
    rows = [json.loads(line) for line in Path(arguments.prompts).read_text(encoding="utf-8").splitlines()]
    answers = [answer(loaded, row, arguments.copy, arguments.max_new_tokens) for row in rows]
    kinds = list(dict.fromkeys(each.kind for each in answers))

    print("| prompts | tokens | the copy is wrong | its second token is right then | product |\n|---|---|---|---|---|")
    for kind in [*kinds, "all"]:
        pairs = [
            pair for each in answers if kind in (each.kind, "all") for pair in zip(each.new[1:], each.copy[1:], strict=True)
        ]
        wrong = [second == token for token, (first, second) in pairs if first != token]
        share, second = len(wrong) / len(pairs), sum(wrong) / max(len(wrong), 1)
        print(f"| {kind} | {len(pairs)} | {share:.1%} | {second:.0%} | {share * second:.3f} |")

    print("\n| step of the copy | a row | a row of the copy | drafts by the copy | drafts for the copy too | gain |")
    print("|---|---|---|---|---|---|")
    single = [Way(evidence, most) for evidence, most in product((2, 4, 99), (8, 12, 16))]
    double = [Way(way.evidence, way.most, *inner) for way, inner in product(single, ((2, 4), (2, 8), (3, 8)))]
    for costs in (Costs(0.3, 0.05, 0.1), Costs(0.5, 0.05, 0.1), Costs(0.5, 0.15, 0.2)):
        best = [max(mean_speedup(answers, costs, way) for way in ways) for ways in (single, double)]
        step, row, copy_row = costs
        print(f"| {step} | {row} | {copy_row} | {best[0]:.2f}x | {best[1]:.2f}x | {best[1] / best[0]:.3f} |", flush=True)


@torch.inference_mode()
def answer(loaded: Decoder, row: dict[str, str], copy: str, limit: int) -> Answer:
    model = loaded.backend
    side = next(side for weights, side in model.draft_sides.items() if weights == copy)
    prompt = loaded.encode_prompt(row["prompt"])
    decoding = decode(model, prompt, DecodingConfig("autoregressive", max_new_tokens=limit), loaded.eos_ids)
    new = [token for [step] in decoding for token in step.ids]
    tokens = torch.tensor([[*prompt, *new]])
    places = model.new_cache(1, tokens.shape[1]).span(0, tokens.shape[1])
    hidden = side.layers.run_layers(side.layers.embed(tokens), 0, side.num_layers, places)
    probs, copies = side.whole.unembed(hidden[:, len(prompt) - 1 : -1])[0].float().softmax(-1).topk(2)
    return Answer(row.get("category", "all"), prompt, new, copies.tolist(), probs[:, 0].tolist(), {})


def mean_speedup(answers: list[Answer], costs: Costs, way: Way) -> float:
    """Geometric mean over the kinds of prompts."""
    by_kind: dict[str, list[float]] = {}
    for each in answers:
        total = by_kind.setdefault(each.kind, [0.0, 0.0])
        total[0] += len(each.new) - 1
        total[1] += sum(rounds(each, costs, way))
    return prod(tokens / cost for tokens, cost in by_kind.values()) ** (1 / len(by_kind))


def rounds(each: Answer, costs: Costs, way: Way) -> Iterator[float]:
    """The cost of each round that gives the answer.

    The copy's drafts end, as adaptive drafting's do, where the chance that all are accepted is low: 1 - 0.15 (1 - p)^3 for a
    token of probability p, and after a wrong one, where the copy's text is unknown, 0.95.
    """
    new, copy, start = each.new, [first for first, _ in each.copy], len(each.prompt)
    text, history, place = [*each.prompt, *new], History(2), 1  # the prompt's pass gives the first token
    while place < len(new):
        room = min(way.most, len(new) - place - 1)
        found, evidence = history.continuation(text[: start + place], room)
        cost, drafted, accepted, survival = 0.0, len(found), agreeing(found, new[place:]), 1.0
        if evidence < way.evidence:
            drafted = accepted = 0
            while drafted < room and survival >= _LEAST_SURVIVAL:
                if accepted < drafted:
                    cost, drafted, survival = cost + costs.step, drafted + 1, 0.95 * survival
                    continue
                at = place + drafted
                given, inner = [], 0
                if way.inner_most:
                    given, inner = each.lookups.get(at) or each.lookups.setdefault(at, lookup(text[: start + at]))
                given = given[: min(way.inner_most, room - drafted - 1)] if inner >= way.inner_evidence else []
                verified = copy[at : at + agreeing(given, copy[at:]) + 1]
                cost += costs.step * (1 + costs.copy_row * len(given))
                drafted += len(verified)
                accepted += agreeing(verified, new[at:])
                survival *= prod(1 - 0.15 * (1 - prob) ** 3 for prob in each.probs[at : at + len(verified)])
        yield cost + 1 + costs.row * drafted
        place += accepted + 1


def lookup(text: list[int]) -> tuple[list[int], int]:
    return History(2).continuation(text, 8)


def agreeing(draft: list[int], said: list[int]) -> int:
    """How many drafts are right."""
    pairs = enumerate(zip(draft, said, strict=False))
    return next((place for place, (token, expected) in pairs if token != expected), min(len(draft), len(said)))


if __name__ == "__main__":
    main()
