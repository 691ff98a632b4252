"""Rows of data sets; whatever bytes a file holds, reading it gives rows or one error of one
line.
"""

import gzip
import io
import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip_core.config.evaluation import TaskConfig
from layerskip_core.config.model import DataConfig
from layerskip_core.data import (
    Conversation,
    Example,
    has_prompts,
    load_examples,
    load_prompts,
    load_rows,
    stream_rows,
)
from layerskip_core.embedded import commands
from layerskip_core.errors import ConfigError, DataError
from layerskip_core.evaluation.tasks.task import load_task

TOPV2_HEADER = "domain\tutterance\tsemantic_parse\n"


def written(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(**columns):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), file)
    return file.getvalue()


PARQUET = parquet(
    prompt=[f"p{row}" for row in range(500)], completion=[f"c{row}" for row in range(500)]
)


def load(name, **settings):
    return [
        (example.prompt, example.completion)
        for example in load_examples(DataConfig(name=name, **settings))
    ]


FULL = {"prompt": "p", "completion": "c"}
GOOD = {
    "lines of JSON": (
        "a.jsonl",
        lines({"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": "d", "more": 1}),
    ),
    "CSV with a blank line": ("a.csv", "completion,prompt\nc,p\n\nd,q\n"),
    "JSON with a mark and CRLF": (
        "a.jsonl",
        b'\xef\xbb\xbf{"prompt":"p","completion":"c"}\r\n{"prompt":"q","completion":"d"}\r\n',
    ),
    "a JSON array": (
        "a.json",
        '\n [{"prompt": "p", "completion": "c"},\n {"prompt": "q", "completion": "d"}]',
    ),
    "a packed JSON array": (
        "a.json.gz",
        gzip.compress(json.dumps([FULL, {"prompt": "q", "completion": "d"}]).encode()),
    ),
    "CSV with empty names": ("a.csv", "\nprompt,,completion,\np,1,c,2\nq,3,d,\n"),
}


@pytest.mark.parametrize("name, content", GOOD.values(), ids=GOOD.keys())
def test_good_files(tmp_path, name, content):
    assert load(written(tmp_path, name, content)) == [("p", "c"), ("q", "d")]


def test_parquet_and_text_a_completion_a_line(tmp_path):
    file = tmp_path / "a.parquet"
    Dataset.from_list(
        [{"prompt": "p", "completion": "c"}, {"prompt": None, "completion": "d"}]
    ).to_parquet(file)
    assert load(str(file)) == [("p", "c"), ("", "d")]
    assert load(
        written(tmp_path, "a.txt", b"\xef\xbb\xbf one\r\n\r\ntwo \xe2\x80\xa8 words\n")
    ) == [("", " one"), ("", "two \u2028 words")]


def test_texts_that_look_like_something_else_stay_as_they_are(tmp_path):
    """The readers of `datasets` make a date, a number, nothing and a truth value of these."""
    texts = ["2020-01-01", "07", "NA", "true"]
    rows = lines(*({"prompt": "null", "completion": text} for text in texts))
    assert load(written(tmp_path, "a.jsonl", rows)) == [("null", text) for text in texts]
    table = "prompt,completion\n" + "".join(f"null,{text}\n" for text in texts)
    assert load(written(tmp_path, "a.csv", table)) == [("null", text) for text in texts]
    assert load(written(tmp_path, "a.csv", 'prompt,completion\n"a, b","c\nd"\n')) == [
        ("a, b", "c\nd")
    ]


USUAL = {
    "Alpaca": [
        {"instruction": "i", "input": "x", "output": "o"},
        {"instruction": "j", "input": "", "output": "p"},
    ],
    "questions": [{"question": "i\n\nx", "answer": "o"}, {"question": "j", "answer": "p"}],
    "ours first": [
        {"input": "?", "prompt": "i\n\nx", "response": "o"},
        {"prompt": "j", "response": "p"},
    ],
}


