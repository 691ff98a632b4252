"""The settings of a run that trains exit blocks, with all defaults."""

import math
from dataclasses import dataclass

from ...config.checks import require_exit_layer
from ...config.training import Answers, BlockLoss, ExitBlockSettings, Feature, FinetuneConfig
from ...model.exit_blocks import ExitBlock
from ..rows.answers import Writing

COMMANDS_STEPS = 600  # of each exit, of a run on `commands` without `steps`
_EPOCHS = 2.0
_ANSWER_TOKENS = 128
_SMALL_MODEL = 50_000_000  # parameters
_LR, _SMALL_LR = 1.5e-3, 2e-3


@dataclass(frozen=True)
class Resolved:
    """ExitBlockSettings with all defaults."""

    exits: tuple[int, ...]  # ascending
    feature: Feature
    answers: Answers
    answer_tokens: int
    answer_temperature: float
    loss: BlockLoss

    @property
    def blocks(self) -> list[ExitBlock]:
        return [ExitBlock(exit_layer, self.feature) for exit_layer in self.exits]


def resolved(config: FinetuneConfig, num_layers: int) -> Resolved:
    """What was asked, with defaults. Raises ConfigError for an exit that is not below the last layer."""
    asked: ExitBlockSettings = config.exit_blocks
    exits = tuple(sorted(config.recipe.exits or (max(1, num_layers // 3),)))
    for exit_layer in exits:
        require_exit_layer(exit_layer, num_layers, field="exits")
    return Resolved(
        exits,
        asked.feature or "none",
        asked.answers or "model",
        asked.answer_tokens or _ANSWER_TOKENS,
        asked.answer_temperature or 0.0,
        asked.loss or "kl",
    )


def writing(config: FinetuneConfig, settings: Resolved, max_length: int) -> Writing:
    return Writing(settings.answer_tokens, max_length, settings.answer_temperature, config.seed)


def steps_of(config: FinetuneConfig, rows: int) -> int:
    """Optimizer steps of each exit, over so many rows."""
    if config.steps is not None:
        return config.steps
    if is_drawn(config):
        return COMMANDS_STEPS
    return max(1, math.ceil(rows / (config.batch_size * config.accumulation) * passes_of(config)))


def passes_of(config: FinetuneConfig) -> float:
    """Passes over the rows."""
    return config.epochs or _EPOCHS


def rows_of_run(config: FinetuneConfig, steps: int) -> int:
    """The rows that so many steps see."""
    return steps * config.batch_size * config.accumulation


def is_drawn(config: FinetuneConfig) -> bool:
    """Whether the rows are drawn by a generator, as many as the run needs."""
    return config.data.name == "commands" and not config.data.limit


def learning_rate(config: FinetuneConfig, parameters: int) -> float:
    return config.lr or (_SMALL_LR if parameters < _SMALL_MODEL else _LR)
