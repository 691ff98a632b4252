"""How a layer runs in training: on some rows of a batch, on packed documents, and with attention in fp32 for short rows."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..model import SpanInputs, TransformersBackend

_NAME = "sdpa_fp32"
_SHORT = 192  # tokens; longer rows are faster in bf16


def run_layer_on(backend: TransformersBackend, layer: int, hidden: Tensor, inputs: SpanInputs, kept: list[int]) -> Tensor:
    """Runs a layer on the kept rows of (B, T, D) only and scatters them back; the other rows skip it unchanged.

    If no row is kept, the layer runs on one row times zero: its parameters need a gradient in every process (DDP, FSDP2).
    """
    if len(kept) == hidden.shape[0]:
        return backend.run_layer(layer, hidden, inputs)
    index = torch.tensor(kept or [0], device=hidden.device)
    selected = hidden.index_select(0, index)
    output = backend.run_layer(layer, selected, inputs.rows(index))
    if not kept:
        output = selected + 0.0 * output
    return hidden.index_copy(0, index, output.to(hidden.dtype))


def span_inputs(backend: TransformersBackend, hidden: Tensor, documents: Tensor | None) -> SpanInputs:
    """The layers' inputs for whole rows (B, T, D), padded at the right.

    `documents` (B, T) numbers the documents packed into a row, -1 in the padding: attention stays within a document, and the
    positions of each start at 0.
    """
    if documents is None:
        return backend.prepare(hidden, torch.arange(hidden.shape[1])[None])
    columns = torch.arange(documents.shape[1]).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool, device="cpu")
    starts[:, 1:] = (documents[:, 1:] != documents[:, :-1]).cpu()
    positions = columns - torch.where(starts, columns, 0).cummax(1).values
    inputs = backend.prepare(hidden, positions, key_mask=documents >= 0)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return replace(inputs, mask={kind: _limited(mask, same) for kind, mask in inputs.mask.items()})


def _limited(mask: Tensor | None, same: Tensor) -> Tensor:
    """A mask (B, 1, T, T) of truth values or of numbers, without the pairs that are not in the `same` document."""
    assert mask is not None
    return mask.masked_fill(~same, torch.finfo(mask.dtype).min if mask.is_floating_point() else False)


def use_fp32_attention(model: Any) -> None:
    """Makes a transformers model with `sdpa` attention run it in fp32 on short rows. Other attention stays unchanged.

    Under bf16 autocast on the CPU torch's flash kernel is slow in bf16. Forward and backward of one layer with torch 2.13 on
    AVX-512 BF16, one thread, in bf16 and in fp32: 32 rows of 56 tokens with 5 heads of 32: 15 and 7 ms; 16 of 128 with 9 heads
    of 64: 44 and 34 ms; 8 of 224: 39 and 44 ms; 2 of 1,024: 98 and 139 ms.
    """
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
