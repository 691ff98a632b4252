"""The models, data and results that attacks start from: tiny, random, generated once per campaign."""

import gc
import importlib
import json
import os
import shutil
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .command import Command, run, start
from .forked import Child, Limits

MODELS = ("llama", "qwen2", "smollm3", "gemma3_text", "sharded", "adapter", "tiny.gguf", "chat", "measured", "blocks", "packed")
_SHAPES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {},
    "smollm3": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16},
}
_TASK = """task: {kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: harness/rows.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{target}"
{more}
metadata: {{version: 1}}
"""
_TASKS = {  # files of lm-evaluation-harness, by what they ask a model for
    "multiple_choice": ("{{label}}", 'doc_to_choice: "{{choices}}"'),
    "generate_until": ("{{completion}}", 'generation_kwargs: {until: ["]"], max_gen_toks: 4}'),
    "loglikelihood_rolling": ("{{prompt}}", "metric_list: [{metric: word_perplexity}]"),
}
_CHAT = "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}<assistant>"


@dataclass(frozen=True)
class Material:
    """A folder with models and files to attack. Attacks copy from it and never write to it."""

    root: Path

    def model(self, name: str = "llama") -> Path:
        """One of MODELS."""
        return self.root / "models" / name

    @property
    def data(self) -> Path:
        """Valid files of every kind: rows.*, prompts.jsonl, text.txt, chat.jsonl, code.jsonl, mbpp.jsonl, topv2/, harness/."""
        return self.root / "data"

    @property
    def bench(self) -> Path:
        """The output of a finished `bench`."""
        return self.root / "bench"

    @property
    def sweep(self) -> Path:
        """The output of a finished `sweep-exits`."""
        return self.root / "sweep"

    @property
    def journal(self) -> Path:
        """The unfinished.jsonl of a `bench` with `bench_flags` that was interrupted."""
        return self.root / "unfinished.jsonl"

    @property
    def training(self) -> Path:
        """The output of a finetuning run with checkpoints, started with `training_flags`."""
        return self.root / "training"

    @property
    def frozen(self) -> Path:
        """What `frozen_flags` leave when they are killed after the first of two steps: answers, states and a checkpoint."""
        return self.root / "frozen"

    def bench_flags(self) -> tuple[str, ...]:
        return ("bench", "--model", str(self.model()), "--samples", "3", "--repeats", "1", "--max-new-tokens", "4")

    def calibrate_flags(self, model: str | None = None) -> tuple[str, ...]:
        """`model`: a folder, by default that of `measured`."""
        return ("calibrate", "--model", model or str(self.model("measured")), "--samples", "2", "--length", "8", "--steps", "1")

    def training_flags(self, steps: int = 3) -> tuple[str, ...]:
        return (
            *("finetune", "--model", str(self.model()), "--steps", str(steps), "--batch-size", "2", "--max-length", "64"),
            *("--samples", "16", "--save-steps", "1", "--dtype", "fp32", "--device", "cpu"),
        )

    def frozen_flags(self, model: str | None = None) -> tuple[str, ...]:
        """`model`: a folder, by default that of `llama`."""
        return (
            *(
                "finetune",
                "--frozen",
                "--model",
                model or str(self.model()),
                "--exits",
                "2",
                "--steps",
                "2",
                "--save-steps",
                "1",
            ),
            *("--batch-size", "2", "--max-length", "48", "--samples", "4", "--answer-tokens", "4", "--dtype", "fp32"),
        )


