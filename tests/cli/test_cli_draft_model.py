"""`--draft-model` with every command that has it, and what is wrong with one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import fails, refused, run
from evaluating import own_answers, tiny_loaded

from layerskip_core.checkpoint.save import save_checkpoint

PROMPT = "set an alarm for 7 am"


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    """The first four of the six layers of `checkpoint`."""
    loaded = tiny_loaded(torch.float32, num_hidden_layers=4)
    folder = str(tmp_path_factory.mktemp("draft") / "draft")
    loaded.backend.model.load_state_dict(
        tiny_loaded(torch.float32).backend.model.state_dict(), strict=False
    )
    save_checkpoint(
        loaded.backend.model, loaded.tokenizer, replace(loaded.info), folder, torch.float32
    )
    return folder


@pytest.fixture
def plain(checkpoint):
    return run(
        "generate", PROMPT, f"--model {checkpoint} --strategy autoregressive --max-new-tokens 30"
    ).out


def test_generate(checkpoint, draft, plain):
    """By itself with a flag about drafts, and as an arm of adaptive drafting, whatever the
    checkpoint recommends.
    """
    common = ("generate", PROMPT, f"--model {checkpoint} --max-new-tokens 30 --stats --draft-model")
    for flags in (("--spec 3",), ("--strategy draft-model",)):
        result = run(*common, draft, *flags)
        assert result.out == plain and "steps by draft model: " in result.err
    result = run(*common, checkpoint)  # itself
    assert result.out == plain and "steps by " in result.err
    result = run(*common, checkpoint, "--strategy draft-model --draft-vocab 300")
    assert result.out == plain and "(100.0%) in " in result.err


def test_rows_of_generate_may_decode_otherwise(checkpoint, draft, plain):
    rows = [
        {"prompt": PROMPT},
        {"prompt": PROMPT, "strategy": "lookup"},
        {"prompt": PROMPT, "strategy": "draft-model"},
    ]
    flags = f"--jsonl --batch-size 2 --max-new-tokens 30 --draft-model {draft}"
    result = run(
        f"generate --model {checkpoint}",
        flags,
        stdin="".join(json.dumps(row) + "\n" for row in rows),
    )
    answers = [json.loads(line) for line in result.out.splitlines()]
    assert [answer["text"] + "\n" for answer in answers] == [plain] * 3
    assert (
        "draft model" not in answers[1]["steps_by_drafter"]
        and "draft model" in answers[2]["steps_by_drafter"]
    )


def test_bench(checkpoint, draft, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = (
        {"prompt": example.prompt, "reference": example.completion}
        for example in own_answers().examples
    )
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"bench --model {checkpoint} --data {data} --repeats 1 --samples 2 --format json"
    arguments = (common, f"--max-new-tokens 8 --draft-model {draft}")
    document = json.loads(run(*arguments, "--baselines assistant-model").out)
    results = {one["strategy"]: one for one in document["results"]}
    assert {"draft-model", "adaptive", "assistant-model"} <= results.keys() and "lookup" in results
    assert {one["identical_outputs"] for name, one in results.items() if name != "early-exit"} == {
        1.0
    }
    assert (
        results["draft-model"]["num_draft_tokens"]
        == results["assistant-model"]["num_draft_tokens"]
        == 6
    )
    assert document["config"]["packing"]["draft_model"] == draft
    needed = "given for the strategy draft-model or the baseline assistant-model, and else only for adaptive"
    fails(
        f"--draft-model must be {needed}, got {draft}",
        *arguments,
        "--strategies autoregressive,lookup",
    )
    fails(f"--draft-model must be {needed}, got none", common, "--baselines assistant-model")
    # No such option: a policy cannot name a model
    assert "--draft-model" in run(f"sweep-exits --draft-model {draft}").err


def test_what_is_wrong_is_one_error(checkpoint, draft, tmp_path):
    common = ("generate", "hi", f"--model {checkpoint}")
    name = Path(checkpoint)
    needed = f"--draft-model must be a model with the tokenizer of {checkpoint} and its 300 tokens"
    refused(
        f"{needed}, got embedded-base with 1024 tokens, of which id ",
        *common,
        "--draft-model embedded-base",
    )
    other = shutil.copytree(draft, tmp_path / "other")
    stored = json.loads((other / "tokenizer.json").read_text())
    first, second = list(stored["model"]["vocab"])[60:62]
    vocab = stored["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(stored))
    fails(
        f"{needed}, got {other} with 300 tokens, of which id {vocab[second]} differs",
        *common,
        f"--draft-model {other}",
    )
    used = "--draft-model must be used with --strategy adaptive or draft-model, got --strategy"
    for flags, strategy in (
        (("--exit 3",), "self-speculative"),
        (("--strategy lookup",), "lookup"),
    ):
        fails(f"{used} {strategy}", *common, f"--draft-model {draft}", *flags)
    fails(
        "--draft-model must be given for --strategy draft-model, got none",
        *common,
        "--strategy draft-model",
    )
    assert f"{name.parent}/none" in run(*common, "--draft-model", f"{name.parent}/none").err
