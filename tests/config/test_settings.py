"""Every number of every command has a range, and hostile ones are one line; what options mean for a
checkpoint.
"""

import re
from pathlib import Path

import pytest
from command_line import run

from layerskip_core.config.decoding import DecodingConfig, DecodingOptions, changed, choices
from layerskip_core.config.evaluation import BenchConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.config.options import checked, parse_counts
from layerskip_core.config.resolution import (
    Recommended,
    policy_named,
    policy_options,
    policy_packing,
    policy_text,
    resolve,
    resolve_as,
    spread_exits,
)
from layerskip_core.errors import ConfigError

HOSTILE = ("-1", "nan", "9" * 5000)
# Read by the same code for every command
BY_TYPE = (str(2**70), "inf", "1e-50", "2147483648", "-1e308", "", "x", "٣")
# Outside every range but that of an exit
HUGE = ("-1", str(2**70), "-1e308", "inf", "nan", "9" * 5000)
# What is said where the number was taken: nothing else of these commands can be done.
ACCEPTED = (
    "error: no model 'nonesuch'",
    "error: --data none.csv: there is no such file",
    "error: cannot load model nonesuch",
)
NOWHERE = {
    "generate": ("x", "--model nonesuch"),
    "bench": ("--model nonesuch --data none.csv",),
    "sweep-exits": ("--model nonesuch --data none.csv",),
    "inspect": ("x", "--model nonesuch"),
    "finetune": ("--threads 1 --model nonesuch --data none.csv --output out",),
    "train-drafter": ("--threads 1 --model nonesuch --data none.csv --output out",),
    "calibrate": ("--model nonesuch",),
    "data": ("--data none.csv",),
}
NEEDED = {  # of flags that mean nothing by themselves
    ("generate", "--batch-size"): ("--lines",),
    **{(name, "--timed"): ("--batch-size 2",) for name in ("bench", "sweep-exits")},
    **{(name, "--problem-samples"): ("--temperature 1",) for name in ("bench", "sweep-exits")},
    **{
        (name, "--validation-samples"): ("--validation none.csv",)
        for name in ("finetune", "train-drafter")
    },
    ("finetune", "--vocab-size"): ("--recipe scratch",),
    **{("finetune", flag): ("--lora-rank 2",) for flag in ("--lora-alpha", "--lora-dropout")},
}
SIGNED = ("--frequency-penalty", "--presence-penalty")  # in -2..2
LISTS = ("--exits", "--specs", "--layers", "--skip", "--pass-k", "--exit-confidences")
FLAGS = []
for name in NOWHERE:
    text = run(f"{name} --help-all").out or run(f"{name} --help").out
    for flag, kind in re.findall(r"^  (--[a-z-]+) <(\w+)>", text, re.MULTILINE):
        if kind in ("int", "float") or flag in LISTS:
            FLAGS.append((name, flag))


