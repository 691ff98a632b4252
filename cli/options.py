"""Builds commands from settings: Typer gets the flags of the fields, the command's function gets
validated settings.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
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
_HINTS: dict[str, dict[str, Any]] = {}  # annotations by command and setting, for messages
_OPTIONAL_VALUE: set[str] = set()  # flags that can stand without a value
# Flags of transformers and vLLM, and the equivalents here.
_FLAGS_ELSEWHERE = {
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


@dataclass(frozen=True)
class _Setting:
    """A parameter of a command, or a field of a group of settings among its parameters."""

    name: str
    hint: Any
    default: Any
    panel: Panel | None

    @property
    def flag(self) -> Flag | None:
        return flag_of(self.hint)

    @property
    def is_list(self) -> bool:
        return get_origin(alternatives(self.hint)[-1]) not in (None, Literal, dict)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator: parameters with a Flag, and the fields of groups of settings, become flags.

    Equal names share one flag.
    """
    hints = get_type_hints(function, include_extras=True)
    defaults = {}
    settings: dict[str, _Setting] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        defaults[name] = None if parameter.default is parameter.empty else parameter.default
        for setting in _settings(name, hints[name], defaults[name]):
            settings.setdefault(setting.name, setting)
    _HINTS[_command_name(function)] = {name: setting.hint for name, setting in settings.items()}

    @wraps(function)
    def run(**values: Any) -> None:
        arguments = {
            name: _converted(name, hints[name], default, values)
            for name, default in defaults.items()
        }
        for setting in settings.values():
            _require_it_exists(setting, values[setting.name])
        function(**arguments)

    parameters = [_parameter(setting) for setting in settings.values()]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__annotations__["return"] = None
    return run


def _command_name(function: Callable[..., None]) -> str:
    return function.__name__.removesuffix("_model").replace("_", "-")


def _require_it_exists(setting: _Setting, value: Any) -> None:
    """Raises ConfigError for a model or data that are not there, before torch is imported."""
    if not isinstance(value, str):
        return
    reads = None if setting.flag is None else setting.flag.reads
    if reads == "model" or setting.hint == ModelArgument:
        require_model(value)
    perhaps = reads == "perhaps data" and not value.startswith(HARNESS) and is_data(value)
    if reads == "data" or perhaps:
        require_data(value, setting.name)


def with_flags(message: str) -> str:
    """A message of the core, with flags in place of settings in backquotes."""
    return re.sub(r"`(\w+)`", lambda match: FLAGS.get(match[1], match[0]), message)


def usage_error(error: BaseException, arguments: Sequence[str]) -> ConfigError | None:
    """The error to show for wrong usage; None for an error while running."""
    if isinstance(error, ConfigError):
        # Without a field what is on disk is at fault, with a ContextError the prompt.
        is_setting = error.field is not None and not isinstance(error, ContextError)
        return error if is_setting else None
    if not hasattr(error, "format_message"):  # Typer does not export the classes of its errors
        return None
    context = getattr(error, "ctx", None)
    parameter = getattr(error, "param", None)
    if context is not None and parameter is not None:
        hint = _HINTS.get(context.info_name, {}).get(parameter.name)
        value = _given_value(parameter.opts, arguments)
        if hint is not None and value is not None:
            return refused(parameter.name, needed(hint), shown(value))
    possibilities = getattr(error, "possibilities", None)
    if possibilities:
        message = f"{error.message}{did_you_mean(possibilities)}"  # type: ignore[attr-defined]
    else:
        message = error.format_message().removeprefix("Invalid value: ").rstrip(".")
        message = message.replace(". Did", "; did")
    help_of = "" if context is None else f" (see {context.command_path} --help)"
    return ConfigError(message[:1].lower() + message[1:] + help_of)


def _given_value(flags: Sequence[str], arguments: Sequence[str]) -> str | None:
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
        completed = []
        for arg, after in zip(args, [*args[1:], "-"], strict=False):
            # Typer needs a value: an empty one says that none was given.
            stands_alone = arg in _OPTIONAL_VALUE and after.startswith("-")
            completed.append(f"{arg}=" if stands_alone else arg)
        try:
            return super().parse_args(ctx, completed)
        except Exception as error:  # of a class that Typer does not export
            ours = _FLAGS_ELSEWHERE.get(getattr(error, "option_name", ""), "")
            if any(ours.partition(" ")[0] in parameter.opts for parameter in self.params):
                vars(error)["possibilities"] = [ours]
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


def _field_value(group: Any, field: str) -> Any:
    return group.get(field) if isinstance(group, dict) else getattr(group, field)


