"""lm-evaluation-harness on this decoder, against its own model type `hf` on the same checkpoint."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from chatml import chatml_folder
from command_line import run

pytest.importorskip("lm_eval", reason="needs the extra lm-eval: pip install 'layerskip[lm-eval]'")

from command_line import fails
from evaluating import tiny_loaded
from exit_block_models import add_blocks
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval_tasks import write_tasks
from transformers import AutoTokenizer

from layerskip_core.checkpoint.info import read_info
from layerskip_core.checkpoint.save import write_info
from layerskip_core.config.model import ExportConfig
from layerskip_core.errors import ConfigError
from layerskip_core.export.run import export
from layerskip_core.harness import register
from layerskip_core.harness.model import LayerSkipLM
from layerskip_core.model.exit_blocks import ExitBlock


def asked(*arguments):
    return SimpleNamespace(args=arguments, task_name="")


def hf(folder):
    return HFLM(folder, device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, checkpoint):
    """Local task files; two of the answers are what the model says."""
    folder = write_tasks(tmp_path_factory.mktemp("tasks"))
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    settings = {"until": ["]", "<|endoftext|>"], "max_gen_toks": 10}
    said = LayerSkipLM(checkpoint, dtype="fp32").generate_until(
        [asked(row["question"], settings) for row in rows[:2]], True
    )
    return write_tasks(folder, [text.strip() for text in said])


@pytest.fixture(scope="module")
def exported(tmp_path_factory, checkpoint):
    folder = str(tmp_path_factory.mktemp("exported") / "exit3")
    export(ExportConfig(checkpoint, 3, folder))
    return folder


def evaluated(lm, tasks, names=("choice", "shots", "answer", "text")):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(model=lm, tasks=list(names), task_manager=manager, bootstrap_iters=0)
    responses = {
        task: [sample["resps"] for sample in samples] for task, samples in found["samples"].items()
    }
    scores = {
        f"{task} {key.removesuffix(',none')}": value
        for task, values in found["results"].items()
        for key, value in values.items()
        if "," in key and "stderr" not in key
    }
    return scores, responses


def flat(responses):
    if isinstance(responses, list | tuple):
        for part in responses:
            yield from flat(part)
    else:
        yield responses


def agree(ours, theirs):
    scores, responses = ours
    expected, expected_responses = theirs
    assert scores == pytest.approx(expected, rel=1e-4)
    for task, each in expected_responses.items():
        for found, wanted in zip(flat(responses[task]), flat(each), strict=True):
            assert found == (
                pytest.approx(wanted, rel=1e-4, abs=1e-4) if isinstance(wanted, float) else wanted
            )


def test_full_depth_equals_hf_and_an_exit_equals_hf_on_its_exported_folder(
    checkpoint, exported, tasks
):
    whole = evaluated(hf(checkpoint), tasks)
    early = evaluated(hf(exported), tasks)
    agree(evaluated(LayerSkipLM(checkpoint, dtype="float32", batch_size=4), tasks), whole)
    agree(evaluated(LayerSkipLM(checkpoint, exit=3, dtype="fp32", batch_size=16), tasks), early)
    speculative = LayerSkipLM(checkpoint, exit=3, spec=4, dtype="fp32")
    agree(evaluated(speculative, tasks), whole)
    assert speculative.decoding.strategy == "self-speculative"
    assert whole[0]["answer exact_match"] == 2 / 10  # neither none nor all
    assert whole[0]["text word_perplexity"] != pytest.approx(
        early[0]["text word_perplexity"], rel=0.01
    )


def test_a_sweep_gives_the_scores_of_all_exits_in_one_run(checkpoint, tasks, tmp_path):
    """By lm-eval's own flags, with its records of the rows."""
    arguments = (
        f"--model {checkpoint} --include-path {tasks} --limit 0 --dtype fp32",
        "--batch-size 8",
    )
    output = tmp_path / "out"
    done = run(
        "sweep-exits --task lm-eval:choice,shots,answer,text --exits 2,5 --timed 2",
        *arguments,
        f"--format json --output {output} --log-samples",
    )
    assert done.code == 0, done.err
    document = json.loads(done.out)
    for result, exit_layer in zip(document["results"], (None, 2, 5), strict=True):
        assert result["exit_layer"] == exit_layer
        expected, _ = evaluated(
            LayerSkipLM(checkpoint, exit=exit_layer, dtype="fp32", batch_size=8), tasks
        )
        assert result["metrics"] == pytest.approx(expected, rel=1e-5)
        assert set(result["stderr"]) == {
            "choice acc",
            "choice acc_norm",
            "shots acc",
            "shots acc_norm",
            "answer exact_match",
        }
        assert result["samples"] == dict.fromkeys(("choice", "shots", "answer", "text"), 10)
        assert result["tokens_per_second"] > 0
    accuracy = document["results"][0]["metrics"]["answer exact_match"]
    assert document["results"][0]["stderr"]["answer exact_match"] == pytest.approx(
        (accuracy * (1 - accuracy) / 9) ** 0.5
    )
    names = {file.name for file in output.iterdir()}
    assert {"scores_by_exit.png", "lower_scores_by_exit.png", "results.csv", "report.html"} <= names
    assert "choice acc" in (output / "results.csv").read_text().splitlines()[0]
    logged = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    for number, result in enumerate(document["results"]):
        rows = [row for row in logged if (row["result"], row["task"]) == (number, "choice")]
        assert sum(row["acc"] for row in rows) / 10 == result["metrics"]["choice acc"]
    assert len(logged) == 3 * 4 * 10
    again = run(f"sweep-exits --from {output}/results.json --format markdown")
    assert f"| answer | exact_match | 10 | {accuracy:.3f}±.133 |" in again.out
    assert "exit 2 | exit 5 |" in again.out.splitlines()[0]


