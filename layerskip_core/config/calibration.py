"""How int4 weights are calibrated."""

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from .checks import require
from .options import DATA, MODEL, OPTIMISATION, OUTPUT, RUN, Flag, Seed, Text


@dataclass(frozen=True)
class CalibrationConfig:
    """`samples` texts of `length` tokens, from `data` or else written by the model, and `tuning_steps` (0: none) on them.

    `output`: a folder for a copy of the model; None for the model's own folder, or for a copy where it is no folder.
    """

    model: Annotated[Text, Flag(MODEL, "embedded, embedded-base, a folder, a .gguf file or a hub id.")] = "embedded"
    output: Annotated[
        Text | None, Flag(OUTPUT, "Folder for a copy of the model.", default="--model's folder, or calibrated-model")
    ] = None
    data: Annotated[
        Text | None, Flag(DATA, "Rows to calibrate on: commands, topv2, a file or a hub id.", default="what the model writes")
    ] = None
    samples: Annotated[int, Meta(ge=0, le=10_000_000), Flag(DATA, "Number of texts; fewer if --data has fewer tokens.")] = 256
    length: Annotated[int, Meta(ge=2, le=10_000_000), Flag(DATA, "Tokens of a text.")] = 256
    tuning_steps: Annotated[
        int, Meta(ge=0, le=1_000_000_000), Flag(OPTIMISATION, "Steps of tuning the scales; 0: none.", "--steps")
    ] = 32
    seed: Annotated[Seed, Flag(RUN, "Seed of the texts and of their order.")] = 0
    overwrite: Annotated[bool, Flag(RUN, "Replace a model in --output.")] = False

    def __post_init__(self) -> None:
        require(self.samples >= 1, "samples", "at least 1", self.samples)
