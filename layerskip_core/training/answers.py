"""What the model writes before a training: its answers to prompts, and texts of its own that are replayed.

A text is decoded once: it goes to a journal, where an interrupted run and a run with other settings of the training find it.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.loaded import Decoder
from ..checkpoint.open import for_decoding
from ..config.decoding import DecodingConfig
from ..config.training import FinetuneConfig
from ..decoding import decode_batch
from ..errors import CheckpointError
from ..losses import IGNORED
from .checkpoints import checkpoints_folder
from .data import EncodedData, replayed_rows
from .encoding import Encoder
from .sharding import process_index

BATCH = 32  # that are decoded together
MOST_REPLAYED = 4096  # texts; a run with more rows of replay sees them again: writing takes longer than training on them
_DIGITS = 16  # of a digest in the name of what a run keeps
_MEASURED = 256  # tokens of a pass that is timed
_WAIT = 1.0  # seconds


@dataclass(frozen=True)
class Text:
    """Token ids, and their labels: the ids of the answer, IGNORED elsewhere and for the first token."""

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

    def room(self, prompt: int) -> int:
        """Tokens of an answer to a prompt of so many tokens."""
        return min(self.tokens, self.max_length - prompt)


def batches_of(lengths: Sequence[int], fits: Callable[[int, int], bool]) -> list[list[int]]:
    """Batches of texts of similar length, as indices, the longest first; the same in every run.

    `fits(texts, longest)` says whether a batch may hold that many texts, of which the longest has that many tokens.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if batches and fits(len(batches[-1]) + 1, lengths[batches[-1][0]]):
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def write_answers(
    decoder: Decoder, prompts: Sequence[list[int]], how: Writing, journal: Path, report: Callable[[int], None]
) -> list[list[int]]:
    """The answer to each prompt, with its end of text if it ends by itself. Answers in the journal are not decoded again.

    `report` gets the number of answers written so far, and may raise to stop. The prompts must leave room for a token.
    """
    known = read_answers(journal)
    for batch in batches_of([len(prompt) for prompt in prompts], lambda texts, longest: texts <= BATCH):
        if all(row in known for row in batch):
            continue
        report(len(known))
        room = how.room(len(prompts[batch[0]]))
        config = DecodingConfig("autoregressive", max_new_tokens=room, temperature=how.temperature)
        seeds = [(how.seed + row) % 2**32 for row in batch]
        asked, written = [prompts[row] for row in batch], {}
        for output in decode_batch(decoder.backend, asked, config, decoder.eos_ids, seeds=seeds):
            written[batch[output.row]] = output.ids
        _append(journal, written)
        known |= written
    report(len(known))
    return [known[row] for row in range(len(prompts))]


def read_answers(journal: Path) -> dict[int, list[int]]:
    """The answers in a journal, by row. An incomplete last line, of a process that was killed or still writes, is left out.

    Raises CheckpointError for a line that `write_answers` does not write.
    """
    if not journal.is_file():
        return {}
    try:
        lines = map(json.loads, _whole_lines(journal))
        return {line["row"]: line["ids"] for line in lines}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{journal} is damaged: {error}; remove the file to write the answers again") from None


def _whole_lines(journal: Path) -> list[bytes]:
    return journal.read_bytes().split(b"\n")[:-1]


def _append(journal: Path, answers: dict[int, list[int]]) -> None:
    """Adds a line for each answer in the place of an incomplete last line."""
    lines = "".join(json.dumps({"row": row, "ids": ids}) + "\n" for row, ids in answers.items())
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        whole = sum(len(line) + 1 for line in _whole_lines(journal)) if journal.exists() else 0
        with journal.open("ab") as file:
            file.truncate(whole)
            file.write(lines.encode())
    except OSError as error:
        raise CheckpointError(f"cannot write {journal}: {error.strerror}") from error


def answers_digest(model: str, prompts: Sequence[list[int]], how: Writing, dtype: str) -> str:
    """A digest of everything that decides the answers, for the name of their journal. `model`: its fingerprint."""
    seed = how.seed if how.temperature else 0
    return digest([model, prompts, how.tokens, how.max_length, how.temperature, seed, dtype])


def digest(value: object) -> str:
    """A digest of a JSON value, for a file name."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:_DIGITS]


@dataclass(frozen=True)
class Speed:
    """Seconds of the model on this machine: of a token in a pass of many, and of a step that decodes a batch."""

    token: float
    step: float

    def writing(self, prompts: Sequence[list[int]], how: Writing) -> float:
        """Seconds that answers of the full length take."""
        return sum(map(len, prompts)) * self.token + math.ceil(len(prompts) / BATCH) * how.tokens * self.step


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


@dataclass
class Replay:
    """Rows of the original's own text among those of the data (as in Sun et al., LAMOL, ICLR 2020), sampled at temperature 1.

    The texts begin as those of a calibration: half with a random token, half with what the prompt template puts before a
    prompt, so that the model writes the prompt, too. `written` of them are in the journal; the others take `seconds`.
    """

    rows: int  # of each step
    starts: list[list[int]]
    how: Writing
    journal: Path
    packed: bool  # the data's rows are
    decoder: Decoder | None  # until the texts are there
    written: int = 0
    seconds: float = 0.0

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(len(start) + self.how.room(len(start)) for start in self.starts)

    def texts(self, report: Callable[[int], None]) -> list[dict[str, Any]]:
        """All texts as encoded rows, with labels on all their tokens; what is not in the journal is written.

        Of the processes that torchrun started the first one writes, and the others wait. `report` gets the number of texts that
        are there, and may raise to end it.
        """
        if self.decoder is not None and self.written < len(self.starts) and process_index() == 0:
            endless = replace(self.decoder, eos_ids=frozenset())  # a text goes on after the end of an answer
            write_answers(endless, self.starts, self.how, self.journal, report)
        self.decoder = None  # frees its weights
        while len(known := read_answers(self.journal)) < len(self.starts):
            report(len(known))
            time.sleep(_WAIT)
        texts = [start + known[text] for text, start in enumerate(self.starts)]
        packed = [{"documents": [0] * len(text)} if self.packed else {} for text in texts]
        return [{"input_ids": text, "labels": text, **more} for text, more in zip(texts, packed, strict=True)]


def plan_replay(config: FinetuneConfig, original: str, data: EncodedData, encoder: Encoder, device: str, steps: int) -> Replay:
    """The replay that a config asks for; the speed of the model is measured. `original`: the model's fingerprint.

    Raises ConfigError for a share that gives no row or all of them.
    """
    rows = replayed_rows(config)
    decoder = for_decoding(config.model, device, config.dtype)
    count, tokens = min(steps * rows, MOST_REPLAYED), config.retention.replay_tokens or round(data.tokens / len(data.rows))
    how = Writing(min(tokens, encoder.max_length - 1), encoder.max_length, 1.0, config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    first = torch.randint(decoder.backend.vocab_size, (count,), generator=generator).tolist()
    templated = decoder.prompt_start()[: encoder.max_length - 1]
    starts = [templated if templated and text % 2 else [token] for text, token in enumerate(first)]
    journal = checkpoints_folder(config.output) / f"replay-{answers_digest(original, starts, how, config.dtype)}.jsonl"
    known = read_answers(journal)
    missing = [start for text, start in enumerate(starts) if text not in known]
    seconds = measured_speed(decoder).writing(missing, how)
    return Replay(rows, starts, how, journal, encoder.pack, decoder, len(known), seconds)


def has_replay(output: str) -> bool:
    """Whether a run left texts there."""
    return any(checkpoints_folder(output).glob("replay-*.jsonl"))
