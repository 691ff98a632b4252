"""Print the rows of a data set as JSON lines."""

import json

import typer

from layerskip_core.config.model import DataConfig

from ..options import command

_TEN_ROWS = DataConfig(split="test", limit=10)


@command
def data(rows: DataConfig = _TEN_ROWS) -> None:
    """Print the rows of a data set as JSON lines of `prompt` and `completion`, to read or to pipe into `generate --jsonl`.

    Example: layerskip data --samples 3
    """
    from layerskip_core.data import load_examples

    for example in load_examples(rows):
        typer.echo(json.dumps({"prompt": example.prompt, "completion": example.completion}, ensure_ascii=False))
