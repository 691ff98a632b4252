"""What lies beside tiny models: exit blocks and drafters in the EAGLE-3 layout with random weights,
calibrated int4 weights.
"""

import torch

from layerskip_core.checkpoint import sidecars
from layerskip_core.checkpoint.folder import EXIT_BLOCKS_FILE, INT4_FILE
from layerskip_core.checkpoint.open import for_training
from layerskip_core.checkpoint.save import save_sidecar
from layerskip_core.checkpoint.sidecars import (
    EAGLE3_FOLDER,
    eagle3_content,
    exit_blocks_content,
    fingerprint,
)
from layerskip_core.model import TransformersBackend
from layerskip_core.model.eagle3 import Eagle3, Eagle3Form, Eagle3Weights
from layerskip_core.model.exit_blocks import ExitBlock, StoredDrafters
from layerskip_core.model.spec import ModelSpec
from layerskip_core.model.weights import int4_bytes, int4_of
from layerskip_core.training.exit_blocks import FrozenExits

_ROPE = {"rope_theta": 10_000.0, "rope_type": "default"}


def random_blocks(model, *blocks: ExitBlock, scale: float = 0.3) -> StoredDrafters:
    """Blocks near where training begins. `scale`: of what is added, relative to each weight's own
    size.
    """
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, weight in FrozenExits(TransformersBackend(model), blocks).weights().items():
        noise = torch.randn(
            weight.shape, generator=generator, dtype=torch.float64
        ) * weight.double().std().nan_to_num(0)
        if name.endswith("norm.weight"):
            noise = 0.2 * torch.rand(weight.shape, generator=generator, dtype=torch.float64)
        weights[name] = (weight + scale * noise).to(model.dtype)
    return StoredDrafters(tuple(sorted(blocks, key=lambda block: block.exit_layer)), weights.get)


def add_blocks(folder, *blocks: ExitBlock) -> None:
    loaded = for_training(str(folder), "cpu", "fp32")
    spec = loaded.backend.spec
    made = random_blocks(loaded.model, *blocks)
    trained_for = fingerprint(spec, loaded.model.get_parameter)
    content = exit_blocks_content(
        spec, {name: made.take(name) for name in made.shapes(spec)}, trained_for
    )
    found = {str(block.exit_layer): {"agreement": 0.75} for block in blocks}
    save_sidecar(str(folder), EXIT_BLOCKS_FILE, content, lambda info: info.with_exit_blocks(found))


def random_eagle3(spec: ModelSpec, tokens: torch.Tensor | None = None) -> Eagle3Weights:
    """Its head scores `tokens`, or every second one. Its weights are those that f16 holds."""
    tokens = torch.arange(1, spec.vocab, 2) if tokens is None else tokens
    form = Eagle3Form(
        (2, 3, 5),
        spec.hidden,
        spec.heads,
        spec.kv_heads,
        spec.head_dim,
        64,
        len(tokens),
        1e-5,
        _ROPE,
    )
    drafter = Eagle3(form, tokens)
    return Eagle3Weights(
        form, tokens, {name: drafter.weight(name).detach().half().float() for name in form.shapes}
    )


def add_eagle3(folder) -> None:
    spec = for_training(str(folder), "cpu", "fp32").backend.spec
    (folder / EAGLE3_FOLDER).mkdir()
    for name, content in eagle3_content(random_eagle3(spec), spec, str(folder)).items():
        (folder / name).write_bytes(content)


def add_int4(folder, change=lambda weight: weight, **details):
    """Calibrated weights that differ visibly from rounded ones, if `change` does."""
    model = (trained := for_training(str(folder), "cpu")).model
    spec = trained.backend.spec
    names = sidecars.matrix_names(spec)
    rows = {name: int4_bytes(int4_of(change(model.get_parameter(name).detach()))) for name in names}
    save_sidecar(
        str(folder),
        INT4_FILE,
        sidecars.int4_content(rows, fingerprint(spec, model.get_parameter), details),
    )
