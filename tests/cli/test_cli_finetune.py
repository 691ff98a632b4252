"""`layerskip finetune` and `train-drafter`: what they say, write and refuse."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from command_line import fails, refused, run

from layerskip_core.checkpoint.open import for_training

SHORT = "--batch-size 2 --max-length 48 --device cpu --dtype fp32"


@pytest.fixture
def finetune(checkpoint, tmp_path, monkeypatch):
    """The command in an empty folder, on four rows in a file elsewhere; `--output` is `out`
    there.
    """
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(f'{{"prompt": "row {row}", "completion": "answer {row}"}}\n' for row in range(4))
    )
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def command(*arguments, name="finetune"):
        return (name, f"--model {checkpoint} --data {file} --output out", SHORT, *arguments)

    return command


def files():
    return sorted(str(file) for file in Path().rglob("*") if file.is_file())


def test_a_dry_run_tells_the_plan_and_writes_nothing(finetune, checkpoint):
    flags = ["--steps 7 --pmax 0.3 --lr 0.002 --accumulation 2 --dry-run"]
    result = run(*finetune(*flags))
    assert (result.code, result.out) == (0, "")
    what, how, recipe, _ = result.err.splitlines()
    assert what.startswith(f"{checkpoint} (0.1M parameters, 6 layers) on ")
    assert "4 rows and 0 held out" in what
    assert how == "7 steps of 2 x 2 rows, lr 0.002, fp32 on cpu"
    for part in ("recipe auto: dropout up to 0.3", "exits 2 on 7 of 7 steps, each read by a block"):
        assert part in recipe
    assert list(Path().iterdir()) == []


def test_the_papers_recipe_with_named_exits(finetune):
    """R is 1 of 2 exits in a small vocabulary; paper's weights."""
    result = run(*finetune("--recipe finetune --steps 2 --exits 2:4:2"))
    assert (result.code, result.out) == (0, "")
    expected = "dropout 0.2 in all steps, e_scale 1 paper, rotational R=1, exits 2 on 2, 4 on 2 of 2 steps\n"
    assert expected in result.err
    assert re.search(r"^loss by exit: 2: [\d.]+  4: [\d.]+  6: [\d.]+$", result.err, re.MULTILINE)
    assert not Path("out", "exit_blocks.safetensors").exists()


def test_the_end_tells_what_the_exits_give_and_what_they_cost(finetune):
    """Of 340 rows 21 choose and 10 report; two steps of two rows answer eight of them."""
    Path("rows.jsonl").write_text(
        "".join(f'{{"prompt": "row {row}", "completion": "a {row}"}}\n' for row in range(340))
    )
    result = run(*finetune("--data rows.jsonl --steps 2 --exits 2"))
    assert (result.code, result.out) == (0, "")
    assert ": 309 rows and 31 held out, " in result.err
    verdict = re.search(
        r"^exit 2: [\d.]+% of first drafts agree on held-out rows; .*by arithmetic at most [\d.]+x.*",
        result.err,
        re.MULTILINE,
    )
    assert "held-out loss " in result.err and "exact match of 8 held-out rows 0.0 ->" in result.err
    number = re.search(r"^  prompt    'row (\d+)'$", result.err, re.MULTILINE)[1]
    assert f"\n  reference 'a {number}'\n" in result.err
    following = (
        "train-drafter --model out --output out --data rows.jsonl"
        if "does not pay" in verdict[0]
        else "sweep-exits --model out --save"
    )
    assert result.err.endswith(f"layerskip {following}\n")
    details = json.loads(Path("out", "layerskip.json").read_text())
    assert details["held_out"][0]["rows"] == 31 and details["cost"]["answered"] == 8
    # Keys, not texts
    assert not any(f"row {number}" in value for value in map(str, details["held_out"]))


def test_a_replay_is_planned_written_and_found_again(finetune):
    arguments = finetune("--replay 0.5 --steps 3 --lora-rank 2")
    plan = run(*arguments, "--dry-run")
    assert "\nreplay: 1 of the 2 rows of a step\n" in plan.err
    assert re.search(
        r"^3 replayed texts by the model, at most \d+ tokens; 0 exist already$",
        plan.err,
        re.MULTILINE,
    )
    assert "lr 0.0005, fp32 on cpu" in plan.err and list(Path().iterdir()) == []
    result = run(*arguments)
    assert (result.code, result.out) == (0, "")
    assert re.search(r"^replay texts 3/3 ", result.err, re.MULTILINE)
    assert json.loads(Path("out", "layerskip.json").read_text())["config"]["replay"] == 0.5
    again = run(*arguments, "--overwrite --dry-run")
    assert "tokens; 3 exist already\n" in again.err