def import_everything() -> None:
    """Imports what commands import, so that forked children need not. Nothing of it is run here."""
    os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1"})
    os.environ["OMP_WAIT_POLICY"] = "passive"  # waiting threads leave the cores to the other attacks
    os.environ.setdefault("HF_HOME", "/nonexistent")
    import datasets  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401
    import peft  # noqa: F401
    import pydantic.main  # noqa: F401
    import torch  # noqa: F401
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    for name in ("Llama", "Qwen2", "Qwen3", "Mistral", "SmolLM3", "Gemma3Text", "Gemma2", "Gemma", "Olmo2", "Granite"):
        MODEL_FOR_CAUSAL_LM_MAPPING[getattr(transformers, f"{name}Config")]
    import layerskip_core.evaluation.report.html
    import layerskip_core.evaluation.report.inspect_page

    import cli.main
    import layerskip_core.calibration.run
    import layerskip_core.evaluation.measure.bench
    import layerskip_core.evaluation.measure.sweep
    import layerskip_core.evaluation.report.plots
    import layerskip_core.evaluation.verification.run
    import layerskip_core.serving
    import layerskip_core.training.run

    with suppress(ModuleNotFoundError):  # without the extra `lm-eval`
        import lm_eval.evaluator
        import lm_eval.tasks  # noqa: F401

        import layerskip_core.harness.measure  # noqa: F401
    with suppress(ModuleNotFoundError):  # without the extra `serve`, which the tests have
        import uvicorn.lifespan.off
        import uvicorn.loops.auto
        import uvicorn.protocols.http.auto
        import uvicorn.protocols.websockets.auto  # noqa: F401

        import cli.server.app  # noqa: F401

    _require_no_threads()


def _require_no_threads() -> None:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    if len(names) - names.count("jemalloc_bg_thd") > 1:  # this thread is started again after a fork
        sys.exit(f"importing the libraries started threads, which a forked child would lack: {', '.join(names)}")


def import_what_commands_import(material: Material) -> None:
    """Runs commands that use many modules, and imports these modules, so that no later child has to."""
    logs = material.root / "logs"
    training = (*material.training_flags(1), "--output", "learnt", "--lora-rank", "2")
    named = ("--model", str(material.model("tiny.gguf")), "--max-new-tokens", "2", "call")
    for number, arguments in enumerate(
        (
            ("bench", "--from", str(material.bench / "results.json"), "--output", "learnt"),
            ("inspect", "--model", str(material.model("chat")), "--max-new-tokens", "1", "--output", "learnt.html", "call"),
            ("data", "--data", str(material.data / "rows.parquet")),
            ("generate", *named),
            ("generate", "--model", str(material.model("adapter")), *named[2:]),
            ("generate", "--model", str(material.model("measured")), "--quantize", "int4", *named[2:]),
            training,
            (*material.frozen_flags(), "--output", "learnt-blocks"),
            ("export", str(material.model()), "--exit", "2", "--engine", "llama.cpp", "--output", "learnt-gguf"),
        )
    ):
        known, listed = set(sys.modules), logs / f"modules-{number}"
        listing = partial(_list_modules_at_exit, listed)
        start(Command(arguments), material.root, logs, prepare=listing).wait()  # some of them fail with sanitizers
        for name in listed.read_text().split():
            if name not in known:
                with suppress(Exception):  # a few modules cannot be imported alone
                    importlib.import_module(name)
    _require_no_threads()
    gc.collect()
    gc.freeze()  # otherwise each child's garbage collections would touch, and so copy, everything imported


def _list_modules_at_exit(listed: Path) -> None:
    """Keeps the list up to date while the child runs, because a child skips the interpreter's shutdown."""

    def tell(event: str, _: object) -> None:
        if event == "layerskip.attack.done":
            listed.write_text("\n".join(sys.modules))

    sys.addaudithook(tell)


