"""What a run that trains exit blocks is about to do and to cost. Nothing is written here."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...checkpoint.loaded import Decoder
from ...config.training import FinetuneConfig
from .answers import BATCH, Writing
from .run_data import RunRows
from .settings import Resolved, learning_rate, rows_of_run, steps_of
from .states import states_bytes

_MEASURED = 256  # tokens of a pass that is timed
_BACKWARD = 3  # forward and backward pass over a forward pass


@dataclass(frozen=True)
class FrozenPlan:
    """A run's resolved settings and estimates; memory and disk are in MB, times in seconds on this machine.

    `answered`: of the `texts`, those whose answers an earlier run has left. With answers of the model `tokens` and what
    follows from it are for answers of the full length.
    """

    settings: Resolved
    lr: float
    max_length: int
    steps: int  # of each exit
    texts: int
    held_out: int  # of them
    left_out: int  # rows whose prompt is too long
    answered: int
    tokens: int
    parameters: int
    num_layers: int
    trained: int  # parameters of the blocks
    disk_mb: float
    answer_seconds: float
    state_seconds: float
    train_seconds: float
    device: str
    autocast: bool
    resumed_step: int = 0
    notes: tuple[str, ...] = ()

    @property
    def total_steps(self) -> int:
        return self.steps * len(self.settings.exits)

    @property
    def dtype(self) -> str:
        return "bf16 autocast" if self.autocast else "fp32"


def make_frozen_plan(
    config: FinetuneConfig,
    settings: Resolved,
    rows: RunRows,
    known: Mapping[int, Sequence[int]],
    how: Writing,
    decoder: Decoder,
    autocast: bool,
) -> FrozenPlan:
    """`known`: the answers that are there, by row. The speed of the model is measured."""
    spec, speed = decoder.backend.spec, _measured_speed(decoder, BATCH)
    room = {row: how.most(len(prompt)) for row, prompt in enumerate(rows.prompts)}
    answers = sum(len(known[row]) if row in known else most for row, most in room.items())
    targets = answers or sum(text.targets for text in rows.texts)
    missing = [prompt for row, prompt in enumerate(rows.prompts) if row not in known]
    tokens, trained = rows.tokens + answers, rows.count - rows.held_out
    steps = steps_of(config, trained)
    passes = rows_of_run(config, steps) / rows.count
    return FrozenPlan(
        settings=settings,
        lr=learning_rate(config, spec.parameters),
        max_length=how.max_length,
        steps=steps,
        texts=trained,
        held_out=rows.held_out,
        left_out=rows.left_out,
        answered=len(known) if rows.prompts else rows.count,
        tokens=tokens,
        parameters=spec.parameters,
        num_layers=spec.layers,
        trained=sum(math.prod(shape) for block in settings.blocks for shape in block.shapes(spec).values()),
        disk_mb=states_bytes(tokens, spec.hidden, len(settings.exits)) / 2**20,
        answer_seconds=sum(map(len, missing)) * speed.token + math.ceil(len(missing) / BATCH) * how.tokens * speed.step,
        state_seconds=tokens * speed.token,
        train_seconds=_train_seconds(decoder, speed, settings, tokens * passes, targets * passes),
        device=str(decoder.backend.device),
        autocast=autocast,
    )


@dataclass(frozen=True)
class _Speed:
    """Seconds of the model on this machine: of a token in a pass of many, and of a step that decodes a batch."""

    token: float
    step: float


@torch.inference_mode()
def _measured_speed(decoder: Decoder, rows: int) -> _Speed:
    """Times one pass of each kind."""
    backend = decoder.backend
    length = min(_MEASURED, backend.max_positions - 1)
    cache = backend.new_cache(rows, length + 1)
    ids = torch.zeros(rows, 1, dtype=torch.long, device=backend.device)

    def seconds(ids: torch.Tensor, at: int) -> float:
        started = time.perf_counter()
        positions = torch.arange(at, at + ids.shape[1])[None].expand(len(ids), -1)
        hidden = backend.run_layers(backend.embed(ids), 0, backend.num_layers, positions, cache if len(ids) == rows else None)
        float(backend.unembed(hidden[:, -1:]).sum())  # waits for a device
        return time.perf_counter() - started

    whole = min(seconds(ids[:1].expand(1, length), 0) for _ in range(2))
    return _Speed(whole / length, min(seconds(ids, at) for at in range(min(3, length))))


def _train_seconds(decoder: Decoder, speed: _Speed, settings: Resolved, tokens: float, targets: float) -> float:
    """Of training, on that many tokens and targets in all: a block is a layer, and each target needs heads."""
    spec = decoder.backend.spec
    layer = sum(math.prod(shape) for shape in spec.layer_shapes.values())
    head = spec.hidden * spec.vocab
    runs = 2 if settings.feature == "final" else 1
    products = len(settings.exits) * (tokens * layer * _BACKWARD * runs + targets * head * (1 + 2 * runs))
    return speed.token * products / (spec.layers * layer)
