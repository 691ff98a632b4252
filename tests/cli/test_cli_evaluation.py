"""`sweep-exits` and `bench` from the command line, on a tiny model in a folder."""

import csv
import io
import json
import shutil
from pathlib import Path
from statistics import fmean

import command_line
import pytest
import torch
from command_line import refused
from evaluating import own_answers, tiny_loaded

from layerskip_core import load
from layerskip_core.checkpoint.info import read_info
from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.checkpoint.save import save_checkpoint
from layerskip_core.config import decoding
from layerskip_core.config.resolution import policy_text
from layerskip_core.evaluation.results import read_record

STRATEGIES = "autoregressive,early-exit,self-speculative"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    loaded = tiny_loaded(torch.float32)
    folder = str(tmp_path_factory.mktemp("tiny") / "model")
    save_checkpoint(loaded.backend.model, loaded.tokenizer, loaded.info, folder, torch.float32)
    return folder


@pytest.fixture
def copy(model, tmp_path):
    return str(shutil.copytree(model, tmp_path / "copy"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The model's own answers as a file: exact match is 100% wherever decoding is the model's
    own.
    """
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"prompt": example.prompt, "reference": example.completion}
        for example in own_answers().examples
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def run(*arguments):
    result = command_line.run(*arguments)
    assert result.code == 0, result.err
    return result


def test_sweep_prints_json_and_writes_files(tmp_path, model):
    result = run(
        f"sweep-exits --model {model} --samples 2 --exits 2,5 --specs 2 --max-new-tokens 6",
        f"--format json --output {tmp_path}/out",
    )
    document = json.loads(result.out)
    assert [(one["strategy"], one["exit_layer"]) for one in document["results"][:5]] == [
        ("autoregressive", None), ("early-exit", 2), ("early-exit", 5), ("self-speculative", 2), ("self-speculative", 5),
    ]  # fmt: skip
    assert document["config"]["task"]["task"] == "commands"
    assert document["environment"]["dtype"] == "float32"
    plots = ["acceptance_by_exit", "pareto", "perplexity"]
    files = ["answers.html", "answers.jsonl", "report.html", "results.csv", "results.json"]
    out = tmp_path / "out"
    assert sorted(file.name for file in out.iterdir()) == sorted(
        [f"{name}.png" for name in plots] + files
    )
    assert json.loads((out / "results.json").read_text()) == document
    assert (
        "wrote report.html, results.json, results.csv, answers.html, answers.jsonl, pareto.png"
        in result.err
    )
    again = run(f"sweep-exits --from {out}/results.json --format json --output {tmp_path}/again")
    assert again.out == result.out
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


SAVED = "--samples 1 --exits 5 --specs 3 --max-new-tokens 6 --save"


def only(monkeypatch, strategy, pays=True):
    """Sweeps whose finalists are the settings of this strategy, and whether these certainly
    gain.
    """
    measure = "layerskip_core.evaluation.measure"

    def chosen(result):
        return result.strategy == strategy and result.metrics

    drafting = {name: decoding.Strategy() for name in decoding.STRATEGIES}
    drafting[strategy] = decoding.STRATEGIES[strategy]
    monkeypatch.setattr(f"{measure}.recommendation.STRATEGIES", drafting)
    low = 2.0 if pays else 0.5
    monkeypatch.setattr(f"{measure}.recommendation.Contest.lower_end", lambda *_: low)
    monkeypatch.setattr(
        f"{measure}.sweep.finalists",
        lambda every, *_: [0, *(n for n, each in enumerate(every) if chosen(each))],
    )


def test_a_policy_that_is_no_exit_leaves_no_exit_recommended(copy, monkeypatch):
    only(monkeypatch, "lookup")
    result = run(f"sweep-exits --model {copy}", SAVED)
    info = read_info(copy)
    assert (info.exit_layer, info.num_draft_tokens, info.strategy) == (None, None, "autoregressive")
    assert (info.policies["exact"]["strategy"], info.policies["exact"]["num_draft_tokens"]) == (
        "lookup",
        3,
    )
    assert f"saved lookup with 3 draft tokens as the default of {copy}" in result.err
    assert "Recommended: lookup with 3 draft tokens is the fastest of 1 settings" in result.out


@pytest.mark.parametrize("pays", [True, False])
def test_save_writes_the_recommendation_if_there_is_one(copy, tmp_path, monkeypatch, pays):
    only(monkeypatch, "self-speculative", pays)
    result = run(f"sweep-exits --model {copy}", SAVED, f"--output {tmp_path}/out")
    info = read_info(copy)
    assert (info.exit_layer, info.num_draft_tokens) == ((5, 3) if pays else (None, None))
    assert info.prompt_template == "{prompt}\n" and info.strategy == (
        None if pays else "autoregressive"
    )
    saved = (
        "exit 5 with 3 draft tokens as the default"
        if pays
        else f"plain decoding as the default of {copy}: speculation does"
    )
    assert f"saved {saved}" in result.err
    exact = info.policies["exact"]
    assert (exact["strategy"], exact.get("exit_layer")) == (
        ("self-speculative", 5) if pays else ("autoregressive", None)
    )
    assert (exact["measured"]["task"], exact["measured"]["metric"]) == ("commands", "exact_match")
    assert "policy fast: none, because exact_match is 0 at full depth" in result.err
    assert (
        set(info.profile.acceptance) == set(info.profile.drafts) == {"exit 5"}
        and len(info.profile.passes) == 17
    )
    assert (
        "Policy fast: none, because" in result.out
        and f"Policy exact: {policy_text(exact)}." in result.out
    )
    (Path(copy) / "layerskip.json").unlink()
    run(f"sweep-exits --from {tmp_path}/out/results.json --save")
    assert (
        read_info(copy).policies == info.policies and read_info(copy).exit_layer == info.exit_layer
    )


def test_adaptive_drafting_starts_from_the_acceptance_of_the_copy_that_a_sweep_saved(copy):
    little = "--samples 1 --max-new-tokens 6 --draft-weights int8 --save"
    run(f"sweep-exits --model {copy}", little)
    stored = read_info(copy).profile
    assert list(stored.acceptance) == list(stored.drafts) == ["int8"]
    adaptive = {"strategy": "adaptive"}
    assert load(copy, draft_weights="int8")._resolved(adaptive).profile == stored
    others = load(copy, draft_weights="int8", draft_vocab=50)._resolved(adaptive).profile
    assert others.acceptance == {}  # of other drafts


def test_bench_formats(tmp_path, model, data):
    arguments = (
        f"bench --model {model} --data {data} --exit 5 --spec 3 --repeats 1",
        f"--max-new-tokens 12 --strategies {STRATEGIES}",
    )
    table = run(*arguments, f"--output {tmp_path}/out").out.splitlines()
    assert table[0].split()[:5] == ["strategy", "exit", "spec", "R2", "EM"]
    assert [line.split()[:3] for line in table[2:5]] == [
        ["autoregressive", "-", "-"], ["early-exit", "5", "-"], ["self-speculative", "5", "3"]
    ]  # fmt: skip
    assert [line.split()[4] for line in (table[2], table[4])] == ["100%"] * 2
    assert max(map(len, table)) <= 80
    pages = ["answers.html", "answers.jsonl", "report.html", "results.csv", "results.json"]
    files = [*pages, "pareto.png"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(
        [*files, "outputs.jsonl"]
    )
    saved = str(tmp_path / "out" / "results.json")
    assert run(f"bench --from {saved}").out.splitlines() == table
    record = read_record(saved)
    for place, result in enumerate(record.results):
        by_prompt = [row.scores["rouge2"][place] for row in record.answered]
        assert fmean(by_prompt) == pytest.approx(result.metrics["rouge2"])
    refused("must be a results.json that sweep-exits wrote", f"sweep-exits --from {saved}")
    rows = list(csv.DictReader(io.StringIO(run(*arguments, "--format csv").out)))
    assert [row["num_draft_tokens"] for row in rows] == ["", "", "3"]
    assert run(*arguments, "--format markdown").out.startswith(
        "| strategy | exit | spec | R2 | EM | "
    )


def test_adaptive_drafting_has_the_copy_that_generate_gives_it(model, data, monkeypatch):
    packings = []

    def recorded(name, device, dtype, packing, *policies, **options):
        packings.append(packing)
        return for_decoding(name, device, dtype, packing, *policies, **options)

    monkeypatch.setattr("layerskip_core.checkpoint.open.for_decoding", recorded)
    arguments = f"--model {model} --data {data} --samples 1 --max-new-tokens 6 --format json"
    for strategies in ("autoregressive", "autoregressive,adaptive"):
        result = run("bench", arguments, f"--repeats 1 --strategies {strategies}")
    plain, adaptive = json.loads(result.out)["results"]
    assert (adaptive["exit_layer"], adaptive["num_draft_tokens"], adaptive["draft_weights"]) == (
        None,
        None,
        None,
    )
    assert adaptive["metrics"] == plain["metrics"] and adaptive["identical_outputs"] == 1.0
    swept = json.loads(run("sweep-exits", arguments, "--exits 5 --specs 2").out)
    assert swept["results"][-1]["strategy"] == "adaptive"
    assert [packing.adaptive for packing in packings] == [False, True, True]


def test_an_unfinished_benchmark_is_not_lost_without_a_word(tmp_path, model, monkeypatch):
    out = tmp_path / "out"
    told = "holds an unfinished run; give --resume to go on, or --overwrite to start anew"
    arguments = (
        f"bench --model {model} --samples 2 --repeats 1 --max-new-tokens 2",
        f"--output {out}",
    )
    with monkeypatch.context() as patch:
        patch.setattr("layerskip_core.evaluation.measure.bench.result_of", lambda *_: 1 / 0)
        assert command_line.run(*arguments).code == 1
    left = (out / "unfinished.jsonl").read_bytes()
    refused(f"--output {out} {told}", *arguments)
    assert (out / "unfinished.jsonl").read_bytes() == left and left.count(b"\n") == 3
    run(*arguments, "--resume")
    assert (out / "outputs.jsonl").read_bytes() == left
    refused(
        f"--output {out} already holds results.json; give --overwrite to replace it",
        *arguments,
        "--resume",
    )


def test_an_earlier_result_is_replaced_whole_and_only_if_asked(tmp_path, model):
    out = tmp_path / "out"
    again = f"--from {tmp_path}/out/results.json --output {tmp_path}/out"
    flags = f"--model {model} --samples 1 --max-new-tokens 2 --output {out}"
    swept = ("sweep-exits", flags, "--exits 2,5 --specs 2")
    benched = ("bench", flags, "--repeats 1 --strategies autoregressive,early-exit")
    run(*swept)
    (out / "mine.png").write_text("of the user")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert "acceptance_by_exit.png" in before
    for command in (swept, benched, ("sweep-exits", again)):
        told = f"--output {out} already holds results.json; give --overwrite to replace it, or another folder"
        refused(told, *command)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    run(*benched, "--overwrite")
    reported = {
        "report.html",
        "results.json",
        "results.csv",
        "answers.html",
        "answers.jsonl",
        "pareto.png",
    }
    assert {file.name for file in out.iterdir()} == reported | {"outputs.jsonl", "mine.png"}
    run("bench", again, "--overwrite")  # the outputs are those of this result
    assert {file.name for file in out.iterdir()} == reported | {"outputs.jsonl", "mine.png"}
    run(*swept, "--overwrite")
    assert {file.name for file in out.iterdir()} == before.keys()


def test_bench_tells_failures_and_goes_on(tmp_path, model):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        json.dumps({"prompt": "word " * 200, "reference": "x"})
        + '\n{"prompt": "hi", "reference": "y"}\n'
    )
    result = run(
        f"bench --model {model} --data {file} --repeats 1 --max-new-tokens 2", "--format json"
    )
    results = json.loads(result.out)["results"]
    assert [[failure["sample"] for failure in one["failures"]] for one in results] == [[0]] * len(
        results
    )
    # Though every strategy did
    (told,) = [line for line in result.err.splitlines() if "failed" in line]
    assert told.startswith(
        "autoregressive: 1 prompt failed, counted as wrong; sample 0: the prompt must be at most 127 tokens"
    )


@pytest.fixture
def problem(tmp_path, model):
    file = tmp_path / "problems.jsonl"
    row = {
        "task_id": 1,
        "prompt": "def f(x):\n",
        "entry_point": "f",
        "canonical_solution": "    return x\n",
    }
    file.write_text(json.dumps({**row, "test": "def check(f):\n    assert f(1) == 1\n"}) + "\n")
    return (f"bench --model {model} --task humaneval --data {file} --exit 5 --repeats 1",)


def test_code_is_judged_with_the_flag_alone(problem):
    arguments = (*problem, "--max-new-tokens 4 --format json")
    without = run(*arguments)
    assert list(json.loads(without.out)["results"][0]["metrics"]) == ["rouge2"]
    assert "pass@k needs --allow-code-execution" in without.err
    drawn = "--allow-code-execution --pass-k 1,2 --problem-samples 2 --temperature 1.0"
    result = run(*arguments, drawn)
    for one in json.loads(result.out)["results"]:
        assert list(one["metrics"]) == ["pass@1", "pass@2", "rouge2"]
        assert (one["metrics"]["pass@1"], one["differences"]) == (0.0, [])


def test_where_the_sandbox_protects_no_files_code_runs_only_if_the_flag_says_unsandboxed(
    problem, monkeypatch
):
    arguments = (*problem, "--strategies autoregressive --format json")
    for standing in (("network", "system calls", "privileges"), ("privileges",)):
        monkeypatch.setattr(
            "layerskip_core.evaluation.tasks.code.standing_layers",
            lambda standing=standing: standing,
        )
        message = (
            "--allow-code-execution needs a sandbox that protects files, and this machine has none"
        )
        refused(message, *arguments, "--allow-code-execution")
    result = run(*arguments, "--allow-code-execution unsandboxed --max-new-tokens 4")
    assert json.loads(result.out)["results"][0]["metrics"]["pass@1"] == 0.0
    assert "the sandbox does not restrict: files, file names, network" in result.err


def test_text_is_measured_by_perplexity(tmp_path, model, monkeypatch):
    # For a context of 128 tokens
    monkeypatch.setattr("layerskip_core.evaluation.tasks.texts._PROMPT_WORDS", 20)
    file = tmp_path / "text.txt"
    file.write_text("remind me to call mom at five and to buy some milk on the way " * 40)
    arguments = f"--model {model} --task lm --data {file} --samples 1 --max-new-tokens 3"
    swept = json.loads(run("sweep-exits", arguments, "--exits 5 --specs 2 --format json").out)[
        "results"
    ]
    assert [one["metrics"]["perplexity"] for one in swept[:2]] == [
        one["perplexity"] for one in swept[:2]
    ]
    assert swept[2]["metrics"] == swept[0]["metrics"] != swept[1]["metrics"]
    benched = json.loads(run("bench", arguments, "--exit 5 --repeats 1 --format json").out)[
        "results"
    ]
    assert [one["metrics"] for one in benched[:3]] == [
        swept[place]["metrics"] for place in (0, 1, 0)
    ]


@pytest.mark.parametrize(
    "arguments, named",
    [
        ("bench --format xml", "--format must be one of table, json, csv, markdown, got xml"),
        (
            "bench --template chat",
            "a chat template was asked for, but the model's tokenizer has none",
        ),
        ("bench --data nothing-here", "nothing-here"),
        ("bench --task nothing-here", "--task must be one of commands, topv2, jsonl"),
        ("bench --temperature 1 --baselines no-reuse", "--temperature must be 0 with --baselines"),
        ("bench --problem-samples 5", "--temperature must be above 0"),
        ("sweep-exits --problem-samples 5", "--temperature must be above 0"),
        ("bench --baselines magic", "--baselines must be a list, each one of transformers, "),
        ("bench --strategies lookup", "--strategies must be a list with autoregressive"),
        ("bench --strategies autoregressive,eagle3", "--strategies must be a list without eagle3"),
        ("bench --gguf x.gguf", "--gguf must be given with baselines of llama.cpp"),
        (
            "bench --resume",
            "--resume must be used with the --output of the interrupted run, got none",
        ),
        ("sweep-exits --save", "--save needs a --model that is a folder"),
        ("sweep-exits --metric bleu", "--metric must be one of exact_match"),
        (
            "sweep-exits --specs 0,2",
            "--specs must be a list, each a whole number in 1..10000, got 0,2",
        ),
    ],
)
def test_bad_flags_are_named(arguments, named):
    refused(named, arguments)
