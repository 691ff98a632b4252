"""From prompts to text: one streamed answer, and conversations."""

from collections.abc import Iterator
from math import inf
from typing import Unpack

from ..checkpoint.loaded import Decoder
from ..config.decoding import DecodingConfig
from ..prompting import CHAT
from .engine import EngineOptions
from .loop import check_prompt, decode
from .output import Answer, DecodeStats, StopReason
from .prefixes import Prefixes


class TextStream:
    """Iterates over the pieces of one answer as they are verified.

    `text`, `stats` and `finish_reason` describe the answer so far; `decoding` is its loop. An
    answer that cannot match its grammar raises LayerSkipError after its last piece.
    """

    def __init__(
        self,
        loaded: Decoder,
        prompt: str | list[int],
        config: DecodingConfig,
        **options: Unpack[EngineOptions],
    ) -> None:
        """`prompt`: a text for the template, or token ids. `options`: Engine's.

        Raises ConfigError for a prompt or exit that does not fit, CheckpointError for a chat
        template that fails.
        """
        ids = loaded.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        ends = loaded.ends_of(config)
        self.decoding = decode(loaded.backend, ids, config, ends, loaded.detokenize, **options)
        self._output = self.decoding.rows[0].text

    @property
    def answer(self) -> Answer:
        """The whole answer, once all pieces have come. Raises RuntimeError before."""
        if self.finish_reason is None:
            raise RuntimeError("the answer is not finished: iterate over the stream first")
        [row] = self.decoding.rows
        return row.answer(self.text, self.stats)

    @property
    def text(self) -> str:
        return self._output.text

    @property
    def stats(self) -> DecodeStats:
        return self.decoding.stats

    @property
    def finish_reason(self) -> StopReason | None:
        return self.decoding.finish_reason

    def finish(self) -> Answer:
        """The whole answer, decoded to its end."""
        for _ in self:
            pass
        return self.answer

    def __iter__(self) -> Iterator[str]:
        for [step] in self.decoding:
            piece = self._output.add(step.ids, step.finish_reason is not None)
            if piece:
                yield piece
            self._raise_error()

    def segments(self) -> Iterator[list[tuple[str, bool]]]:
        """The same text, one list per step (perhaps empty) of segments: text, and whether accepted
        drafts gave it.

        A character belongs to the token that completes it.
        """
        output = self._output
        # By token not fully shown: where its text ends, and whether it was drafted
        ends: list[tuple[int, bool]] = []
        for [step] in self.decoding:
            finished = step.finish_reason is not None
            start = len(self.text)
            for count, token in enumerate(step.ids, start=1):
                output.decode([token], finished and count == len(step.ids))
                ends.append((len(output.decoded), count <= step.counts.accepted))
            shown_end = start + len(output.show(finished))
            segments: list[tuple[str, bool]] = []
            for end, from_draft in ends:
                piece = self.text[start : min(end, shown_end)]
                if not piece:
                    continue
                start += len(piece)
                if segments and segments[-1][1] == from_draft:
                    piece = segments.pop()[0] + piece
                segments.append((piece, from_draft))
            ends = [(end, from_draft) for end, from_draft in ends if end > shown_end]
            yield segments
            self._raise_error()

    def _raise_error(self) -> None:
        """Raises LayerSkipError for an answer that ended without matching its grammar."""
        error = self.decoding.rows[0].error
        if error is not None:
            raise error


class Dialogue:
    """Asks a model one message after another. The model sees all turns in full; a message that does
    not fit is refused.

    Turns need a chat template. With any other template every message is a prompt of its own.
    """

    def __init__(self, loaded: Decoder, config: DecodingConfig) -> None:
        self._loaded = loaded
        self._config = config
        self._turns: tuple[tuple[str, str], ...] = ()  # without the last
        self._asked: tuple[str, TextStream] | None = None  # the last
        self._prefixes = Prefixes(inf, most_texts=2, least=1)

    @property
    def has_turns(self) -> bool:
        """True if the model sees earlier turns, which needs a chat template."""
        return self._loaded.template.text == CHAT

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """The turns before the next message, each a message and its answer so far.

        A turn without any answer, as after an interruption, is left out.
        """
        if self._asked is not None and self.has_turns:
            message, stream = self._asked
            if stream.text or stream.finish_reason is not None:
                return (*self._turns, (message, stream.text))
        return self._turns

    def ask(self, message: str) -> TextStream:
        """The answer to a message, as it comes: iterate over its pieces, or `finish()` it.

        Iteration can stop at any point; the turn then has the text so far.

        Raises ContextError for a message that does not fit after the earlier turns, ConfigError for
        an empty prompt, CheckpointError if the chat template refuses the turns, which then stay
        unchanged.
        """
        turns = self.turns
        ids = self._loaded.encode_prompt(message, turns)
        check_prompt(
            ids,
            self._loaded.backend,
            "the conversation with this message" if turns else "the prompt",
        )
        if self._asked is not None:
            self._asked[1].decoding.keep_texts()
        stream = TextStream(self._loaded, ids, self._config, prefixes=self._prefixes)
        self._turns = turns
        self._asked = (message, stream)
        return stream

    def forget(self, count: int | None = None) -> None:
        """Drops the oldest `count` turns, or all, with their KV entries."""
        self._turns = () if count is None else self.turns[count:]
        self._asked = None
        if count is None:
            self._prefixes = Prefixes(inf, most_texts=2, least=1)
