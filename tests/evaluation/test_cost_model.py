"""The cost model: simulated rounds, pass times, and the arithmetic on them; given layers to
skip.
"""

import json
from dataclasses import astuple, replace

import pytest
from evaluating import NEW_TOKENS, own_answers, tiny_loaded

from layerskip_core.config.decoding import DecodingConfig, DraftProfile
from layerskip_core.config.evaluation import BenchConfig, SweepConfig, TaskConfig
from layerskip_core.config.model import DataConfig, PackingConfig
from layerskip_core.data import load_examples
from layerskip_core.decoding import DecodeStats, decode
from layerskip_core.evaluation.measure import passes
from layerskip_core.evaluation.measure.draft_profile import draft_profile
from layerskip_core.evaluation.measure.measuring import measure_prompt
from layerskip_core.evaluation.measure.passes import (
    Part,
    PassTimes,
    interpolated,
    timed_part,
    timed_visits,
)
from layerskip_core.evaluation.measure.prediction import agreement, predicted_speedup, simulate
from layerskip_core.evaluation.results import Result
from layerskip_core.evaluation.tasks.task import load_task

EOS = frozenset({9})
PLAIN = DecodingConfig("autoregressive", max_new_tokens=NEW_TOKENS)
SETTING = DecodingConfig("self-speculative", 5, 3)


def counts(stats):
    return stats.drafted, stats.accepted, stats.rounds, stats.steps_by_drafter.get("plain", 0)


@pytest.mark.parametrize(
    "new_tokens, drafts",
    [(1, 3), (2, 8), (5, 1), (NEW_TOKENS, 1), (NEW_TOKENS, 3), (NEW_TOKENS, 8)],
)
@pytest.mark.parametrize("exit_layer", [2, 5])
def test_simulated_rounds_are_the_real_ones(exit_layer, new_tokens, drafts):
    loaded = tiny_loaded()
    for example in own_answers().examples:
        prompt = loaded.encode_prompt(example.prompt)
        output = list(
            measure_prompt(
                loaded, example.prompt, DecodingConfig("autoregressive", max_new_tokens=new_tokens)
            ).ids
        )
        choices = agreement(loaded, prompt, output, [2, 4, 5])[exit_layer]
        found = simulate(choices, output, drafts, new_tokens, loaded.eos_ids)
        real = decode(
            loaded.backend,
            prompt,
            DecodingConfig("self-speculative", exit_layer, drafts, new_tokens),
            loaded.eos_ids,
        )
        assert [token for [step] in real for token in step.ids] == output
        assert counts(found) == counts(real.stats)


def test_pass_times_of_the_real_loop():
    loaded = tiny_loaded()
    prompt = loaded.encode_prompt("hi")
    part = timed_part(loaded, prompt, [5] * 9)
    setting = DecodingConfig("self-speculative", 2, 4)
    ((_, passes),) = next(timed_visits(loaded, [part], [setting])).items()
    assert min(astuple(passes)) > 0
    # Passes of 1 to 17 tokens after the context, as far as there is room
    for context in (40, 10_000):
        passes = draft_profile(loaded, (), PackingConfig(), [5] * context).passes
        assert len(passes) == 17 and all(time > 0 for time in passes)
    for without_room in (
        timed_part(loaded, [5] * (loaded.backend.spec.context - 1), [5]),
        timed_part(loaded, prompt, []),
    ):
        assert list(timed_visits(loaded, [without_room], [setting])) == [{}]


@pytest.mark.parametrize("tokens, start", [(1, 0), (32, 0), (33, 0), (34, 1), (100, 34)])
def test_of_a_long_answer_the_middle_is_timed(tokens, start):
    part = timed_part(tiny_loaded(), [1, 2], list(range(10, 10 + tokens)))
    assert part == Part([1, 2, *range(10, 10 + start)], tokens - start + 1)


