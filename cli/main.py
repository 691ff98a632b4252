"""The Typer app; every exception becomes `error: ...` and exit status 1 here."""

import os
import sys
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

# Quiet by default; both must be set before transformers is imported.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from typer.core import TyperGroup

from .console import discard_output, open_streams, print_error
from .options import Command, usage_error

# One module per command, in the order of --help, which shows the module's docstring.
_COMMANDS = (
    "finetune",
    "train_drafter",
    "sweep_exits",
    "generate",
    "chat",
    "bench",
    "compare",
    "inspect",
    "calibrate",
    "import_model",
    "export",
    "serve",
    "data",
)


class _Commands(TyperGroup):
    """Ends quietly when the reader of stdout (`| head`) goes away; Typer alone exits with 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            discard_output()
            raise typer.Exit() from None


_HELP = """Turn a causal language model into a LayerSkip model and decode faster with the same output.

\b
convert or attach  finetune trains the model's own exits, train-drafter a drafter beside it
measure            sweep-exits finds the fastest setting, bench compares strategies, compare compares runs
generate           generate answers prompts, chat holds a conversation
serve              serve offers an OpenAI-compatible API
"""

app = typer.Typer(
    name="layerskip",
    cls=_Commands,
    help=_HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)
for _name in _COMMANDS:
    _module = import_module(f".commands.{_name}", __package__)
    _command = app.command(
        _name.removesuffix("_model").replace("_", "-"), cls=Command, short_help=_module.__doc__
    )
    _command(getattr(_module, _name))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("layerskip"))
        raise typer.Exit()


@app.callback()
def _root(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; accepted anywhere.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line and exits: 0 done; after an error in one line 2 for wrong usage, else
    1; 130 interrupted.
    """
    open_streams()
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    given = [argument for argument in arguments[:end] if argument != "--debug"]
    debug = len(given) < end or os.environ.get("LAYERSKIP_DEBUG", "0") not in ("", "0")
    given += arguments[end:]
    try:
        status = app(given, prog_name="layerskip", standalone_mode=False) or 0
        sys.stdout.flush()
    except BrokenPipeError:
        status = 0
    except KeyboardInterrupt:
        status = 130
    # Including panics of the tokenizers library, which are not Exceptions
    except BaseException as error:
        wrong_usage = usage_error(error)
        status = 1 if wrong_usage is None else 2
        print_error(wrong_usage or error, debug)
    else:
        sys.exit(status)
    discard_output()  # so that the interpreter's exit does not fail
    sys.exit(status)
