"""`layerskip inspect`: what the model would have answered after every layer."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from layerskip_core.config.checks import require, require_choice, require_given
from layerskip_core.config.decoding import MaxNewTokens
from layerskip_core.config.machine import MachineConfig
from layerskip_core.config.options import DECODING, MODEL, OUTPUT, check, parse_counts
from layerskip_core.config.prompting import PromptingConfig
from layerskip_core.errors import LayerSkipError
from layerskip_core.wording import visible

from .. import streams
from ..console import ResultsConsole, narrate, narrate_notes
from ..loading import use_threads
from ..signature import command

if TYPE_CHECKING:
    from layerskip_core.evaluation.inspection import Inspection, TokenTrace

_CELL = 9  # characters shown of a token
_FORMATS = ("table", "json")


@command
def inspect(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt. [default: standard input, or an example on a terminal]")
    ] = None,
    model: Annotated[
        str, typer.Option(help="embedded, embedded-base, a folder, a .gguf file or a hub id.", rich_help_panel=MODEL)
    ] = "embedded",
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens in the answer.", rich_help_panel=DECODING)] = 24,
    *,
    prompting: PromptingConfig,
    machine: MachineConfig,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers shown: 2,4,8 or A:B:STEP. [default: as many as fit]", rich_help_panel=OUTPUT),
    ] = None,
    format: Annotated[str, typer.Option(help="Format of standard output: table or json.", rich_help_panel=OUTPUT)] = "table",
    output: Annotated[str | None, typer.Option(help="HTML file with every layer.", rich_help_panel=OUTPUT)] = None,
) -> None:
    """Show what the model would have answered after every layer, and from which layer on each token was correct.

    Example: layerskip inspect "set an alarm for 7 am" --layers 2:24:2 --output inspect.html
    """
    require_choice(format, "format", _FORMATS)
    check("max_new_tokens", MaxNewTokens, max_new_tokens)
    require_given("model", model)
    require_given("output", output)
    wanted = parse_counts(layers, "layers") if layers is not None else None
    use_threads(machine.threads)
    from layerskip_core.checkpoint.open import for_decoding
    from layerskip_core.evaluation.inspection import inspect as run_inspect
    from layerskip_core.evaluation.report.pages import inspection_page
    from layerskip_core.files import require_writable, write_file

    if output is not None:
        require_writable(_page_file(output), LayerSkipError)
    loaded = for_decoding(model, machine.device, machine.dtype).with_template(prompting.asked, prompting.system)
    narrate_notes(loaded)
    use_threads(machine.threads, loaded)
    count = loaded.backend.num_layers
    console = ResultsConsole()
    shown = wanted or _spread(count, _room(console))
    require(shown[0] >= 1 and shown[-1] <= count, "layers", f"in 1..{count}", ",".join(map(str, shown)))
    inspection = run_inspect(loaded, _prompt(prompt), max_new_tokens)
    if output is not None:
        write_file(_page_file(output), inspection_page(inspection).encode(), LayerSkipError)
        narrate(f"wrote {output}")
    if format == "json":
        typer.echo(json.dumps(inspection.document(), indent=2, ensure_ascii=False))
    else:
        _print(inspection, shown, console)


def _page_file(output: str) -> Path:
    """Raises LayerSkipError if the folder does not exist, and for a file of a model, which must not be replaced."""
    from layerskip_core.checkpoint.save import model_files

    file = Path(output)
    real = file.resolve()
    if not file.parent.is_dir():
        raise LayerSkipError(f"`output` {output}: there is no folder {file.parent}")
    if real.name in model_files(real.parent):
        raise LayerSkipError(f"`output` {output} must not be a file of the model in {real.parent}; give another name")
    return file


def _prompt(given: str | None) -> str:
    if given is None and streams.is_piped():
        given = streams.prompts_stream().read().removesuffix("\n") or None
    return streams.example_prompt() if given is None else given


def _room(console: Console) -> int:
    """The number of layers that fit next to a token and its count."""
    return max(1, (console.width - _CELL - 1 - len("needed")) // (_CELL + 1))


def _spread(num_layers: int, count: int) -> tuple[int, ...]:
    """About `count` evenly spaced layers, the last one included."""
    return tuple(sorted({max(1, round(num_layers * part / count)) for part in range(1, count + 1)}))


def _print(inspection: "Inspection", layers: tuple[int, ...], console: Console) -> None:
    """A row per token, a column per layer and exit block, in as many tables as the terminal's width requires."""
    room, blocks = _room(console), inspection.tokens[0].blocks if inspection.tokens else {}
    columns = [(kind, layer) for layer in layers for kind in ("layer", "block") if kind == "layer" or layer in blocks]
    for start in range(0, len(columns), room):
        part = columns[start : start + room]
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
        table.add_column("token", no_wrap=True, width=_CELL)
        table.add_column("needed", justify="right", no_wrap=True)
        for kind, layer in part:
            table.add_column(f"{kind} {layer}", no_wrap=True, width=_CELL)
        for trace in inspection.tokens:
            cells = (_cell(trace, layer) if kind == "layer" else _block_cell(trace, layer) for kind, layer in part)
            table.add_row(Text(visible(trace.token)), str(trace.settled), *cells)
        console.print(table)
        console.print()
    console.print(
        f"A token needed {inspection.mean_layers:.1f} of {inspection.num_layers} layers on average. "
        "Green or =: correct from this layer on. Yellow or ~: correct here, but not in every later layer."
        + (" block E: the exit block after layer E." if blocks else ""),
        markup=False,
    )


def _cell(trace: "TokenTrace", layer: int) -> Text:
    predicted = trace.predictions[layer - 1].token
    return Text("=" + visible(predicted), "bold green") if layer >= trace.settled else _compared(trace, predicted)


def _block_cell(trace: "TokenTrace", exit_layer: int) -> Text:
    return _compared(trace, trace.blocks[exit_layer].token)


def _compared(trace: "TokenTrace", predicted: str) -> Text:
    return Text("~" + visible(predicted), "yellow") if predicted == trace.token else Text(" " + visible(predicted), "dim")
