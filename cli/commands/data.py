"""Print the rows of a data set, or prompts that a chat model writes, as JSON lines."""

import json
from dataclasses import replace
from typing import Annotated

import typer

from layerskip_core.config.model import DataConfig, MachineConfig, PromptingConfig
from layerskip_core.config.options import Flag, Text
from layerskip_core.errors import require

from ..console import stage_bars
from ..loading import load_model
from ..options import command

_TEN_ROWS = DataConfig(split="test", limit=10)
_OWN = "Print prompts that this chat model writes itself, and no data set: for train-drafter."


@command
def data(
    rows: DataConfig = _TEN_ROWS,
    model: Annotated[Text | None, Flag(_OWN, default="none", panel="Model", reads="model")] = None,
    *,
    machine: MachineConfig,
) -> None:
    """Print the rows of a data set as JSON lines of `prompt` and `completion`, to read or to pipe
    into `generate --jsonl`.

    Example: layerskip data --samples 3
    """
    if model is None:
        from layerskip_core.data import load_examples

        for example in load_examples(rows):
            typer.echo(
                json.dumps(
                    {"prompt": example.prompt, "completion": example.completion}, ensure_ascii=False
                )
            )
        return
    require(
        rows == replace(_TEN_ROWS, limit=rows.limit, seed=rows.seed),
        "model",
        "given without flags of a data set",
        "both",
    )
    require(rows.limit > 0, "limit", "at least 1 with `model`", rows.limit)
    loaded = load_model(model, machine, prompting=PromptingConfig("chat"))
    from layerskip_core.training.answers import own_prompts

    with stage_bars() as show:
        for done, prompt in enumerate(own_prompts(loaded, rows.limit, rows.seed), start=1):
            typer.echo(json.dumps({"prompt": prompt}, ensure_ascii=False))
            show("prompts", done, rows.limit, "")
