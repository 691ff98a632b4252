"""Numbers, plurals and tokens in messages and tables."""


def plural(count: int, noun: str) -> str:
    """`1 draft`, `6 drafts`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def number(value: float | None, form: str) -> str:
    """A value by a format, or a dash for none."""
    return "-" if value is None else format(value, form)


def visible(token: str) -> str:
    """A token on one line, with visible whitespace."""
    line_end, blank = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\N{OPEN BOX}"
    return token.replace("\n", line_end).replace("\t", blank).replace(" ", blank)
