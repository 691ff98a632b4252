"""`layerskip data`: rows as JSON lines."""

import json

import pytest
from command_line import fails, run

from layerskip_core.config.model import DataConfig
from layerskip_core.data import load_examples


@pytest.mark.parametrize("split", ["test", "compositional"])
def test_rows_of_commands(split):
    result = run("data", "--samples", "3", "--split", split, "--seed", "4")
    expected = load_examples(DataConfig("commands", split, limit=3, seed=4))
    assert (result.code, result.err) == (0, "")
    rows = [(row["prompt"], row["completion"]) for row in map(json.loads, result.out.splitlines())]
    assert rows == [(example.prompt, example.completion) for example in expected]


def test_ten_test_rows_by_default():
    assert run("data") == run("data", "--data", "commands", "--split", "test", "--samples", "10", "--seed", "0")


def test_rows_of_a_file_stay_as_they_are_whatever_the_locale(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "né\\n", "completion": "日本 \\"🏠\\""}\n', encoding="utf-8")
    result = run("data", "--data", str(file), encoding="ascii")
    assert result.out == file.read_text(encoding="utf-8")


def test_what_cannot_be_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    fails("--data none.csv: there is no such file", "data", "--data", "none.csv")
    fails("--split must be one of train, validation, test, compositional for commands, got dev", "data", "--split", "dev")
    file.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    message = f"{file} holds conversations (a column 'messages'); needed a prompt and a completion"
    fails(message, "data", "--data", str(file))
