"""Builds commands from settings: Typer gets the flags of the fields, the command's function gets
validated settings.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

import typer
from msgspec import Meta
from typer.core import TyperCommand

from layerskip_core.checkpoint.locate import require_model
from layerskip_core.config.evaluation import HARNESS
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
_HINTS: dict[tuple[str, str], Any] = {}  # annotations by command and setting
_ALONE: set[str] = set()  # flags whose value is optional
# Flags of transformers and vLLM, and the equivalents here.
_MEANT = {
    **dict.fromkeys(("--bf16", "--fp16"), "--dtype bf16"),
    **dict.fromkeys(("--max-tokens", "--max-length"), "--max-new-tokens"),
    "--model-name-or-path": "--model",
    "--revision": "--model ID@REVISION",
    "--num-speculative-tokens": "--spec",
}
# What --help of a command with many flags shows, in this order; --help-all shows the others too.
_COMMON = {
    "finetune": "model name output preset p_max exits steps batch_size lr lora_rank dry_run",
    "train-drafter": "model name output layout exits steps batch_size start_from dry_run",
    "sweep-exits": "model task name samples exits specs max_new_tokens keep format output save",
    "generate": "prompt model exit_layer num_draft_tokens strategy policy max_new_tokens temperature "
    "system lines jsonl stats",
    "chat": "model exit_layer num_draft_tokens strategy policy max_new_tokens temperature system "
    "show_drafts stats",
    "bench": "model task name samples strategies exit_layer num_draft_tokens max_new_tokens repeats "
    "baselines format output",
    "serve": "model host port api_key batch_size queue_size kv_memory policy max_new_tokens "
    "temperature",
}
_HELP_ALL = "--help-all"
_WIDEST = 40  # characters of the choices next to a flag; longer ones go into its help
_DTYPES = {"bfloat16": "bf16", "float32": "fp32"}

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


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator: parameters with a Flag, and groups of settings, become flags; equal names share
    one.
    """
    hints = get_type_hints(function, include_extras=True)
    given = inspect.signature(function).parameters
    defaults = {
        name: None if each.default is each.empty else each.default for name, each in given.items()
    }
    parameters: dict[str, inspect.Parameter] = {}
    # What a field names (model, data): if that is missing, the error comes before torch is imported
    read = dict[str, str]()
    for name in given:
        for field, hint, default, panel in _flags(name, hints[name], defaults[name]):
            parameters.setdefault(field, _parameter(field, hint, default, panel))
            _HINTS[function.__name__.removesuffix("_model").replace("_", "-"), field] = hint
            read[field] = (
                "model" if hint == ModelArgument else getattr(flag_of(hint), "reads", None) or ""
            )

    @wraps(function)
    def run(**values: Any) -> None:
        arguments = {name: _made(name, hints[name], defaults[name], values) for name in given}
        for field, reads in read.items():
            match reads, values[field]:
                case "model", str(name):
                    require_model(name)
                case "perhaps data", str(name) if name.startswith(HARNESS) or not is_data(name):
                    pass
                case "data" | "perhaps data", str(name):
                    require_data(name, field)
        function(**arguments)

    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()} | {
        "return": None
    }
    return run


def with_flags(message: str) -> str:
    """A message of the core, with flags in place of settings in backquotes."""
    return re.sub(r"`(\w+)`", lambda match: FLAGS.get(match[1], match[0]), message)


def usage_error(error: BaseException, arguments: Sequence[str]) -> ConfigError | None:
    """The error to show for wrong usage, of a setting or of the arguments; None for an error while
    running.
    """
    if isinstance(error, ConfigError):
        is_setting = error.field is not None and not isinstance(error, ContextError)
        return error if is_setting else None  # else a prompt is at fault, or what is on disk
    # As Typer's errors, of classes that it does not export
    if not hasattr(error, "format_message"):
        return None
    context = getattr(error, "ctx", None)
    parameter = getattr(error, "param", None)
    if context is not None and parameter is not None:
        hint = _HINTS.get((context.info_name, parameter.name))
        value = _given(parameter.opts, arguments)
        if hint is not None and value is not None:
            return refused(parameter.name, needed(hint), shown(value))
    if possibilities := getattr(error, "possibilities", None):
        message = f"{error.message}{did_you_mean(possibilities)}"  # type: ignore[attr-defined]
    else:
        message = (
            error.format_message()
            .removeprefix("Invalid value: ")
            .rstrip(".")
            .replace(". Did", "; did")
        )
    help_of = "" if context is None else f" (see {context.command_path} --help)"
    return ConfigError(message[:1].lower() + message[1:] + help_of)


def _given(flags: Sequence[str], arguments: Sequence[str]) -> str | None:
    """The last value that arguments give to a flag; None if there is none."""
    value = None
    for argument, after in zip(arguments, [*arguments[1:], None], strict=True):
        flag, equals, attached = argument.replace("_", "-").partition("=")
        if flag in flags:
            value = attached if equals else after
    return value


