"""The rows of a data set."""

from dataclasses import dataclass
from typing import Annotated

from .options import CountOrNone, Flag, Seed, Text


@dataclass(frozen=True)
class DataConfig:
    """A data set: a name (`commands`, `topv2`), a file or folder, or a hub id; its columns; the number of rows (0: all).

    `setting` is the one that named the data, for errors.
    """

    name: Annotated[
        Text, Flag("Data", "commands, topv2, a .jsonl/.json/.csv/.parquet/.txt file, a TOPv2 folder or a hub id.", "--data")
    ] = "commands"
    split: Annotated[str, Flag("Data", "Split of the data; for `commands` train, validation, test or compositional.")] = "train"
    prompt_column: Annotated[str, Flag("Data", "Column of the prompt.")] = "prompt"
    completion_column: Annotated[str, Flag("Data", "Column of what follows the prompt.")] = "completion"
    limit: Annotated[
        CountOrNone,
        Flag("Data", "Number of rows; 0: all (of `commands` 20000; in training as many as needed).", "--samples"),
    ] = 0
    seed: Annotated[Seed, Flag("Data", "Seed of generated rows.")] = 0
    setting: str = "data"
