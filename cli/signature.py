"""Commands made of configs: Typer sees a flag for each field, the function gets the configs."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import wraps
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from .options import ALONE, HIDDEN, OPTIONS, PANELS, Option, flags_of


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A function whose parameters of a config's type became flags, one for each field that has an Option.

    A parameter's default, or else the config without arguments, gives the flags' defaults. Configs that share a field's name
    share its flag, and every one of them gets its value; the help is that of the first.
    """
    hints = get_type_hints(function, include_extras=True)
    configs: dict[str, Any] = {}
    parameters: dict[str, inspect.Parameter] = {}
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if hint in OPTIONS:
            configs[parameter.name] = hint() if parameter.default is parameter.empty else parameter.default
            for flag in _flags_of(configs[parameter.name]):
                parameters.setdefault(flag.field, flag.parameter)
        else:
            parameters[parameter.name] = parameter.replace(annotation=hint, kind=parameter.KEYWORD_ONLY)

    @wraps(function)
    def run(**values: Any) -> None:
        made = {name: _made(config, values) for name, config in configs.items()}
        own = {name: value for name, value in values.items() if name in hints and name not in configs}
        function(**own, **made)

    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()} | {"return": None}
    return run


class Command(TyperCommand):
    """A command whose --help lists the options under the headings of their panels, and whose flags can have optional values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        followers = [*args[1:], "-"][: len(args)]
        alone = [flag in ALONE and after.startswith("-") for flag, after in zip(args, followers, strict=True)]
        return super().parse_args(ctx, [f"{flag}=" if empty else flag for flag, empty in zip(args, alone, strict=True)])

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                panel = (
                    "Arguments"
                    if parameter.param_type_name == "argument"
                    else str(getattr(parameter, "rich_help_panel", None) or "Other")
                )
                panels.setdefault(panel, []).append(record)
        for panel in ("Arguments", *PANELS, "Other"):
            if panel in panels:
                with formatter.section(panel):
                    formatter.write_dl(panels[panel])


@dataclass(frozen=True)
class _Flag:
    """A field as Typer takes it."""

    field: str
    hint: Any
    default: Any
    option: Option

    @property
    def parameter(self) -> inspect.Parameter:
        kind, default = self._kind_and_default()
        flags = flags_of(self.field, self.option)
        if kind is bool and self.default is None:
            flags = (f"{flags[0]}/--no-{flags[0][2:]}",)
        shown = f" [default: {self.option.default}]" if self.option.default and default is None else ""
        metavar = f"[{self.option.optional}]" if self.option.optional else "<str>" if kind == list[str] else None
        option = typer.Option(*flags, help=self.option.help + shown, rich_help_panel=self.option.panel, metavar=metavar)
        annotation: Any = Annotated[kind if default is not None else kind | None, option]
        return inspect.Parameter(self.field, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    def _kind_and_default(self) -> tuple[Any, Any]:
        if self.option.parse is not None:
            return str, ",".join(map(str, self.default or ())) or None
        kind = next(kind for kind in _alternatives(self.hint) if kind is not NoneType)
        if get_origin(kind) is tuple:
            return list[str], None
        return str if get_origin(kind) is Literal else kind, self.default

    def value(self, given: Any) -> Any:
        """The field's value, for what Typer read."""
        if given is None:
            return self.default
        if self.option.parse is not None:
            return self.option.parse(given, self.field)
        return tuple(given) if isinstance(given, list) else given


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _own_flags(config: Any) -> Iterator[_Flag]:
    hints, options = get_type_hints(type(config)), OPTIONS[type(config)]
    for field in fields(config):
        if field.name in options:
            yield _Flag(field.name, hints[field.name], getattr(config, field.name), options[field.name])


def _nested(config: Any) -> dict[str, Any]:
    """The configs among a config's fields."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: value for name, value in values.items() if type(value) in OPTIONS}


def _flags_of(config: Any) -> Iterator[_Flag]:
    """The flags of a config and of the configs in it, in the order of the fields."""
    nested = _nested(config)
    own = {flag.field: flag for flag in _own_flags(config)}
    replaced = {*own, *HIDDEN.get(type(config), ())}
    for field in fields(config):
        if field.name in own:
            yield own[field.name]
        elif field.name in nested:
            yield from (flag for flag in _flags_of(nested[field.name]) if flag.field not in replaced)


def _made(config: Any, values: Mapping[str, Any]) -> Any:
    """The config with the values of its flags."""
    nested = {name: _made(value, values) for name, value in _nested(config).items()}
    own = {flag.field: flag.value(values[flag.field]) for flag in _own_flags(config) if flag.field in values}
    return replace(config, **nested, **own)
