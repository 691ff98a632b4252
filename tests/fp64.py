"""Transformers' models in fp64 throughout."""

import pytest
import torch
import transformers

from layerskip_core.model.architectures import ARCHITECTURES


def compute_in_fp64(model, monkeypatch):
    """transformers' norms, the softmax of eager attention and of routers, and some rotations
    compute in fp32 even in fp64.

    That would hide any difference under 1e-6. Skips with transformers 5.17, whose rotary embedding
    refuses fp64 positions.
    """
    if transformers.__version__.startswith("5.17."):
        pytest.skip("the rotary embedding of transformers 5.17 refuses fp64 positions")
    architecture = ARCHITECTURES[model.config.model_type]
    offset = 1 if architecture.norm == "rms_plus_one" else 0
    norm = model.get_submodule(architecture.names.norm)
    plain = torch.layer_norm if architecture.norm.startswith("layer") else torch.rms_norm
    if not isinstance(norm, torch.nn.LayerNorm):
        monkeypatch.setattr(
            type(norm),
            "forward",
            lambda n, x: plain(
                x,
                x.shape[-1:],
                n.weight + offset if hasattr(n, "weight") else None,
                eps=getattr(n, "variance_epsilon", None) or n.eps,
            ),
        )
    softmax = torch.nn.functional.softmax
    rounded = torch.Tensor.float
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim)
    )
    monkeypatch.setattr(
        torch.Tensor,
        "float",
        lambda numbers: numbers if numbers.dtype == torch.float64 else rounded(numbers),
    )
