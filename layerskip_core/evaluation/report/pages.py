"""Renders the templates of this package. They escape every value, so that no text of a model or a data set becomes markup."""

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """Renders `templates/<template>.html.j2`. Only values of type Markup are not escaped."""
    return _templates().get_template(f"{template}.html.j2").render(values)


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("layerskip_core.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