def test_the_speed_of_known_rounds_and_times_between_those_of_shorter_and_longer_drafts():
    # 3 answers with 30 tokens: 3 prefills of 0.5 s in all and 27 plain steps of 0.1 s, or 6 drafts,
    # 3 rounds, 2 plain steps.
    rounds = DecodeStats(drafted=6, accepted=4, rounds=3, steps_by_drafter={"plain": 2})
    times = PassTimes(0.01, 0.19, 0.01, plain=0.1)
    found = predicted_speedup(rounds, times, prefill=0.5, tokens=30, answers=3)
    assert found == pytest.approx((0.5 + 2.7) / (0.5 + 0.06 + 0.6 + 0.2))
    short = PassTimes(0.01, 0.2, 0.0, 0.1, length=2.0)
    long = PassTimes(0.02, 0.4, 0.1, 0.1, length=10.0)
    between = interpolated(4.0, [long, short])
    assert astuple(between) == pytest.approx((0.0125, 0.25, 0.025, 0.1, 4.0))
    found = [interpolated(length, [long, short]) for length in (1.0, 2.0, 10.0, 12.0)]
    assert found == [short, short, long, long]
    assert interpolated(3.0, [long]) == long


def test_the_speedup_of_rounds_over_plain_steps(monkeypatch):
    """6 accepted drafts and a token of each of 2 rounds in 4 s; plain steps take 0.25 s each."""
    monkeypatch.setattr(passes, "plain_step", lambda *_: 0.25)
    rounds = DecodeStats(accepted=6, rounds=2, draft_seconds=1.0, verify_seconds=3.0)
    assert passes.speed_of(tiny_loaded(), rounds) == 0.5


def test_a_profile_has_acceptance_and_times_of_the_exits_and_copies_that_drafted():
    def row(strategy, exit_layer=None, **changes):
        return Result(strategy, exit_layer, 2, {}, **changes)

    rows = (
        row(
            "self-speculative", 2, acceptance_by_position=(0.5, 0.75), pass_times_ms={"draft": 0.5}
        ),
        row(
            "self-speculative",
            6,
            draft_weights="int8",
            acceptance_by_position=(1.0, 0.5),
            pass_times_ms={"draft": 0.25},
        ),
        row("lookup", acceptance_by_position=(0.25, 0.25)),
    )
    profile = draft_profile(tiny_loaded(), rows, PackingConfig(draft_vocab=9), [])
    # Of two drafts at exit 2 the second is compared in half of the rounds: (0.5 + 0.5 * 0.75) / 1.5
    # of those compared.
    expected = {"exit 2": pytest.approx(0.875 / 1.5), "int8": 0.75}
    assert profile == DraftProfile(expected, (), {"exit 2": 0.5, "int8": 0.25}, draft_vocab=9)


def prompts_of(rows):
    return {example.prompt for example in rows}


def test_a_sweep_chooses_and_checks_on_rows_that_bench_does_not_report(tmp_path):
    """Of `commands` by split; a file is divided by the content of its rows, in whatever order."""
    chosen = load_task(SweepConfig().task)
    reported = load_task(BenchConfig().task)
    checked = chosen.others(8)
    validation = {
        row.prompt for row in load_examples(DataConfig("commands", "validation", limit=20))
    }
    assert (len(chosen.examples), len(reported.examples), len(checked)) == (12, 20, 8)
    assert prompts_of(chosen.examples) | prompts_of(
        checked
    ) == validation and not validation & prompts_of(reported.examples)
    file = tmp_path / "rows.jsonl"
    lines = [
        json.dumps({"prompt": f"p{number}", "completion": "x"}) + "\n" for number in range(200)
    ]
    file.write_text("".join(lines))
    chosen = load_task(replace(SweepConfig().task, data=str(file)))
    checked = chosen.others(256)
    file.write_text("".join(reversed(lines)))
    reported = load_task(TaskConfig(data=str(file), samples=199))
    assert len(chosen.examples) == 12 and not prompts_of(chosen.examples) & prompts_of(checked)
    sides = prompts_of(chosen.examples) | prompts_of(checked), prompts_of(reported.examples)
    assert (
        not sides[0] & sides[1]
        and len(sides[0]) + len(sides[1]) == 200
        and min(map(len, sides)) > 80
    )
    (note,) = reported.notes
    assert (
        note
        == f"rows: among {len(sides[1])} of the 200 in {file}; others choose (`sweep-exits`), `samples` 0 takes both"
    )
    everything = load_task(TaskConfig(data=str(file), samples=0))
    assert len(everything.examples) == 200 and everything.notes[0].endswith(
        "the same rows choose and report"
    )
    file.write_text("".join(lines[:30]))  # too few
    assert prompts_of(load_task(TaskConfig(data=str(file), samples=30)).examples) == {
        f"p{number}" for number in range(30)
    }
    assert len(load_task(TaskConfig(data=str(file), samples=4)).others(99)) == 26
