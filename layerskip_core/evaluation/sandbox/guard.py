"""Keeps a program from looking at its tests through the interpreter: an audit hook that ends it when it tries.

Refused are tracing, profiling, the frames of all threads and the collector's lists of objects, at any time, and the code of the
tests, of their functions and of their frames. Native code (ctypes, bytecode built by hand) reads memory without an audit event.
"""

import os
import sys
from collections.abc import Callable
from types import AsyncGeneratorType, CodeType, CoroutineType, FrameType, FunctionType, GeneratorType
from typing import Any

TESTS = "<tests>"  # the name of their code
CHANNEL = 3  # the program's descriptor to its supervisor


def keep_tests_unseen() -> None:
    """For this process, for good. What is refused is named on the channel, in one line."""
    # Globals that nothing else refers to, because a program can change those of a module. The hook knows itself by them.
    sys.addaudithook(FunctionType(_hook.__code__, {"__builtins__": {}}, None, _hook.__defaults__))


def _hook(
    event: str,
    arguments: tuple[Any, ...],
    end: Callable[[int], Any] = os._exit,
    tell: Callable[[int, bytes], Any] = os.write,
    caller: Callable[[int], FrameType] = sys._getframe,
    mine: Callable[[], dict[str, Any]] = globals,
    read: Callable[[Any, str], CodeType] = getattr,
    kind: type = type,
    function: type = FunctionType,
    frame: type = FrameType,
    generators: tuple[type, type, type] = (GeneratorType, CoroutineType, AsyncGeneratorType),
    channel: int = CHANNEL,
    tests: str = TESTS,
) -> None:
    """Names nothing but its arguments and calls nothing of the program's, and raises nothing that would show its frame."""
    if event in {
        "gc.get_objects",
        "gc.get_referents",
        "gc.get_referrers",
        "sys._current_exceptions",
        "sys._current_frames",
        "sys.addaudithook",
        "sys.monitoring.register_callback",
        "sys.remote_exec",
        "sys.setprofile",
        "sys.settrace",
    }:
        tell(channel, b"used " + event.encode() + b", which generated code may not use\n")
        end(1)
    if event == "object.__getattr__" and arguments.__len__() == 2:
        try:
            of, name = arguments
            of_kind = kind(of)
            carries_code = (
                (of_kind is function and name == "__code__")
                or (of_kind is frame and name == "f_code")
                or (of_kind is generators[0] and name == "gi_code")
                or (of_kind is generators[1] and name == "cr_code")
                or (of_kind is generators[2] and name == "ag_code")
            )
            # Reading it here is an event as well.
            if carries_code and caller(1).f_globals is not mine() and read(of, name).co_filename == tests:
                tell(channel, b"looked at the code of its tests\n")
                end(1)
        except:  # noqa: E722
            end(1)
