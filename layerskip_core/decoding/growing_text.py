"""The text of tokens that come one by one or several at a time. It is the same either way."""

from collections.abc import Callable, Sequence

Detokenize = Callable[[list[int]], str]

_INCOMPLETE = "\ufffd"  # stands for a character whose last bytes have not come yet


class GrowingText:
    """Each text extends the one before. Only the end is decoded again: a token's text can depend on the one before it."""

    def __init__(self, detokenize: Detokenize) -> None:
        self.text = ""  # of the tokens so far, without an incomplete character at its end
        self._detokenize = detokenize
        self._ids: list[int] = []  # the last that were settled at once, and those that came after them
        self._settled = 0  # ids[:settled] are in `text`: they are the context of the others

    def add(self, ids: Sequence[int]) -> str:
        """Takes new tokens and returns the text so far."""
        if len(ids) > 1 and _INCOMPLETE not in self._decode([*self._ids, *ids]):
            self._take(ids)
        else:  # some tokenizers turn a whole run of bytes into U+FFFD if one is wrong: those before it are settled first
            for token in ids:
                self._take([token])
        return self.text

    def finish(self) -> str:
        """The text at the end of the output, with U+FFFD for bytes that make no character."""
        self.text += self._new()
        self._ids, self._settled = [], 0
        return self.text

    def _take(self, ids: Sequence[int]) -> None:
        self._ids += ids
        new = self._new()
        if new and not new.endswith(_INCOMPLETE):  # ids without text would be no context
            self.text += new
            self._ids, self._settled = self._ids[self._settled :], len(self._ids) - self._settled

    def _new(self) -> str:
        """The text of the ids that are not settled."""
        before, now = self._decode(self._ids[: self._settled]), self._decode(self._ids)
        return now[len(before) :] if now.startswith(before) else self._decode(self._ids[self._settled :])

    def _decode(self, ids: list[int]) -> str:
        return self._detokenize(ids) if ids else ""