@pytest.mark.parametrize("rows", USUAL.values(), ids=USUAL.keys())
def test_columns_with_usual_names_need_no_flag(tmp_path, rows):
    name = written(tmp_path, "a.jsonl", lines(*rows))
    assert load(name) == [("i\n\nx", "o"), ("j", "p")]
    assert [row.prompt for row in load_prompts(DataConfig(name))] == [
        "i\n\nx",
        "j",
    ] and has_prompts(DataConfig(name))
    task = load_task(TaskConfig(data=name, samples=0))
    assert [(row.prompt, row.completion) for row in task.examples] == load(name)


def test_a_column_is_that_of_the_first_row(tmp_path):
    name = written(
        tmp_path, "a.jsonl", lines({"question": "q", "answer": "a"}, {"prompt": "p", "answer": "b"})
    )
    with pytest.raises(
        DataError,
        match=r"a\.jsonl:2: no column 'question' \(`prompt_column`\); found prompt, answer",
    ):
        load(name)


def corrupted(content):
    """Parquet whose pages are overwritten and whose footer is whole."""
    return content[:100] + b"\xff" * 200 + content[300:]


BAD = {
    "malformed JSON": (
        "a.jsonl",
        lines(FULL) + '\n{"prompt": "p",\n',
        r"a\.jsonl:3: not valid JSON",
    ),
    "not an object": ("a.jsonl", lines(FULL, ["p", "c"]), r"a\.jsonl:2: needed a JSON object"),
    "a prompt that stops coming": (
        "a.jsonl",
        lines(FULL, {"completion": "c"}),
        r"a\.jsonl:2: no column 'prompt'",
    ),
    "an empty completion": (
        "a.jsonl",
        lines(FULL, {"prompt": "p", "completion": " "}),
        r"a\.jsonl:2: the completion must be",
    ),
    "too many fields": (
        "a.csv",
        "prompt,completion\np,c\np,c,d\n",
        r"a\.csv:3: needed 2 fields, found 3",
    ),
    "a quote left open": ("a.csv", 'prompt,completion\np,c\np,"c\nq,d\n', r"a\.csv:3: "),
    "text in Latin-1": ("a.txt", b"one\ntw\xf6\n", r"a\.txt:2: not UTF-8 text: .* at byte 3"),
    "JSON nested too deeply": (
        "a.jsonl",
        lines(FULL) + '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}\n",
        r"a\.jsonl:2: ",
    ),
    "columns of one name": (
        "a.csv",
        "prompt,completion,prompt\np,c,q\n",
        r"a\.csv:1: needed distinct column names.*prompt",
    ),
    "a damaged gzip": (
        "a.jsonl.gz",
        gzip.compress(lines(FULL).encode())[:-8] + b"\1" * 8,
        r"a\.jsonl\.gz cannot be read after line 1: CRC check failed",
    ),
    "damaged Parquet": ("a.parquet", corrupted(PARQUET), r"a\.parquet: not readable as Parquet: "),
    "another ending": (
        "a.xml",
        "<a/>",
        r"a\.xml: needed one of \.jsonl, .* found the ending '\.xml'",
    ),
}


@pytest.mark.parametrize("name, content, message", BAD.values(), ids=BAD.keys())
def test_bad_files_are_named_with_their_line(tmp_path, name, content, message):
    file = written(tmp_path, name, content)
    for read in (load_rows, stream_rows):
        with pytest.raises(DataError, match=message) as error:
            list(read(DataConfig(file)))
        assert "\n" not in str(error.value)


def test_missing_and_unknown_data(tmp_path):
    with pytest.raises(DataError, match=r"`data` some/missing\.jsonl: there is no such file"):
        load("some/missing.jsonl")
    with pytest.raises(DataError, match="`data` nonsense is none of: commands, topv2, a "):
        load("nonsense")
    with pytest.raises(DataError, match="cannot load data nobody/nothing: "):
        load("nobody/nothing")


def topv2(tmp_path, **files):
    for name, rows in files.items():
        written(tmp_path, f"{name}.tsv", TOPV2_HEADER + rows)
    return str(tmp_path)


def test_a_topv2_folder_reads_every_domain_of_a_split(tmp_path):
    folder = topv2(
        tmp_path,
        b_train='b\tsay "hi\t[IN:B say "hi ]\r\n',
        a_train="a\tgo\t[IN:A go ]\n",
        a_eval="a\tstop\t[IN:A stop ]\n",
    )
    assert load(folder) == [("go", "[IN:A go ]"), ('say "hi', '[IN:B say "hi ]')]
    assert load(folder, split="validation") == [("stop", "[IN:A stop ]")]


