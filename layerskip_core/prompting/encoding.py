"""A prompt in its template as token ids, for training and decoding alike."""

from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import CheckpointError, ConfigError, LayerSkipError
from .chat import render_chat
from .special_text import special_text

CHAT = "chat"  # the prompt template that stands for the tokenizer's own chat template
RAW = "raw"  # a template that adds nothing, and makes tokens of the prompt's special text as well
PLACE = "{prompt}"  # in a template that is a text
Result = TypeVar("Result")


def encode_prompt(tokenizer: Any, template: str | None, prompt: str) -> list[int]:
    """Token ids of a prompt, special tokens at its start included and none at its end.

    Text of special tokens in the prompt is text; only the template's makes tokens. Without a template, or with RAW,
    the prompt's does, too.

    Raises:
        ConfigError: the prompt is not valid Unicode, or the template is `chat` and the tokenizer has none.
        CheckpointError: the chat template or the tokenizer fails.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair, an argument can hold any bytes
        raise ConfigError(f"the prompt must be valid Unicode, got {prompt[error.start]!r} in it") from None
    special = special_text(tokenizer)
    if template is None or template == RAW:
        return _without_end(tokenizer, encoded(lambda: tokenizer(prompt)["input_ids"]))
    if special is None:
        _refuse_special(tokenizer, prompt)
    if template == CHAT:
        held = special is not None and encoded(lambda: special.in_prompt(prompt))
        content = special.masked(prompt) if special is not None and held else prompt
        text = render_chat(tokenizer, [{"role": "user", "content": content}], add_generation_prompt=True)
        if special is not None and held:
            return list(encoded(lambda: special.encode(special.sealed(text), add_special_tokens=False).ids))
        return list(encoded(lambda: tokenizer(text, add_special_tokens=False)["input_ids"]))
    text = template.replace(PLACE, prompt)
    if special is not None and (special.occurs(text) != special.occurs(template) or encoded(lambda: special.in_prompt(prompt))):
        text = special.sealed(template).replace(PLACE, prompt)
        return _without_end(tokenizer, encoded(lambda: special.encode(text, add_special_tokens=True).ids))
    return _without_end(tokenizer, encoded(lambda: tokenizer(text)["input_ids"]))


def encoded(encode: Callable[[], Result]) -> Result:
    """Runs a call of a tokenizer; whatever it raises becomes a CheckpointError."""
    try:
        return encode()
    except (LayerSkipError, KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        raise CheckpointError(f"the model's tokenizer cannot encode the prompt: {error}") from None


def _without_end(tokenizer: Any, ids: list[int]) -> list[int]:
    """Some tokenizers end every text, as if nothing should follow."""
    ids = list(ids)
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def _refuse_special(tokenizer: Any, prompt: str) -> None:
    """For a tokenizer in Python, which cannot be told to take special tokens as text."""
    for token in getattr(tokenizer, "all_special_tokens", ()):
        if token in prompt:
            raise ConfigError(f"the prompt must be without the special token {token} for this model's tokenizer, or `raw`")
