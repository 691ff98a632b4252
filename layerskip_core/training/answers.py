"""Texts that the model writes before its training, kept in a journal: answers to prompts, and texts
to replay.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ..checkpoint.loaded import Decoder
from ..config.decoding import DecodingConfig
from ..config.training import FinetuneConfig
from ..decoding import DecodingLoop, decode_batch
from ..errors import CheckpointError, ConfigError, require
from ..files import append_lines, whole_lines, write_file
from ..losses import IGNORED
from .data import RunData, step_rows
from .encoding import EncodedRow, encoded_row
from .progress import WorkReport, checkpoints_folder
from .sharding import process_index

BATCH = 32  # prompts decoded together
_APART = 1 << 31  # flips a bit of the seed: `own_texts` and replayed texts differ
OWN_TEXTS = 32  # of the original, to measure a training's cost on
OWN_TOKENS = 64  # of each
# Longer runs repeat these texts, because writing a text takes longer than training on it
MOST_REPLAYED = 4096
_PROMPT_TOKENS = 64  # of a prompt of the model's own, at most
_TRIES = 8  # for each of these prompts, because many do not end
# First words of prompts, for more kinds of them (examples/LOG.md).
_OPENINGS = (
    "Write a,Write a short,Explain,What is,How do I,How can I,Translate,Summarize,Rewrite,List,"
    "Correct the,Give me,Why,Who,Which,Calculate,Solve,If,Compare,Describe,Create a,Make a,"
    "Convert,Extract,Classify,Answer,Fix the,Implement,Write a function,Continue,Suggest,Plan,"
    "Draft an email,Tell me,Define,Find,Can you,Write code,Fill in,Given"
)
_WAIT = 1.0  # seconds between two looks into the journal


@dataclass(frozen=True)
class Writing:
    """How answers are decoded: at most `tokens` each, at most `max_length` with the prompt; row r
    has the seed `seed` + r.
    """

    tokens: int
    max_length: int
    temperature: float = 0.0
    seed: int = 0

    def max_new_tokens(self, prompt_length: int) -> int:
        """Of an answer to a prompt of `prompt_length` tokens."""
        return min(self.tokens, self.max_length - prompt_length)


class ModelAnswers:
    """A model's answers to prompts, which must leave room for a token. `known`: answers in the
    journal, by row.
    """

    def __init__(
        self, decoder: Decoder, prompts: Sequence[list[int]], how: Writing, journal: Path
    ) -> None:
        self.prompts = prompts
        self.how = how
        self.journal = journal
        self._decoder: Decoder | None = decoder
        self.known = self._read()

    def write(self, stage: str, report: WorkReport) -> list[list[int]]:
        """The answers with their EOS. The first process decodes, others wait."""
        known = self._read()
        total = len(self.prompts)
        if process_index() == 0 and len(known) < total:
            decoder = self._decoder
            assert decoder is not None
            if self.journal.exists():  # a killed process may have left a part of a line
                lines = b"".join(whole_lines(self.journal, CheckpointError))
                write_file(self.journal, lines, CheckpointError)
            # Prompts of similar length together, the longest first
            order = sorted(range(len(self.prompts)), key=lambda row: (-len(self.prompts[row]), row))
            for at in range(0, len(order), BATCH):
                batch = order[at : at + BATCH]
                missing = sum(row not in known for row in batch)
                if missing == 0:
                    continue
                tell = partial(report, stage, len(known), total)
                written = self._write_batch(decoder, batch, missing, tell)
                lines_of = [{"row": row, "ids": ids} for row, ids in written.items()]
                append_lines(self.journal, lines_of, CheckpointError)
                known |= written
        self._decoder = None  # frees its weights
        while len(known) < total:
            report(stage, len(known), total)
            time.sleep(_WAIT)
            known = self._read()
        report(stage, total, total)
        return [known[row] for row in range(total)]

    def _write_batch(
        self, decoder: Decoder, batch: Sequence[int], missing: int, report: Callable[[int], None]
    ) -> dict[int, list[int]]:
        """The answers to the prompts of these rows. `report` gets after each step how many of the
        `missing` answers its tokens are worth.
        """
        how = self.how
        prompts = [self.prompts[row] for row in batch]
        limit = how.max_new_tokens(len(prompts[0]))
        config = DecodingConfig("autoregressive", max_new_tokens=limit, temperature=how.temperature)
        seeds = [(how.seed + row) % 2**32 for row in batch]
        loop = DecodingLoop(decoder.backend, prompts, config, decoder.eos_ids, seeds=seeds)
        report(0)
        for number, _ in enumerate(loop, start=1):
            report(min(missing * number // limit, missing - 1))
        return {row: answer.output for row, answer in zip(batch, loop.rows, strict=True)}

    def _read(self) -> dict[int, list[int]]:
        """The journal's answers, without an incomplete last line (its process was killed or still
        writes).
        """
        lines = map(json.loads, whole_lines(self.journal, CheckpointError))
        return {line["row"]: line["ids"] for line in lines}


def digest(*values: object) -> str:
    """A digest for the name of a journal."""
    return hashlib.sha256(json.dumps(values, default=asdict).encode()).hexdigest()[:16]


def plan_replay(
    config: FinetuneConfig,
    model_digest: str,
    data: RunData,
    decoder: Decoder,
    steps: int,
) -> ModelAnswers:
    """Plans texts for `decoder` to sample and a run to replay (Sun et al., LAMOL, ICLR
    2020).
    """
    endless = replace(decoder, eos_ids=frozenset())  # texts run past EOS
    count = min(steps * step_rows(config)[1], MOST_REPLAYED)
    mean_tokens = round(data.training.tokens / len(data.training.rows))
    max_length = data.encoder.max_length
    how = Writing(min(mean_tokens, max_length - 1), max_length, 1.0, config.seed)
    starts = _starts(decoder, count, config.seed, max_length - 1)
    journal = f"replay-{digest(model_digest, starts, how, config.dtype)}.jsonl"
    return ModelAnswers(endless, starts, how, checkpoints_folder(config.output) / journal)


def own_texts(decoder: Decoder, seed: int) -> list[EncodedRow]:
    """Short texts sampled from a model. Their seeds are not those of a replay."""
    seed ^= _APART
    tokens = min(OWN_TOKENS, decoder.backend.spec.context - 1)
    starts = _starts(decoder, OWN_TEXTS, seed, decoder.backend.spec.context - tokens)
    config = DecodingConfig("autoregressive", max_new_tokens=tokens, temperature=1.0)
    seeds = [(seed + row) % 2**32 for row in range(OWN_TEXTS)]
    outputs = decode_batch(decoder.backend, starts, config, frozenset(), seeds=seeds)
    return [answered(start, output.ids) for start, output in zip(starts, outputs, strict=True)]


def own_prompts(decoder: Decoder, count: int, seed: int) -> Iterator[str]:
    """Different prompts that a chat model writes in the user's place, sampled (Magpie: Xu et al.,
    ICLR 2025).

    Every second begins with one of `_OPENINGS`, for more kinds. Raises ConfigError for a model that
    rarely ends a prompt.
    """
    start = decoder.prompt_start()
    kinds = _OPENINGS.split(",")
    known = set[str]()
    most_tokens = min(
        _PROMPT_TOKENS, decoder.backend.context_length() - len(start) - _PROMPT_TOKENS
    )
    needed = "one whose chat template begins a prompt, and has room for it"
    require(bool(start) and most_tokens > 0, "model", needed, decoder.name)
    config = DecodingConfig(
        "autoregressive", max_new_tokens=most_tokens, temperature=1.0, top_p=0.95
    )
    for first in range(0, _TRIES * count + BATCH, BATCH):
        numbers = range(first, first + BATCH)
        openings = []
        prompts = []
        for number in numbers:
            opening = kinds[number // 2 % len(kinds)] if number % 2 else ""
            ids = decoder.tokenizer(opening, add_special_tokens=False)["input_ids"]
            openings.append(opening)
            prompts.append([*start, *ids])
        seeds = [(seed + number) % 2**32 for number in numbers]
        outputs = decode_batch(
            decoder.backend, prompts, config, decoder.eos_ids, decoder.detokenize, seeds
        )
        for opening, answer in zip(openings, outputs, strict=True):
            text = (opening + answer.text).strip()
            is_whole = answer.finish_reason == "eos" and answer.text.strip() != ""
            if is_whole and text not in known and len(known) < count:
                known.add(text)
                yield text
        if len(known) == count:
            return
    raise ConfigError(
        f"`model` must write prompts that end, got {len(known)} in {numbers.stop} tries by {decoder.name}"
    )


def answered(prompt: list[int], answer: list[int]) -> EncodedRow:
    """A row with labels on the answer only."""
    return encoded_row(prompt + answer, [IGNORED] * len(prompt) + answer)


def _starts(decoder: Decoder, count: int, seed: int, longest: int) -> list[list[int]]:
    """Prompts for sampled texts: a random token, in every second one the template's text before a
    prompt, if there is any.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(decoder.backend.spec.vocab, (count,), generator=generator).tolist()
    starts = [[token] for token in first]
    templated = decoder.prompt_start()[:longest]
    if templated:
        starts[1::2] = [templated] * len(starts[1::2])
    return starts
