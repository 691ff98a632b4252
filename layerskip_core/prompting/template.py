"""Which template a prompt is put into."""

from typing import Any

from .chat import has_chat_template
from .encoding import CHAT


def default_template(stored: str | None, tokenizer: Any) -> str | None:
    """The checkpoint's own template, else the tokenizer's chat template, else none."""
    if stored is not None:
        return stored
    return CHAT if has_chat_template(tokenizer) else None
