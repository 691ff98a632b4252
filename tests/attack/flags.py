"""The commands as the CLI defines them: their flags, a short valid form of each command, and hostile values for flags."""

from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from .material import Material
from .victim import OUTPUTS

FROZEN, FROZEN_ON_DATA = "finetune --frozen", "finetune --frozen --answers data"  # count as commands of their own
COMMANDS = (
    *(
        "generate",
        "chat",
        "bench",
        "sweep-exits",
        "finetune",
        "data",
        "inspect",
        "import",
        "export",
        "calibrate",
        "compare",
        "verify",
    ),
    FROZEN,
)
OF_BLOCKS = ("--feature", "--answers", "--answer-tokens", "--answer-temperature", "--loss", "--exits")
_LONG_MARK = 1000  # with more rows or steps than this, a long run is no fault


@dataclass(frozen=True)
class Flag:
    """One flag of a command; `kind` is the name of its values' type."""

    name: str
    kind: str

    @property
    def is_switch(self) -> bool:
        return self.kind == "bool"


@cache
def flags_of(command: str) -> tuple[Flag, ...]:
    """All flags except --help, in the CLI's order."""
    import typer.main

    from cli.main import app

    group = typer.main.get_command(app)
    parameters = group.commands[command.split()[0]].params
    options = [option for option in parameters if option.param_type_name == "option" and option.name != "help"]
    named = [(option, _kind(option)) for option in options]
    return tuple(Flag(name, kind) for option, kind in named for name in (option.opts[0], *option.secondary_opts))


def _kind(option: Any) -> str:
    """The name of an option's type, in older and newer versions of Typer."""
    if (descriptor := getattr(option, "type_descriptor", None)) is not None:
        return getattr(descriptor.annotation, "__name__", "str")
    return {"boolean": "bool", "integer": "int"}.get(option.type.name, option.type.name)


def base_of(command: str, material: Material) -> tuple[str, ...]:
    """The shortest useful form of a command."""
    model, few = ("--model", str(material.model())), ("--samples", "2", "--max-new-tokens", "4")
    return {
        "generate": ("generate", *model, "--max-new-tokens", "4"),
        "chat": ("chat", *model, "--max-new-tokens", "4"),
        "bench": ("bench", *model, *few, "--repeats", "1"),
        "sweep-exits": ("sweep-exits", *model, *few, "--exits", "2", "--specs", "2"),
        "finetune": ("finetune", *model, "--steps", "1", "--batch-size", "2", "--max-length", "48", "--samples", "4"),
        "data": ("data", "--samples", "3"),
        "inspect": ("inspect", *model, "--max-new-tokens", "2"),
        "import": ("import", str(material.model())),
        "export": ("export", str(material.model()), "--exit", "2"),
        "compare": ("compare", str(material.sweep), str(material.bench)),
        "verify": (
            *("verify", str(material.model()), "--samples", "2", "--max-new-tokens", "3", "--draws", "0", "--specs", "2"),
            *("--precisions", "fp32", "--kernels", "torch"),
        ),
        "calibrate": (*material.calibrate_flags(), "--output", "calibrated"),
        FROZEN: (
            *("finetune", "--frozen", *model, "--exits", "2", "--steps", "1", "--batch-size", "2", "--max-length", "48"),
            *("--samples", "4", "--answer-tokens", "4"),
        ),
        FROZEN_ON_DATA: (
            *("finetune", "--frozen", "--answers", "data", *model, "--exits", "2", "--steps", "1", "--batch-size", "2"),
            *("--max-length", "48", "--samples", "4"),
        ),
    }[command]


def hostile_value(flag: Flag, random: Random, legal: bool = False) -> str:
    """A value for a flag. `legal`: without bytes that only a command-line argument can hold."""
    pool = {
        "int": (*_COUNTS, *_NUMBERS),
        "float": (*_REALS, *_NUMBERS),
    }.get(flag.kind, (*_TEXTS, *_OF_FLAGS.get(flag.name, ())))
    if flag.name in _OF_FLAGS and random.random() < 0.5:
        pool = _OF_FLAGS[flag.name]
    value = random.choice(pool)
    if flag.name == "--output" and value == "/":  # root may write there, and nothing would remove it
        value = "/proc"
    return value.encode(errors="replace").decode() if legal else value


def takes_long(argument: str) -> bool:
    """Whether a value asks for so many rows or steps that a long run is no fault."""
    try:
        return float(argument) > _LONG_MARK
    except ValueError:
        return False


