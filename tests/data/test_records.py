"""Whatever bytes a file holds, reading it gives rows or one error of one line."""

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_core.config.model import DataConfig
from layerskip_core.data import Conversation, Example, load_rows, stream_rows
from layerskip_core.errors import DataError

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS = [{"prompt": f"p{row} \u00e9", "completion": "c" * row, "messages": TURNS} for row in range(1, 30)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
TABLE = b"prompt,completion\n" + b"".join(b'"p, %d",c\n' % row for row in range(30))


def parquet():
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), file)
    return file.getvalue()


WHOLE = {
    ".jsonl": LINES,
    ".json": json.dumps(ROWS).encode(),
    ".csv": TABLE,
    ".txt": LINES,
    ".parquet": parquet(),
    ".jsonl.gz": gzip.compress(LINES),
    ".csv.gz": gzip.compress(TABLE),
}
EVERY = settings(max_examples=50, deadline=None, derandomize=True, database=None)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "a"]), inner, max_size=3),
    max_leaves=6,
)
json_rows = st.dictionaries(st.sampled_from(["prompt", "completion", "messages", "text"]), json_values, max_size=4)


@st.composite
def damaged(draw, content):
    """The content cut, with some bytes changed, and some put in."""
    parts = bytearray(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)
    for place, byte in draw(st.lists(st.tuples(st.integers(0, len(content)), st.integers(0, 255)), max_size=8)):
        if place < len(parts):
            parts[place] = byte
    place = draw(st.integers(0, len(parts)))
    return bytes(parts[:place]) + draw(st.binary(max_size=12)) + bytes(parts[place:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


def read_all(folder, name, content):
    """The rows, the same read at once and as a stream; None where both give the same error."""
    file = folder / name
    file.write_bytes(content)
    results = []
    for read in (load_rows, stream_rows):
        try:
            results.append(list(read(DataConfig(str(file)))))
        except DataError as error:
            assert str(file) in str(error) and "\n" not in str(error) and len(str(error)) < len(str(file)) + 450
            results.append(str(error))
    assert results[0] == results[1]
    return None if isinstance(results[0], str) else results[0]


@pytest.mark.parametrize("ending", WHOLE)
def test_whole_files_are_read(folder, ending):
    rows = read_all(folder, f"a{ending}", WHOLE[ending])
    assert len(rows) == (30 if ending.startswith(".csv") else 29)


@pytest.mark.parametrize("ending", WHOLE)
@EVERY
@given(data=st.data())
def test_damaged_files(folder, ending, data):
    read_all(folder, f"a{ending}", data.draw(damaged(WHOLE[ending])))


@EVERY
@given(rows=st.lists(json_rows, min_size=1, max_size=3))
def test_rows_of_any_json(folder, rows):
    read = read_all(folder, "a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    for row in read or []:
        texts = [row.prompt, row.completion] if isinstance(row, Example) else [text for turn in row.messages for text in turn]
        assert isinstance(row, Example | Conversation) and all(isinstance(text, str) for text in texts)


@EVERY
@given(text=st.text(st.characters(codec="utf-8"), max_size=80))
def test_lines_of_any_text_come_through(folder, text):
    rows = read_all(folder, "a.txt", text.encode())
    lines = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
    expected = [line.rstrip("\r") for line in lines if line.strip()]
    assert rows == ([Example("", line) for line in expected] if expected else None)
