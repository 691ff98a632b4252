"""From rows to prompts: the form of a row, solved rows before it, and the template that the model reads them in."""

from collections.abc import Iterable, Sequence

from ...data.examples import Example
from ...prompting.template import CHAT, RAW

BARE = "{prompt}"  # as a form of rows and as a model's template: nothing is added
SHOT_END = "\n\n"


def forms(template: str | None, form: str, by_default: str | None) -> tuple[str, str | None]:
    """(the form of a row, the model's template) by `template`: `raw`, `chat`, a form of the user's own, or none.

    Without one the model's template is `by_default`, where None stands for the checkpoint's own. A form of the user's own is
    both.
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
    """Examples in a form, after solved rows in the same or a form of their own; and the template to encode them in.

    `form` and `template` are those of `forms`. A form of the user's own stays a template, so that its special tokens are tokens
    while those of the rows are text.
    """
    before = "".join((shot_form or form).replace(BARE, shot.prompt) + shot.completion + SHOT_END for shot in shots)
    own = template == form != BARE
    if own and BARE not in before:  # a solved row that holds {prompt} would be filled in as well
        return tuple(examples), before + form
    whole = tuple(Example(before + form.replace(BARE, example.prompt), example.completion) for example in examples)
    return whole, BARE if own else template
