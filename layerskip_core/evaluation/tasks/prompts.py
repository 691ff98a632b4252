"""From rows to prompts: the form of a row, the solved rows (shots) before it, and the model's prompt template."""

from collections.abc import Iterable, Sequence

from ...data.examples import Example
from ...prompting import CHAT, RAW

BARE = "{prompt}"  # a form, or a template, that adds nothing
SHOT_END = "\n\n"


def forms(template: str | None, form: str, by_default: str | None) -> tuple[str, str | None]:
    """(the form of a row, the model's template) for a `template` of `raw`, `chat`, a text with {prompt} in it, or None.

    A text is both the form and the model's template. With None the model's template is `by_default`; None there stands for
    the checkpoint's own.
    """
    if template is None:
        return form, by_default
    return (form if template in (CHAT, RAW) else template), template


def framed(
    form: str,
    template: str | None,
    examples: Iterable[Example],
    shots: Sequence[Example] = (),
    shot_form: str | None = None,
) -> tuple[tuple[Example, ...], str | None]:
    """(examples, the template to encode them in): each example in `form`, after the shots in `shot_form` or `form`.

    `form` and `template` come from `forms`. A user's own form stays a template, so that special tokens in it are encoded as
    tokens, and those in the rows as text.
    """
    before = "".join((shot_form or form).replace(BARE, shot.prompt) + shot.completion + SHOT_END for shot in shots)
    own = template == form != BARE
    if own and BARE not in before:  # else the template would fill in the {prompt} of a shot, too
        return tuple(examples), before + form
    whole = tuple(Example(before + form.replace(BARE, example.prompt), example.completion) for example in examples)
    return whole, BARE if own else template
