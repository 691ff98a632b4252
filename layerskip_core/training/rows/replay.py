"""Replay: rows of the original's own text among those of the data (as in Sun et al., LAMOL, ICLR 2020).

The original writes the texts before the training, sampled at temperature 1. They begin as those of a calibration: half with a
random token, half with what the prompt template puts before a prompt, so that the model writes the prompt, too.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ...checkpoint.open import for_decoding
from ...config.training import FinetuneConfig
from ..loop.checkpoints import checkpoints_folder
from .answers import Writing, answers_digest, measured_speed, read_answers, write_answers, writing_seconds
from .encoded_data import EncodedData
from .encoder import Encoder
from .order import OrderedRows
from .step_rows import process_index, replayed_rows

MOST_TEXTS = 4096  # a run with more rows of replay sees them again: writing takes longer than training on them
_JOURNAL = "replay-{}.jsonl"
_WAIT = 1.0  # seconds


@dataclass(frozen=True)
class Replay:
    """The planned texts of a run, by their beginnings. `written` of them are in the journal; the others take `seconds`."""

    rows: int  # of each step
    starts: list[list[int]]
    how: Writing
    journal: Path
    packed: bool  # the data's rows are
    vocab_size: int
    written: int
    seconds: float

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(len(start) + self.how.most(len(start)) for start in self.starts)

    def known(self) -> dict[int, list[int]]:
        """What the original wrote after these beginnings, by text. Raises CheckpointError as `read_answers` does."""
        return read_answers(self.journal, self.starts, self.how, self.vocab_size)


def plan_replay(
    config: FinetuneConfig, original: str, data: EncodedData, encoder: Encoder, device: str, steps: int
) -> Replay | None:
    """The replay that a config asks for; None if there is none. `original`: the model's fingerprint.

    The speed of the model is measured. Raises ConfigError for a share that gives no row or all of them.
    """
    rows = replayed_rows(config)
    if not rows:
        return None
    decoder = for_decoding(config.model, device, config.dtype)
    vocab_size, count = decoder.backend.vocab_size, min(steps * rows, MOST_TEXTS)
    tokens = config.retention.replay_tokens or round(data.tokens / len(data.rows))
    how = Writing(min(tokens, encoder.max_length - 1), encoder.max_length, 1.0, config.seed)
    first = torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(config.seed)).tolist()
    templated = decoder.prompt_start()[: encoder.max_length - 1]
    starts = [templated if templated and text % 2 else [token] for text, token in enumerate(first)]
    journal = checkpoints_folder(config.output) / _JOURNAL.format(answers_digest(original, starts, how, config.dtype))
    replay = Replay(rows, starts, how, journal, encoder.pack, vocab_size, 0, 0.0)
    known = replay.known()
    missing = [start for text, start in enumerate(starts) if text not in known]
    return replace(replay, written=len(known), seconds=writing_seconds(missing, how, measured_speed(decoder)))


def has_journal(output: str) -> bool:
    """Whether a run left texts there."""
    return any(checkpoints_folder(output).glob(_JOURNAL.format("*")))


def replayed_texts(config: FinetuneConfig, replay: Replay, device: str, report: Callable[[int], None]) -> list[dict[str, Any]]:
    """All texts as encoded rows, with labels on all their tokens; what is not in the journal is written.

    Of the processes that torchrun started the first one writes, and the others wait. `report` gets the number of texts that
    are there, and may raise to end it.
    """
    known = replay.known()
    if len(known) < len(replay.starts) and process_index() == 0:
        # A text goes on after the end of an answer.
        decoder = replace(for_decoding(config.model, device, config.dtype), eos_ids=frozenset())
        write_answers(decoder, replay.starts, replay.how, replay.journal, report)
    while len(known := replay.known()) < len(replay.starts):
        report(len(known))
        time.sleep(_WAIT)
    texts = [start + known[text] for text, start in enumerate(replay.starts)]
    packed = [{"documents": [0] * len(text)} if replay.packed else {} for text in texts]
    return [{"input_ids": text, "labels": text, **more} for text, more in zip(texts, packed, strict=True)]


class ReplayedRows(Dataset[Any]):
    """The rows of a whole run in sequence: in each step so many texts, at even distances among the rows of the data.

    Which they are is a function of the position alone, so that resuming needs no history.
    """

    def __init__(self, rows: OrderedRows, texts: list[dict[str, Any]], replayed: int, per_step: int) -> None:
        """`rows`: those of the data, per_step - replayed of each step."""
        self._rows, self._texts = rows, texts
        self._replayed, self._per_step = replayed, per_step

    def __len__(self) -> int:
        return len(self._rows) // (self._per_step - self._replayed) * self._per_step

    def __getitem__(self, position: int) -> Any:
        step, place = divmod(position, self._per_step)
        before = place * self._replayed // self._per_step
        if (place + 1) * self._replayed // self._per_step > before:
            return self._texts[(step * self._replayed + before) % len(self._texts)]
        return self._rows[step * (self._per_step - self._replayed) + place - before]
