"""Runs a program, then its tests, in the restricted process.

The program shares this interpreter. It can change every module and, from Python 3.13 on, the local variables of every frame
above its own. Therefore the code that runs after it is created before it and has no name: it is a function on the value stack
of the frame that runs the program, and everything it calls is bound to it. This function sends a key to the supervisor when the
program has run to its end. Only then the tests arrive, with a second key, which goes back when they have run to their end.
"""

import _signal  # type: ignore[import-not-found]
import _thread
import gc
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from . import guard
from .guard import CHANNEL
from .walls import confine

KEY_BYTES = 32
_SECONDS_FOR_THREADS = 1.0  # that have ended but are not removed yet


def run_program(
    settings: dict[str, Any], channel: socket.socket, identity: int | None, separate: bool, small_tree: bool
) -> NoReturn:
    """Restricts this process, runs the program and its tests, and reports to the supervisor."""
    leave = os._exit
    try:
        _keep_only(channel)
        try:
            ready: dict[str, Any] = {"walls": confine(settings, identity, separate, small_tree)}
        except Exception as error:
            ready = {"failure": _describe(error)}
        os.write(CHANNEL, json.dumps(ready).encode() + b"\n")
        if "failure" in ready:
            leave(1)
        module = ModuleType(
            "program"
        )  # not __main__: other harnesses of these tasks do not run `if __name__ == "__main__"` either
        sys.modules["program"] = module
        sys.path.remove(sys.argv[1])
        guard.keep_tests_unseen()
        _play(module.__dict__)
    finally:
        leave(0)


def _play(namespace: dict[str, Any]) -> None:
    # The left call runs first, so that its result has no name while the program runs.
    _second_part(_receive(KEY_BYTES))(_first_part(_receive_text(), namespace), namespace)


def _first_part(program: str, namespace: dict[str, Any]) -> BaseException | None:
    """Runs the program; returns what it raised."""
    try:
        exec(compile(program, "<program>", "exec", dont_inherit=True), namespace)
    except BaseException as error:
        return error
    return None


def _second_part(key: bytes) -> Callable[[BaseException | None, dict[str, Any]], None]:
    """The function that runs the tests. It uses only its arguments and looks up no global and no builtin."""
    every_signal = frozenset(signal.valid_signals())

    def exactly(size: int, read: Callable[[int, int], bytes] = os.read, channel: int = CHANNEL) -> bytes:
        data = part = read(channel, size)
        while part and data.__len__() < size:
            part = read(channel, size - data.__len__())
            data += part
        return data

    def text(receive: Callable[[int], bytes] = exactly, number: Callable[[bytes, Any], int] = int.from_bytes) -> str:
        return receive(number(receive(8), "little")).decode("utf-8", "surrogatepass")

    def finisher(key: bytes, send: Callable[[int, bytes], int] = os.write, channel: int = CHANNEL) -> Callable[[None], None]:
        def finish(_: None, key: bytes = key, send: Callable[[int, bytes], int] = send, channel: int = channel) -> None:
            send(channel, key + b"\n")

        return finish

    def freed(
        namespace: dict[str, Any],
        collects: bool,
        collect: Callable[[], None] = gc.enable,
        mask: Callable[[int, Any], Any] = _signal.pthread_sigmask,
        unblock: int = int(signal.SIG_UNBLOCK),
        signals: frozenset[int] = every_signal,
    ) -> dict[str, Any]:
        """Returns the namespace, after allowing the program's own signal handlers and finalizers to run again."""
        if collects:
            collect()
        mask(unblock, signals)
        return namespace

    def alone(
        threads: Callable[[], int] = _thread._count,
        sleep: Callable[[float], None] = time.sleep,
        left: float = _SECONDS_FOR_THREADS,
    ) -> bool:
        while threads() and left > 0:
            sleep(0.01)
            left -= 0.01
        return not threads()

    def judge(
        error: BaseException | None,
        namespace: dict[str, Any],
        key: bytes = key,
        alone: Callable[[], bool] = alone,
        text: Callable[[], str] = text,
        freed: Callable[[dict[str, Any], bool], dict[str, Any]] = freed,
        finisher: Callable[[bytes], Callable[[None], None]] = finisher,
        receive: Callable[[int], bytes] = exactly,
        key_bytes: int = KEY_BYTES,
        describe: Callable[[BaseException], str] = _describe,
        send: Callable[[int, bytes], int] = os.write,
        channel: int = CHANNEL,
        run: Any = exec,
        translate: Any = compile,
        name: str = guard.TESTS,
        mask: Callable[[int, Any], Any] = _signal.pthread_sigmask,
        block: int = int(signal.SIG_BLOCK),
        signals: frozenset[int] = every_signal,
        collects: Callable[[], bool] = gc.isenabled,
        collect_no_more: Callable[[], None] = gc.disable,
        process: Callable[[], int] = os.getpid,
        me: int = os.getpid(),
        anything: type[BaseException] = BaseException,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        if process() != me:  # a process that the program forked
            leave(0)
        try:
            if error is None:
                mask(block, signals)  # runs the handlers of pending signals
                collected = collects()
                collect_no_more()
                if alone():
                    send(channel, key + b"\n")
                    # The text, its code and the second key get no names here.
                    finisher(receive(key_bytes))(run(translate(text(), name, "exec", 0, True), freed(namespace, collected)))
                else:
                    send(channel, b"left a thread running\n")
        except anything as failure:
            error = failure
        if error is not None:
            send(channel, describe(error).encode("utf-8", "replace") + b"\n")

    return judge


def _keep_only(channel: socket.socket) -> None:
    """Leaves an empty input, two discarded outputs and the channel, as descriptor CHANNEL; closes all other descriptors."""
    ended, writer = os.pipe()
    os.close(writer)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for source, stream in ((ended, 0), (nowhere, 1), (nowhere, 2), (channel.fileno(), CHANNEL)):
        if source != stream:
            os.dup2(source, stream)
    os.closerange(CHANNEL + 1, os.sysconf("SC_OPEN_MAX"))


def _receive(size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = os.read(CHANNEL, size - len(data))
        if not part:
            raise EOFError("the supervisor has ended")
        data += part
    return data


def _receive_text() -> str:
    return _receive(int.from_bytes(_receive(8), "little")).decode("utf-8", "surrogatepass")


def _describe(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException:
        text = ""
    line = " ".join(f"{type(error).__name__}: {text}".split()) if text else type(error).__name__
    return line[:200]
