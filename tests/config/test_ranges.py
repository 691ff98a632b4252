"""Every number of every command has a range, which is looked at before a model or data are: hostile numbers are one line."""

from pathlib import Path

import pytest
from command_line import run

from layerskip_core.config.options import parse_counts
from layerskip_core.errors import ConfigError

HOSTILE = (
    "-1", "0", str(2**63), str(2**70), "1e308", "-inf", "nan", "", "x", "1e-50", "٣", "9" * 5000,
)  # fmt: skip
# What is said where the number was taken: nothing else of these commands can be done.
ACCEPTED = ("error: no model 'nonesuch'", "error: --data none.csv: there is no such file", "error: cannot load model nonesuch")
COMMANDS = {
    ("generate", "x", "--model", "nonesuch"): (
        "--exit", "--spec", "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--draft-confidence", "--seed",
        "--draft-vocab", "--threads",
    ),
    ("generate", "--lines", "--model", "nonesuch"): ("--batch-size",),
    ("bench", "--model", "nonesuch", "--data", "none.csv"): (
        "--samples", "--exit", "--spec", "--max-new-tokens", "--repeats", "--shots", "--pass-k", "--temperature", "--seed",
        "--draft-vocab", "--threads", "--batch-size",
    ),
    ("bench", "--model", "nonesuch", "--data", "none.csv", "--temperature", "1"): ("--problem-samples",),
    ("bench", "--model", "nonesuch", "--data", "none.csv", "--batch-size", "2"): ("--timed",),
    ("sweep-exits", "--model", "nonesuch", "--data", "none.csv"): (
        "--samples", "--exits", "--specs", "--max-new-tokens", "--shots", "--pass-k", "--temperature", "--seed",
        "--draft-vocab", "--threads", "--batch-size", "--exit-confidences",
    ),
    ("sweep-exits", "--model", "nonesuch", "--data", "none.csv", "--temperature", "1"): ("--problem-samples",),
    ("sweep-exits", "--model", "nonesuch", "--data", "none.csv", "--batch-size", "2"): ("--timed",),
    ("inspect", "x", "--model", "nonesuch"): ("--max-new-tokens", "--layers", "--threads"),
    ("finetune", "--model", "nonesuch", "--data", "none.csv", "--output", "out"): (
        "--pmax", "--escale", "--rotation", "--exits", "--distill", "--lr", "--steps", "--epochs", "--batch-size",
        "--accumulation", "--max-length", "--warmup", "--weight-decay", "--samples", "--validation-samples",
        "--lora-rank", "--save-steps", "--seed", "--threads",
    ),
    ("finetune", "--model", "nonesuch", "--data", "none.csv", "--output", "out", "--validation", "none.csv"): ("--eval-steps",),
    ("finetune", "--model", "nonesuch", "--data", "none.csv", "--output", "out", "--regime", "scratch"): ("--vocab-size",),
    ("data", "--data", "none.csv"): ("--samples", "--seed"),
}  # fmt: skip


@pytest.mark.parametrize(("command", "flag"), [(command, flag) for command, flags in COMMANDS.items() for flag in flags])
def test_hostile_numbers(command, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in HOSTILE:
        result = run(*command, flag, number)
        case = (number[:30], result)
        assert result.out == "" and "Traceback" not in result.err, case
        lines = result.err.splitlines()
        if result.code == 2:  # worded by click, below the usage
            assert flag in lines[-1], case
        else:
            assert result.code == 1 and len(lines) == 1 and len(lines[0]) < 300, case
            assert flag in lines[0] or lines[0].startswith(ACCEPTED), case
            if number in ("-inf", "nan", "1e308", str(2**70), "9" * 5000) and flag != "--exit":
                assert flag in lines[0], case
    assert not list(Path().iterdir())


def test_counts_are_bounded_before_they_are_built():
    assert parse_counts("1:10000", "exits") == tuple(range(1, 10_001))
    for text, message in (
        ("1:10001", "`exits` must be at most 10000 counts, got 10001"),
        ("1:1000000000", "`exits` must be at most 10000 counts, got 1000000000"),
        ("1:10000000000", "`exits` must be counts of at most 1000000000, got 1:10000000000"),
        ("-10000000000:3", "`exits` must be counts of at most 1000000000, got -10000000000:3"),
        (",".join(["7"] * 10_001), "`exits` must be at most 10000 counts, got 10001"),
        ("5,1:6000,1:4000", "`exits` must be at most 10000 counts, got 10001"),
        ("5,1:10000000000", "`exits` must be counts of at most 1000000000, got 5,1:10000000000"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_counts(text, "exits")
        assert str(caught.value) == message
    for text in ("9" * 5000, "1:" + "9" * 5000, "1:2:3:4", ":", "1:", "1:5:0", "1:5:-1"):
        with pytest.raises(ConfigError, match="`exits` must be a list such as 3,6,8 or a range"):
            parse_counts(text, "exits")
