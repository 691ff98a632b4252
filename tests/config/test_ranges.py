"""Every number of every command has a range, which is looked at before a model or data are: hostile numbers are one line."""

import re
from pathlib import Path

import pytest
from command_line import run

from layerskip_core.config.evaluation import BenchConfig
from layerskip_core.config.options import checked, parse_counts
from layerskip_core.errors import ConfigError

HOSTILE = ("-1", "2147483648", str(2**70), "-1e308", "inf", "nan", "", "x", "1e-50", "٣", "9" * 5000)
HUGE = ("-1", str(2**70), "-1e308", "inf", "nan", "9" * 5000)  # outside every range but that of an exit
# What is said where the number was taken: nothing else of these commands can be done.
ACCEPTED = ("error: no model 'nonesuch'", "error: --data none.csv: there is no such file", "error: cannot load model nonesuch")
NOWHERE = {
    "generate": ("x", "--model", "nonesuch"),
    "bench": ("--model", "nonesuch", "--data", "none.csv"),
    "sweep-exits": ("--model", "nonesuch", "--data", "none.csv"),
    "inspect": ("x", "--model", "nonesuch"),
    "finetune": ("--threads", "1", "--model", "nonesuch", "--data", "none.csv", "--output", "out"),
    "train-drafter": ("--threads", "1", "--model", "nonesuch", "--data", "none.csv", "--output", "out"),
    "calibrate": ("--model", "nonesuch", "--data", "none.csv", "--output", "out"),
    "data": ("--data", "none.csv"),
}
NEEDED = {  # of flags that mean nothing by themselves
    ("generate", "--batch-size"): ("--lines",),
    **{(name, "--timed"): ("--batch-size", "2") for name in ("bench", "sweep-exits")},
    **{(name, "--problem-samples"): ("--temperature", "1") for name in ("bench", "sweep-exits")},
    **{(name, "--validation-samples"): ("--validation", "none.csv") for name in ("finetune", "train-drafter")},
    ("finetune", "--vocab-size"): ("--recipe", "scratch"),
    **{("finetune", flag): ("--lora-rank", "2") for flag in ("--lora-alpha", "--lora-dropout")},
}
SIGNED = ("--frequency-penalty", "--presence-penalty")  # in -2..2
LISTS = ("--exits", "--specs", "--layers", "--skip", "--pass-k", "--exit-confidences")
FLAGS = [
    (name, flag)
    for name in NOWHERE
    for flag, kind in re.findall(r"^  (--[a-z-]+) <(\w+)>", run(name, "--help").out, re.MULTILINE)
    if kind in ("int", "float") or flag in LISTS
]


@pytest.mark.parametrize(("command", "flag"), FLAGS)
def test_hostile_numbers(command, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fixed = NOWHERE[command] if flag != "--batch-size" or command != "generate" else NOWHERE[command][1:]
    for number in HOSTILE:
        result = run(command, *fixed, *NEEDED.get((command, flag), ()), flag, number)
        case = (number[:30], result)
        assert result.out == "" and "Traceback" not in result.err, case
        lines = result.err.splitlines()
        if result.code == 2:  # worded by click, below the usage
            assert flag in lines[-1], case
        else:
            assert result.code == 1 and len(lines) == 1 and len(lines[0]) < 300, case
            assert flag in lines[0] or lines[0].startswith(ACCEPTED), case
            taken = number not in HUGE or flag in ("--exit", *LISTS) or (number == "-1" and flag in SIGNED)
            assert flag in lines[0] or taken, case
    assert not list(Path().iterdir())


def test_counts_are_bounded_before_they_are_built():
    assert parse_counts("1:10000", "exits") == tuple(range(1, 10_001))
    for text in ("1:10001", "1:10000000000", ",".join(["7"] * 10_001), "5,1:6000,1:4000"):
        with pytest.raises(ConfigError, match="`exits` must be at most 10000 counts, got 1000"):
            parse_counts(text, "exits")
    huge = ("9" * 5000, "1:" + "9" * 5000, "1:" + "9" * 30)
    for text in (*huge, "", "a", "3,", "1.5", "3,8:6", "1:2:3:4", ":", "1:", "1:5:0", "1:5:-1", "5:3"):
        with pytest.raises(ConfigError, match="`exits` must be a list such as 3,6,8 or a range"):
            parse_counts(text, "exits")


@pytest.mark.parametrize("name", ["llama-cpp", "llama.cpp\n", "no"])
def test_a_choice_is_one_of_the_names_to_the_letter(name):
    assert checked(BenchConfig, {"baselines": ["llama.cpp"]}) == {"baselines": ("llama.cpp",)}
    with pytest.raises(ConfigError, match="`baselines` must be a list, each one of transformers, "):
        checked(BenchConfig, {"baselines": [name]})