def test_bad_topv2_folders(tmp_path):
    with pytest.raises(DataError, match=r"holds no TOPv2 files named DOMAIN_train\.tsv"):
        load(str(tmp_path))
    with pytest.raises(
        ConfigError, match="`split` must be one of train, validation, test, got dev for TOPv2"
    ):
        load(str(tmp_path), split="dev")
    for row, fault in (
        ("a\tgo\t[IN:A go ]\na\tgo\n", "3: needed 3 fields, found 2"),
        ("a\tgo\t\n", "2: the completion must be"),
    ):
        topv2(tmp_path, a_train=row)
        with pytest.raises(DataError, match=rf"a_train\.tsv:{fault}"):
            load(str(tmp_path))
    written(tmp_path, "a_train.tsv", "domain\tutterance\na\tgo\n")
    with pytest.raises(DataError, match=r"a_train\.tsv:2: no column 'semantic_parse'"):
        load(str(tmp_path))


def test_rows_of_a_hub_id_are_checked_too(monkeypatch):
    rows = [{"question": "q", "answer": "a"}, {"question": "r", "answer": ""}]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split, streaming: Dataset.from_list(rows)
    )
    columns = {"prompt_column": "question", "completion_column": "answer"}
    with pytest.raises(
        DataError, match="owner/set:2: the completion must be a text that is not empty, found ''"
    ):
        load("owner/set", **columns)
    rows.pop()
    assert load("owner/set", **columns) == load("owner/set") == [("q", "a")]
    told = r"owner/set:1: no column 'completion', nor response, .*, text \(`completion_column`\); found question, answer"
    rows[0] = {"question": "q", "reply": "a"}
    with pytest.raises(DataError, match=told.replace("answer", "reply")):
        load("owner/set")


def test_the_limit_is_spread_over_the_rows(tmp_path):
    name = written(tmp_path, "a.txt", "".join(f"{row}\n" for row in range(10)))
    assert [completion for _, completion in load(name, limit=4)] == ["0", "2", "5", "7"]
    assert len(load(name, limit=99)) == len(load(name)) == 10


CHAT_ROW = {
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
}


def test_conversations(tmp_path):
    name = written(tmp_path, "a.jsonl", lines(CHAT_ROW))
    expected = [Conversation((("user", "hi"), ("assistant", "yes")))]
    assert load_rows(DataConfig(name=name)) == list(stream_rows(DataConfig(name=name))) == expected
    with pytest.raises(
        DataError, match=r"holds conversations .*; needed a prompt and a completion"
    ):
        load_examples(DataConfig(name=name))
    Dataset.from_list([CHAT_ROW]).to_parquet(tmp_path / "a.parquet")
    for read in (load_rows, stream_rows):
        assert list(read(DataConfig(name=str(tmp_path / "a.parquet")))) == expected
    shared = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}
    # As ShareGPT has them
    assert load_rows(DataConfig(written(tmp_path, "a.jsonl", lines(shared)))) == expected
    both = written(tmp_path, "both.jsonl", lines({**CHAT_ROW, "prompt": "p", "completion": "c"}))
    assert load(both) == [("p", "c")]  # who names a completion means it


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS = [
    {"prompt": f"p{row} \u00e9", "completion": "c" * row, "messages": TURNS} for row in range(1, 30)
]
EVERY_LINE = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
TABLE = b"prompt,completion\n" + b"".join(b'"p, %d",c\n' % row for row in range(30))


def whole_parquet():
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), file)
    return file.getvalue()


WHOLE = {
    ".jsonl": EVERY_LINE,
    ".json": json.dumps(ROWS).encode(),
    ".csv": TABLE,
    ".txt": EVERY_LINE,
    ".parquet": whole_parquet(),
    ".jsonl.gz": gzip.compress(EVERY_LINE),
    ".csv.gz": gzip.compress(TABLE),
}
EVERY = settings(max_examples=50, deadline=None, derandomize=True, database=None)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "a"]), inner, max_size=3)
    ),
    max_leaves=6,
)
json_rows = st.dictionaries(
    st.sampled_from(["prompt", "completion", "messages", "text"]), json_values, max_size=4
)


