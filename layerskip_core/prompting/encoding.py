"""A prompt in its template as token ids, for training and for decoding."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeVar

from ..errors import CheckpointError, ConfigError, LayerSkipError
from .chat import render_chat
from .special_text import SpecialText, special_text
from .template import CHAT, PLACE, RAW, PromptTemplate
from .tokenizer import Tokenizer

Result = TypeVar("Result")


def encode_prompt(
    tokenizer: Tokenizer, template: PromptTemplate, prompt: str, turns: Sequence[tuple[str, str]] = ()
) -> list[int]:
    """Token ids of a prompt in its template, with the tokenizer's special tokens at the start and none at the end.

    Only the template's special tokens become tokens; in the prompt and the system message they stay text. In the raw
    template those of the prompt become tokens. `turns`: earlier prompts with their answers, for the chat template only; special
    tokens in them stay text too.

    Raises:
        ConfigError: the prompt is not valid Unicode, or the template is `chat` and the tokenizer has none.
        CheckpointError: the chat template or the tokenizer fails.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair, an argument can hold any bytes
        raise ConfigError(f"the prompt must be valid Unicode, got {prompt[error.start]!r} in it") from None
    assert not turns or template.text == CHAT
    special = special_text(tokenizer)
    if template.text == RAW:
        return _without_end(tokenizer, encoded(lambda: tokenizer(prompt)["input_ids"]))
    if special is None:
        _refuse_special(tokenizer, prompt, template.system or "", *chain.from_iterable(turns))
    if template.text == CHAT:
        return _encode_chat(tokenizer, special, _messages(template.system, prompt, turns))
    return _without_end(tokenizer, _encode_text(tokenizer, special, template.text, prompt))


def encode_conversation(tokenizer: Tokenizer, turns: Sequence[tuple[str, str]]) -> list[int]:
    """Token ids of turns (role, text) in the tokenizer's chat template, up to where the assistant's next turn begins.

    Special tokens in the turns stay text. Raises ConfigError if the tokenizer has no chat template, CheckpointError if that or
    the tokenizer fails.
    """
    special = special_text(tokenizer)
    if special is None:
        _refuse_special(tokenizer, *(text for _, text in turns))
    return _encode_chat(tokenizer, special, [{"role": role, "content": text} for role, text in turns])


def _messages(system: str | None, prompt: str, turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    spoken = [("system", system)] if system is not None else []
    for earlier, answer in turns:
        spoken += [("user", earlier), ("assistant", answer)]
    return [{"role": role, "content": content} for role, content in [*spoken, ("user", prompt)]]


def _encode_chat(tokenizer: Tokenizer, special: SpecialText | None, messages: list[dict[str, str]]) -> list[int]:
    if special is not None and encoded(lambda: any(special.in_prompt(message["content"]) for message in messages)):
        masked = [{**message, "content": special.masked(message["content"])} for message in messages]
        sealed = special.sealed(render_chat(tokenizer, masked, add_generation_prompt=True))
        return list(encoded(lambda: special.encode(sealed, add_special_tokens=False).ids))
    text = render_chat(tokenizer, messages, add_generation_prompt=True)
    return list(encoded(lambda: tokenizer(text, add_special_tokens=False)["input_ids"]))


def _encode_text(tokenizer: Tokenizer, special: SpecialText | None, template: str, prompt: str) -> list[int]:
    text = template.replace(PLACE, prompt)
    # The prompt may also complete a special token that the template begins.
    if special is not None and (special.occurs(text) != special.occurs(template) or encoded(lambda: special.in_prompt(prompt))):
        sealed = special.sealed(template).replace(PLACE, prompt)
        return list(encoded(lambda: special.encode(sealed, add_special_tokens=True).ids))
    return list(encoded(lambda: tokenizer(text)["input_ids"]))


def encoded(encode: Callable[[], Result]) -> Result:
    """Runs a call of a tokenizer; whatever it raises becomes a CheckpointError."""
    try:
        return encode()
    except (LayerSkipError, KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # a panic of the tokenizers library is not an Exception
        raise CheckpointError(f"the model's tokenizer cannot encode the prompt: {error}") from None


def _without_end(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Removes the end-of-text tokens that some tokenizers append to every text."""
    ids = list(ids)
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def _refuse_special(tokenizer: Tokenizer, *texts: str) -> None:
    """Raises ConfigError for a tokenizer written in Python, which cannot encode special tokens as text."""
    for token in tokenizer.all_special_tokens:
        if any(token in text for text in texts):
            raise ConfigError(f"the prompt must be without the special token {token} for this model's tokenizer, or `raw`")
