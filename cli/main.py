"""The Typer app, and the one place where a LayerSkipError, or one of the system's, becomes `error: ...` and exit status 1."""

import os
import sys
from importlib.metadata import version
from typing import Annotated, Any

# The libraries beneath are quiet by default; both must be set before transformers loads.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from typer.core import TyperGroup

from layerskip_core.errors import LayerSkipError

from . import standard_input
from .bench import bench
from .console import stderr_console
from .data import data
from .finetune import finetune
from .generate import generate
from .import_model import import_model
from .inspect import inspect
from .sweep_exits import sweep_exits


class _Commands(TyperGroup):
    """Ends quietly when the reader of stdout (`| head`) has what it wanted; Typer alone would exit with 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes there
            raise typer.Exit() from None


app = typer.Typer(
    name="layerskip",
    cls=_Commands,
    help="Turn a causal language model into a LayerSkip model and decode faster with the same output.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("finetune")(finetune)
app.command("sweep-exits")(sweep_exits)
app.command("generate")(generate)
app.command("bench")(bench)
app.command("inspect")(inspect)
app.command("import")(import_model)
app.command("data")(data)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("layerskip"))
        raise typer.Exit()


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn a causal language model into a LayerSkip model and decode faster with the same output."""


def main() -> None:
    """Runs the command line and exits: 0 done, 1 an error told in one line, 2 wrong usage, 130 interrupted."""
    standard_input.take()
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]  # whatever the locale
    try:
        app()
    except (LayerSkipError, OSError) as error:
        stderr_console().print(f"error: {error}", style=None, markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
