"""Renders conversations as text with a tokenizer's chat template."""

import json
import os
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from .tokenizer import Tokenizer

TIME_LIMIT = 10.0  # seconds for one conversation; an ordinary template takes less than 10 ms
_WORKER = Path(__file__).with_name("chat_worker.py")


def has_chat_template(tokenizer: Tokenizer) -> bool:
    return bool(tokenizer.chat_template)


def require_chat_template(tokenizer: Tokenizer) -> None:
    """Raises ConfigError for a tokenizer without one."""
    if not has_chat_template(tokenizer):
        raise ConfigError("a chat template was asked for, but the model's tokenizer has none")


def render_chat(tokenizer: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    """The text of a conversation, as transformers' `apply_chat_template` renders it.

    Raises:
        ConfigError: the tokenizer has no chat template.
        CheckpointError: its template is damaged, refuses the conversation, or needs too much time or memory.
    """
    template = _template(tokenizer)
    values = {
        **tokenizer.special_tokens_map,
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    answer = _worker(os.getpid()).ask({"template": template, "values": values, "seconds": TIME_LIMIT})
    if "error" in answer:
        raise CheckpointError(f"the model's chat template cannot be used: {answer['error']}")
    return answer["text"]


def _template(tokenizer: Tokenizer) -> str:
    """The template. Of several templates it is the one named default."""
    require_chat_template(tokenizer)
    template = tokenizer.chat_template
    if isinstance(template, list):  # how tokenizer_config.json stores several
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        raise CheckpointError("the model's chat template cannot be used: needed a text, or several with one named default")
    return template


class _Worker:
    """A process that renders templates. It ends with this process, and is started again after a template has ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = _started()
            started = time.monotonic()
            try:
                line = self._exchange(self._process, json.dumps(request))
            except BaseException:  # an interrupt: a late answer must not be taken for the next one's
                self._process.kill()
                self._process = None
                raise
            if not line:
                self._process.wait()
                late = time.monotonic() - started >= TIME_LIMIT
                return {"error": f"it took longer than {TIME_LIMIT:g} seconds" if late else "it ended the process it ran in"}
            answer: dict[str, str] = json.loads(line)
            return answer

    @staticmethod
    def _exchange(process: subprocess.Popen[str], request: str) -> str:
        """The line that answers a request; empty if the process has ended."""
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            return process.stdout.readline()
        except OSError:  # a broken pipe
            return ""


@cache
def _worker(process: int) -> _Worker:
    """The worker of a process, by process id: a fork must not share its parent's worker."""
    return _Worker()


def _started() -> subprocess.Popen[str]:
    # -P: modules in the worker's folder or the working folder do not take precedence over installed ones.
    return subprocess.Popen(
        [sys.executable, "-P", str(_WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    )
