import pytest

from layerskip_core.errors import DataError
from layerskip_core.storage.json_reading import MAX_DEPTH, parse_json, read_json_object


def nested(levels: int) -> str:
    return "[" * levels + "1" + "]" * levels


def test_values_come_through():
    assert parse_json('{"a": [1, "\\u00e9\\ud83d\\ude00"]}', "here", DataError) == {"a": [1, "é😀"]}
    assert parse_json(b"\xef\xbb\xbf{}", "here", DataError) == {}


@pytest.mark.parametrize("levels", [MAX_DEPTH + 1, 900, 100_000])
def test_deep_nesting_is_an_error_at_any_depth(levels):
    with pytest.raises(DataError, match=f"^here: nested deeper than {MAX_DEPTH} levels$"):
        parse_json(nested(levels), "here", DataError)


def test_the_deepest_allowed_is_read():
    assert parse_json(nested(MAX_DEPTH), "here", DataError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "here: not valid JSON: Expecting property name"),
        (b"\xff", "here: not valid JSON: 'utf-8' codec"),
        ("NaN", "here: not valid JSON: NaN is not a JSON number"),
        ("-Infinity", "here: not valid JSON: -Infinity is not a JSON number"),
        ("[-1e999]", "here: not valid JSON: -1e999 is too large for a number"),
        ("1" * 5000, "here: not valid JSON: Exceeds the limit"),
        ('{"a": "\\ud800"}', "here: not valid Unicode"),
        ('{"\\ud800": 1}', "here: not valid Unicode"),
    ],
)
def test_bad_text_is_one_line(text, message):
    with pytest.raises(DataError, match=f"^{message}") as caught:
        parse_json(text, "here", DataError)
    assert "\n" not in str(caught.value)


def test_files(tmp_path):
    with pytest.raises(DataError, match="absent: there is no such file"):
        read_json_object(tmp_path / "absent", DataError)
    (tmp_path / "list").write_text("[]")
    with pytest.raises(DataError, match="needed a JSON object, found list"):
        read_json_object(tmp_path / "list", DataError)
