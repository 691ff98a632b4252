"""Attention under bf16 autocast on the CPU, in fp32: torch's flash kernel is four times slower backward in bf16 there.

Measured with torch 2.13 on AVX-512 BF16, one thread, 32 rows of 56 tokens, 5 heads of 32: 11.4 ms a layer backward in bf16 and
2.5 ms in fp32, which was half of a training step.
"""

from typing import Any

import torch
from torch import Tensor

from ..model.depth import FP32_SDPA


def use_fp32_attention(model: Any) -> None:
    """Has a transformers model whose attention is `sdpa` run it in fp32; a model with another kind stays as it is."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if model.config._attn_implementation != "sdpa":
        return
    ALL_ATTENTION_FUNCTIONS.register(FP32_SDPA, _fp32_sdpa)
    ALL_MASK_ATTENTION_FUNCTIONS.register(FP32_SDPA, sdpa_mask)
    model.set_attn_implementation(FP32_SDPA)


def _fp32_sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    with torch.autocast(query.device.type, enabled=False):
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **options)
    return output, None
