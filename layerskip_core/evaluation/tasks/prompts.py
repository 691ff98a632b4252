"""From rows to prompts: the form of a row, and solved rows before it."""

from collections.abc import Sequence

from ...data import Example
from ...prompt_encoding import CHAT

BARE = "{prompt}"  # as a form of rows and as a model's template: nothing is added
SHOT_END = "\n\n"


def with_shots(form: str, example: Example, shots: Sequence[Example] = (), shot_form: str | None = None) -> Example:
    """The example's prompt in a form (a text with {prompt} in it), behind solved rows in the same or a form of their own."""
    before = "".join((shot_form or form).replace(BARE, shot.prompt) + shot.completion + SHOT_END for shot in shots)
    return Example(before + form.replace(BARE, example.prompt), example.completion)


def forms(template: str | None, form: str, by_default: str | None) -> tuple[str, str | None]:
    """(the form of a row, the model's template) by --template: `raw`, `chat`, a form of the user's own, or none.

    Without one the model's template is `by_default`, where None stands for the checkpoint's own.
    """
    if template is None:
        return form, by_default
    if template == CHAT:
        return form, CHAT
    return (form if template == "raw" else template), BARE
