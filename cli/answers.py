"""Answers to requests, one by one or in batches, in order, to standard output."""

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.packing import PackingConfig
from layerskip_core.errors import ConfigError, LayerSkipError

from .console import narrate
from .options import with_flags
from .requests import Request, of_row

if TYPE_CHECKING:
    from layerskip_core.checkpoint.loaded import Decoder
    from layerskip_core.decoding import DecodeStats
    from layerskip_core.decoding.text import Answer, TextStream


def answer_all(
    loaded: "Decoder", packing: PackingConfig, requests: Iterator[Request], lines: bool, jsonl: bool
) -> tuple[bool, "DecodeStats"]:
    """Answers every request in order; returns whether one failed, and the counts of all. `packing`: as it was asked for."""
    from layerskip_core.decoding import DecodeStats
    from layerskip_core.decoding.text import TextStream

    failed, total = False, DecodeStats()
    for request in requests:
        try:
            answer = TextStream(loaded, request.prompt, _resolved(loaded, packing, request))
            for piece in answer:
                if not jsonl:
                    _write(piece)
        except LayerSkipError as error:
            if not (lines or jsonl):
                raise
            failed = True
            _report(error, request.number, jsonl)
        else:
            total = total + answer.stats
            if jsonl:
                _write_object(answer, loaded.policy_for(request.settings, packing))
        _write("\n")
    return failed, total


def answer_in_batches(
    loaded: "Decoder", packing: PackingConfig, requests: Iterator[Request], batch_size: int, jsonl: bool
) -> tuple[bool, "DecodeStats"]:
    """The same, `batch_size` requests at a time; those of them with equal settings are decoded together."""
    from layerskip_core.decoding import DecodeStats

    failed, total = False, DecodeStats()
    while batch := list(islice(requests, batch_size)):
        answers, stats = _answered_together(loaded, packing, batch)
        total = total + stats
        for request, answer in zip(batch, answers, strict=True):
            if isinstance(answer, LayerSkipError):
                failed = True
                _report(answer, request.number, jsonl)
            elif jsonl:
                _write_object(answer, loaded.policy_for(request.settings, packing))
            else:
                _write(answer.text)
            _write("\n")
    return failed, total


def _answered_together(
    loaded: "Decoder", packing: PackingConfig, batch: Sequence[Request]
) -> "tuple[list[Answer | LayerSkipError], DecodeStats]":
    """An answer or an error for each request of a batch, and the stats of all."""
    from layerskip_core.decoding import DecodeStats
    from layerskip_core.decoding.text import Answer, answer_together

    answers: dict[int, Answer | LayerSkipError] = {}
    groups: dict[DecodingConfig, list[int]] = {}
    for place, request in enumerate(batch):
        try:
            groups.setdefault(_resolved(loaded, packing, request), []).append(place)
        except LayerSkipError as error:
            answers[place] = error
    total = DecodeStats()
    for config, places in groups.items():
        answer = _answered_singly if config.exit_confidence else answer_together
        group, stats = answer(loaded, [batch[place].prompt for place in places], config)
        answers |= zip(places, group, strict=True)
        total = total + stats
    return [answers[place] for place in range(len(batch))], total


def _answered_singly(
    loaded: "Decoder", prompts: Sequence[str], config: DecodingConfig
) -> "tuple[list[Answer | LayerSkipError], DecodeStats]":
    """As `answer_together`, for tokens that leave at different exits: such prompts cannot share passes."""
    from layerskip_core.decoding import DecodeStats
    from layerskip_core.decoding.text import Answer, TextStream

    answers: list[Answer | LayerSkipError] = []
    total = DecodeStats()
    for prompt in prompts:
        try:
            stream = TextStream(loaded, prompt, config)
            for _ in stream:
                pass
            answers.append(stream.answer)
            total = total + stream.stats
        except LayerSkipError as error:
            answers.append(error)
    return answers, total


def _resolved(loaded: "Decoder", packing: PackingConfig, request: Request) -> DecodingConfig:
    """How a request is decoded. Raises LayerSkipError if that cannot be."""
    if request.problem is not None:
        raise LayerSkipError(request.problem)
    try:
        return loaded.resolve(request.settings, packing)
    except ConfigError as error:
        raise LayerSkipError(of_row(error)) from None


def _report(error: LayerSkipError, number: int, jsonl: bool) -> None:
    """Prints an error in place of an answer."""
    message = f"line {number}: {error}"
    if jsonl:
        _write(json.dumps({"error": with_flags(message)}, ensure_ascii=False))
    else:
        narrate(f"error: {message}")


def _write_object(answer: "TextStream | Answer", policy: str | None) -> None:
    stats = answer.stats
    document = {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "policy": policy,
        "prompt_tokens": stats.prompt_tokens,
        "new_tokens": stats.new_tokens,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "rounds": stats.rounds,
        "acceptance_rate": round(stats.acceptance_rate, 4),
        "steps_by_drafter": stats.steps_by_drafter,
        "mean_layers": round(stats.mean_layers, 2),
    }
    _write(json.dumps(document, ensure_ascii=False))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
