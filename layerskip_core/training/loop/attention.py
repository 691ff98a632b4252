"""Attention in fp32 for short rows under bf16 autocast on the CPU, where torch's flash kernel is slow in bf16.

Forward and backward of one layer with torch 2.13 on AVX-512 BF16, one thread, in bf16 and in fp32: 32 rows of 56 tokens with 5
heads of 32: 15 and 7 ms; 16 of 128 with 9 heads of 64: 44 and 34 ms; 8 of 224: 39 and 44 ms; 2 of 1,024: 98 and 139 ms. In
bf16 it took half of a training step of the embedded model.
"""

from typing import Any

import torch
from torch import Tensor

_NAME = "sdpa_fp32"
_SHORT = 192  # tokens; longer rows are faster in bf16


def use_fp32_attention(model: Any) -> None:
    """Makes a transformers model with `sdpa` attention run it in fp32 on short rows. Other attention stays unchanged."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if model.config._attn_implementation != "sdpa":
        return
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _fp32_sdpa)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)


def _fp32_sdpa(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """(B, heads, T, head dim) each; the result is (B, T, heads, head dim)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.shape[-2] >= _SHORT:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    with torch.autocast(query.device.type, enabled=False):
        output, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **options)
    return output.to(query.dtype), weights  # FSDP computes in bf16 without autocast
