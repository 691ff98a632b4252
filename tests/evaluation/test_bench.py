"""The benchmark: figures from known times, and a run on the tiny model."""

import json
import shutil
from dataclasses import replace

import pytest
from evaluating import (
    NEW_TOKENS,
    TRAINED,
    collect,
    early_exit_share,
    measured_of,
    outputs_of,
    own_answers,
    repacked,
    tiny_loaded,
)

from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.evaluation import BenchConfig, TaskConfig
from layerskip_core.config.model import PackingConfig, PromptingConfig
from layerskip_core.data import PARSING_TEMPLATE
from layerskip_core.decoding import DecodeStats
from layerskip_core.errors import LayerSkipError
from layerskip_core.evaluation.journal import JOURNAL
from layerskip_core.evaluation.measure import measuring
from layerskip_core.evaluation.measure.bench import bench, strategies_of
from layerskip_core.evaluation.measure.figures import result_of
from layerskip_core.evaluation.measure.measuring import Progress, measure_prompt
from layerskip_core.evaluation.metrics import Scores
from layerskip_core.evaluation.report.files import to_json
from layerskip_core.evaluation.report.tables import results_table
from layerskip_core.evaluation.results import Difference, Failure, Output, Result
from layerskip_core.evaluation.tasks.task import load_task

STRATEGIES = ("autoregressive", "early-exit", "self-speculative", "lookup")
PLAIN = DecodingConfig("autoregressive", max_new_tokens=4)
DRAFTED = DecodingConfig("self-speculative", 5, 3)


def figures(setting, repeats, baseline, scores=(), differing=()):
    """The figures of a setting from its outputs in each repeat, and from those of plain
    decoding.
    """
    full = measured_of(PLAIN, *baseline)
    own = measured_of(setting, *repeats, scores=dict(scores), differences=differing)
    return result_of(own, full)


def record_of(task, config):
    progress, record = collect(bench(tiny_loaded(), task, config))
    assert all(isinstance(event, Progress) for event in progress)
    return record


def test_figures_from_known_times_are_medians_over_the_repeats():
    # Baseline: 1 + 4 tokens, prefill 1 s, decoding 4 s: 1 s a token. Each repeat of the other
    # decodes its 4 tokens in one step.
    baseline = [outputs_of([(1, 1.0), (1, 1.0), (1, 1.0), (1, 1.0), (1, 1.0)])] * 3
    stats = DecodeStats(drafted=6, accepted=3, rounds=2)
    repeats = [outputs_of([(1, 1.0), (4, seconds)], stats=stats) for seconds in (1.0, 4.0, 1.5)]
    result = figures(
        DRAFTED, repeats, baseline, {"exact_match": Scores((0.5,))}, (Difference(0, 1, 0.25),)
    )
    assert result == Result(
        strategy="self-speculative",
        exit_layer=5,
        num_draft_tokens=3,
        metrics={"exact_match": 0.5},
        acceptance_rate=0.5,
        mean_accepted_tokens=1.5,
        tokens_per_second=5 / 2.5,
        ttft_ms=1000.0,
        speedup=2.0,  # 5 s against 2, 5 and 2.5 s
        identical_outputs=1.0,
        acceptance_by_position=(),
        differences=(Difference(0, 1, 0.25),),
    )


def test_speedup_is_per_token():
    # Half the tokens in half the time are no speedup.
    baseline = outputs_of([(1, 1.0), (1, 1.0)])
    shorter = outputs_of([(1, 1.0)])
    result = figures(DecodingConfig("early-exit", 5), [shorter], [baseline])
    assert (result.speedup, result.identical_outputs) == (1.0, 0.0)
    assert (result.acceptance_rate, result.mean_accepted_tokens, result.num_draft_tokens) == (
        None,
        None,
        None,
    )
    stats = DecodeStats(new_tokens=4, tested_by_position=(4, 2, 1), accepted_by_position=(2, 1))
    result = figures(
        DRAFTED, [outputs_of([(1, 0.6), (3, 3.3)], stats=stats)], [outputs_of([(1, 1.0)])]
    )
    assert result.acceptance_by_position == (0.5, 0.5, 0.0)