def test_a_short_run_writes_a_checkpoint_and_names_the_next_command(finetune):
    flags = ["--steps 2 --curriculum all --recipe finetune --output"]
    result = run(*finetune(*flags, "my model"))
    assert (result.code, result.out) == (0, "")
    assert re.search(r"^training 2/2 loss [\d.]+ exits 2:[\d.]+ ", result.err, re.MULTILINE)
    assert "held-out rows: not measured: 4 rows are too few" in result.err
    following = f"layerskip sweep-exits --model {shlex.quote('my model')} --save\n"
    assert result.err.endswith(f"saved my model; next: {following}")
    info = for_training("my model", "cpu", "fp32").info
    assert info.prompt_template == "{prompt}\n"
    config = info.details["config"]
    assert (config["steps"], config["batch_size"], config["recipe"]["curriculum"]) == (2, 2, "all")
    assert run("generate", "row 1", "--model", "my model", "--max-new-tokens 4").code == 0


def test_without_a_recipe_train_drafter_is_next(finetune):
    result = run(*finetune("--recipe none --steps 1"))
    assert (result.code, result.out) == (0, "")
    assert "\ntrained at full depth only, as in ordinary training\n" in result.err
    rows = str(Path("../rows.jsonl").resolve())
    following = f"train-drafter --model out --output out --data {rows}"
    assert result.err.endswith(f"saved out; next: layerskip {following}\n")
    drafter = run(*following.split(), SHORT, "--answers data --steps 1")
    assert drafter.code == 0 and re.search(
        r"^training 1/1 loss \d\.\d{3} exits 0:\d\.\d{3} lr ", drafter.err, re.MULTILINE
    )
    assert re.search(r"^divergence: eagle3: \d", drafter.err, re.MULTILINE)
    measured = run("bench --model out --repeats 1 --max-new-tokens 2 --format json")
    assert (
        json.loads(measured.out)["config"]["task"].items()
        >= {"data": rows, "prompt_column": "prompt"}.items()
    )
    assert (
        f"rows: among 4 of the 4 in {rows}, which the model was trained on; --data gives others\n"
        in measured.err
    )
    adapter = run(*finetune("--recipe none --steps 1 --lora-rank 2 --lora-keep --output adapter"))
    assert adapter.err.endswith("saved adapter; next: layerskip generate --model adapter\n")


def test_the_template_and_the_system_message_are_saved_and_used(checkpoint, finetune):
    shutil.copytree(checkpoint, "base")
    Path("base", "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}"
    )
    asked = ("--template chat --system", "Be brief.")
    assert run(*finetune("--model base --steps 1", *asked)).code == 0
    saved = json.loads(Path("out", "layerskip.json").read_text())
    assert (saved["prompt_template"], saved["system"]) == ("chat", "Be brief.")
    prompt = ("row 1", "--max-new-tokens 4 --device cpu --dtype fp32")
    by_default = run("generate", *prompt, "--model out --stats")
    assert "prompt template: chat with a system message" in by_default.err
    whole = run("generate", "[system: Be brief.][user: row 1]", *prompt[1:], "--model out --raw")
    assert (by_default.code, by_default.out) == (0, whole.out)
    assert run("generate", *prompt, "--model out --raw").out != whole.out


def plan_of(*arguments):
    result = run(*arguments, "--dry-run")
    assert (result.code, result.out) == (0, "")
    return result.err


def test_a_config_file_gives_defaults_and_flags_win(finetune, checkpoint):
    data = str(Path("../rows.jsonl").resolve())
    Path("run.toml").write_text(
        f"model = {json.dumps(checkpoint)}\ndata = {json.dumps(data)}\nsteps = 9\npmax = 0.4\nmax-length = 12\n"
        'curriculum = "gradual"\nbatch_size = 3\ndevice = "cpu"\n'
    )
    plan = plan_of("finetune --config run.toml")
    assert "4 rows" in plan and "4 rows are truncated at 12" in plan and "9 steps of 3 x 1" in plan
    assert (
        "recipe auto: dropout up to 0.4, ending after 1 step, e_scale 0.2 uniform, gradual, "
        in plan
    )
    plan = plan_of("finetune --steps 5 --config run.toml --pmax 0")
    assert "truncated at 12" in plan and "5 steps of 3 x 1" in plan and "no dropout" in plan
    Path("run.toml").write_text("dry-run = true\n")
    assert run(*finetune("--config run.toml")).code == 0  # a switch too
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "text, named",
    [
        ("learning-speed = 1\n", "'learning-speed' is no flag of finetune; known: accumulation, "),
        ('config = "other.toml"\n', "'config' is no flag of finetune"),
        ("steps = \n", "run.toml is not valid TOML: Invalid value (at line 1"),
        (None, "there is no such file"),
        ("lr = nan", "--lr must be a number in (0, 100], got nan"),
    ],
)
def test_a_config_file_that_cannot_be(finetune, text, named):
    if text is not None:
        Path("run.toml").write_text(text)
    refused(named, *finetune("--config run.toml"))
    assert not Path("out").exists()


