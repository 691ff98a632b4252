"""`layerskip data`: the rows of a data set as JSON lines."""

import json
from typing import Annotated

import typer

from layerskip_core.config.data import DataConfig


def data(
    name: Annotated[str, typer.Option("--data", help="commands, topv2, a file, a TOPv2 folder or a hub id.")] = "commands",
    split: Annotated[str, typer.Option(help="train, validation, test; compositional for commands.")] = "test",
    samples: Annotated[int, typer.Option(help="How many rows; 0 is all, for `commands` 20000.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of generated rows.")] = 0,
) -> None:
    """Print a data set's rows, `{"prompt": ..., "completion": ...}` a line: to look at, or to pipe into `generate --jsonl`."""
    from layerskip_core.data.examples import load_examples

    for example in load_examples(DataConfig(name, split, limit=samples, seed=seed)):
        typer.echo(json.dumps({"prompt": example.prompt, "completion": example.completion}, ensure_ascii=False))
