"""The rows of an optimizer step: how many there are, and which of them are replayed."""

import os

from ...config.checks import require
from ...config.training import FinetuneConfig


def world_size() -> int:
    """The processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_index() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def rows_per_step(config: FinetuneConfig) -> int:
    """Rows of an optimizer step, over all processes."""
    return config.batch_size * config.accumulation * world_size()


def replayed_rows(config: FinetuneConfig) -> int:
    """Those of them that are the original's own text. Raises ConfigError for a share that leaves none, or none of the data."""
    share, rows = config.retention.replay, rows_per_step(config)
    replayed = round(share * rows)
    needed = f"a share of the {rows} rows of a step that is one row at least, and not all"
    require(not share or 0 < replayed < rows, "replay", needed, share)
    return replayed


def data_rows(config: FinetuneConfig) -> int:
    """Those that are of the data."""
    return rows_per_step(config) - replayed_rows(config)
