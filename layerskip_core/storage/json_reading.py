"""The one reader of JSON from outside. Bad input becomes one clear error, wherever it comes from."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from ..errors import LayerSkipError
from .reading import read_bytes

MAX_DEPTH = 64  # levels of nested lists and objects: more than real documents have, and safe for recursive code


def parse_json(text: str | bytes, where: str, error: type[LayerSkipError]) -> Any:
    """The value of a JSON text.

    Raises `error`, whose message begins with `where`, for text that is not UTF-8 or not JSON, for NaN, Infinity and numbers too
    large for a float, for lists and objects nested deeper than MAX_DEPTH, and for half a surrogate pair in a string.
    """

    def number(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            raise ValueError(f"{digits:.40} is too large for a number")
        return value

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text, parse_constant=refuse, parse_float=number)
    except RecursionError:
        raise error(f"{where}: nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as reason:  # UnicodeDecodeError and JSONDecodeError are ValueErrors too
        raise error(f"{where}: not valid JSON: {reason}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise error(f"{where}: nested deeper than {MAX_DEPTH} levels")
    if "\\u" in text and not _is_unicode(value):
        raise error(f"{where}: not valid Unicode: half of a surrogate pair in a string")
    return value


def read_json(path: Path, error: type[LayerSkipError]) -> Any:
    """The value of a JSON file. Raises `error` like `parse_json`, and for a file that cannot be read."""
    return parse_json(read_bytes(path, str(path), error), str(path), error)


def read_json_object(path: Path, error: type[LayerSkipError]) -> dict[str, Any]:
    """The object in a JSON file. Raises `error` like `read_json`, and for any other value."""
    value = read_json(path, error)
    if not isinstance(value, dict):
        raise error(f"{path}: needed a JSON object, found {type(value).__name__}")
    return value


def _depth(value: Any) -> int:
    """How many lists and objects enclose the innermost value, computed without recursion."""
    level, depth = [value], 0
    while level := [child for item in level for child in _children(item)]:
        depth += 1
    return depth


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
