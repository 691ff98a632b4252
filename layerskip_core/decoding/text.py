"""From prompts to text."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..checkpoint.loaded import Decoder
from ..config.decoding import DecodingConfig
from ..errors import LayerSkipError
from .growing_text import GrowingText
from .loop import Token, check_prompt
from .prefix import PrefixCache
from .stats import DecodeStats
from .stopping import Stopping, StopReason
from .strategies import decode, decode_batch


@dataclass(frozen=True)
class Answer:
    """A whole answer. Its stats are counts alone if it was decoded together with others."""

    text: str
    finish_reason: StopReason
    stats: DecodeStats


class Run(NamedTuple):
    """Text that came from accepted drafts, or from the target alone."""

    text: str
    from_draft: bool


class TextStream:
    """Iterates over the pieces of one answer as they are verified.

    `text`, `stats` and `finish_reason` describe what has come so far. `broken_off`: an exception, as of Ctrl-C, ended a step.
    """

    def __init__(
        self, loaded: Decoder, prompt: str | list[int], config: DecodingConfig, prefix: PrefixCache | None = None
    ) -> None:
        """`prompt`: a text for the template, or token ids. `prefix`: as in `decode`.

        Raises ConfigError for a prompt or exit that does not fit, CheckpointError for a chat template that fails.
        """
        ids = loaded.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        self._decoding = decode(loaded.backend, ids, config, loaded.ends(config.stop), loaded.detokenize, prefix=prefix)
        self._shown = ShownText(loaded, config)
        self.broken_off = False

    @property
    def answer(self) -> Answer:
        """The whole answer, once all pieces have come. Raises RuntimeError before."""
        if self.finish_reason is None:
            raise RuntimeError("the answer is not finished: iterate over the stream first")
        return Answer(self.text, self.finish_reason, self.stats)

    @property
    def text(self) -> str:
        return self._shown.text

    @property
    def stats(self) -> DecodeStats:
        return self._decoding.stats

    @property
    def finish_reason(self) -> StopReason | None:
        return self._decoding.finish_reason

    @property
    def reused_tokens(self) -> int:
        """How many of the prompt's first tokens needed no pass."""
        return self._decoding.reused_tokens

    def finish(self) -> Answer:
        """The whole answer, decoded to its end."""
        for _ in self:
            pass
        return self.answer

    def __iter__(self) -> Iterator[str]:
        for tokens in self._steps():
            if piece := self._shown.add([token.id for token in tokens], self.finish_reason is not None):
                yield piece

    def runs(self) -> Iterator[list[Run]]:
        """The same text, as one list per step that may be empty. A character belongs to the token that completes it."""
        ends: list[tuple[int, bool]] = []  # where the text of each token ends that is not wholly shown
        for tokens in self._steps():
            decoded, finished = "", self.finish_reason is not None
            for place, token in enumerate(tokens, start=1):
                decoded = self._shown.decode([token.id], finished and place == len(tokens))
                ends.append((len(decoded), token.from_draft))
            runs: list[Run] = []
            start, stop = len(self.text), len(self.text) + len(self._shown.show(decoded, finished))
            for end, from_draft in ends:
                if (shown := min(end, stop)) > start:
                    before = runs.pop().text if runs and runs[-1].from_draft == from_draft else ""
                    runs.append(Run(before + self.text[start:shown], from_draft))
                    start = shown
            ends = [(end, from_draft) for end, from_draft in ends if end > stop]
            yield runs

    def _steps(self) -> Iterator[list[Token]]:
        try:
            yield from self._decoding
        except GeneratorExit:  # the stream was left between two steps
            raise
        except BaseException:
            self.broken_off = True
            raise


def answer_together(
    loaded: Decoder, prompts: Sequence[str], config: DecodingConfig
) -> tuple[list[Answer | LayerSkipError], DecodeStats]:
    """Answers in the order of the prompts, an error in the place of a prompt that does not fit; and the stats of all."""
    started = time.perf_counter()
    answers: dict[int, Answer | LayerSkipError] = {}
    encoded: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        try:
            ids = loaded.encode_prompt(prompt)
            check_prompt(ids, loaded.backend.max_positions)
            encoded[place] = ids
        except LayerSkipError as error:
            answers[place] = error
    places, total = list(encoded), DecodeStats()
    if places:
        for output in decode_batch(loaded.backend, list(encoded.values()), config, loaded.ends(config.stop), loaded.detokenize):
            text = ShownText(loaded, config).add(output.ids, finished=True)
            answers[places[output.row]] = Answer(text, output.finish_reason, output.stats)
            total += output.stats
    return [answers[place] for place in range(len(prompts))], replace(total, total_seconds=time.perf_counter() - started)


class ShownText:
    """The part of a growing answer that may be shown: whole characters, and nothing from a stop string on."""

    def __init__(self, loaded: Decoder, config: DecodingConfig) -> None:
        self.text = ""
        self._ends = loaded.ends(config.stop)
        self._stopping = Stopping(self._ends, config.stop, config.max_new_tokens)
        self._growing = GrowingText(loaded.detokenize)

    def add(self, ids: list[int], finished: bool) -> str:
        """Takes new tokens of the output and returns the text that can be shown now and could not before."""
        return self.show(self.decode(ids, finished), finished)

    def decode(self, ids: list[int], finished: bool) -> str:
        """Takes new tokens and returns the text of all, whether it can be shown or not."""
        text = self._growing.add([token for token in ids if token not in self._ends])
        return self._growing.finish() if finished else text

    def show(self, decoded: str, finished: bool) -> str:
        """What of that text can be shown now and could not before."""
        visible = self._stopping.visible(decoded, finished)
        piece, self.text = visible[len(self.text) :], visible
        return piece