REFUSED = {
    "--curriculum spiral": "--curriculum must be one of rotational, gradual, all, none, got spiral",
    "--exits 2,6": "--exits must be in 1..5, got 6 (model has 6 layers)",
    "--max-length 129": "--max-length must be at most the model's context of 128 tokens, got 129",
    "--vocab-size 400": "--vocab-size must be used with --recipe scratch, got 400",
    "--recipe none --pmax 0.1": "--pmax must be left out with --recipe none",
    "--template chat": "a chat template was asked for, but the model's tokenizer has none",
    "--epochs 2 --data commands": "--epochs must be used with --samples for `commands`",
    "--curriculum all --rotation 2": "--rotation must be used with --curriculum rotational",
    "--streaming": "--steps must be given with --streaming",
    "--lora-targets q_proj": "--lora-targets must be used with --lora-rank, got no rank",
    "--resume": "--resume: there is no checkpoint in out/checkpoints; a run with --save-steps N",
    '--training-arguments {"max_steps":1}': "--training-arguments: the run decides on max_steps",
}


@pytest.mark.parametrize("flags, message", REFUSED.items())
def test_settings_that_cannot_be(finetune, flags, message):
    refused(f"error: {message}", *finetune("--threads 1", *flags.split()))
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("flags", ["--lora-targets nothing --lora-rank 2", "--report-to nowhere"])
def test_a_dry_run_finds_what_the_libraries_refuse(finetune, flags):
    result = run(*finetune(*flags.split(), "--dry-run"))
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"error: {' '.join(flags.split()[:2])}: ")


def test_a_malformed_row_is_named_and_nothing_written(finetune):
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    fails(
        "rows.jsonl:2: no column 'completion' (--completion-column); found prompt",
        *finetune("--data rows.jsonl"),
    )
    assert files() == ["rows.jsonl"]


def test_an_output_that_may_not_be_replaced(finetune):
    Path("out").mkdir()
    Path("out", "config.json").write_text("{}")
    fails(
        "--output out already holds a model; give --overwrite to replace it, or another folder",
        *finetune(),
    )
    message = "in the way is config.json, which layerskip did not write; move it away, or give another folder"
    fails(f"--output out: {message}", *finetune("--overwrite"))
    assert (files(), Path("out", "config.json").read_text()) == (["out/config.json"], "{}")
    Path("out", "config.json").write_text('{"model_type": "llama"}')
    assert run(*finetune("--overwrite --dry-run")).code == 0
    Path("file").write_text("mine")
    assert "File exists" in run(*finetune("--output file")).err


def test_blocks_beside_a_frozen_model(finetune, checkpoint):
    flags = "--exits 2,4 --steps 2 --answer-tokens 4 --lr 0.01"
    arguments = finetune(flags, name="train-drafter")
    planned = run(*arguments, "--dry-run")
    assert (planned.code, planned.out, list(Path().iterdir())) == (0, "", [])
    for part in (
        "blocks at exits 2,4, 0.0M parameters; the model stays as it is; answers of the model\n",
        "4 answers by the model, at most 4 tokens; 0 exist already\n",
        "estimated speedup by acceptance rate: ",
        "saved settings that will be left out: exit 1; ",
    ):
        assert part in planned.err

    result = run(*arguments)
    assert (result.code, result.out) == (0, "")
    assert re.search(
        r"^training 2/2 loss [\d.]+ exits 2:[\d.]+ 4:[\d.]+ lr [\d.e-]+ \d+ tokens/s 0 s left$",
        result.err,
        re.MULTILINE,
    )
    assert re.search(r"^divergence: 2: [\d.]+  4: [\d.]+$", result.err, re.MULTILINE)
    assert result.err.endswith("saved out; next: layerskip bench --model out\n")
    assert {"out/exit_blocks.safetensors", "out/model.safetensors", "out/layerskip.json"} <= set(
        files()
    )
    for wrong, told in (
        (("--answers data",), "--answer-tokens must be left out with --answers data, got 4"),
        (("--draft-vocab 9",), "--draft-vocab must be used with --layout eagle3, got 9"),
    ):
        fails(told, *arguments, "--overwrite", *wrong)


@pytest.mark.parametrize("value", ['"many"', "1.5", "true"])
def test_a_number_of_another_kind_in_a_config_file_is_wrong_usage(finetune, value):
    Path("run.toml").write_text(f"steps = {value}\n")
    result = run(*finetune("--config run.toml"))
    assert (result.code, result.out) == (2, "") and "--steps" in result.err
