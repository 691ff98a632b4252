"""What a run that trains exit blocks is about to do and to cost. Nothing is written here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...checkpoint.loaded import Decoder
from ...config.training import FinetuneConfig
from ..rows.answers import Speed, Writing, measured_speed, writing_seconds
from .run_data import RunRows
from .settings import Resolved, learning_rate, rows_of_run, steps_of
from .states import states_bytes

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
    spec, speed = decoder.backend.spec, measured_speed(decoder)
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
        answer_seconds=writing_seconds(missing, how, speed),
        state_seconds=tokens * speed.token,
        train_seconds=_train_seconds(decoder, speed, settings, tokens * passes, targets * passes),
        device=str(decoder.backend.device),
        autocast=autocast,
    )


def _train_seconds(decoder: Decoder, speed: Speed, settings: Resolved, tokens: float, targets: float) -> float:
    """Of training, on that many tokens and targets in all: a block is a layer, and each target needs heads."""
    spec = decoder.backend.spec
    layer = sum(math.prod(shape) for shape in spec.layer_shapes.values())
    head = spec.hidden * spec.vocab
    runs = 2 if settings.feature == "final" else 1
    products = len(settings.exits) * (tokens * layer * _BACKWARD * runs + targets * head * (1 + 2 * runs))
    return speed.token * products / (spec.layers * layer)