def test_a_run_on_the_models_own_answers():
    task = own_answers()
    generation = {"exit_layer": 5, "num_draft_tokens": 3}
    config = BenchConfig("tiny", generation=generation, repeats=2, strategies=STRATEGIES)
    record = record_of(task, config)
    plain, early, drafted, looked_up = record.results
    assert [result.strategy for result in record.results] == list(STRATEGIES)
    assert (early.exit_layer, drafted.exit_layer, drafted.num_draft_tokens) == (5, 5, 3)
    assert plain.metrics == drafted.metrics == looked_up.metrics == {"exact_match": 1.0}
    assert (plain.speedup, plain.identical_outputs, plain.acceptance_rate) == (1.0, 1.0, None)
    for result in (drafted, looked_up):
        assert (result.identical_outputs, result.differences) == (1.0, ())
    share = early_exit_share(tiny_loaded(), task, 5)
    assert early.metrics["exact_match"] == early.identical_outputs == share < 1
    setting = DecodingConfig("self-speculative", 5, 3, NEW_TOKENS)
    stats = DecodeStats()
    for example in task.examples:
        stats += measure_prompt(tiny_loaded(), example.prompt, setting).stats
    assert 0 < drafted.acceptance_rate == stats.acceptance_rate < 1
    assert drafted.mean_accepted_tokens == stats.mean_accepted_tokens
    assert drafted.steps_by_drafter == stats.steps_by_drafter
    assert stats.steps_by_drafter["exit 5"] == stats.rounds
    assert record.config["task"]["max_new_tokens"] == NEW_TOKENS
    assert record.environment["implementation"] == "generic"


def test_figures_by_category_are_those_of_its_prompts_alone(tmp_path):
    """Without references: full depth is right, and an early exit is as good as it agrees with full
    depth.
    """
    prompts = [example.prompt for example in own_answers(4).examples]
    file = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": prompt, "category": "ab"[place % 2]} for place, prompt in enumerate(prompts[:3])
    ]
    file.write_text("\n".join(map(json.dumps, [*rows, {"prompt": prompts[3]}])))
    asked = TaskConfig(
        data=str(file),
        metric="exact_match",
        max_new_tokens=NEW_TOKENS,
        prompting=PromptingConfig("raw"),
    )
    task = load_task(asked)
    generation = {"exit_layer": 5, "num_draft_tokens": 3}
    settings = {"task": asked, "generation": generation, "repeats": 1, "batch_size": 2, "timed": 2}
    record = record_of(
        task,
        BenchConfig(
            "tiny", **settings, strategies=("autoregressive", "early-exit", "self-speculative")
        ),
    )
    plain, early, drafted = record.results
    assert plain.metrics == drafted.metrics == {"exact_match": 1.0}
    assert early.metrics["exact_match"] == early.identical_outputs
    assert [list(result.categories) for result in record.results] == [["a", "b"]] * 3
    assert [figures.samples for figures in plain.categories.values()] == [2, 1]
    assert early.categories["a"].metrics["exact_match"] == early.categories["a"].identical_outputs
    both = drafted.categories["a"]
    setting = DecodingConfig("self-speculative", 5, 3, NEW_TOKENS)
    loaded = task.prepared(tiny_loaded())
    stats = sum(
        (measure_prompt(loaded, prompts[place], setting).stats for place in (0, 2)), DecodeStats()
    )
    assert (both.acceptance_rate, both.mean_accepted_tokens) == (
        stats.acceptance_rate,
        stats.mean_accepted_tokens,
    )
    # Timed were the first prompt and the third, which are both of category a.
    assert both.speedup == drafted.speedup
    assert drafted.categories["b"].speedup is None


def test_every_low_bit_copy_drafts():
    packing = PackingConfig(draft_weights=("int8", "int4"))
    loaded = repacked(packing)
    settings = {
        "strategies": ("autoregressive", "self-speculative"),
        "repeats": 1,
        "packing": packing,
    }
    _, record = collect(bench(loaded, own_answers(2), BenchConfig("tiny", **settings)))
    assert [(result.draft_weights, result.exit_layer) for result in record.results] == [
        (None, None),
        ("int8", 6),
        ("int4", 6),
    ]
    assert [row[0] for row in results_table(record).texts] == [
        "autoregressive",
        "int8 drafts",
        "int4 drafts",
    ]
    _, int8, int4 = record.results
    assert int8.identical_outputs == int4.identical_outputs == 1.0
    assert int8.acceptance_rate > int4.acceptance_rate > 0
    assert set(int8.steps_by_drafter) - {"plain"} == {"int8"}


