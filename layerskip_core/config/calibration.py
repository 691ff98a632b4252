"""How int4 weights are calibrated."""

from dataclasses import dataclass

from .checks import require, require_given
from .ranges import require_ranges


@dataclass(frozen=True)
class CalibrationConfig:
    """`samples` texts of `length` tokens, from `data` or else written by the model, and `tuning_steps` (0: none) on them.

    `output`: a folder for a copy of the model; None for the model's own folder, or for a copy where it is no folder.
    """

    model: str = "embedded"
    output: str | None = None
    data: str | None = None
    samples: int = 256
    length: int = 256
    tuning_steps: int = 32
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        require_given("model", self.model)
        require_given("output", self.output)
        require_given("data", self.data)
        require(self.samples >= 1, "samples", "at least 1", self.samples)
        require_ranges(samples=self.samples, length=self.length, tuning_steps=self.tuning_steps, seed=self.seed)