@pytest.mark.parametrize("command, flag", FLAGS)
def test_hostile_numbers(command, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fixed = (
        NOWHERE[command]
        if flag != "--batch-size" or command != "generate"
        else NOWHERE[command][1:]
    )
    for number in (*HOSTILE, *(BY_TYPE if command == "generate" else ())):
        result = run(command, *fixed, *NEEDED.get((command, flag), ()), flag, number)
        case = (number[:30], result)
        assert result.out == "" and "Traceback" not in result.err, case
        lines = result.err.splitlines()
        if result.code == 2:  # worded by click, below the usage
            assert flag in lines[-1], case
        else:
            assert result.code == 1 and len(lines) == 1 and len(lines[0]) < 300, case
            assert flag in lines[0] or lines[0].startswith(ACCEPTED), case
            taken = (
                number not in HUGE
                or flag in ("--exit", *LISTS)
                or (number == "-1" and flag in SIGNED)
            )
            assert flag in lines[0] or taken, case
    assert not list(Path().iterdir())


def test_counts_are_bounded_before_they_are_built():
    assert parse_counts("1:10000", "exits") == tuple(range(1, 10_001))
    for text in ("1:10001", "1:10000000000", ",".join(["7"] * 10_001), "5,1:6000,1:4000"):
        with pytest.raises(ConfigError, match="`exits` must be at most 10000 counts, got 1000"):
            parse_counts(text, "exits")
    huge = ("9" * 5000, "1:" + "9" * 5000, "1:" + "9" * 30)
    for text in (
        *huge,
        "",
        "a",
        "3,",
        "1.5",
        "3,8:6",
        "1:2:3:4",
        ":",
        "1:",
        "1:5:0",
        "1:5:-1",
        "5:3",
    ):
        with pytest.raises(ConfigError, match="`exits` must be a list such as 3,6,8 or a range"):
            parse_counts(text, "exits")


@pytest.mark.parametrize("name", ["llama-cpp", "llama.cpp\n", "no"])
def test_a_choice_is_one_of_the_names_to_the_letter(name):
    assert checked(BenchConfig, {"baselines": ["llama.cpp"]}) == {"baselines": ("llama.cpp",)}
    with pytest.raises(ConfigError, match="`baselines` must be a list, each one of transformers, "):
        checked(BenchConfig, {"baselines": [name]})


TRAINED = Recommended(4, 12, "self-speculative")
UNKNOWN = Recommended(2, 6)
CONFIDENT = {"exit_confidence": 0.9}
LOW = {
    "strategy": "self-speculative", "exit_layer": 8, "num_draft_tokens": 3, "draft_weights": "int8",
    "lookup": 4, "measured": {"task": "topv2", "metric": "exact_match", "value": 0.9, "full_depth": 0.91, "speedup": 1.8},
}  # fmt: skip


@pytest.mark.parametrize(
    "asked, recommended, strategy, exit_layer, drafts",
    [
        ({}, TRAINED, "self-speculative", 4, 12),
        ({}, UNKNOWN, "adaptive", None, 32),
        ({}, Recommended(4, 12, "autoregressive"), "autoregressive", None, 6),
        ({"exit_layer": 3}, UNKNOWN, "self-speculative", 3, 6),
        ({"num_draft_tokens": 1}, UNKNOWN, "self-speculative", 2, 1),
        ({"strategy": "early-exit", "exit_layer": 8}, TRAINED, "early-exit", 8, 6),
        # It was ignored
        ({"lookup": 3}, Recommended(4, 12, "autoregressive"), "adaptive", None, 32),
    ],
)
def test_the_checkpoint_decides_what_was_not_said(asked, recommended, strategy, exit_layer, drafts):
    config = resolve(asked, recommended, 8)
    assert (config.strategy, config.exit_layer, config.num_draft_tokens) == (
        strategy,
        exit_layer,
        drafts,
    )
    assert config.max_new_tokens == 256


def test_weights_for_drafts_imply_drafting():
    plain = Recommended(2, 6, "autoregressive")  # found best without such weights
    assert resolve({}, plain, 8, PackingConfig(draft_vocab=9)).strategy == "adaptive"
    asked = {"num_draft_tokens": 3}
    copies = PackingConfig(draft_weights=("int4", "int8"))
    low = resolve(asked, UNKNOWN, 8, copies)
    assert (low.strategy, low.exit_layer, low.draft_weights) == ("self-speculative", 8, "int4")
    assert (
        resolve(asked, Recommended(4, 12, "self-speculative", exits=(4, 6)), 8, copies).exit_layer
        == 4
    )


@pytest.mark.parametrize(
    "asked, drafts",
    [({"skip": [2]}, 6), ({"strategy": "draft-and-verify", "skip": [2], "num_draft_tokens": 2}, 2)],
)
def test_layers_to_skip_imply_the_strategy(asked, drafts):
    for packing in (PackingConfig(), PackingConfig(draft_weights=("int8",))):
        config = resolve(asked, UNKNOWN, 8, packing)
        assert (config.strategy, config.skip, config.num_draft_tokens) == (
            "draft-and-verify",
            (2,),
            drafts,
        )
        assert config.exit_layer is None and config.draft_weights == next(
            iter(packing.draft_weights), None
        )


def test_one_strategy_of_several_takes_what_it_uses():
    asked = {"skip": [2], "exit_confidence": 0.9, "lookup": 3, "exit_layer": 5, "stop": "x"}
    plain = resolve_as("autoregressive", asked, Recommended(4, 12), 8)
    assert plain == DecodingConfig("autoregressive", stop=("x",))
    assert resolve_as("self-speculative", asked, Recommended(4, 12), 8) == DecodingConfig(
        exit_layer=5, num_draft_tokens=12, lookup=3, stop=("x",)
    )


def test_early_exit_by_confidence_is_among_the_trained_exits():
    config = resolve(CONFIDENT, Recommended(4, 12, "self-speculative", exits=(4, 6)), 8)
    assert (config.strategy, config.exit_layer, config.exits, config.exit_confidence) == (
        "early-exit",
        None,
        (4, 6),
        0.9,
    )
    assert resolve(CONFIDENT, Recommended(4, 12, exits=tuple(range(1, 24))), 24).exits == (
        3,
        4,
        6,
        8,
        12,
        18,
    )
    assert spread_exits((1, 2, 5, 9, 10, 11, 20, 23), 24) == (2, 5, 9, 11, 20)
    assert resolve({**CONFIDENT, "exits": [2, 7]}, UNKNOWN, 8).exits == (2, 7)


@pytest.mark.parametrize(
    "asked, field, message",
    [
        ({"strategy": "draft-and-verify"}, "skip", "given for `strategy` draft-and-verify"),
        ({**CONFIDENT, "exits": [2, 8]}, "exits", "in 1..7, got 8"),
        ({**CONFIDENT, "exit_layer": 3}, "exit_layer", "left out with `exit_confidence`"),
        ({"exits": [2]}, "exits", "used with `exit_confidence`, got none"),
        (
            {"strategy": "early-exit", "lookup": 3},
            "lookup",
            "used with `strategy` adaptive or self-speculative or ",
        ),
    ],
)
def test_options_that_contradict_each_other_or_the_model(asked, field, message):
    with pytest.raises(ConfigError) as caught:
        resolve(asked, UNKNOWN, 8)
    assert caught.value.field == field and str(caught.value).startswith(
        f"`{field}` must be {message}"
    )


@pytest.mark.parametrize(
    "field, inside, outside",
    [
        ("num_draft_tokens", (1, 10_000), (0, 10_001, True, 2.5, "3", 2**70)),
        ("top_p", (1e-9, 1), (0, 1.001, float("nan"), float("inf"), "hot", False)),
        ("seed", (0, 2**32 - 1), (2**32, -1)),
        ("skip", ([1], (2, 3), range(2, 5)), ([0], "2,3", ["2"], 3)),
        ("stop", ("x", ["x", "y"]), ("", [""], ["a", 5], 5)),
        ("strategy", ("lookup",), ("magic", "", 3)),
        ("policy", ("fast",), ("", "\ud800")),
    ],
)
def test_ranges_and_types(field, inside, outside):
    for value in inside:
        assert checked(DecodingOptions, {field: value, "exits": None}).keys() == {field}
    for value in outside:
        with pytest.raises(ConfigError, match=f"^`{field}` must be ") as caught:
            checked(DecodingOptions, {field: value})
        assert caught.value.field == field
    with pytest.raises(TypeError, match="unknown option 'nothing'; known: strategy, "):
        checked(DecodingOptions, {"nothing": 1})


# --- policies
# -----------------------------------------------------------------------------------------------------------


def test_a_policy_keeps_limit_stop_and_sampling_of_the_request():
    request = {"max_new_tokens": 9, "stop": ["x"], "temperature": 0.5, "top_k": 3, "seed": 7}
    config = resolve(policy_options(LOW, request), UNKNOWN, 8, policy_packing(LOW))
    expected = DecodingConfig(
        "self-speculative", 8, 3, 9, ("x",), "int8", 4, temperature=0.5, top_k=3, seed=7
    )
    assert config == expected
    for said in (
        {"strategy": "lookup"},
        {"exit_layer": 4},
        {"exit_confidence": 0.5},
        {"exits": [2, 3]},
    ):
        with pytest.raises(
            ConfigError, match=f"`policy` must be given without `{next(iter(said))}`"
        ):
            policy_options(LOW, said)


def test_a_row_replaces_options_and_a_policy_all_that_it_sets():
    flags = {"exit_layer": 4, "lookup": 3, "temperature": 0.9}
    assert changed(flags, {"policy": "fast", "seed": 1}) == {
        "policy": "fast",
        "temperature": 0.9,
        "seed": 1,
    }
    assert changed({"policy": "fast", "seed": 1}, {"exit_layer": 3}) == {"exit_layer": 3, "seed": 1}
    assert changed(flags, {"lookup": 0}) == flags | {"lookup": 0}
    assert choices({"max_new_tokens": 9, "stop": ["x"], "temperature": 0.5, "lookup": 0}) == {}
    for said in ({"policy": "fast"}, {"strategy": "autoregressive"}, {"exit_layer": 2}):
        assert choices({**said, "seed": 1}) == said


def test_how_its_drafts_are_stored_and_its_name():
    several = {
        "strategy": "adaptive",
        "draft_copies": ["int8", "int4"],
        "draft_head": "int4",
        "draft_vocab": 500,
    }
    assert policy_packing(several) == PackingConfig(
        draft_weights=("int8", "int4"), draft_head="int4", draft_vocab=500
    )
    assert policy_packing(LOW) == PackingConfig(draft_weights=("int8",))
    names = {
        "plain decoding": {"strategy": "autoregressive"},
        "exit 8 of the int8 copies with 3 draft tokens": LOW,
        "exit 4": {"strategy": "early-exit", "exit_layer": 4},
        "exits by confidence 0.9": {"strategy": "early-exit", "exit_confidence": 0.9},
    }
    assert [policy_text(policy) for policy in names.values()] == list(names)
    with pytest.raises(ConfigError, match=r"saved with the model \(exact, mine; .*got fast"):
        policy_named({"exact": {"strategy": "autoregressive"}, "mine": LOW}, "fast")
    with pytest.raises(ConfigError, match=r"\(there are none; .*got exact"):
        policy_named({}, "exact")
