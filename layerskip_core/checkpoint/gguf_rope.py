"""The scaled rope of a GGUF file, as transformers configures it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError
from ..model.rope import llama3_factors
from .gguf_header import GgufHeader

_FACTORS = "rope_freqs.weight"
_REFUSED = ("rope_factors_long.weight", "rope_factors_short.weight")  # of longrope, whose lengths the file does not say
_LOW, _HIGH = 1.0, 4.0  # of every Llama 3; the file has only the factors that they give
_USUAL = {"yarn_ext_factor": 1.0, "attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}
_F32 = 0  # ggml's number of fp32


def scaled_rope(path: Path, header: GgufHeader, rope: Mapping[str, Any], head_dim: int, context: int) -> dict[str, Any]:
    """The parameters that are to be changed in `rope`, those of a rope without scaling; none if the file scales it in no way.

    Linear and YaRN are named in the header. For Llama 3 the file has only what each frequency is divided by: the original
    context is then one that gives these factors. Raises CheckpointError for a rope that is scaled otherwise.
    """
    prefix = f"{header.architecture}.rope."
    named = {key.removeprefix(prefix): value for key, value in header.values.items() if key.startswith(prefix)}
    kind = str(named.get("scaling.type", "linear"))
    factor = _number(path, "scaling.factor", named.get("scaling.factor", named.get("scale_linear", 1.0)) or 1.0, 1e4)
    original = _number(path, "scaling.original_context_length", named.get("scaling.original_context_length", context), 2**31)
    unusual = next((key for key, value in _USUAL.items() if named.get(f"scaling.{key}", value) != value), None)
    if stored := [name for name in _REFUSED if name in header.tensors]:
        raise _error(path, f"{stored[0]}, of a longrope")
    if unusual is not None:
        raise _error(path, f"{prefix}scaling.{unusual} {named[f'scaling.{unusual}']}")
    if _FACTORS in header.tensors:
        return _llama3(path, header, rope, head_dim, context)
    if kind == "none" or factor == 1.0:
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": int(original)}
    raise _error(path, f"a rope of type {kind}")


def _llama3(path: Path, header: GgufHeader, rope: Mapping[str, Any], head_dim: int, context: int) -> dict[str, Any]:
    tensor = header.tensors[_FACTORS]
    if tensor.kind != _F32 or tensor.shape != (head_dim // 2,):
        raise _error(path, f"{_FACTORS} of shape {tensor.shape}, where {head_dim // 2} numbers in fp32 were needed")
    if tensor.start + 2 * head_dim > path.stat().st_size:
        raise CheckpointError(f"{path.name} is damaged: {_FACTORS} ends after the file")
    content = np.memmap(path, dtype="<f4", mode="r", offset=tensor.start, shape=tensor.shape)
    factors = torch.from_numpy(np.array(content, np.float64))
    if (factors == 1).all():
        return {}
    for before in (2**exponent for exponent in (13, *range(3, context.bit_length()))):  # 8192 of every Llama 3 so far
        found = {
            "rope_type": "llama3", "factor": float(factors.max()), "original_max_position_embeddings": before,
            "low_freq_factor": _LOW, "high_freq_factor": _HIGH,
        }  # fmt: skip
        if torch.allclose(llama3_factors({**rope, **found}, head_dim), factors, rtol=1e-4, atol=0):
            return found
    raise _error(path, f"{_FACTORS} with factors other than those of Llama 3")


def _number(path: Path, name: str, value: Any, most: float) -> float:
    if not isinstance(value, int | float) or not 1 <= value <= most:
        raise CheckpointError(f"{path.name}: rope.{name} must be a number from 1 to {most:g}, got {value}")
    return float(value)


def _error(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path.name}: its rope must be plain, or scaled as linear, yarn or llama3; found {found}; use the original checkpoint"
    )
