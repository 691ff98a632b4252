"""What the model writes before a training: its answers to prompts, or how it goes on from the beginning of a text.

An answer is decoded once: it goes to a journal, where an interrupted run and a run with other settings of the training find it.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig
from ...decoding import decode_batch
from ...errors import CheckpointError, LayerSkipError
from ...files import SchemaError, append_lines, build, drop_incomplete_line, parse_json, whole_lines
from ...losses import IGNORED

BATCH = 32  # that are decoded together
DIGITS = 16  # of the digest in the name of what a run keeps
_MEASURED = 256  # tokens of a pass that is timed


@dataclass(frozen=True)
class Text:
    """Tokens, and as labels those of them that are answers; the others are IGNORED, and so is the first."""

    ids: list[int]
    labels: list[int]

    @classmethod
    def of(cls, prompt: list[int], answer: list[int]) -> "Text":
        return cls(prompt + answer, [IGNORED] * len(prompt) + answer)

    @property
    def targets(self) -> int:
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Writing:
    """How the model writes answers: at most `tokens` each, within `max_length` with the prompt. Temperature 0 is greedy.

    A sampled answer has a seed of its own, so that equal prompts have different answers.
    """

    tokens: int
    max_length: int
    temperature: float
    seed: int

    def config(self, longest: int) -> DecodingConfig:
        """Of a batch whose longest prompt has that many tokens."""
        return DecodingConfig("autoregressive", max_new_tokens=self.most(longest), temperature=self.temperature)

    def seeds(self, rows: Sequence[int]) -> list[int]:
        return [(self.seed + row) % 2**32 for row in rows]

    def most(self, prompt: int) -> int:
        """Tokens of an answer to a prompt of so many tokens."""
        return min(self.tokens, self.max_length - prompt)


@dataclass(frozen=True)
class _Line:
    """One line of the journal."""

    row: int
    ids: list[int]


def batches_of(prompts: Sequence[list[int]]) -> list[list[int]]:
    """The rows that are decoded together, by their indices: those of similar length, the same in every run."""
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    return [order[at : at + BATCH] for at in range(0, len(order), BATCH)]


def write_answers(
    decoder: Decoder, prompts: Sequence[list[int]], how: Writing, journal: Path, report: Callable[[int], None]
) -> list[list[int]]:
    """The answer to each prompt, with its end of text if it ends by itself; those in the journal are not decoded again.

    `report` gets the number of answers that are there, and may raise to end it. The prompts must leave room for a token.
    """
    known = read_answers(journal, prompts, how, decoder.backend.vocab_size)
    drop_incomplete_line(journal, CheckpointError)
    for batch in batches_of(prompts):
        if all(row in known for row in batch):
            continue
        report(len(known))
        config, asked = how.config(len(prompts[batch[0]])), [prompts[row] for row in batch]
        written = {}
        for output in decode_batch(decoder.backend, asked, config, decoder.eos_ids, seeds=how.seeds(batch)):
            written[batch[output.row]] = output.ids
        append_lines(journal, ({"row": row, "ids": ids} for row, ids in written.items()), CheckpointError)
        known |= written
    report(len(known))
    return [known[row] for row in range(len(prompts))]


def read_answers(journal: Path, prompts: Sequence[list[int]], how: Writing, vocab_size: int) -> dict[int, list[int]]:
    """The answers that are known, by row, without an incomplete last line, of a process that was killed or still writes.

    Raises CheckpointError for a line that `write_answers` does not write.
    """
    answers = {}
    for number, line in enumerate(whole_lines(journal, CheckpointError), start=1):
        where = f"{journal}, line {number}"
        try:
            entry: _Line = build(_Line, parse_json(line, where, CheckpointError), "")
            if not (0 <= entry.row < len(prompts) and entry.ids and all(0 <= token < vocab_size for token in entry.ids)):
                raise SchemaError(f"needed a row below {len(prompts)} and tokens below {vocab_size}")
            if len(entry.ids) > (most := how.most(len(prompts[entry.row]))):
                raise SchemaError(f"needed at most {most} tokens, found {len(entry.ids)}")
        except (SchemaError, LayerSkipError) as error:
            raise CheckpointError(f"{where} is damaged: {error}; remove the file to write the answers again") from None
        answers[entry.row] = entry.ids
    return answers


def answers_digest(model: str, prompts: Sequence[list[int]], how: Writing, dtype: str) -> str:
    """Of what decides the answers, for the name of their journal; `model`: its fingerprint."""
    seed = how.seed if how.temperature else 0
    return digest([model, prompts, how.tokens, how.max_length, how.temperature, seed, dtype])


def digest(value: object) -> str:
    """Of what JSON can hold, for a name."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:DIGITS]


def writing_seconds(prompts: Sequence[list[int]], how: Writing, speed: "Speed") -> float:
    """What so many answers of the full length take."""
    return sum(map(len, prompts)) * speed.token + math.ceil(len(prompts) / BATCH) * how.tokens * speed.step


@dataclass(frozen=True)
class Speed:
    """Seconds of the model on this machine: of a token in a pass of many, and of a step that decodes a batch."""

    token: float
    step: float


@torch.inference_mode()
def measured_speed(decoder: Decoder) -> Speed:
    """Times one pass of each kind."""
    backend = decoder.backend
    length = min(_MEASURED, backend.max_positions - 1)
    cache = backend.new_cache(BATCH, length + 1)
    ids = torch.zeros(BATCH, 1, dtype=torch.long, device=backend.device)

    def seconds(ids: torch.Tensor, at: int) -> float:
        started = time.perf_counter()
        positions = torch.arange(at, at + ids.shape[1])[None].expand(len(ids), -1)
        hidden = backend.run_layers(backend.embed(ids), 0, backend.num_layers, positions, cache if len(ids) == BATCH else None)
        float(backend.unembed(hidden[:, -1:]).sum())  # waits for a device
        return time.perf_counter() - started

    whole = min(seconds(ids[:1].expand(1, length), 0) for _ in range(2))
    return Speed(whole / length, min(seconds(ids, at) for at in range(min(3, length))))