def train_exits(folder):
    write_info(str(folder), replace(read_info(folder), details={"trained_exits": [2, 4]}))


@pytest.mark.parametrize(
    "prepare, exits",
    [(train_exits, [2, 4]), (lambda folder: add_blocks(folder, ExitBlock(3)), [3])],
)
def test_by_default_trained_exits_are_swept(checkpoint, tasks, tmp_path, prepare, exits):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    prepare(folder)
    arguments = f"--include-path {tasks} --samples 2 --task lm-eval:choice --format json"
    done = run(f"sweep-exits --model {folder}", arguments)
    assert done.code == 0, done.err
    assert [result["exit_layer"] for result in json.loads(done.out)["results"]] == [None, *exits]


def test_bench_has_a_column_per_strategy_and_drafts_only_where_text_is_generated(checkpoint, tasks):
    strategies = "autoregressive,early-exit,self-speculative"
    arguments = (
        f"bench --model {checkpoint} --include-path {tasks} --dtype fp32 --exit 2",
        f"--strategies {strategies} --format json --samples 4 --repeats 1",
    )
    done = run(*arguments, "--task lm-eval:answer,choice --max-new-tokens 6")
    assert done.code == 0, done.err
    plain, early, drafted = json.loads(done.out)["results"]
    assert [plain["strategy"], early["strategy"], drafted["strategy"]] == strategies.split(",")
    assert (
        drafted["metrics"] == plain["metrics"]
        and drafted["identical_outputs"] == 1.0
        and drafted["acceptance_rate"] >= 0
    )
    assert early["identical_outputs"] < 1 and plain["speedup"] == 1.0
    assert plain["samples"] == {"answer": 4, "choice": 4}
    copies = "--draft-weights int8 --skip 2,3 --max-new-tokens 6"
    done = run(*arguments, "--task lm-eval:answer", copies)
    assert done.code == 0, done.err
    drafting = json.loads(done.out)["results"]
    assert [(result["strategy"], result["draft_weights"], result["skip"]) for result in drafting[2:]] == [
        ("self-speculative", "int8", []), ("draft-and-verify", "int8", [2, 3]),
    ]  # fmt: skip
    likely = json.loads(run(*arguments, "--task lm-eval:choice").out)["results"]
    assert [result["strategy"] for result in likely] == ["autoregressive", "early-exit"]
    assert (
        likely[0]["metrics"]["choice acc"] == plain["metrics"]["choice acc"]
        and likely[0]["speedup"] is None
    )


def test_the_exit_block_of_a_frozen_model_counts(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "frozen")
    add_blocks(folder, ExitBlock(2))
    export(ExportConfig(str(folder), 2, str(tmp_path / "alone")))
    requests = [asked("remind me to call", " mom at 5"), asked("play", " some jazz")]
    ours = LayerSkipLM(str(folder), exit=2, dtype="fp32")
    expected = hf(str(tmp_path / "alone"))
    assert list(flat(ours.loglikelihood(requests, True))) == pytest.approx(
        list(flat(expected.loglikelihood(requests, True))), abs=1e-4
    )
    until = [asked("wake me up", {"until": ["]"], "max_gen_toks": 8})]
    assert ours.generate_until(until, True) == expected.generate_until(until, True)


