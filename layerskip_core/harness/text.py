"""What lm-evaluation-harness asks, as token ids and as settings of decoding: as it defines them, so that scores compare."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoint.loaded import Decoder
from ..config.decoding import MAX_NEW_TOKENS, DecodingConfig
from ..decoding import before_stop
from ..errors import CheckpointError, ConfigError
from ..prompting import encoded, render_chat
from .likelihood import Pair

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first of them counts
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}


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


@dataclass(frozen=True)
class AnswerSettings:
    """Where an answer ends and how its tokens are chosen."""

    stop: tuple[str, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def of(self, config: DecodingConfig) -> DecodingConfig:
        """A decoding with these settings, and its own stop strings too."""
        stop = (*self.stop, *(text for text in config.stop if text not in self.stop))
        return replace(config, **vars(self) | {"stop": stop})

    def cut(self, text: str) -> str:
        return before_stop(text, self.stop)


def answer_settings(request: Mapping[str, Any], default_tokens: int = MAX_NEW_TOKENS, seed: int = 0) -> AnswerSettings:
    """The settings of a request's `generation_kwargs`.

    Raises ConfigError for a setting that this decoder does not have.
    """
    asked = dict(request)
    until = asked.pop("until", None) or []
    stop = [until] if isinstance(until, str) else list(until)
    limits = [asked.pop(name, None) for name in _LIMITS]
    limit = next((int(value) for value in limits if value is not None), default_tokens)
    temperature, drawn = asked.pop("temperature", None), asked.pop("do_sample", None)
    drawn = bool(temperature) if drawn is None else bool(drawn)
    temperature = float(1.0 if temperature is None else temperature) if drawn else 0.0
    top_k, top_p = int(asked.pop("top_k", 0) or 0), float(asked.pop("top_p", 1.0) or 1.0)
    unknown = {name: value for name, value in asked.items() if _NEUTRAL.get(name) != value}
    if unknown:
        name, value = next(iter(unknown.items()))
        raise ConfigError(
            f"generation_kwargs must be until, {_LIMITS[0]}, do_sample, temperature, top_k or top_p, got {name}={value!r:.60}"
        )
    sampling = (temperature, top_k, top_p, seed) if drawn else ()
    return AnswerSettings(tuple(string for string in stop if string), limit, *sampling)
