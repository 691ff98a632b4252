"""Show the model's prediction after every layer."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text as Cell

from layerskip_core.config.model import MachineConfig, PromptingConfig
from layerskip_core.config.options import Count, Flag, Layer, ModelName, Text
from layerskip_core.errors import LayerSkipError, require, visible

from ..console import ResultsConsole, given_prompt, narrate
from ..loading import load_model
from ..options import Prompt, command

if TYPE_CHECKING:
    from layerskip_core.evaluation.inspection import Inspection, TokenTrace

_CELL = 9  # characters shown of a token


@command
def inspect(
    prompt: Prompt = None,
    model: ModelName = "embedded",
    max_new_tokens: Annotated[
        Count, Flag("Maximum number of tokens in the answer.", panel="Decoding")
    ] = 24,
    *,
    prompting: PromptingConfig,
    machine: MachineConfig,
    layers: Annotated[
        tuple[Layer, ...],
        Flag("Layers shown: 2,4,8 or A:B:STEP.", default="as many as fit", panel="Output"),
    ] = (),
    format: Annotated[
        Literal["table", "json"], Flag("Format of standard output.", panel="Output")
    ] = "table",
    output: Annotated[Text | None, Flag("HTML file with every layer.", panel="Output")] = None,
) -> None:
    """Show the prediction after every layer, and from which layer on each token was correct.

    Example: layerskip inspect "set an alarm for 7 am" --layers 2:24:2 --output inspect.html
    """
    from layerskip_core.checkpoint.save import model_files
    from layerskip_core.evaluation.inspection import inspect as run_inspect
    from layerskip_core.evaluation.report.files import inspection_page, to_json
    from layerskip_core.files import require_writable, write_file

    if output is not None:
        require_writable(Path(output), LayerSkipError)
        real = Path(output).resolve()
        if real.name in model_files(real.parent):
            raise LayerSkipError(
                f"`output` {output} must not be a file of the model in {real.parent}; give another name"
            )
    loaded = load_model(model, machine, prompting=prompting)
    count = loaded.backend.num_layers
    console = ResultsConsole()
    # Columns besides the first two
    room = max(1, (console.width - _CELL - 1 - len("needed")) // (_CELL + 1))
    layers = layers or tuple(
        sorted({max(1, round(count * part / room)) for part in range(1, room + 1)})
    )
    require(layers[-1] <= count, "layers", f"in 1..{count}", ",".join(map(str, layers)))
    inspection = run_inspect(loaded, given_prompt(prompt, may_be_empty=False), max_new_tokens)
    if output is not None:
        write_file(Path(output), inspection_page(inspection).encode(), LayerSkipError)
        narrate(f"wrote {output}")
    if format == "json":
        typer.echo(to_json(inspection), nl=False)
    else:
        _print(inspection, layers, room, console)


def _print(inspection: "Inspection", layers: tuple[int, ...], room: int, console: Console) -> None:
    """A row per token, a column per layer and exit block, in as many tables as the terminal's width
    requires.
    """
    blocks = inspection.tokens[0].blocks if inspection.tokens else {}
    columns = []
    for layer in layers:
        columns.append(("layer", layer))
        if layer in blocks:
            columns.append(("block", layer))
    for start in range(0, len(columns), room):
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
        table.add_column("token", no_wrap=True, width=_CELL)
        table.add_column("needed", justify="right", no_wrap=True)
        for kind, layer in columns[start : start + room]:
            table.add_column(f"{kind} {layer}", no_wrap=True, width=_CELL)
        for trace in inspection.tokens:
            cells = [_cell(trace, kind, layer) for kind, layer in columns[start : start + room]]
            table.add_row(Cell(visible(trace.token)), str(trace.settled), *cells)
        console.print(table)
        console.print()
    legend = (
        f"A token needed {inspection.mean_layers:.1f} of {inspection.num_layers} layers on average. "
        "Green or =: correct from this layer on. "
        "Yellow or ~: correct here, but not in every later layer."
    )
    if blocks:
        legend += " block E: the exit block after layer E."
    console.print(legend, markup=False)


def _cell(trace: "TokenTrace", kind: str, layer: int) -> Cell:
    """The token that a layer or its exit block predicts, with its mark and colour."""
    prediction = trace.blocks[layer] if kind == "block" else trace.predictions[layer - 1]
    predicted = prediction.token
    if kind == "layer" and layer >= trace.settled:
        return Cell(f"={visible(predicted)}", "bold green")
    if predicted == trace.token:
        return Cell(f"~{visible(predicted)}", "yellow")
    return Cell(f" {visible(predicted)}", "dim")