def make(root: Path) -> Material:
    """Generates everything in forked children."""
    material = Material(root)
    logs = root / "logs"
    logs.mkdir(parents=True)
    for work in (_make_models, _make_data):
        outcome = Child(lambda work=work: work(material) or 0, logs, Limits(), None, (-1, -1)).wait()
        assert outcome is not None and outcome.status == 0, outcome
    _make_packed(material, root, logs)
    bench = material.bench_flags()
    sweep = ("sweep-exits", *bench[1:5], "--exits", "2,3", "--specs", "2", *bench[7:])
    outcome = run(Command(material.calibrate_flags()), root, logs)
    assert outcome.status == 0, outcome
    for flags, folder in ((bench, material.bench), (sweep, material.sweep), (material.training_flags(), material.training)):
        outcome = run(Command((*flags, "--output", str(folder))), root, logs)
        assert outcome.status == 0, outcome
    frozen = Command((*material.frozen_flags(), "--output", str(material.frozen)))
    killed = start(frozen, root, logs, prepare=_kill_at_the_second_checkpoint).wait()
    assert killed is not None and killed.status == -signal.SIGKILL and material.frozen.is_dir(), killed
    lines = (material.bench / "outputs.jsonl").read_text().splitlines(keepends=True)
    material.journal.write_text("".join(lines[:-1]))
    return material


def _kill_at_the_second_checkpoint() -> None:
    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.rename" and str(arguments[1]).endswith("checkpoint-2"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _make_models(material: Material) -> None:
    import torch
    from conftest import tiny_model
    from evaluating import tiny_loaded
    from gguf_file import write_gguf

    from layerskip_core.checkpoint.save import save_checkpoint

    torch.set_num_threads(1)
    loaded = tiny_loaded(torch.float32)
    tokenizer, special = loaded.tokenizer, {}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        special[name] = getattr(tokenizer, name)
    for name, changes in _SHAPES.items():
        model = tiny_model(name, torch.float32, vocab_size=300, num_hidden_layers=4, **{**special, **changes})
        save_checkpoint(model, tokenizer, loaded.info, str(material.model(name)), torch.float32)
    sharded = tiny_model(dtype=torch.float32, vocab_size=300, num_hidden_layers=4, **special)
    sharded.save_pretrained(material.model("sharded"), max_shard_size="60KB")
    tokenizer.save_pretrained(material.model("sharded"))
    write_gguf(str(material.model()), material.model("tiny.gguf"))
    shutil.copytree(material.model(), material.model("chat"))
    (material.model("chat") / "chat_template.jinja").write_text(_CHAT)
    information = json.loads((material.model("chat") / "layerskip.json").read_text())
    information["prompt_template"] = "chat"
    (material.model("chat") / "layerskip.json").write_text(json.dumps(information))
    _make_measured(material, tokenizer, special)
    _make_blocks(material, tokenizer, special)
    _make_adapter(material, tokenizer)


def _make_measured(material: Material, tokenizer: object, special: dict[str, object]) -> None:
    """A model with all that a training and `sweep-exits --save` store, of widths that int4 kernels run."""
    import torch
    from conftest import tiny_model
    from layerskip_core.config.policies import Policy

    from layerskip_core.checkpoint.info import CheckpointInfo
    from layerskip_core.checkpoint.save import save_checkpoint
    from layerskip_core.config.decoding import DraftProfile, SkipChoice

    widths = {"hidden_size": 64, "intermediate_size": 64}
    model = tiny_model("llama", torch.float32, vocab_size=300, num_hidden_layers=4, **widths, **special)
    info = CheckpointInfo(
        "{prompt}\n",
        exit_layer=2,
        num_draft_tokens=3,
        details={"config": {"recipe": {"curriculum": "rotational", "exits": [2, 3]}}, "final_losses": {"2": 3.5, "4": 3.0}},
        policies={
            "exact": Policy("adaptive"),
            "fast": Policy("early-exit", 3),
            "confident": Policy("early-exit", exits=(2, 3), exit_confidence=0.3),
            "copies": Policy("self-speculative", 4, 2, "int4"),
        },
        skip=SkipChoice((2,), 3),
        profile=DraftProfile({"exit 2": 0.5, "exit 3": 0.7}, (1.0, 1.1, 1.2), {"exit 2": 0.5, "exit 3": 0.7}),
    )
    save_checkpoint(model, tokenizer, info, str(material.model("measured")), torch.float32)


