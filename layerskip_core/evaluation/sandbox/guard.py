"""An audit hook that ends a program when it tries to inspect its tests through the interpreter.

It refuses, at any time, tracing, profiling, the frames of all threads and the garbage collector's lists of objects; and reading
the code of the tests, of their functions and of their frames. Native code (ctypes, hand-made bytecode) can read memory without
an audit event.
"""

import os
import sys
from collections.abc import Callable
from types import AsyncGeneratorType, CodeType, CoroutineType, FrameType, FunctionType, GeneratorType
from typing import Any

TESTS = "<tests>"  # the file name of the tests' code
CHANNEL = 3  # the file descriptor from the program to the supervisor


def keep_tests_unseen() -> None:
    """Installs the hook in this process, permanently. It reports what it refused on the channel, in one line."""
    # Its own globals dict, because a program can change a module's. The hook recognises its own frames by it.
    sys.addaudithook(FunctionType(_hook.__code__, {"__builtins__": {}}, None, _hook.__defaults__))


def _hook(
    event: str,
    arguments: tuple[Any, ...],
    end: Callable[[int], Any] = os._exit,
    tell: Callable[[int, bytes], Any] = os.write,
    caller: Callable[[int], FrameType] = sys._getframe,
    own_globals: Callable[[], dict[str, Any]] = globals,
    read: Callable[[Any, str], CodeType] = getattr,
    kind: type = type,
    function: type = FunctionType,
    frame: type = FrameType,
    generators: tuple[type, type, type] = (GeneratorType, CoroutineType, AsyncGeneratorType),
    channel: int = CHANNEL,
    tests: str = TESTS,
) -> None:
    """Uses only its arguments, calls nothing that the program can change, and raises nothing, which would expose its frame."""
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
            # Reading it here triggers this event again.
            if carries_code and caller(1).f_globals is not own_globals() and read(of, name).co_filename == tests:
                tell(channel, b"looked at the code of its tests\n")
                end(1)
        except:  # noqa: E722
            end(1)