@st.composite
def damaged(draw, content):
    parts = bytearray(
        content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content
    )
    for place, byte in draw(
        st.lists(st.tuples(st.integers(0, len(content)), st.integers(0, 255)), max_size=8)
    ):
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
            assert (
                str(file) in str(error)
                and "\n" not in str(error)
                and len(str(error)) < len(str(file)) + 450
            )
            results.append(str(error))
    assert results[0] == results[1]
    return None if isinstance(results[0], str) else results[0]


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
        texts = (
            [row.prompt, row.completion]
            if isinstance(row, Example)
            else [text for turn in row.messages for text in turn]
        )
        assert isinstance(row, Example | Conversation) and all(
            isinstance(text, str) for text in texts
        )


@EVERY
@given(text=st.text(st.characters(codec="utf-8"), max_size=80))
def test_lines_of_any_text_come_through(folder, text):
    rows = read_all(folder, "a.txt", text.encode())
    lines = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
    expected = [line.rstrip("\r") for line in lines if line.strip()]
    assert rows == ([Example("", line) for line in expected] if expected else None)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv.gz"])
def test_a_file_that_cannot_be_read(tmp_path, name):
    with pytest.raises(
        DataError, match=rf"`validation` .*{name}.* (cannot be read|not readable|no such file)"
    ):
        load(str(tmp_path / name), setting="validation")
    (tmp_path / name).mkdir()
    with pytest.raises(DataError):
        load(str(tmp_path / name))


def test_columns_by_flag_and_without_a_prompt_column(tmp_path):
    name = written(tmp_path, "a.jsonl", lines({"prompt": "x", "question": "q", "answer": "a"}))
    assert load(name, prompt_column="question", completion_column="answer") == [("q", "a")]
    name = written(tmp_path, "a.jsonl", lines({"text": "t", "source": "web"}))
    assert load(name) == load(name, completion_column="text") == [("", "t")]
    assert load(written(tmp_path, "a.csv", "completion\nc\n")) == [("", "c")]


def test_commands_by_name():
    rows = load_examples(DataConfig(limit=5, seed=1))
    assert (
        rows
        == load_examples(DataConfig(limit=7, seed=1))[:5]
        != load_examples(DataConfig(limit=5, seed=2))
    )
    with pytest.raises(
        ConfigError,
        match=r"`split` must be one of train, validation, .* sealed, got dev for commands",
    ):
        load("commands", split="dev")


MALFORMED = {
    "no list": {"messages": "hi"},
    "no role": {"messages": [{"content": "hi"}]},
    "no text": {"messages": [{"role": "user", "content": 5}]},
    "no answer": {"messages": [{"role": "user", "content": "hi"}]},
    "no messages": {"other": "hi"},
    "turns of numbers": {"conversations": [{"from": "human", "value": 5}]},
}


@pytest.mark.parametrize("row", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_conversations_are_named_with_their_line(tmp_path, row):
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*(messages?|no column 'completion')"):
        load_rows(DataConfig(name=written(tmp_path, "a.jsonl", lines(CHAT_ROW, row))))


def test_topv2_by_name_comes_from_the_hub(monkeypatch):
    asked = []

    def hub(name, streaming, **keywords):
        asked.append((name, keywords))
        return Dataset.from_list(
            [{"domain": "a", "utterance": "go", "semantic_parse": "[IN:A go ]"}]
        )

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert load("topv2", split="validation") == [("go", "[IN:A go ]")]
    assert asked == [("WillHeld/top_v2", {"split": "eval"})]
    with pytest.raises(ConfigError, match="`split` must be one of"):
        load("topv2", split="dev")


def test_more_commands_than_there_are(monkeypatch):
    tiny = commands.Grammar(
        {"d": "== a root\n" + "\n".join(f"[IN:X {'w' * length} ]" for length in range(1, 30))}
    )
    monkeypatch.setattr(commands, "load_grammar", lambda: tiny)
    with pytest.raises(DataError, match="`limit` 50: split train has fewer than 50 distinct rows"):
        load("commands", limit=50)