def test_strategies_that_the_model_was_not_made_for_are_left_out_unless_asked_for():
    usual = {"autoregressive", "lookup", "adaptive"}
    exits = {*usual, "early-exit", "self-speculative"}
    untrained = tiny_loaded()
    saved = replace(untrained, info=CheckpointInfo(PARSING_TEMPLATE, exit_layer=3))
    copies = PackingConfig(draft_weights=("int8",))
    for model, settings, names in (
        (untrained, {}, usual),
        (untrained, {"generation": {"exit_layer": 2}}, exits),
        (untrained, {"packing": copies}, {*usual, "self-speculative"}),
        (untrained, {"strategies": STRATEGIES[:2]}, set(STRATEGIES[:2])),
        (replace(untrained, info=TRAINED), {}, exits),
        (saved, {}, exits),
    ):
        config = BenchConfig("tiny", **settings)
        assert {
            each.strategy
            for each in strategies_of(model, config, model.recommended(config.packing))
        } == names
    record = record_of(own_answers(1), BenchConfig("tiny", repeats=1))
    assert (
        {result.strategy for result in record.results} == set(record.config["strategies"]) == usual
    )
    document = json.loads(to_json(record))
    assert list(document) == ["config", "environment", "results"]
    # A checkpoint without a recommendation gets a quarter of its six layers, and 6 drafts.
    assert (document["config"]["exit_layer"], document["config"]["num_draft_tokens"]) == (1, 6)
    read = document["environment"]["bandwidth"]
    assert (
        read["bytes_per_second"] > 0
        and 8 * tiny_loaded().backend.spec.weights_read(1) < read["bytes_per_token"]
    )


def test_prompts_that_failed_count_as_different_and_in_no_time():
    outputs = [
        *outputs_of([(1, 1.0), (4, 0.8)], [(1, 2.0), (2, 1.0)], ids=((1,), (2,))),
        Output((3,), peak_memory_mb=30.0),
    ]
    failed = [*outputs[:2], Output(error="too long", peak_memory_mb=20.0)]
    mine = figures(PLAIN, [failed], [outputs])
    base = figures(PLAIN, [outputs], [failed])
    assert (mine.identical_outputs, base.identical_outputs) == (pytest.approx(2 / 3), 1.0)
    assert (mine.peak_memory_mb, base.peak_memory_mb, mine.failures) == (
        20.0,
        30.0,
        (Failure(2, "too long"),),
    )
    # 1 + 4 + 1 + 2 tokens in 1.0 + 0.8 + 2.0 + 1.0 seconds.
    assert (mine.tokens_per_second, mine.ttft_ms) == pytest.approx((8 / 4.8, 1500.0))


RESUMED = STRATEGIES[:3]
CONFIG = BenchConfig(
    "tiny", generation={"exit_layer": 5, "num_draft_tokens": 3}, repeats=2, strategies=RESUMED
)


def test_what_other_weights_kernels_versions_rows_or_settings_measured_is_not_resumed(
    tmp_path, checkpoint, monkeypatch
):
    model = tmp_path / "model"
    out = tmp_path / "out"
    task = own_answers()
    shutil.copytree(checkpoint, model)
    loaded = replace(tiny_loaded(), name=str(model))
    other = replace(task, examples=task.examples[::-1])
    running = bench(loaded, task, CONFIG, out)
    out.mkdir()
    next(running)
    running.close()

    def refused(told, task=task, config=CONFIG):
        with pytest.raises(
            LayerSkipError,
            match=rf"unfinished.jsonl belongs to another run \({told}\); give `overwrite`",
        ):
            next(bench(loaded, task, config, out, resume=True))

    digests = "[0-9a-f]{16} then, [0-9a-f]{16} now"
    refused(f"`rows` {digests}", task=other)
    refused("`repeats` 2 then, 3 now", config=replace(CONFIG, repeats=3))
    with monkeypatch.context() as patch:
        patch.setattr(type(loaded.backend), "implementation", "native (amx)")
        patch.setattr("torch.__version__", "9.9")
        refused("`implementation` generic then, native \\(amx\\) now, `torch` .* then, 9.9 now")
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    refused(f"`model_files` {digests}")


def test_only_what_is_missing_is_measured(tmp_path, monkeypatch):
    loaded = replace(tiny_loaded(), name="embedded")
    task = own_answers()
    _, whole = collect(bench(loaded, task, CONFIG))
    running = bench(loaded, task, CONFIG, tmp_path)
    for _ in range(4):  # of 6: one repeat of 3 prompts, and the first of the other
        next(running)
    running.close()
    assert [
        json.loads(line).get("sample") for line in (tmp_path / JOURNAL).read_text().splitlines()
    ] == [None, 0, 1, 2, 0]
    calls = []
    honest = measuring.answer_prompts

    def counted(loaded, prompts, *arguments):
        calls.extend(prompts)
        return honest(loaded, prompts, *arguments)

    monkeypatch.setattr(measuring, "answer_prompts", counted)
    progress, resumed = collect(bench(loaded, task, CONFIG, tmp_path, resume=True))
    prompts = [example.prompt for example in task.examples]
    # Warm-up, then two prompts in three ways
    assert calls == [prompts[0]] * 3 + [prompts[1]] * 3 + [prompts[2]] * 3
    assert [event.done for event in progress] == [5, 6]
    assert [
        (result.metrics, result.acceptance_rate, result.identical_outputs)
        for result in resumed.results
    ] == [
        (result.metrics, result.acceptance_rate, result.identical_outputs)
        for result in whole.results
    ]
