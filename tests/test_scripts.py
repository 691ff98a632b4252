"""Every script of examples/ runs once with tiny settings, and prints what it is for.

`layerskip` and `python` on the PATH of a script are clients of this process, which does their work
in forks that have imported all libraries, with fewer steps, rows and tokens than the script asks
for.
"""

import gzip
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from command_line import measure_little
from forks import hasten, import_once

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
CLIENT = """#!{python} -IS
import json, os, socket, sys
name, given = os.path.basename(sys.argv[0]), sys.argv[1:]
if name == "python" and not (given and given[0].endswith(".py")):
    os.execv(given and given[:2] == ["-m", "pip"] and "/bin/true" or {python!r}, [{python!r}, *given])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    socket.send_fds(server, [json.dumps([os.getcwd(), os.environ["PATH"], name, *given]).encode()], [0, 1, 2])
    sys.exit((server.recv(1) or b"\\1")[0])
"""
_MEASURED = {
    "--samples": "2",
    "--timed": "1",
    "--max-new-tokens": "3",
    "--threads": "1",
    "--batch-size": "2",
}
FEWER = {  # by command: flags with these values in place of the script's
    "finetune": {
        "--steps": "2",
        "--batch-size": "2",
        "--epochs": None,
        "--samples": "40",
        "--threads": "1",
    },
    "train-drafter": {
        "--steps": "1",
        "--batch-size": "2",
        "--answers": "data",
        "--samples": "8",
    },
    "sweep-exits": {**_MEASURED, "--exits": "1,2"},
    "bench": {**_MEASURED, "--repeats": "1", "--baselines": None, "--gguf": None},
    "generate": {"--max-new-tokens": "3"},
    "data": {"--samples": "4"},
}
GIVEN = {
    "--vocab-size": "300",
    "--draft-vocab": "100",
    "--exits": "1,2",
    "--exit": "2",
    "--specs": "2",
    "--spec": "2",
}  # if a script has them


def fewer(model, command, *arguments):
    """The arguments of a call with less to do, and with a small model in place of the embedded
    ones.
    """
    wanted = {
        **{flag: value for flag, value in GIVEN.items() if flag in arguments},
        **FEWER.get(command, {}),
    }
    if any(word.endswith("recipe.toml") for word in arguments):
        wanted["--exits"] = "1,2"
    kept = []
    words = iter(arguments)
    for word in words:
        if word in wanted:
            next(words)
        else:
            kept.append(model if word in ("embedded", "embedded-base") else word)
    return [
        command,
        *kept,
        *(word for flag, value in wanted.items() if value is not None for word in (flag, value)),
    ]


def _work(connection, model):
    """In a fork: the work of one client, on its streams and in its folder."""
    hasten()
    request, descriptors, *_ = socket.recv_fds(connection, 1 << 16, 3)
    folder, os.environ["PATH"], name, *given = json.loads(request)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    os.chdir(folder)
    sys.stdin = os.fdopen(0)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ended = threading.Event()

    def follow():
        """Ends with the client."""
        connection.recv(1)
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    code = 0
    try:
        if name == "python":
            sys.argv = given
            sys.path.insert(0, str(Path(given[0]).parent))
            runpy.run_path(given[0], run_name="__main__")
        else:
            from cli.main import main

            patch = pytest.MonkeyPatch()
            measure_little(patch)
            # Tests/cli look at pictures
            patch.setattr("layerskip_core.evaluation.report.plots.draw_plots", lambda record: {})
            sys.argv = ["layerskip", *fewer(model, *given)]
            main()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    ended.set()
    connection.send(bytes([code & 255]))
    os._exit(0)