def _settings(name: str, hint: Any, default: Any) -> Iterator[_Setting]:
    """The settings of a parameter: itself, or the fields of a group and of the groups in it.

    A group's own fields hide those of equal name in the groups in it.
    """
    kind = _group(hint)
    if kind is None:
        flag = flag_of(hint)
        yield _Setting(name, hint, default, None if flag is None else flag.panel)
        return
    fields = hints_of(kind)
    group = kind() if default is None else default
    panels: dict[str, Panel | None] = {}
    panel: Panel | None = None
    for field, field_hint in fields.items():
        flag = flag_of(field_hint)
        if flag is not None:
            panel = flag.panel or panel  # without one, under the heading of the field before
            panels[field] = panel
    left_out = set[str]()
    for note in getattr(hint, "__metadata__", ()):
        if isinstance(note, Without):
            left_out.update(note)
    for field in {**kind.__annotations__, **fields}:  # a subclass's own fields come first
        if field in left_out:
            continue
        if field in panels:
            value = _field_value(group, field)
            yield _Setting(field, fields[field], value, panels[field])
        elif _group(fields[field]):
            for setting in _settings(field, fields[field], _field_value(group, field)):
                if setting.name not in left_out and setting.name not in panels:
                    yield setting


def _converted(name: str, hint: Any, default: Any, values: Mapping[str, Any]) -> Any:
    """A parameter's value, or a group with its values, from what Typer parsed."""
    kind = _group(hint)
    if kind is None:
        value = values[name]
        return default if value is None else _parsed(_Setting(name, hint, default, None), value)
    group = kind() if default is None else default
    fields = {}
    for field, field_hint in hints_of(kind).items():
        if _group(field_hint) or (field in values and flag_of(field_hint)):
            fields[field] = _converted(field, field_hint, _field_value(group, field), values)
    if is_typeddict(kind):
        return {field: value for field, value in fields.items() if value is not None}
    return replace(group, **fields)


def _parsed(setting: _Setting, value: Any) -> Any:
    """A flag's value as its type has it. Raises ConfigError."""
    flag = setting.flag
    if flag is not None and flag.reads == "file":
        value = "".join(text_lines(Path(value), setting.name))
    if setting.name == "dtype":
        value = _DTYPES.get(value, value)
    if flag is not None and flag.optional:
        value = value or True
    elif isinstance(value, str) and get_origin(alternatives(setting.hint)[0]) is dict:
        value = parse_json(value, f"`{setting.name}`", ConfigError)
    elif isinstance(value, str) and setting.is_list:
        value = parse_list(value, setting.name, setting.hint)
    notes = getattr(setting.hint, "__metadata__", ())
    is_declared = any(isinstance(note, Flag | Meta) for note in notes)
    return check(setting.name, setting.hint, value) if is_declared else value


def _parameter(setting: _Setting) -> inspect.Parameter:
    """What Typer reads of a setting: the type of its value, its flag and its line of --help."""
    flag = setting.flag
    kind: Any = alternatives(setting.hint)[0]
    default = setting.default
    annotation = setting.hint
    if flag is not None:
        if flag.repeated:
            kind = list[str]
            default = None
        elif flag.optional or setting.is_list:
            kind = str
            default = ",".join(map(str, default or ())) or None
        elif get_origin(kind) in (Literal, dict):
            kind = str
        option = _typer_option(setting, flag, kind, default)
        annotation = Annotated[kind if default is not None else kind | None, option]
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _typer_option(setting: _Setting, flag: Flag, kind: Any, default: Any) -> Any:
    names = (flag.flag or "--" + setting.name.replace("_", "-")).split("/")
    FLAGS[setting.name] = names[0]
    if flag.optional:
        _OPTIONAL_VALUE.update(names)
    if kind is bool and default is None:
        names = [f"{names[0]}/--no-{names[0][2:]}"]
    text = flag.help
    choices = needed(setting.hint).partition("one of ")[2]
    metavar = None
    if flag.optional:
        metavar = f"[{flag.optional}]"
    elif flag.repeated:
        metavar = "<str>"
    elif choices:
        more = ",..." if setting.is_list else ""
        metavar = f"<{choices.replace(', ', '|')}{more}>"
        if len(metavar) > _WIDEST:
            metavar = None
            text = f"{text.removesuffix('.')}: {choices}."
    if flag.default and default is None:
        text += f" [default: {flag.default}]"
    return typer.Option(*names, help=text, rich_help_panel=setting.panel, metavar=metavar)
