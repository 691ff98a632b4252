"""Whether two strategies give the same tokens, and if not, whether rounding explains the difference."""

from collections.abc import Sequence

import torch

from ...checkpoint.loaded import Decoder
from ...data.examples import Example
from ...model.backend import Backend
from ..outputs import Outputs
from ..results import Difference

# A top-2 logit gap below this is a near-tie: kernels for one row and for several rows may round to either side of it. In bf16,
# logits of 16 to 32 are 1/8 apart, so the bound is two steps. In fp32 it is a thousand times the spread between the kernels.
NEAR_TIE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.25}


def differences(loaded: Decoder, examples: Sequence[Example], outputs: Outputs, baseline: Outputs) -> tuple[Difference, ...]:
    """The first difference of each output from the baseline's. Samples that failed in either are left out."""
    differing = []
    for sample, (output, expected) in enumerate(zip(outputs.each, baseline.each, strict=True)):
        position = first_difference(output.ids, expected.ids)
        if position is not None and output.error is None and expected.error is None:
            prefix = loaded.encode_prompt(examples[sample].prompt) + list(expected.ids[:position])
            differing.append(Difference(sample, position, top2_gap(loaded.backend, prefix)))
    return tuple(differing)


def first_difference(ids: Sequence[int], expected: Sequence[int]) -> int | None:
    """The first position where two outputs differ, None when they are equal. If one is a prefix of the other, its length."""
    if list(ids) == list(expected):
        return None
    shorter = min(len(ids), len(expected))
    return next((position for position in range(shorter) if ids[position] != expected[position]), shorter)


@torch.inference_mode()
def top2_gap(model: Backend, ids: Sequence[int]) -> float:
    """The gap between the two largest logits of the full model for the token after `ids`."""
    tokens = torch.tensor([list(ids)], device=model.device)
    positions, cache = torch.arange(len(ids))[None], model.new_cache(1, len(ids))
    hidden = model.run_layers(model.embed(tokens), 0, model.num_layers, positions, cache)
    best, second = model.unembed(hidden[:, -1:])[0, -1].double().topk(2).values.tolist()
    return float(best - second)
