"""Tasks by name and from files, and how they score."""

import json

import pytest

from layerskip_core.config import TaskConfig
from layerskip_core.data import Example
from layerskip_core.errors import DataError
from layerskip_core.evaluation.tasks import load_task


def test_commands_is_the_default_and_a_parsing_task():
    task = load_task(TaskConfig(samples=5))
    assert (task.name, len(task.examples), task.max_new_tokens, task.quality_metric) == ("commands", 5, 128, "exact_match")
    assert all(example.completion.startswith("[IN:") for example in task.examples)
    assert (task.config.task, task.config.data, task.config.completion_column) == ("commands", "commands", "completion")
    references = [example.completion for example in task.examples]
    assert task.score(references) == {"exact_match": 1.0}
    spaced = [f"\n{references[0]}  ", references[1].replace(" ", "  "), "", *references[3:]]
    assert task.score(spaced) == {"exact_match": 0.8}


def test_rows_follow_seed_and_split():
    first, again, other = (load_task(TaskConfig(samples=4, seed=seed)).examples for seed in (1, 1, 2))
    assert first == again != other
    assert load_task(TaskConfig(samples=4, split="compositional", seed=1)).examples != first


@pytest.mark.parametrize("column", ["completion", "reference"])
def test_jsonl_and_csv_with_prompt_and_reference(tmp_path, column):
    rows = [{"prompt": "one", column: "the cat sat down"}, {"prompt": "two", column: "b a"}]
    jsonl, table = tmp_path / "rows.jsonl", tmp_path / "rows.csv"
    jsonl.write_text("\n" + "\n".join(map(json.dumps, rows)))
    table.write_text(f"prompt,{column}\none,the cat sat down\ntwo,b a\n")
    for task in (load_task(TaskConfig(str(jsonl))), load_task(TaskConfig("text", str(table)))):
        assert task.examples == (Example("one", "the cat sat down"), Example("two", "b a"))
        assert (task.parsing, task.quality_metric, task.config.completion_column) == (False, "rouge2", column)
        assert task.score(["the cat sat", "b a"]) == pytest.approx({"rouge2": 0.9, "exact_match": 0.5})


def test_columns_by_flag(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"q": "one", "a": "two"}\n')
    assert load_task(TaskConfig(data=str(file), prompt_column="q", completion_column="a")).examples == (Example("one", "two"),)


def test_a_folder_of_topv2_files(tmp_path):
    (tmp_path / "music_test.tsv").write_text("domain\tutterance\tsemantic_parse\nmusic\tplay it\t[IN:PLAY_MUSIC play it ]\n")
    for task in (load_task(TaskConfig("topv2", str(tmp_path))), load_task(TaskConfig(data=str(tmp_path)))):
        assert task.parsing
        assert task.examples == (Example("play it", "[IN:PLAY_MUSIC play it ]"),)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"prompt": "a", "reference": "b"}\n{"prompt": ', r"rows.jsonl:2: not valid JSON"),
        ("rows.jsonl", "[1]\n", r"rows.jsonl:1: needed a JSON object"),
        ("rows.jsonl", '{"prompt": "a", "answer": "b"}\n', r"rows.jsonl:1: no column 'completion'"),
        ("rows.jsonl", '{"prompt": " ", "reference": "b"}\n', r"a prompt in every row, found none in row 1"),
        ("rows.txt", "plain text\n", r"a prompt in every row, found none in row 1"),
        ("rows.csv", "", r"rows.csv:1: no column 'completion'"),
    ],
)
def test_bad_data_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_task(TaskConfig(str(tmp_path / name)))


def test_a_split_without_rows_is_named(tmp_path):
    (tmp_path / "music_test.tsv").write_text("domain\tutterance\tsemantic_parse\n")
    with pytest.raises(DataError, match="has no rows in split test"):
        load_task(TaskConfig(data=str(tmp_path)))


def test_an_unknown_task_is_named():
    with pytest.raises(DataError, match="nothing-here"):
        load_task(TaskConfig("nothing-here"))