class Command(TyperCommand):
    """A command whose --help has options under headings, and whose flags can have optional
    values.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_HELP_ALL] = _HELP_ALL in args  # for format_options, which gets no arguments
        followers = [*args[1:], "-"][: len(args)]
        alone = [
            flag in _ALONE and after.startswith("-")
            for flag, after in zip(args, followers, strict=True)
        ]
        try:
            return super().parse_args(
                ctx,
                [f"{flag}=" if empty else flag for flag, empty in zip(args, alone, strict=True)],
            )
        except Exception as error:  # of a class that Typer does not export
            meant = _MEANT.get(getattr(error, "option_name", ""), "")
            if any(meant.partition(" ")[0] in parameter.opts for parameter in self.params):
                vars(error)["possibilities"] = [meant]
            raise

    def get_help_option_names(self, ctx: Any) -> list[str]:
        return [*super().get_help_option_names(ctx), _HELP_ALL]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        shows_all = ctx.meta[_HELP_ALL]
        common = _COMMON.get(self.name or "", "").split()
        panels: dict[str, list[tuple[str, str]]] = {
            name: [] for name in ("Arguments", "Common", *get_args(Panel), "Other")
        }
        parameters = self.get_params(ctx)
        for parameter in sorted(parameters, key=lambda each: [*common, each.name].index(each.name)):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if parameter.param_type_name == "argument":
                panels["Arguments"].append(record)
            elif parameter.name in common:
                panels["Common"].append(record)
            elif parameter.name == "help":
                panels["Other"].append(("-h, --help", "Show this message and exit."))
                if common:
                    panels["Other"].append((_HELP_ALL, f"Show all {len(parameters)} options."))
            elif shows_all or not common:
                panels[getattr(parameter, "rich_help_panel", None) or "Other"].append(record)
        for panel, records in panels.items():
            if records:
                with formatter.section(panel):
                    formatter.write_dl(records)


def _group(hint: Any) -> Any:
    """The dataclass or TypedDict of an annotation; None for any other type."""
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return kind if is_dataclass(kind) or is_typeddict(kind) else None


def _value(group: Any, field: str) -> Any:
    return group.get(field) if isinstance(group, dict) else getattr(group, field)


def _flags(field: str, hint: Any, default: Any) -> Iterator[tuple[str, Any, Any, Panel | None]]:
    """Yields field, annotation, default and panel of a parameter, or of a group's fields, which
    hide nested ones.
    """
    kind = _group(hint)
    if kind is None:
        yield field, hint, default, None if (flag := flag_of(hint)) is None else flag.panel
        return
    inner = hints_of(kind)
    default = kind() if default is None else default
    panels: dict[str, Panel | None] = {}
    for name, each in inner.items():
        if flag := flag_of(each):
            panels[name] = flag.panel or (list(panels.values())[-1] if panels else None)
    hidden = {
        name
        for note in getattr(hint, "__metadata__", ())
        if isinstance(note, Without)
        for name in note
    }
    for name in {**kind.__annotations__, **inner}:  # a subclass's own fields come first
        if name in panels:
            if name not in hidden:
                yield name, inner[name], _value(default, name), panels[name]
        elif _group(inner[name]):
            for nested in _flags(name, inner[name], _value(default, name)):
                if nested[0] not in hidden and nested[0] not in panels:
                    yield nested


def _made(field: str, hint: Any, default: Any, values: Mapping[str, Any]) -> Any:
    """The value of a parameter, or the group, from Typer's values."""
    kind = _group(hint)
    if kind is not None:
        group = kind() if default is None else default
        inner = hints_of(kind)
        named = [
            name
            for name in inner
            if _group(inner[name]) or (name in values and flag_of(inner[name]))
        ]
        made = {name: _made(name, inner[name], _value(group, name), values) for name in named}
        if is_typeddict(kind):
            return {name: value for name, value in made.items() if value is not None}
        return replace(group, **made)
    value = values[field]
    flag = flag_of(hint)
    if value is None:
        return default
    if flag is not None and flag.reads == "file":
        value = "".join(text_lines(Path(value), field))
    if field == "dtype":
        value = _DTYPES.get(value, value)
    if flag is not None and flag.optional:
        value = value or True
    elif isinstance(value, str) and get_origin(alternatives(hint)[0]) is dict:
        value = parse_json(value, f"`{field}`", ConfigError)
    elif isinstance(value, str) and _is_list(hint):
        value = parse_list(value, field, hint)
    is_declared = any(isinstance(note, Flag | Meta) for note in getattr(hint, "__metadata__", ()))
    return check(field, hint, value) if is_declared else value


def _is_list(hint: Any) -> bool:
    return get_origin(alternatives(hint)[-1]) not in (None, Literal, dict)


def _parameter(field: str, hint: Any, default: Any, panel: Panel | None) -> inspect.Parameter:
    flag = flag_of(hint)
    if flag is None:
        return inspect.Parameter(
            field, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint
        )
    names = (flag.flag or "--" + field.replace("_", "-")).split("/")
    FLAGS[field] = names[0]
    kind: Any = alternatives(hint)[0]
    if flag.repeated:
        kind = list[str]
        default = None
    elif flag.optional or _is_list(hint):
        kind = str
        default = ",".join(map(str, default or ())) or None
    elif get_origin(kind) in (Literal, dict):
        kind = str
    if flag.optional:
        _ALONE.update(names)
    if kind is bool:
        names = [f"{names[0]}/--no-{names[0][2:]}"] if default is None else names
    shown = f" [default: {flag.default}]" if flag.default and default is None else ""
    choices = needed(hint).partition("one of ")[2]
    metavar = f"<{choices.replace(', ', '|')}{',...' if _is_list(hint) else ''}>"
    text = flag.help
    if flag.optional or flag.repeated or not choices:
        metavar = f"[{flag.optional}]" if flag.optional else "<str>" if flag.repeated else ""
    elif len(metavar) > _WIDEST:
        metavar = ""
        text = f"{text.removesuffix('.')}: {choices}."
    option = typer.Option(*names, help=text + shown, rich_help_panel=panel, metavar=metavar or None)
    annotation: Any = Annotated[kind if default is not None else kind | None, option]
    return inspect.Parameter(
        field, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )
