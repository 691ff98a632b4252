"""Builds commands from settings: Typer gets the flags of the fields, the command's function gets
validated settings.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

import typer
from msgspec import Meta
from typer.core import TyperCommand

from layerskip_core.checkpoint.locate import require_model
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.evaluation import HARNESS
from layerskip_core.config.model import DTYPE_NAMES
from layerskip_core.config.options import (
    Flag,
    Panel,
    Text,
    Without,
    alternatives,
    check,
    flag_of,
    hints_of,
    needed,
    parse_list,
)
from layerskip_core.data import is_data, require_data
from layerskip_core.errors import ConfigError, ContextError, did_you_mean, refused, shown
from layerskip_core.files import parse_json, text_lines

FLAGS: dict[str, str] = {}  # by setting, of all commands, for messages
_WITH_OPTIONAL_VALUE: set[str] = set()  # flags
# Flags of transformers and vLLM, and the equivalents here.
_FLAGS_ELSEWHERE = {
    **dict.fromkeys(("--bf16", "--fp16"), "--dtype bf16"),
    **dict.fromkeys(("--max-tokens", "--max-length"), "--max-new-tokens"),
    "--model-name-or-path": "--model",
    "--revision": "--model ID@REVISION",
    "--num-speculative-tokens": "--spec",
}
# In commands with many flags, those that people use: --help shows these, --help-all also the rest.
_COMMON = {
    "finetune": "model name output preset p_max exits steps batch_size lr lora_rank dry_run",
    "train-drafter": "model name output layout exits steps batch_size start_from dry_run",
    "generate": "prompt model exit_layer num_draft_tokens strategy policy max_new_tokens temperature "
    "lines jsonl batch_size stats",
    "chat": "model system exit_layer num_draft_tokens strategy max_new_tokens temperature "
    "show_drafts stats",
    "serve": "model host port batch_size queue_size api_key kv_memory exit_layer num_draft_tokens "
    "strategy",
    "bench": "model task data samples exit_layer num_draft_tokens strategies baselines repeats "
    "batch_size output",
    "sweep-exits": "model task data samples exits specs batch_size output save",
}
_WIDEST = 40  # characters of the choices next to a flag; longer ones go into its help
_ALL = "layerskip.all_flags"  # in Typer's context: --help-all was given

Format = Annotated[
    Literal["table", "json", "csv", "markdown"], Flag("Format of standard output.", panel="Output")
]
ReportFolder = Annotated[
    Text | None,
    Flag(
        "Folder for report.html, answers.html, results.json, results.csv and plots.", panel="Output"
    ),
]
Overwrite = Annotated[bool, Flag("Replace an earlier result in --output.", panel="Output")]
SavedReport = Annotated[
    Text | None, Flag("Measure nothing: render this results.json again.", "--from", panel="Output")
]
ModelArgument = Annotated[
    Text,
    typer.Argument(
        help="embedded, embedded-base, a folder (also an adapter's), a .gguf file or a hub id."
    ),
]
Prompt = Annotated[
    str | None,
    typer.Argument(help="The prompt. [default: standard input, or an example on a terminal]"),
]


@dataclass(frozen=True)
class _Setting:
    """A flag or an argument: a parameter of the command's function, or a field of a group."""

    name: str
    hint: Any
    default: Any
    panel: Panel | None


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator: parameters with a Flag, and groups of settings, become flags; equal names share
    one.

        @command
        def inspect(prompt: Prompt = None, machine: MachineConfig = MachineConfig()) -> None: ...

    gives Typer a function with the argument PROMPT and the flags --device, --dtype, ... of
    MachineConfig's fields. It makes a MachineConfig of what Typer parsed, checks every value by its
    annotation, and calls `inspect(prompt, machine)`. The name of each flag goes into FLAGS, because
    errors of the core name settings: `device` is shown as --device. All commands are imported for
    every command line (cli/main.py), so FLAGS is whole before any of them runs.
    """
    hints = get_type_hints(function, include_extras=True)
    defaults = {}
    settings: dict[str, _Setting] = {}
    for name, given in inspect.signature(function).parameters.items():
        defaults[name] = None if given.default is given.empty else given.default
        for setting in _settings(name, hints[name], defaults[name]):
            settings.setdefault(setting.name, setting)

    @wraps(function)
    def run(**values: Any) -> None:
        arguments = {
            name: _argument(name, hints[name], defaults[name], values) for name in defaults
        }
        # Before torch is imported, which takes seconds
        for setting in settings.values():
            _require_present(setting, values[setting.name])
        function(**arguments)

    parameters = [_parameter(setting) for setting in settings.values()]
    if function.__name__.replace("_", "-") in _COMMON:
        parameters.append(_help_all(len(parameters)))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": None}
    return run


def with_flags(message: str) -> str:
    """A message of the core, with flags in place of settings in backquotes."""
    return re.sub(r"`(\w+)`", lambda match: FLAGS.get(match[1], match[0]), message)


def usage_error(error: BaseException) -> ConfigError | None:
    """The error to show for wrong usage, of a setting or of the arguments; None for an error while
    running.
    """
    if isinstance(error, ConfigError):
        is_setting = error.field is not None and not isinstance(error, ContextError)
        return error if is_setting else None  # else a prompt is at fault, or what is on disk
    # As Typer's errors, of classes that it does not export
    if not hasattr(error, "format_message"):
        return None
    possibilities = getattr(error, "possibilities", None)
    if possibilities:
        message = f"{error.message}{did_you_mean(possibilities)}"  # type: ignore[attr-defined]
    else:
        message = error.format_message().removeprefix("Invalid value: ").rstrip(".")
        message = message.replace(". Did", "; did")
    message = message[:1].lower() + message[1:]
    context = getattr(error, "ctx", None)
    if context is not None:
        message += f" (see {context.command_path} --help)"
    return ConfigError(message)


class Command(TyperCommand):
    """A command whose --help has options under headings, and whose flags can have optional
    values.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        completed = []
        for flag, after in zip(args, [*args[1:], "-"], strict=False):
            is_alone = flag in _WITH_OPTIONAL_VALUE and after.startswith("-")
            completed.append(f"{flag}=" if is_alone else flag)
        try:
            return super().parse_args(ctx, completed)
        except Exception as error:  # of a class that Typer does not export
            meant = _FLAGS_ELSEWHERE.get(getattr(error, "option_name", ""), "")
            if any(meant.partition(" ")[0] in parameter.opts for parameter in self.params):
                vars(error)["possibilities"] = [meant]
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        first = _COMMON.get(self.name or "", "").split()
        has_all = not first or ctx.meta.get(_ALL, False)
        panels: dict[str, list[tuple[str, str]]] = {
            name: [] for name in ("Arguments", "Common", *get_args(Panel), "Other")
        }
        by_order = {name: place for place, name in enumerate(first)}
        parameters = self.get_params(ctx)
        for parameter in sorted(parameters, key=lambda each: by_order.get(each.name, len(first))):
            panel = getattr(parameter, "rich_help_panel", None) or "Other"
            if parameter.param_type_name == "argument":
                panel = "Arguments"
            elif parameter.name in by_order:
                panel = "Common"
            record = parameter.get_help_record(ctx)
            if record and (has_all or panel in ("Arguments", "Common", "Other")):
                panels[panel].append(record)
        for panel, records in panels.items():
            if records:
                with formatter.section(panel):
                    formatter.write_dl(records)


def _help_all(count: int) -> inspect.Parameter:
    """The flag --help-all, of a command with so many flags."""

    def show(context: typer.Context, is_given: bool) -> None:
        if is_given:
            context.meta[_ALL] = True
            typer.echo(context.get_help())
            raise typer.Exit()

    option = typer.Option(
        "--help-all", is_eager=True, callback=show, help=f"Show all {count} flags and exit."
    )
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter("help_all", keyword, default=False, annotation=Annotated[bool, option])


def _require_present(setting: _Setting, value: Any) -> None:
    """Raises an error if a model or data that the value names is missing."""
    if not isinstance(value, str):
        return
    flag = flag_of(setting.hint)
    reads = None if flag is None else flag.reads
    if setting.hint == ModelArgument or reads == "model":
        require_model(value)
        return
    may_be_data = reads == "perhaps data" and is_data(value) and not value.startswith(HARNESS)
    if reads == "data" or may_be_data:
        require_data(value, setting.name)


def _group(hint: Any) -> Any:
    """The dataclass or TypedDict of an annotation; None for any other type."""
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return kind if is_dataclass(kind) or is_typeddict(kind) else None


def _field_of(group: Any, name: str) -> Any:
    return group.get(name) if isinstance(group, dict) else getattr(group, name)


def _settings(name: str, hint: Any, default: Any) -> Iterator[_Setting]:
    """A parameter, or the fields of a group and of groups in it, which they hide."""
    kind = _group(hint)
    if kind is None:
        flag = flag_of(hint)
        yield _Setting(name, hint, default, None if flag is None else flag.panel)
        return
    group = kind() if default is None else default
    inner = hints_of(kind)
    panels: dict[str, Panel | None] = {}
    panel: Panel | None = None
    for field, each in inner.items():
        flag = flag_of(each)
        if flag is not None:
            panel = flag.panel or panel  # without one, that of the field before
            panels[field] = panel
    without: set[str] = set()
    for note in getattr(hint, "__metadata__", ()):
        if isinstance(note, Without):
            without.update(note)
    for field in {**kind.__annotations__, **inner}:  # a subclass's own fields come first
        if field in panels:
            if field not in without:
                yield _Setting(field, inner[field], _field_of(group, field), panels[field])
        elif _group(inner[field]):
            for nested in _settings(field, inner[field], _field_of(group, field)):
                if nested.name not in without and nested.name not in panels:
                    yield nested


