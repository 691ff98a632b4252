"""Which rows of which data."""

from dataclasses import dataclass

from .checks import require_given
from .ranges import require_ranges


@dataclass(frozen=True)
class DataConfig:
    """A data set: a name (`commands`, `topv2`), a file or folder, or a hub id; its columns; the number of rows (0: all).

    `setting` is the one that named the data, for errors.
    """

    name: str = "commands"
    split: str = "train"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    limit: int = 0
    seed: int = 0
    setting: str = "data"

    def __post_init__(self) -> None:
        require_given(self.setting, self.name)
        require_ranges(limit=self.limit, seed=self.seed)
