"""Which rows of which data."""

from dataclasses import dataclass

from .checks import require_given
from .ranges import require_ranges


@dataclass(frozen=True)
class DataConfig:
    """A data set: a name (`commands`, `topv2`), a file or folder, or a hub id; which columns; how many rows (0: all).

    `flag` is the one that named it, for errors.
    """

    name: str = "commands"
    split: str = "train"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    limit: int = 0
    seed: int = 0
    flag: str = "--data"

    def __post_init__(self) -> None:
        require_given("--data", self.name)
        require_ranges(samples=self.limit, seed=self.seed)
