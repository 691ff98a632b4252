"""Which template a prompt is put into, from what the user asks for, the checkpoint and its tokenizer."""

from dataclasses import dataclass

from ..config.checks import require
from .chat import has_chat_template, require_chat_template
from .tokenizer import Tokenizer

CHAT = "chat"  # the tokenizer's chat template
RAW = "raw"  # nothing is added, and the text of special tokens in a prompt becomes tokens
PLACE = "{prompt}"  # where a template that is a text takes the prompt


@dataclass(frozen=True)
class PromptTemplate:
    """A resolved template: `chat`, `raw` or a text with {prompt} in it. `system` is a system message, for `chat` only."""

    text: str = RAW
    system: str | None = None

    @property
    def name(self) -> str:
        """For the user: statistics and reports: `chat`, `chat with a system message`, `raw`, or the text in quotes."""
        if self.text == CHAT:
            return CHAT if self.system is None else f"{CHAT} with a system message"
        return RAW if self.text == RAW else repr(self.text)


def is_template(text: str) -> bool:
    """Whether a text is `chat`, `raw`, or has {prompt} in it."""
    return text in (CHAT, RAW) or PLACE in text


def resolve_template(
    asked: str | None, system: str | None, stored: PromptTemplate | None, tokenizer: Tokenizer
) -> PromptTemplate:
    """What `template` (`asked`) and `system` mean for a checkpoint; None is a setting that was not given.

    Without `asked` it is the template that the checkpoint names (`stored`), else the tokenizer's chat template if it has one,
    else `raw`. A `system` message replaces the stored one. Use `Decoder.with_template` where there is a Decoder.

    Raises ConfigError for a text without {prompt}, for `chat` without a chat template, and for a system message in any other
    template.
    """
    require(asked is None or is_template(asked), "template", "raw, chat or a text with {prompt} in it", asked)
    if asked is None and stored is not None:
        template = stored
    else:
        template = PromptTemplate(asked or (CHAT if has_chat_template(tokenizer) else RAW))
    if asked == CHAT:
        require_chat_template(tokenizer)
    if system is None:
        return template
    require(template.text == CHAT, "system", "given with the chat template only", f"the template {template.name}")
    return PromptTemplate(CHAT, system)
