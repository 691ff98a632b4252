"""A conversation with a model: the turns so far, and what each leaves to the next."""

from typing import NamedTuple

from ..checkpoint.loaded import Decoder
from ..config.decoding import DecodingConfig
from ..prompting import CHAT
from .loop import check_prompt
from .prefix import PrefixCache
from .text import TextStream


class Turn(NamedTuple):
    """A message and what has come of its answer."""

    message: str
    answer: str


class Dialogue:
    """Asks a model one message after another. It sees all turns, whole, or refuses the message: nothing is left out silently.

    Only a chat template says how turns follow each other. With any other template every message is a prompt of its own.
    """

    def __init__(self, loaded: Decoder, config: DecodingConfig) -> None:
        self._loaded, self._config = loaded, config
        self._turns: tuple[Turn, ...] = ()  # without the last
        self._asked: tuple[str, TextStream] | None = None  # the last
        self._prefix = PrefixCache()

    @property
    def has_turns(self) -> bool:
        """Whether a message follows those before it."""
        return self._loaded.template.text == CHAT

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What the next message follows. A turn without any answer, as after an interruption, is none."""
        if self._asked is not None and self.has_turns:
            message, stream = self._asked
            if stream.text or stream.finish_reason is not None:
                return (*self._turns, Turn(message, stream.text))
        return self._turns

    def ask(self, message: str) -> TextStream:
        """The answer to a message, as it comes: iterate over its pieces, or `finish()` it.

        It can be left at any point; then its turn has the text so far. No earlier answer can go on.

        Raises ContextError for a message that does not fit after the turns before it, ConfigError for an empty prompt,
        CheckpointError for a chat template that refuses them. The turns are then as before.
        """
        turns, limit = self.turns, self._loaded.backend.max_positions
        if self._asked is not None and self._asked[1].broken_off:
            self._prefix = PrefixCache()  # the pass may have left it in disorder
        ids = self._loaded.encode_prompt(message, turns)
        check_prompt(ids, limit, "the conversation with this message" if turns else "the prompt")
        stream = TextStream(self._loaded, ids, self._config, self._prefix)
        self._turns, self._asked = turns, (message, stream)
        return stream

    def forget(self, count: int | None = None) -> None:
        """Leaves out the oldest `count` turns; without a number all, and what the cache has of them."""
        self._turns, self._asked = () if count is None else self.turns[count:], None
        if count is None:
            self._prefix = PrefixCache()
