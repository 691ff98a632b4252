"""The data set `commands`, and `layerskip data`, which prints rows as JSON lines."""

import hashlib
import itertools
import json
import random
import re

import pytest
from command_line import fails, run

from layerskip_core.config.model import DataConfig
from layerskip_core.data import load_examples
from layerskip_core.embedded import commands


def labels_of(rows):
    return {label for row in rows for label in re.findall(r"\[((?:IN|SL):[A-Z_]+)", row.parse)}


def chains(row):
    """Label paths from the root to every intent: (IN:A,), (IN:A, SL:B, IN:C), ..."""
    path = []
    intents = set()
    for token in row.parse.split():
        if token.startswith("["):
            path.append(token[1:])
            if token.startswith("[IN:"):
                intents.add(tuple(path))
        elif token == "]":
            path.pop()
    assert not path
    return intents


def novelties(row):
    paths = chains(row)
    return paths | {frozenset(pair) for pair in itertools.combinations(paths, 2)}


class Recording(commands.Grammar):
    """Notes the values of open rules, and the skeleton of each row."""

    def __init__(self, split, count):
        vars(self).update(vars(commands.load_grammar()))
        self.values = set()
        self.skeletons = set()
        for index in range(count):
            self.row(split, random.Random(f"recorded:{split}:{index}"))
            self.skeletons.add(self.filled)

    def _open(self, *arguments):
        value = super()._open(*arguments)
        self.values.add(value)
        return value

    def _filled(self, tokens, *rest):
        text = super()._filled(tokens, *rest)
        self.filled = " ".join(tokens)  # at last those of the whole row
        return text


@pytest.fixture(scope="module")
def recorded():
    return Recording("train", 4000)


@pytest.fixture(scope="module")
def drawn():
    grammar = commands.load_grammar()
    return [grammar.row("train", random.Random(f"0:train:{index}")) for index in range(20_000)]


@pytest.fixture(scope="module")
def train(drawn):
    return list({row.utterance: row for row in drawn}.values())


DIGESTS = {
    "train": "63f558289bc059b7",
    "validation": "bbcbba6b46ea9f5f",
    "test": "340f19203056f3d0",
    "compositional": "4c1c1534deeef5db",
    "sealed": "48cc0b60bcc8a3a1",
}


@pytest.mark.parametrize("split", commands.SPLITS)
def test_the_rows_are_those_that_published_results_used(split):
    lines = "\n".join(
        f"{row.domain}\t{row.utterance}\t{row.parse}" for row in commands.rows(split, 200)
    )
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == DIGESTS[split]


def test_values_and_skeletons_of_other_splits_never_occur_in_training(recorded):
    others = {split: Recording(split, 300) for split in commands.SPLITS[1:]}
    for split, other in others.items():
        assert len(other.values) > 300 and len(other.skeletons) > 200
        assert not other.values & recorded.values
        assert split == "compositional" or not other.skeletons & recorded.skeletons
    sealed = others.pop("sealed")
    assert not any(other.skeletons & sealed.skeletons for other in others.values())


def test_compositional_rows_nest_as_training_never_does(train):
    """A chain of labels, or two chains in one row, that 20k training rows do not have, made of
    labels that they have.
    """
    trained = set().union(*(novelties(row) for row in train))
    rows = list(commands.rows("compositional", 500))
    assert all(novelties(row) - trained for row in rows)
    assert labels_of(rows) <= labels_of(train)
    for split in ("test", "sealed"):
        assert not any(novelties(row) - trained for row in commands.rows(split, 300))


def test_what_cannot_be_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    fails("--data none.csv: there is no such file", "data --data none.csv")
    splits = "train, validation, test, compositional, sealed"
    fails(f"--split must be one of {splits}, got dev for commands", "data --split dev")
    file.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    message = f"{file} holds conversations (a column 'messages'); needed a prompt and a completion"
    fails(message, f"data --data {file}")


def test_sealed_rows_draw_what_is_sealed_and_other_rows_what_is_not():
    words = [f"w{number}" for number in range(50)]  # too short to be made up
    grammar = commands.Grammar(
        {
            "d": "== a root\n[IN:X (do|) {b} {c} ]\n== b open\n" + "\n".join(words) + "\n== c\nold",
            "sealed": "== a\n[IN:X (now|soon) {b} {c} ]\n== b\nnew {d}\n== d\none\ntwo",
        }
    )
    drawn = {
        split: {grammar.row(split, random.Random(index)).utterance for index in range(50)}
        for split in ("train", "sealed")
    }
    assert drawn["sealed"] == {
        f"{when} new {number} old" for when in ("now", "soon") for number in ("one", "two")
    }
    assert drawn["train"] <= {f"{do}{word} old" for do in ("", "do ") for word in words}


def test_ten_test_rows_by_default_and_rows_of_a_file_as_they_are(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "né\\n", "completion": "日本 \\"🏠\\""}\n', encoding="utf-8")
    result = run(f"data --data {file}", encoding="ascii")
    assert result.out == file.read_text(encoding="utf-8")
    assert run("data") == run("data --data commands --split test --samples 10 --seed 0")


@pytest.mark.parametrize("split", ["test", "compositional", "sealed"])
def test_rows_of_commands(split):
    result = run(f"data --samples 3 --split {split} --seed 4")
    expected = load_examples(DataConfig("commands", split, limit=3, seed=4))
    assert (result.code, result.err) == (0, "")
    rows = [(row["prompt"], row["completion"]) for row in map(json.loads, result.out.splitlines())]
    assert rows == [(example.prompt, example.completion) for example in expected]
