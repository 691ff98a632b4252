"""Prompts from the argument or standard input, answered one by one or in batches, in order, to standard output."""

import json
import sys
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.errors import DataError, LayerSkipError
from layerskip_core.storage.json_reading import parse_json

from . import standard_input
from .console import narrate
from .options import with_flags

if TYPE_CHECKING:
    from layerskip_core.checkpoint.loaded import Decoder
    from layerskip_core.decoding import DecodeStats
    from layerskip_core.decoding.text import Answer, TextStream


def answer_all(
    loaded: "Decoder", config: DecodingConfig, prompt: str | None, lines: bool, jsonl: bool
) -> tuple[bool, "DecodeStats"]:
    """Answers every prompt in order; returns whether one failed, and the counts of all."""
    from layerskip_core.decoding import DecodeStats
    from layerskip_core.decoding.text import TextStream

    failed, total = False, DecodeStats()
    for number, text, problem in _prompts(prompt, lines, jsonl):
        try:
            if problem:
                raise LayerSkipError(problem)
            answer = TextStream(loaded, text, config)
            for piece in answer:
                if not jsonl:
                    _write(piece)
        except LayerSkipError as error:
            if not (lines or jsonl):
                raise
            failed = True
            _report(error, number, jsonl)
        else:
            total = total + answer.stats
            if jsonl:
                _write(json.dumps(_answer_object(answer), ensure_ascii=False))
        _write("\n")
    return failed, total


def answer_in_batches(loaded: "Decoder", config: DecodingConfig, batch_size: int, jsonl: bool) -> tuple[bool, "DecodeStats"]:
    """The same for the lines of standard input, `batch_size` of them at a time."""
    from layerskip_core.decoding import DecodeStats
    from layerskip_core.decoding.text import answer_together

    failed, total = False, DecodeStats()
    prompts = _prompts(None, not jsonl, jsonl)
    while batch := list(islice(prompts, batch_size)):
        good = [text for _, text, problem in batch if not problem]
        answers, stats = answer_together(loaded, good, config)
        total = total + stats
        left = iter(answers)
        for number, _, problem in batch:
            answer = LayerSkipError(problem) if problem else next(left)
            if isinstance(answer, LayerSkipError):
                failed = True
                _report(answer, number, jsonl)
            else:
                _write(json.dumps(_answer_object(answer), ensure_ascii=False) if jsonl else answer.text)
            _write("\n")
    return failed, total


def _report(error: LayerSkipError, number: int, jsonl: bool) -> None:
    """Prints an error in place of an answer."""
    if jsonl:
        _write(json.dumps({"error": with_flags(str(error))}, ensure_ascii=False))
    else:
        narrate(f"error: line {number}: {error}")


def _prompts(prompt: str | None, lines: bool, jsonl: bool) -> Iterator[tuple[int, str, str | None]]:
    """(line number, prompt, what is wrong with it): the argument, all of standard input, or each line of it."""
    if prompt is not None:
        yield 1, prompt, None
        return
    stream = standard_input.prompts_stream()
    if not (lines or jsonl):
        yield 1, stream.read().removesuffix("\n"), None
        return
    for number, line in enumerate(stream, start=1):
        line = line.rstrip("\r\n")
        if not jsonl:
            yield number, line, None
        elif line.strip():
            yield number, *_prompt_of(line, number)


def _prompt_of(line: str, number: int) -> tuple[str, str | None]:
    try:
        row = parse_json(line, f"line {number}", DataError)
    except DataError as error:
        return "", str(error)
    text = row.get("prompt") if isinstance(row, dict) else None
    return (text, None) if isinstance(text, str) else ("", f"line {number}: needed an object with a text `prompt`")


def _answer_object(answer: "TextStream | Answer") -> dict[str, object]:
    stats = answer.stats
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": stats.prompt_tokens,
        "new_tokens": stats.new_tokens,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "rounds": stats.rounds,
        "acceptance_rate": round(stats.acceptance_rate, 4),
        "steps_by_drafter": stats.steps_by_drafter,
    }


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