@pytest.fixture(scope="module")
def programs(wide_base):
    """A folder with `layerskip`, `python` and what an environment's folder `bin` has besides."""
    import_once()
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listening:
        path = f"{folder}/socket"
        programs = Path(folder) / "env" / "bin"
        programs.mkdir(parents=True)
        for name in ("layerskip", "python"):
            (programs / name).write_text(CLIENT.format(python=sys.executable, path=path))
            (programs / name).chmod(0o755)
        (programs / "activate").write_text(f"PATH={programs}:$PATH\n")
        listening.bind(path)
        listening.listen(16)

        def accept():
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                multiprocessing.get_context("forkserver").Process(
                    target=_work, args=(connection, wide_base)
                ).start()
                connection.close()

        threading.Thread(target=accept, daemon=True).start()
        yield programs
        listening.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def run(programs):
    """Runs a script in the test's folder; returns its standard output."""

    def run(script, *arguments, **environment):
        path = f"{programs}:{os.environ['PATH']}"
        how = [
            programs / "python" if script.endswith(".py") else "bash",
            EXAMPLES / script,
            *map(str, arguments),
        ]
        variables = {
            **os.environ,
            "PATH": path,
            "OMP_NUM_THREADS": "1",
            "LAYERSKIP_ENV": str(programs.parent),
            **environment,
        }
        done = subprocess.run(how, capture_output=True, text=True, env=variables, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def rows_in(table):
    """Of a Markdown table: the first cells of the rows below its head."""
    return [row.split("|")[1].strip() for row in table.splitlines() if row.startswith("| ")][1:]


def parsing_rows(count):
    rows = ["domain\tutterance\tsemantic_parse"]
    return (
        "\n".join(
            [
                *rows,
                *(
                    f"x\tset timer {n} please\t[IN:SET_TIMER set timer {n} please ]"
                    for n in range(count)
                ),
            ]
        )
        + "\n"
    )


def topv2(folder, *domains):
    folder.mkdir(parents=True)
    for domain in domains:
        for split, count in (("train", 40), ("eval", 4), ("test", 8)):
            (folder / f"{domain}_{split}.tsv").write_text(parsing_rows(count))
    return folder


def test_quickstart(run, tmp_path):
    out = run("quickstart.sh", tmp_path / "model")
    assert out and (tmp_path / "model" / "layerskip.json").exists()


def test_embedded(run, tmp_path):
    out = run("embedded.sh", tmp_path / "runs")
    assert {"embedded-test", "base-test", "parent-test", "embedded-compositional"} <= set(
        rows_in(out)
    )


def test_topv2(run, tmp_path):
    domains = ("alarm", "event", "messaging", "music", "navigation", "reminder", "timer", "weather")
    out = run(
        "topv2.sh", topv2(tmp_path / "data", *domains), tmp_path / "runs", EPOCHS="2", ROWS="4"
    )
    assert {"epoch-1-validation", "epoch-2-validation", "recipe-test", "control-test"} <= set(
        rows_in(out)
    )


def test_smollm2(run, tmp_path, wide_base):
    topv2(tmp_path / "topv2", "reminder", "weather")
    summary = {"source": ["We sort.", "It works."], "target": ["Sorting works."]}
    problems = [
        {
            "task_id": number,
            "text": "Add.",
            "code": "def add(a, b):\n    return a + b",
            "test_list": ["assert add(1, 2) == 3"],
        }
        for number in (11, 12, 700)
    ]
    files = {
        "scitldr/train.jsonl": [summary], "scitldr/test.jsonl": [summary] * 2,
        "mbpp/mbpp.jsonl": [{**problem, "test_setup_code": "", "challenge_test_list": []} for problem in problems],
    }  # fmt: skip
    for name, rows in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.txt").write_text("the early bird gets the worm . " * 10)
    out = run("smollm2.sh", tmp_path, wide_base)
    assert (
        out.count("| autoregressive |") > 10
        and Path("smollm2-runs/results/control-mbpp/results.json").exists()
    )


def test_code(run, tmp_path, wide_base):
    model = tmp_path / "model"
    shutil.copytree(wide_base, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    template = "{% for each in messages %}{{ each.content }}{% endfor %}"
    (model / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": template})
    )
    program = "def add(a, b):\n    return a + b\n"
    problems = [
        {"task_id": number, "text": "Add.", "code": program, "test_list": ["assert add(1, 2) == 3"]}
        for number in (11, 12, 700)
    ]
    (tmp_path / "mbpp").mkdir()
    (tmp_path / "mbpp" / "mbpp.jsonl").write_text("\n".join(map(json.dumps, problems)))
    problem = {
        "task_id": "HumanEval/0",
        "prompt": "def add(a, b):\n",
        "canonical_solution": "    return a + b\n",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
        "entry_point": "add",
    }
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval" / "HumanEval.jsonl.gz").write_bytes(
        gzip.compress("\n".join([json.dumps(problem)] * 2).encode())
    )
    (tmp_path / "sources").mkdir()
    signature = 'import math\n\n\ndef area(side):\n    """The area of a square."""\n'
    documented = f"{signature}    size = math.fabs(side)\n    return size * size\n"
    (tmp_path / "sources" / "geometry.py").write_text(documented)
    # The model's own answers, of which tiny settings leave none whole
    Path("code-runs").mkdir()
    own = {"prompt": "Add.", "completion": program}
    Path("code-runs/own.jsonl").write_text(f"{json.dumps(own)}\n" * 2)
    out = run("code.sh", tmp_path, tmp_path / "sources", model)
    assert out.count("| autoregressive |") > 10
    rows = [json.loads(row) for row in Path("code-runs/train.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    taught = next(row for row in rows if "area" in row["prompt"])
    assert (
        taught["completion"]
        == f"```python\n{documented.replace(chr(10) * 3, chr(10) * 2).strip()}\n```"
    )
    assert "size * size" not in taught["prompt"] and "The area of a square" in taught["prompt"]


def test_own_answers(run):
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "x"}\n' * 2)
    answers = [{"text": "b", "finish_reason": reason} for reason in ("eos", "length")]
    Path("answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
    run("code/answered.py", "rows.jsonl", "answers.jsonl", "own.jsonl")
    assert json.loads(Path("own.jsonl").read_text()) == {"prompt": "a", "completion": "b"}


def test_evidence(run, tmp_path):
    out = run("evidence.sh", tmp_path, "curricula", "scratch", SEEDS="1", LRS="1e-3")
    assert [line for line in out.splitlines() if line.startswith("## ")] == [
        "## curricula",
        "## scratch",
    ]
    assert {path.parent.name for path in tmp_path.glob("*/comparison.md")} == {
        "curricula",
        "scratch",
    }


def test_gpu_on_a_cpu(run, tmp_path):
    run("gpu.sh", tmp_path, DEVICE="cpu", STEPS="1", SAMPLES="2", REPEATS="1")
    report = (tmp_path / "report.md").read_text()
    assert (
        report.count("exit status 0") == report.count("## ") > 8
        and report.count("\n    timed, ") == 4
    )


def test_lm_eval(run, tmp_path):
    pytest.importorskip("lm_eval")
    out = run(
        "lm_eval.sh", ROOT / "layerskip_core" / "embedded" / "commands-base", tmp_path, "2", "2"
    )
    assert out.count("largest gap of 8 log-likelihoods") == 2 and "facts_choice acc" in rows_in(out)


def test_decoder_speed(run):
    out = run(
        "decoder_speed.py", "rows", "rounds", "context", "prefill", "--threads", 1, "--repeats", 1
    )
    assert {"rows", "rounds", "context", "prefill"} == set(rows_in(out))


@pytest.mark.parametrize("through", ["generate", "serve"])
def test_batches(run, through):
    flags = {
        "model": "embedded",
        "rows": "1,2",
        "context": "0,40",
        "samples": 2,
        "least": 2,
        "max-new-tokens": 3,
        "repeats": 1,
    }
    out = run(
        "batches.py",
        f"--through={through}",
        "--threads=1",
        *(f"--{flag}={value}" for flag, value in flags.items()),
    )
    assert rows_in(out) == ["0", "0", "40", "40"]


def test_llama_cpp(run, wide_base):
    pytest.importorskip("xllamacpp")
    few = (f"--model={wide_base}", "--exit=2", "--samples=2", "--repeats=1", "--max-new-tokens=3")
    out = run("engines.py", "llama.cpp", "--formats=f16", *few)
    assert len(rows_in(out)) == 4 and out.count("2 of 2 | 2 of 2") == 4


def test_serve(run, wide_base):
    few = (f"--model={wide_base}", "--samples=2", "--repeats=1")
    out = run("engines.py", "serve", "--clients=1,2", "--max-new-tokens=4", *few)
    assert (
        rows_in(out) == ["without drafts"] * 2 + ["default flags"] * 2 and out.count("2 of 2") == 4
    )
    assert "4 of 4 answers are the same" in run("engines.py", "prefix", "--tokens=100", *few)


def test_first_token(run, tmp_path):
    sizes = {"hidden": 32, "inner": 64, "layers": 2, "heads": 4, "kv-heads": 2, "vocab": 1024}
    run(
        "first_token.py",
        "make",
        tmp_path / "model",
        *(f"--{name}={size}" for name, size in sizes.items()),
    )
    assert rows_in(
        run("first_token.py", "measure", tmp_path / "model", "--settings=int8", "--repeats=1")
    ) == ["model"]


def test_rows(run, tmp_path):
    run("smollm2/pantry.py", tmp_path)
    first, second = (run("smollm2/shell_requests.py", 3, seed).splitlines() for seed in (1, 2))
    made = [*first, *second, *(tmp_path / "test.jsonl").read_text().splitlines()]
    assert len(made) == 1006 == len(set(made)) and {*json.loads(made[-1])} == {
        "prompt",
        "completion",
    }


def test_vllm(run, tmp_path):
    """The engines themselves are those of tests/export/test_export.py: here their results are made
    up.
    """
    drafts = {"drafts": 2, "draft_tokens": 8, "accepted_tokens": 6}
    passes = {
        str(most): {"seconds": 1.0, "texts": ["a"], "tokens": 9, "drafts": drafts}
        for most in (1, 4, 16)
    }
    (tmp_path / "result.json").write_text(json.dumps({**passes, "memory": 1e9, "cache": 512}))
    environment = tmp_path / "vllm-env"
    (environment / "bin").mkdir(parents=True)
    (environment / "layerskip-installed").touch()
    fake = environment / "bin" / "python"
    fake.write_text(
        f'#!/bin/sh\n[ "$2" = table ] && exec python "$@"\ncp {tmp_path}/result.json "$5"\n'
    )
    fake.chmod(0o755)
    out = run("vllm.sh", tmp_path)
    assert (
        len(rows_in(out)) == 2 * (1 + 3 * 3) - 1 and "| 75.0% | 4.0 | 1 of 1 | 1000 | 512 |" in out
    )


def test_no_script_is_left_out():
    sourced = {"environment.sh", "stages.sh", "measuring.py"}
    inside = {
        "lm_eval_tasks.py",
        "lm_eval_agreement.py",
        "parsing_tables.py",
        "vllm_speed.py",
        "mixture.py",
        "rows.py",
        "answered.py",
    }
    text = Path(__file__).read_text()
    for path in EXAMPLES.rglob("*.[ps][yh]"):
        assert path.name in sourced | inside or path.relative_to(EXAMPLES).as_posix() in text, path