def test_contexts_empty_with_spaces_and_too_long(checkpoint):
    texts = ["", "remind me ", "word " * 200]
    requests = [
        asked(context, continuation)
        for context in texts
        for continuation in ("call mom", " at 5 pm")
    ]
    ours = LayerSkipLM(checkpoint, dtype="fp32", batch_size=8)
    theirs = hf(checkpoint)
    for (found, best), (wanted, expected) in zip(
        ours.loglikelihood(requests, True), theirs.loglikelihood(requests, True), strict=True
    ):
        assert (found, best) == (pytest.approx(wanted, rel=1e-4), expected)
    long = [
        asked("word " * 200, {"until": ["]"], "max_gen_toks": 9}),
        asked("play", {"until": [], "max_gen_toks": 3}),
    ]
    assert ours.generate_until(long, True) == theirs.generate_until(long, True)


def test_what_a_request_says_about_its_answer(checkpoint):
    lm = LayerSkipLM(checkpoint)
    pad = lm.tokenizer.special_tokens_map["pad_token"]
    greedy = lm.answering(
        lm.decoding, {"until": ["\n", pad, ""], "do_sample": False, "temperature": 0.7}
    )
    assert (greedy.stop, greedy.max_new_tokens, greedy.temperature) == (("\n", pad), 256, 0)
    assert lm.decoder.ends(greedy.stop) == lm.decoder.eos_ids | {lm.tokenizer.pad_token_id}
    drawn = lm.answering(
        lm.decoding, {"until": "x", "temperature": 0.5, "top_p": 0.9, "max_new_tokens": 7}
    )
    assert (drawn.stop, drawn.temperature, drawn.top_p, drawn.max_new_tokens) == (
        ("x",),
        0.5,
        0.9,
        7,
    )
    with pytest.raises(ConfigError, match="got num_beams=4"):
        lm.answering(lm.decoding, {"num_beams": 4})


def test_sampled_answers_differ_between_repeats_and_not_between_runs(checkpoint):
    request = asked("play", {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5})
    first, second = (
        LayerSkipLM(checkpoint, dtype="fp32", batch_size=4).generate_until([request] * 4, True)
        for _ in range(2)
    )
    assert first == second and len(set(first)) > 1


def test_the_chat_template_is_that_of_the_tokenizer(checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(chatml_folder(tmp_path / "chat"))
    lm = LayerSkipLM(replace(tiny_loaded(), tokenizer=tokenizer))
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    rendered = tokenizer.apply_chat_template(
        messages[:1], tokenize=False, add_generation_prompt=True
    )
    assert lm.apply_chat_template(messages[:1]) == rendered
    assert lm.apply_chat_template(messages, False).endswith("assistant\ngood day")
    with pytest.raises(ConfigError, match="the model's tokenizer has none"):
        LayerSkipLM(checkpoint).apply_chat_template(messages[:1])


def test_the_model_type_is_registered_and_its_arguments_are_checked(checkpoint):
    from lm_eval.api.registry import get_model

    register()
    register()
    made = get_model("layerskip").create_from_arg_string(
        f"pretrained={checkpoint},exit=2,dtype=fp32", {"batch_size": "auto:4", "device": "cuda:0"}
    )
    assert (made.depth, made.batch_size, made.decoding.strategy) == (2, 16, "early-exit")
    for wrong in ({"exit": 7}, {"dtype": "int3"}, {"batch_size": "many"}):
        with pytest.raises(
            ConfigError,
            match=f"`{next(iter(wrong))}.*` must be .*, got {next(iter(wrong.values()))}",
        ):
            LayerSkipLM(checkpoint, **wrong)


def test_errors_of_the_command_line(checkpoint, tasks, tmp_path):
    ours = f"sweep-exits --model {checkpoint} --include-path {tasks} --task lm-eval:choice"
    fails("--exits must be in 1..6, got 9 (model has 6 layers)", ours, "--exits 9")
    for flag, value in (("--specs", "3"), ("--metric", "rouge1")):
        failed = run(ours, flag, value)
        assert failed.code == 2 and failed.err.startswith(
            f"error: {flag} must be left out for --task lm-eval:..."
        )
    gone = tmp_path / "gone.yaml"
    gone.write_text((tasks / "choice.yaml").read_text().replace("rows.jsonl", "no-rows.jsonl"))
    failed = run("sweep-exits --task", f"lm-eval:{gone}")
    assert (
        failed.code == 1
        and "cannot be loaded (without the hub, --include-path names a folder" in failed.err
    )
    odd = tmp_path / "odd"
    shutil.copytree(tasks, odd)
    (odd / "odd.yaml").write_text("task: 1\noutput_type: 2\n")
    failed = run(f"sweep-exits --include-path {odd} --task lm-eval:choice")
    assert failed.code == 1 and failed.err.startswith("error: --task: task files cannot be read: ")
