"""Commands made of settings: Typer sees a flag for each field, the function gets the configs."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import typer
from typer.core import TyperCommand

from layerskip_core.config.options import PANELS, Flag, checked, hints_of

from .options import ALONE, HIDDEN, flags_in, flags_of, is_settings


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A function whose parameters of a config's type became flags, one for each field that has an Option.

    A parameter's default, or else the config without arguments, gives the flags' defaults. Configs that share a field's name
    share its flag, and every one of them gets its value; the help is that of the first.
    """
    hints = get_type_hints(function, include_extras=True)
    configs: dict[str, _Group] = {}
    parameters: dict[str, inspect.Parameter] = {}
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if is_settings(hint):
            configs[parameter.name] = _Group(hint, hint() if parameter.default is parameter.empty else parameter.default)
            for flag in configs[parameter.name].flags():
                parameters.setdefault(flag.field, flag.parameter)
        else:
            parameters[parameter.name] = parameter.replace(annotation=hint, kind=parameter.KEYWORD_ONLY)

    @wraps(function)
    def run(**values: Any) -> None:
        made = {name: group.made(values) for name, group in configs.items()}
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
    option: Flag

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
        kinds = [kind for kind in _alternatives(self.hint) if kind is not NoneType]
        if any(get_origin(kind) in (tuple, Sequence) for kind in kinds):
            return list[str], None
        return str if get_origin(kinds[0]) is Literal else kinds[0], self.default

    def value(self, given: Any) -> Any:
        """The field's value, for what Typer read."""
        if given is None:
            return self.default
        if self.option.parse is not None:
            return self.option.parse(given, self.field)
        return tuple(given) if isinstance(given, list) else given


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union, without their metadata."""
    if get_origin(hint) is Annotated:
        return _alternatives(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return tuple(kind for part in get_args(hint) for kind in _alternatives(part))
    return (hint,)


@dataclass(frozen=True)
class _Group:
    """A kind of settings whose fields are flags of a command, and its default."""

    kind: Any
    default: Any

    def flags(self) -> Iterator[_Flag]:
        """The flags of its fields and of the groups in it, in the order of the fields."""
        own, nested = self._own(), self._nested()
        replaced = {*own, *HIDDEN.get(self.kind, ())}
        for field in hints_of(self.kind):
            if field in own:
                yield own[field]
            elif field in nested:
                yield from (flag for flag in nested[field].flags() if flag.field not in replaced)

    def made(self, values: Mapping[str, Any]) -> Any:
        """The settings with the values of their flags."""
        given = {flag.field: flag.value(values[flag.field]) for flag in self._own().values() if flag.field in values}
        own = checked(self.kind, given)
        if is_typeddict(self.kind):
            return own
        return replace(self.default, **{name: group.made(values) for name, group in self._nested().items()}, **own)

    def _value(self, field: str) -> Any:
        return self.default.get(field) if is_typeddict(self.kind) else getattr(self.default, field)

    def _own(self) -> dict[str, _Flag]:
        hints = hints_of(self.kind)
        return {name: _Flag(name, hints[name], self._value(name), flag) for name, flag in flags_in(self.kind).items()}

    def _nested(self) -> dict[str, "_Group"]:
        hints = {name: hint for name, hint in hints_of(self.kind).items() if is_settings(hint)}
        return {name: _Group(hint, self._value(name)) for name, hint in hints.items()}
