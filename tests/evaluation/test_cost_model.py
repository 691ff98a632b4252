"""The cost model: simulated rounds, pass times, the arithmetic on them; and the layers to skip that are searched by it."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from command_line import fails, run
from decodings import WIDE, backend_on, context_of, silent_layers
from evaluating import LAYERS, NEW_TOKENS, collect, own_answers, tiny_loaded

from layerskip_core.checkpoint.info import read_info
from layerskip_core.config.decoding import DecodingConfig, DraftProfile
from layerskip_core.config.evaluation import BenchConfig, SweepConfig, TaskConfig
from layerskip_core.config.model import DataConfig, PackingConfig
from layerskip_core.config.options import counts_text
from layerskip_core.data import load_examples
from layerskip_core.decoding import DecodeStats, decode
from layerskip_core.decoding.drafters import DrafterSetup, drafter_for
from layerskip_core.errors import ConfigError, LayerSkipError
from layerskip_core.evaluation.measure import Progress, cost_model, measure_prompt, skip_search
from layerskip_core.evaluation.measure.bench import bench
from layerskip_core.evaluation.measure.cost_model import (
    PassTimes,
    agreement,
    draft_profile,
    interpolated,
    prediction_of,
    simulate,
    timed_part,
    timed_visits,
)
from layerskip_core.evaluation.measure.skip_search import Probe, eliminated, search_skips
from layerskip_core.evaluation.measure.sweep import sweep
from layerskip_core.evaluation.report import to_csv, to_json
from layerskip_core.evaluation.report.tables import results_table
from layerskip_core.evaluation.results import Result, read_record
from layerskip_core.evaluation.tasks import load_task, other_rows

EOS = frozenset({9})
PLAIN = DecodingConfig("autoregressive", max_new_tokens=NEW_TOKENS)
SETTING = DecodingConfig("self-speculative", 5, 3)


def counts(stats):
    return stats.drafted, stats.accepted, stats.rounds, stats.steps_by_drafter.get("plain", 0)


@pytest.mark.parametrize(("new_tokens", "drafts"), [(1, 3), (2, 8), (5, 1), (NEW_TOKENS, 1), (NEW_TOKENS, 3), (NEW_TOKENS, 8)])
@pytest.mark.parametrize("exit_layer", [2, 5])
def test_simulated_rounds_are_the_real_ones(exit_layer, new_tokens, drafts):
    loaded = tiny_loaded()
    for example in own_answers().examples:
        prompt = loaded.encode_prompt(example.prompt)
        output = list(measure_prompt(loaded, example.prompt, DecodingConfig("autoregressive", max_new_tokens=new_tokens)).ids)
        choices = agreement(loaded, prompt, output, [2, 4, 5])[exit_layer]
        found = simulate(choices, output, drafts, new_tokens, loaded.eos_ids)
        real = decode(
            loaded.backend, prompt, DecodingConfig("self-speculative", exit_layer, drafts, new_tokens), loaded.eos_ids
        )
        assert [token for [step] in real for token in step.ids] == output
        assert counts(found) == counts(real.stats)


def test_pass_times_of_the_real_loop():
    loaded = tiny_loaded()
    prompt = loaded.encode_prompt("hi")
    part, setting = timed_part(loaded, prompt, [5] * 9), DecodingConfig("self-speculative", 2, 4)
    ((_, passes),) = next(timed_visits(loaded, [part], [setting])).items()
    assert min(passes) > 0
    for context in (40, 10_000):  # passes of 1 to 17 tokens after the context, as far as there is room
        passes = draft_profile(loaded, (), PackingConfig(), [5] * context).passes
        assert len(passes) == 17 and all(time > 0 for time in passes)
    for without_room in (timed_part(loaded, [5] * (loaded.backend.spec.context - 1), [5]), timed_part(loaded, prompt, [])):
        assert list(timed_visits(loaded, [without_room], [setting])) == [{}]


@pytest.mark.parametrize(("tokens", "start"), [(1, 0), (32, 0), (33, 0), (34, 1), (100, 34)])
def test_of_a_long_answer_the_middle_is_timed(tokens, start):
    ids, limit = timed_part(tiny_loaded(), [1, 2], list(range(10, 10 + tokens)))
    assert (ids, limit) == ([1, 2, *range(10, 10 + start)], tokens - start + 1)


def test_the_speed_of_known_rounds_and_times_between_those_of_shorter_and_longer_drafts():
    # 3 answers with 30 tokens: 3 prefills of 0.5 s in all and 27 plain steps of 0.1 s, or 6 drafts, 3 rounds, 2 plain steps.
    rounds = DecodeStats(drafted=6, accepted=4, rounds=3, steps_by_drafter={"plain": 2})
    found = prediction_of(rounds, PassTimes(0.01, 0.19, 0.01, plain=0.1), prefill=0.5, tokens=30, answers=3)
    assert found.speedup == pytest.approx((0.5 + 2.7) / (0.5 + 0.06 + 0.6 + 0.2))
    short, long = PassTimes(0.01, 0.2, 0.0, 0.1, length=2.0), PassTimes(0.02, 0.4, 0.1, 0.1, length=10.0)
    assert interpolated(4.0, [long, short]) == pytest.approx((0.0125, 0.25, 0.025, 0.1, 4.0))
    assert [interpolated(length, [long, short]) for length in (1.0, 2.0, 10.0, 12.0)] == [short, short, long, long]
    assert interpolated(3.0, [long]) == long


def test_the_speedup_of_rounds_over_plain_steps(monkeypatch):
    """6 accepted drafts and a token of each of 2 rounds in 4 s; plain steps take 0.25 s each."""
    monkeypatch.setattr(cost_model, "_steps", lambda *_: [(0, 0.0, 0.0, 0.25)] * 8)
    rounds = DecodeStats(accepted=6, rounds=2, draft_seconds=1.0, verify_seconds=3.0)
    assert cost_model.speed_of(tiny_loaded(), rounds) == 0.5


def test_a_profile_has_acceptance_and_times_of_the_exits_and_copies_that_drafted():
    def row(strategy, exit_layer=None, **changes):
        return Result(strategy, exit_layer, 2, {}, **changes)

    rows = (
        row("self-speculative", 2, acceptance_by_position=(0.5, 0.75), pass_times_ms={"draft": 0.5}),
        row("self-speculative", 6, draft_weights="int8", acceptance_by_position=(1.0, 0.5), pass_times_ms={"draft": 0.25}),
        row("lookup", acceptance_by_position=(0.25, 0.25)),
    )
    profile = draft_profile(tiny_loaded(), rows, PackingConfig(draft_vocab=9), [])
    # Of two drafts at exit 2 the second is compared in half of the rounds: (0.5 + 0.5 * 0.75) / 1.5 of those compared.
    expected = {"exit 2": pytest.approx(0.875 / 1.5), "int8": 0.75}
    assert profile == DraftProfile(expected, (), {"exit 2": 0.5, "int8": 0.25}, draft_vocab=9)


PROMPT = [5, 11, 23, 42, 8]
GENERATION = {"max_new_tokens": NEW_TOKENS}


def silenced(*layers, **changes):
    """The tiny model of `evaluating`, in which these layers (by number) add nothing."""
    return replace(tiny_loaded(), backend=silent_layers(*layers, vocab_size=300, **changes))


def on_backend(kind):
    """The tiny model on this backend; `native int8` with copies that draft."""
    return backend_on("native", PackingConfig(draft_weights=("int8",)), **WIDE) if "int8" in kind else backend_on(kind)


def probe_of(loaded, prompt=PROMPT, tokens=20, weights=None):
    config = DecodingConfig("autoregressive", max_new_tokens=tokens)
    output = [token for [step] in decode(loaded.backend, prompt, config) for token in step.ids]
    return Probe(loaded, prompt, output, weights)


@pytest.mark.parametrize(
    ("kind", "block", "prompt"), [("generic", 1, PROMPT), ("generic", 4, [7]), ("packed", 4, PROMPT), ("native int8", 4, [7])]
)
def test_choices_are_the_drafts_of_rounds_that_start_where_blocks_do(kind, block, prompt, monkeypatch):
    """Up to the first draft that the target refuses, after which a round goes on with another text."""
    monkeypatch.setattr(skip_search, "_BLOCK", block)
    weights = "int8" if "int8" in kind else None
    loaded = replace(silenced(), backend=on_backend(kind))
    model, probe = loaded.backend, probe_of(loaded, prompt, weights=weights)
    ids, right = [*prompt, *probe.output_ids], 0
    for skip in ((1,), (3, 5), (6,), (3,), (2, 3, 4, 5, 6)):
        choices = probe.choices(skip)
        config = DecodingConfig("draft-and-verify", skip=skip, draft_weights=weights)
        drafter = drafter_for(DrafterSetup(model, config))
        for start in range(0, 20, block):
            known = ids[: len(prompt) + start]
            cache, last = model.new_cache(), len(known) - 1
            with torch.inference_mode():
                if last:
                    hidden = model.embed(torch.tensor([known[:last]]))
                    model.run_layers(hidden, 0, LAYERS, cache.span(0, last))
                draft = drafter.draft(context_of([known], torch.tensor(known[last:]), cache, [0], [last]), [block])
            for choice, drafted, token in zip(choices[start:], draft.tokens[1:].tolist(), ids[len(known) :], strict=False):
                assert choice == drafted
                if drafted != token:
                    break
                right += 1
        assert probe.choices(skip) == choices  # the cache is as it was
    assert right > 5


def test_layers_that_add_nothing_go_first():
    loaded = silenced(2, 5)
    probes = [probe_of(loaded, prompt) for prompt in (PROMPT, [9, 8, 7])]
    first, second, *others = eliminated(probes, LAYERS)
    assert (first.skip, second.skip) == ((5,), (2, 5))  # the last of two that cost the same
    assert first.agreeing == second.agreeing == 40 > others[0].agreeing
    assert [len(found.skip) for found in others] == [3, 4, 5]
    for found in others:
        assert {2, 5} < set(found.skip) and len(found.choices) == len(probes)


@pytest.fixture
def known_times(monkeypatch):
    """A draft costs what its layers cost, and the rest of a round a plain step."""

    def passes(loaded, part, setting, plain):
        layers = loaded.backend.num_layers
        return PassTimes((layers - len(setting.skip)) / layers, 1.0, 0.0, 1.0)

    monkeypatch.setattr(cost_model, "pass_times", passes)


def test_the_search_finds_redundant_layers(known_times):
    loaded = silenced(2, 3, 5)
    progress, (choice, agreement, prediction) = collect(search_skips(loaded, own_answers(), GENERATION))
    assert set(choice["skip"]) == {2, 3, 5}
    assert agreement == 1.0 and choice["num_draft_tokens"] >= 2
    assert prediction.rounds.acceptance_rate == 1.0
    assert progress[-1] == Progress(LAYERS - 1, LAYERS - 1, "layers to skip")


def test_models_answers_and_contexts_can_be_too_short():
    with pytest.raises(ConfigError, match="`search_skips` must be used with a model of two layers or more, got 1"):
        collect(search_skips(silenced(num_hidden_layers=1), own_answers(), GENERATION))
    with pytest.raises(LayerSkipError, match="answers of two tokens or more are needed to search the layers to skip"):
        collect(search_skips(silenced(), own_answers(), {"max_new_tokens": 1}))
    loaded = tiny_loaded()
    shortest = min(len(loaded.encode_prompt(example.prompt)) for example in own_answers().examples)
    with pytest.raises(LayerSkipError, match="prompts that leave room for rounds of drafts are needed"):
        collect(search_skips(silenced(max_position_embeddings=shortest + 3), own_answers(), GENERATION))


def test_rows_that_choose_or_check_a_setting_are_not_those_measured(tmp_path):
    task = load_task(TaskConfig("commands", samples=5))
    own, splits = {example.prompt for example in task.examples}, ("validation", "train")
    prompts = {example.prompt for example in other_rows(task, 8, splits)}
    validation = {row.prompt for row in load_examples(DataConfig("commands", "validation", limit=13))}
    assert len(prompts) == 8 and prompts <= validation - own
    same = {example.prompt for example in other_rows(task, 8, ("test", *splits))}
    assert len(same) == 8 and not same & (own | validation)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p{number}", "completion": "x"}) + "\n" for number in range(9)))
    task = load_task(TaskConfig(data=str(file), samples=4))
    measured, others = ({example.prompt for example in rows} for rows in (task.examples, other_rows(task, 8, splits)))
    assert len(others) == 5 and not measured & others  # a file has no splits
    everything = load_task(TaskConfig(data=str(file), samples=0))
    assert len(other_rows(everything, 8, splits)) == 8


def test_a_sweep_measures_what_it_found(known_times, tmp_path):
    loaded, task = silenced(2, 5), own_answers()
    *_, record = sweep(loaded, task, SweepConfig("tiny", exits=(3,), specs=(2,), search_skips=True))
    row = record.results[-1]
    assert (row.strategy, row.exit_layer) == ("draft-and-verify", None) and {2, 5} <= set(row.skip)
    assert row.identical_outputs == 1.0 and row.agreement is not None and row.predicted_speedup > 0
    table = results_table(record)
    assert table.rows[-1][0] == "draft-and-verify" and f"Layers that drafts skip: --skip {counts_text(row.skip)}." in table.text
    assert to_csv(record).splitlines()[-1].startswith("draft-and-verify,")
    file = tmp_path / "results.json"
    file.write_text(to_json(record))
    assert read_record(str(file)).results[-1] == row


def test_given_layers_are_measured_at_every_draft_length():
    generation = {"skip": [2, 5]}
    *_, record = sweep(tiny_loaded(), own_answers(1), SweepConfig("tiny", exits=(3,), specs=(2, 4), generation=generation))
    rows = [(row.skip, row.num_draft_tokens) for row in record.results if row.strategy == "draft-and-verify"]
    assert rows == [((2, 5), 2), ((2, 5), 4)]
    with pytest.raises(ConfigError, match=r"`skip` must be in 1..6, got 9 \(model has 6 layers\)"):
        list(sweep(tiny_loaded(), own_answers(1), SweepConfig("tiny", generation={"skip": [9]})))
    with pytest.raises(ConfigError, match="`search_skips` must be left out with `skip`, got 2,5"):
        SweepConfig(search_skips=True, generation=generation)


def test_bench_searches_unless_the_layers_are_known(known_times, monkeypatch):
    searched = []
    honest = search_skips
    monkeypatch.setattr(
        "layerskip_core.evaluation.measure.bench.search_skips", lambda *args: searched.append(1) or honest(*args)
    )
    loaded, plain = silenced(2, 5), ("autoregressive",)
    stored = replace(loaded, info=replace(loaded.info, skip={"skip": [4], "num_draft_tokens": 3}))
    for model, config, skip, searches in (
        (loaded, BenchConfig("tiny", strategies=plain, baselines=("draft-and-verify",), repeats=1), None, 1),
        (stored, BenchConfig("tiny", strategies=(*plain, "draft-and-verify"), repeats=1), (4,), 1),
        (loaded, BenchConfig("tiny", strategies=plain, generation={"skip": [3]}, repeats=1), (3,), 1),
    ):
        *_, record = bench(model, own_answers(1), config)
        assert [result.strategy for result in record.results] == ["autoregressive", "draft-and-verify"]
        row = record.results[-1]
        assert row.skip == skip or (skip is None and {2, 5} <= set(row.skip))
        assert row.identical_outputs == 1.0 and len(searched) == searches
        assert f"Layers that drafts skip: --skip {counts_text(row.skip)}." in results_table(record).text


def test_save_stores_the_layers_and_generate_uses_them(checkpoint, tmp_path):
    folder = str(shutil.copytree(checkpoint, tmp_path / "model"))
    common = ("--samples", "2", "--exits", "3", "--specs", "2", "--max-new-tokens", "8", "--model", folder)
    result = run("sweep-exits", *common, "--search-skips", "--save")
    assert result.code == 0, result.err
    listed = re.search(r"Layers that drafts skip: --skip (\S+)\.", result.out)[1]
    choice = read_info(folder).skip
    assert f"saved --skip {listed} and {choice['num_draft_tokens']} draft tokens for --strategy draft-and-verify" in result.err
    assert json.loads((tmp_path / "model" / "layerskip.json").read_text())["recommended"]["skip"]["layers"] == choice["skip"]
    answers = [
        run("generate", "hi", "--model", folder, "--dtype", "fp32", "--max-new-tokens", "9", *arguments)
        for arguments in (["--strategy", "draft-and-verify"], ["--strategy", "autoregressive"])
    ]
    assert answers[0].out == answers[1].out and answers[0].code == 0
    fails("--search-skips must be left out with --skip, got 2", "sweep-exits", *common, "--search-skips", "--skip", "2")
