"""Renders chat templates in a separate process, because they come with a model and may loop or use up all memory.

It is run by its path and not imported: it needs jinja2 only. Each line of standard input is a request in JSON, and each line
of standard output its answer. Templates get the same environment as in transformers' `apply_chat_template`.
"""

import faulthandler
import json
import signal
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MEMORY = 1 << 30  # bytes of address space
_LONGEST = 1 << 24  # characters of a rendered text


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for transformers. Here it has no effect: its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=4)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _answer(request: dict[str, Any]) -> dict[str, str]:
    """`text`, or `error` with what is wrong."""
    faulthandler.dump_traceback_later(request["seconds"], exit=True)  # ends this process even inside C code
    try:
        text = _compiled(request["template"]).render(**request["values"])
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        faulthandler.cancel_dump_traceback_later()
    return {"text": text} if len(text) <= _LONGEST else {"error": f"its text is longer than {_LONGEST} characters"}


def _limit_memory() -> None:
    with suppress(ImportError, ValueError, OSError):  # Windows has no resource limits, and macOS lacks this one
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent process; this one ends with it
    _limit_memory()
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
