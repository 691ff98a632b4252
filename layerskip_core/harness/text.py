"""Text and token ids as lm-evaluation-harness defines them, so that scores can be compared with those of its other models."""

from collections.abc import Sequence

from ..checkpoint.loaded import Decoder
from ..errors import CheckpointError
from ..prompting import encoded, render_chat
from .likelihood import Pair


class HarnessText:
    """Encodes what lm-eval asks a model, without the prompt template of the checkpoint."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self._tokenizer = decoder, decoder.tokenizer
        bos = self._tokenizer.special_tokens_map.get("bos_token")
        self._beginning = None if bos is None else str(bos)
        vocabulary = self._tokenizer.get_vocab()
        self.end_id = self._tokenizer.eos_token_id
        self.prefix_id = vocabulary.get(self._beginning or "", self.end_id)

    def ids(self, text: str, special_tokens: bool | None = None) -> list[int]:
        """Token ids of a text; that of special tokens becomes tokens.

        `special_tokens`: whether the tokenizer adds those that begin a text; None: as it does, unless the text has the first.
        Raises ConfigError for a token that the model has no embedding for.
        """
        if special_tokens is None:
            special_tokens = self._beginning is None or not text.startswith(self._beginning)
        ids = encoded(lambda: self._tokenizer(text, add_special_tokens=special_tokens)["input_ids"])
        return self._decoder.known_ids(list(ids))

    def pair(self, context: str, continuation: str) -> Pair:
        """A context and its continuation. The spaces at the end of a context belong to the continuation.

        Both are encoded together, and cut where the context alone ends. Without a context, the token that begins a text is it.
        """
        if not context:
            ids = self.ids(continuation, special_tokens=False)
            return ([self._prefix], ids) if ids[:1] != [self._prefix] else (ids[:1], ids[1:])
        bare = context.rstrip()
        continuation, context = context[len(bare) :] + continuation, bare
        whole, before = self.ids(context + continuation), self.ids(context)
        return (before, whole[len(before) :]) if before else ([self._prefix], whole)

    def windows(self, text: str) -> list[Pair]:
        """A text as windows of the model's context that follow each other, the last one with as much context as fits.

        Every token is a continuation once. The first follows the token that begins a text.
        """
        ids, size = self.ids(text), self._decoder.backend.max_positions
        windows: list[Pair] = []
        for start in range(0, len(ids), size):
            stop = min(start + size, len(ids))
            context = [self._prefix] if not start else ids[stop - size - 1 : start]
            windows.append((context, ids[start:stop]))
        return windows

    @property
    def _prefix(self) -> int:
        if self.prefix_id is None:
            raise CheckpointError("the model's tokenizer must have a token that begins or ends a text, to score a whole text")
        return self.prefix_id

    def conversation(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
        """Messages in the tokenizer's chat template; without a generation prompt, up to the end of the last message's text.

        A template that refuses system messages gets none. Raises ConfigError and CheckpointError as `render_chat` does.
        """
        try:
            text = render_chat(self._tokenizer, list(messages), add_generation_prompt)
        except CheckpointError:
            spoken = [message for message in messages if message["role"] != "system"]
            if len(spoken) == len(messages):
                raise
            text = render_chat(self._tokenizer, spoken, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = messages[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]
