"""The precision in which the steps of a training compute."""

from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from time import thread_time

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..checkpoint.loaded import pick_dtype
from ..config.training import TrainingConfig
from ..errors import CheckpointError
from ..files import read_json
from ..model import TransformersBackend
from .progress import SETTINGS_FILE
from .recipe import SMALL_MODEL
from .sharding import world_size

_BF16 = "bf16 autocast"  # in run.json and layerskip.json
_TOKENS = 512  # rows of the timed product
_WIDEST = 2048  # its inputs and outputs at most, so that it takes milliseconds
_TURNS = 5
# Least ratio of the times: a step also casts, and noise must not choose for small models
_WORTHWHILE = 2.0


@dataclass(frozen=True)
class Precision:
    """`autocast`: layers compute in bf16; weights and optimizer stay in fp32. `reason`: for the
    user, of a choice by `auto`.
    """

    autocast: bool
    reason: str = ""

    @property
    def name(self) -> str:
        return _BF16 if self.autocast else "fp32"


def choose_precision(
    config: TrainingConfig,
    device: torch.device,
    backend: TransformersBackend,
    checkpoint: Path | None,
) -> Precision:
    """The requested precision. `auto` is bf16 on CUDA, and on a CPU where a product is clearly
    faster in it.

    PyTorch's releases differ, so the product is timed. A resumed run keeps its precision.
    """
    if config.dtype != "auto" or device.type != "cpu":
        dtype = pick_dtype(config.dtype, device, backend.spec.parameters)
        return Precision(dtype == torch.bfloat16)
    if checkpoint is not None:
        before = read_json(checkpoint / SETTINGS_FILE, CheckpointError).get("dtype")
        return Precision(before == _BF16, "as before the interruption")
    if world_size() > 1:  # processes could choose differently
        return Precision(
            False, "several processes do not time a product; `dtype` bf16 may be faster"
        )
    if backend.spec.parameters < SMALL_MODEL:
        return Precision(
            False, "a model below 50M parameters spends its time on other work than products"
        )
    fp32, bf16 = product_seconds(*widest_projection(backend.layers))
    faster = fp32 / bf16
    if faster >= _WORTHWHILE:
        return Precision(True, f"a product is {faster:.1f} times as fast as in fp32")
    return Precision(False, f"a product in bf16 is only {faster:.1f} times as fast")


def widest_projection(layers: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of the largest matrix of the layers."""
    shapes = [tuple(weight.shape) for weight in layers.parameters() if weight.dim() == 2]
    outputs, inputs = max(shapes, key=prod, default=(_WIDEST, _WIDEST))
    return outputs, inputs


def product_seconds(outputs: int, inputs: int) -> tuple[float, float]:
    """CPU seconds of a projection, forward and backward, in (fp32, bf16 autocast): minima of some
    turns.

    On one thread, whose CPU time other processes hardly change; beside them, a barrier would hide
    the difference.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = min(inputs, _WIDEST)
    outputs = min(outputs, _WIDEST)
    hidden = torch.randn(_TOKENS, inputs, generator=generator).requires_grad_()
    weight = torch.randn(outputs, inputs, generator=generator).requires_grad_()
    fp32 = inf
    bf16 = inf
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(_TURNS):
            fp32 = min(fp32, _step_seconds(hidden, weight, autocast=False))
            bf16 = min(bf16, _step_seconds(hidden, weight, autocast=True))
    finally:
        torch.set_num_threads(threads)
    return fp32, bf16


def _step_seconds(hidden: Tensor, weight: Tensor, autocast: bool) -> float:
    started = thread_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = linear(hidden, weight)
    torch.autograd.grad(output.sum(), (hidden, weight))
    return thread_time() - started