def _make_blocks(material: Material, tokenizer: object, special: dict[str, object]) -> None:
    """A model with blocks at two exits, of which the second reads the model's final states."""
    import torch
    from conftest import tiny_model
    from exit_block_models import random_blocks

    from layerskip_core.checkpoint.beside import exit_blocks_content, fingerprint
    from layerskip_core.checkpoint.folder import EXIT_BLOCKS_FILE
    from layerskip_core.checkpoint.info import EXIT_BLOCKS, CheckpointInfo
    from layerskip_core.checkpoint.save import save_checkpoint
    from layerskip_core.model import ModelSpec
    from layerskip_core.model.exit_blocks import ExitBlock

    widths = {"hidden_size": 64, "intermediate_size": 64}
    model = tiny_model("llama", torch.float32, vocab_size=300, num_hidden_layers=4, **widths, **special)
    spec, blocks = ModelSpec.of(model.config), random_blocks(model, ExitBlock(1), ExitBlock(2, "final"))
    weights = {name: blocks.take(name) for name in blocks.shapes(spec)}
    content = exit_blocks_content(spec, weights, fingerprint(spec, model.get_parameter))
    info = CheckpointInfo("{prompt}\n", details={EXIT_BLOCKS: {"1": {"agreement": 0.5}, "2": {"agreement": 0.75}}})
    output = str(material.model("blocks"))
    save_checkpoint(model, tokenizer, info, output, torch.float32, {EXIT_BLOCKS_FILE: content})


def _make_packed(material: Material, root: Path, logs: Path) -> None:
    """The model with blocks as `export --format packed` writes it; as it is where no compiled kernels are."""
    from layerskip_core.model.native.compiled import kernels

    target = str(material.model("packed"))
    flags = ("--format", "packed", "--quantize", "int4") if kernels() else ("--exit", "4")
    outcome = run(Command(("export", str(material.model("blocks")), *flags, "--output", target)), root, logs)
    assert outcome.status == 0, outcome


def _make_adapter(material: Material, tokenizer: object) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(material.model())
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(material.model("adapter"), save_embedding_layers=False)
    tokenizer.save_pretrained(material.model("adapter"))


def _make_data(material: Material) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = material.data
    (folder / "topv2").mkdir(parents=True)
    (folder / "harness").mkdir()
    rows = [{"prompt": f"remind me to call person {number}", "completion": f"[IN:CALL {number} ]"} for number in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    choices = [{**row, "choices": [row["completion"], "[IN:CALL ]"], "label": 0} for row in rows]
    (folder / "harness" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    for kind, (target, more) in _TASKS.items():
        (folder / "harness" / f"{kind}.yaml").write_text(_TASK.format(kind=kind, target=target, more=more))
    (folder / "rows.csv").write_text("prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    (folder / "text.txt").write_text("".join(row["prompt"] + ". " + row["completion"] + "\n" for row in rows) * 4)
    chat = [{"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": "yes"}]} for r in rows]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    header = "domain\tutterance\tsemantic_parse\n"
    for split in ("train", "eval", "test"):
        lines = "".join(f"reminder\t{row['prompt']}\t{row['completion']}\n" for row in rows)
        (folder / "topv2" / f"reminder_{split}.tsv").write_text(header + lines)
    code = [
        {"task_id": f"T/{n}", "prompt": f"def f{n}(x):\n", "entry_point": f"f{n}", "canonical_solution": "    return x\n"}
        | {"test": f"def check(candidate):\n    assert candidate({n}) == {n}\n"}
        for n in range(3)
    ]
    (folder / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in code))
    mbpp = [
        {"task_id": n, "text": f"Write g{n}.", "code": f"def g{n}(x): return x", "test_list": [f"assert g{n}(1) == 1"]}
        | {"test_setup_code": "", "challenge_test_list": []}
        for n in range(12)
    ]
    (folder / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mbpp))