_COUNTS = ("-1", "0", "1", "2", "3", "7", "100", str(2**31 - 1), str(2**31), str(2**32), str(2**63), str(2**64), str(2**70))
_NUMBERS = ("", " ", "x", "1e3", "0x10", "\uff11", "1_000", " 3", "--", "-", str(-(2**63)), str(10**30), "1" * 5000, "true")
_REALS = ("nan", "inf", "-inf", "-1", "0", "1e-50", "1e-320", "1e308", "1e400", "0,5", "0.5", "1", "2", "-0.0")
_TEXTS = (
    *(
        "",
        " ",
        "\n",
        "\udcff",
        "a" * 100_000,
        "../../..",
        "/",
        "~",
        ".",
        "/dev/null",
        "/dev/full",
        "http://x/y",
        "a/b",
        "a/b/c",
    ),
    *("{prompt}", "{prompt.__class__}", "{0}", "chat", "raw", "none", "commands", "topv2", "embedded", "\u202e", "%s", "--"),
    *("model", "mixed", "file.txt", "fifo", "dangling", "null", "blocked", "bench", "bench/results.json", "training", "-"),
)
_RANGES = (
    *("1:10000000000", "1:10:0", "3,6,-1", "1:2:3:4", "4:1", "1", "2", "1,2,3", ",", "1,,2", "x", "0", "99", str(2**70)),
    *("1:3", "1:9:2", "-1:3", " 2 ", "1;2", "2" + ",2" * 20_000),
)
_OF_FLAGS = {
    **dict.fromkeys(("--exits", "--specs", "--layers", "--pass-k", "--skip"), _RANGES),
    "--output": OUTPUTS,
    "--strategy": (
        *("adaptive", "lookup", "self-speculative", "draft-and-verify", "early-exit", "autoregressive"),
        *("Autoregressive", "adaptive,lookup"),
    ),
    "--strategies": ("autoregressive", "early-exit", "autoregressive,autoregressive", ",", "x", "autoregressive," * 2000),
    "--baselines": (
        "transformers",
        "prompt-lookup",
        "no-reuse",
        "assistant-early-exit",
        "draft-model",
        "draft-and-verify",
        "x",
        ",,",
    ),
    "--device": ("cpu", "cuda", "cuda:99", "mps", "meta", "cpu:1", "CPU", "cuda:-1", "xla", "cuda:" + "9" * 30),
    "--dtype": ("fp32", "bf16", "auto", "float64", "FP32", "f16", "q8_0", "q4_0"),
    **dict.fromkeys(("--quantize", "--draft-weights"), ("int8", "int4", "int2", "INT8", "int8,int4", "int8,int8", "int4,")),
    "--exit-confidences": ("0.5", "0.8,0.9", "1", "0,0.5", "nan", "1e-50", ",", "0.5,", "2", "0.5" + ",0.5" * 20_000),
    "--policy": ("exact", "fast", "confident", "copies", "Exact", "exact,fast", "x"),
    "--draft-head": ("int8", "int4", "int2", "int8,int4"),
    "--format": ("table", "json", "csv", "markdown", "html", "transformers", "gguf", "GGUF"),
    "--engine": ("vllm", "sglang", "llama.cpp", "tensorrt-llm", "transformers", "vLLM", "vllm,sglang", "x"),
    "--task": (
        "commands",
        "jsonl",
        "lm",
        "humaneval",
        "mbpp",
        "cnn_dm",
        "xsum",
        "scitldr",
        "x",
        "../x",
        "lm-eval:",
        "lm-eval:x",
    ),
    "--include-path": ("mixed", "file.txt", "absent", "."),
    "--kernels": (
        "amx",
        "avx512",
        "avx2",
        "torch",
        "exact",
        "generic",
        "transformers",
        "generic,generic",
        "AVX2",
        "cuda",
        ",",
        "torch," * 2000,
    ),
    "--precisions": ("fp32", "bf16", "int8", "int4", "int8,int4", "fp8", "FP32", ",", "fp32," * 2000),
    "--draws": ("0", "1", "60", "-1", "1000001"),
    "--only": ("exact_match", "perplexity,speedup", "x", ",", "exact_match,", "a" * 3000),
    "--metric": ("exact_match", "rouge1", "rougeL", "rouge9"),
    "--stop": ("a", "\n", "{prompt}", "x" * 3000),
    "--system": ("Be short.", "{prompt}", "{{ messages }}", "<|im_end|>", "x" * 3000),
    "--split": ("train", "validation", "test", "compositional", "x", "../x", "train[:3]"),
    "--template": ("chat", "raw", "{prompt}", "{prompt}{prompt}", "{prompt!r:>9999999999}", "{}", "no", "{prompt}" * 3000),
    "--prompt-template": ("chat", "{prompt}", "{prompt}{x}", "{", "{prompt}" * 3000),
    "--curriculum": ("rotational", "gradual", "all", "none", "x"),
    "--dropout-profile": ("exponential", "constant", "Constant", "linear", "x"),
    "--anchor-weights": ("bf16", "int8", "int4", "BF16"),
    "--feature": ("none", "final", "Final", "final,none", "x"),
    "--answers": ("model", "data", "Model", "model,data", "x"),
    "--loss": ("kl", "tv", "KL", "kl,tv", "x"),
    "--exit-weights": ("paper", "linear", "sqrt", "uniform", "x"),
    "--regime": ("finetune", "continual", "scratch", "code", "x"),
    "--report-to": ("x", "wandb", "tensorboard", ",", "all", "none", "os"),
    "--lora-layers": ("all", "below-exit", "x"),
    "--lora-targets": ("all-linear", "q_proj", "x", ".*", "(", "lm_head", "embed_tokens", "norm", ","),
    "--data": ("commands", "topv2", "file.txt", "mixed", "x.jsonl", "x.csv", "a/b", "a/b@c", "/dev/zero", "fifo", "bench"),
    "--from": ("bench/results.json", "bench", "file.txt", "fifo2", "/dev/null", "model/config.json"),
    "--config": ("file.txt", "bench", "/dev/null", "model/config.json", "dangling"),
    "--model": ("model", "mixed", "file.txt", "blocked", "training", "bench", "a/b", "embedded ", "x.gguf", "/", "null"),
}
