"""How a prompt is put to the model."""

from dataclasses import dataclass
from typing import Annotated

from .checks import require, require_unicode
from .options import PROMPTING, Flag


@dataclass(frozen=True)
class PromptingConfig:
    """What was asked; None: the checkpoint's own template, else the tokenizer's chat template if it has one.

    `template` is `chat`, `raw` or a text with {prompt} in it. `system` is a system message, for chat templates only. `raw` is
    short for `template` raw: nothing is added, and special tokens in the prompt count.
    """

    template: Annotated[
        str | None,
        Flag(
            PROMPTING,
            "Prompt template: chat, raw, or a text with {prompt} in it.",
            "--template/--prompt-template",
            default="the task's or checkpoint's, else the tokenizer's chat template",
        ),
    ] = None
    system: Annotated[str | None, Flag(PROMPTING, "System message, for chat templates.")] = None
    raw: Annotated[bool, Flag(PROMPTING, "Use no template; text of special tokens in the prompt becomes tokens.")] = False

    def __post_init__(self) -> None:
        require_unicode("template", self.template)
        require_unicode("system", self.system)
        text = self.template
        known = text is None or text in ("raw", "chat") or "{prompt}" in text
        require(known, "template", "raw, chat or a text with {prompt} in it", text)
        require(not self.raw or text in (None, "raw"), "raw", "given without `template`", f"`template` {text}")
        require(self.system is None or self.asked != "raw", "system", "given with a chat template", "a raw prompt")

    @property
    def asked(self) -> str | None:
        """The template: `chat`, `raw`, a text with {prompt} in it, or None where nothing was said."""
        return "raw" if self.raw else self.template