def _argument(name: str, hint: Any, default: Any, values: Mapping[str, Any]) -> Any:
    """The value of the function's parameter, perhaps a group, from Typer's values."""
    kind = _group(hint)
    if kind is None:
        return default if values[name] is None else _value(name, hint, values[name])
    group = kind() if default is None else default
    fields = {}
    for field, inner in hints_of(kind).items():
        if _group(inner) or (field in values and flag_of(inner)):
            fields[field] = _argument(field, inner, _field_of(group, field), values)
    if is_typeddict(kind):
        return {field: value for field, value in fields.items() if value is not None}
    return replace(group, **fields)


def _value(name: str, hint: Any, value: Any) -> Any:
    """A flag's value, converted from Typer's. Raises ConfigError and DataError."""
    flag = flag_of(hint)
    if flag is None:
        is_declared = any(isinstance(note, Meta) for note in getattr(hint, "__metadata__", ()))
        return check(name, hint, value) if is_declared else value
    if flag.reads == "file":
        value = "".join(text_lines(Path(value), name))
    if name == "dtype":
        value = DTYPE_NAMES.get(value, value)
    if flag.optional:
        value = value or True
    elif isinstance(value, str):
        value = _parsed(name, hint, value)
    return check(name, hint, value)


def _parsed(name: str, hint: Any, text: str) -> Any:
    """A flag's text as JSON, list or number, as its type says."""
    kind = alternatives(hint)[0]
    if get_origin(kind) is dict:
        return parse_json(text, f"`{name}`", ConfigError)
    if _is_list(hint):
        return parse_list(text, name, hint)
    if kind not in (int, float):
        return text
    try:
        return kind(text)
    except ValueError:
        raise refused(name, needed(hint), shown(text)) from None


def _is_list(hint: Any) -> bool:
    return get_origin(alternatives(hint)[-1]) not in (None, Literal, dict)


def _parameter(setting: _Setting) -> inspect.Parameter:
    """A setting's parameter for Typer: a text, but for switches and flags that can be repeated."""
    name = setting.name
    hint = setting.hint
    default = setting.default
    keyword = inspect.Parameter.KEYWORD_ONLY
    flag = flag_of(hint)
    if flag is None:
        return inspect.Parameter(name, keyword, default=default, annotation=hint)
    spellings = (flag.flag or "--" + name.replace("_", "-")).split("/")
    FLAGS[name] = spellings[0]
    text = flag.help
    kind: Any = str
    metavar = None
    if alternatives(hint)[0] is bool and not flag.optional:
        kind = bool
        if default is None:
            spellings = [f"{spellings[0]}/--no-{spellings[0][2:]}"]
    elif flag.repeated:
        kind = list[str]
        metavar = "<str>"
        default = None
    elif flag.optional:
        metavar = f"[{flag.optional}]"
        default = None
        _WITH_OPTIONAL_VALUE.update(spellings)
    else:
        metavar, more = _values_shown(hint)
        text = text.removesuffix(".") + more if more else text
        if _is_list(hint):
            default = ",".join(map(str, default or ())) or None
    shown_default = flag.default or _usual(name)
    if shown_default and default is None:
        text += f" [default: {shown_default}]"
    option = typer.Option(*spellings, help=text, rich_help_panel=setting.panel, metavar=metavar)
    annotation: Any = Annotated[kind if default is not None else kind | None, option]
    return inspect.Parameter(name, keyword, default=default, annotation=annotation)


def _usual(option: str) -> str:
    """The default of a decoding option that was not given, where it is a number or a switch."""
    default = getattr(DecodingConfig, option, None)
    if default is False:
        return "no"
    return f"{default:g}" if isinstance(default, int | float) else ""


def _values_shown(hint: Any) -> tuple[str, str]:
    """What --help shows of a flag's values: beside the flag, and at the end of its help."""
    kind = alternatives(hint)[0]
    name = kind.__name__ if kind in (int, float) else "str"
    choices = needed(hint).partition("one of ")[2]
    if not choices:
        return f"<{name}>", ""
    several = ",..." if _is_list(hint) else ""
    listed = f"<{choices.replace(', ', '|')}{several}>"
    if len(listed) > _WIDEST:
        return f"<{name}>", f": {choices}."
    return listed, ""
