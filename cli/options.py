"""Every flag, declared once: the option of each field of the configs, and commands made of configs.

A command takes configs, and `signature.command` makes a flag of each of their fields that has an Option here. A new field of
GenerationSettings with its Option is thereby a flag of generate, chat, bench and sweep-exits.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, is_typeddict

import typer

from layerskip_core.config.calibration import CalibrationConfig
from layerskip_core.config.checks import require, require_choice, require_given
from layerskip_core.config.data import DataConfig
from layerskip_core.config.decoding import DecodingOptions
from layerskip_core.config.evaluation import BASELINES, HARNESS, UNSANDBOXED, BenchConfig, SweepConfig, TaskConfig
from layerskip_core.config.machine import MachineConfig
from layerskip_core.config.options import (
    ADAPTERS,
    DATA,
    DECODING,
    EXIT_BLOCKS,
    MACHINE,
    MEASUREMENT,
    MODEL,
    OPTIMISATION,
    OUTPUT,
    PROMPTING,
    RECIPE,
    RETENTION,
    RUN,
    SERVER,
    TASK,
    WEIGHTS,
    Flag,
    flag_of,
    hints_of,
)
from layerskip_core.config.packing import PackingConfig
from layerskip_core.config.prompting import PromptingConfig
from layerskip_core.config.ranges import parse_counts, parse_shares
from layerskip_core.config.serving import ServeConfig
from layerskip_core.config.training import ExitBlockSettings, FinetuneConfig, RecipeSettings, RetentionSettings
from layerskip_core.config.verification import VerifyConfig
from layerskip_core.evaluation.tasks import TASKS

FORMATS = ("table", "json", "csv", "markdown")
_FORMAT_HELP = "Format of standard output: table, json, csv or markdown."
Format = Annotated[str, typer.Option("--format", help=_FORMAT_HELP, rich_help_panel=OUTPUT)]


@dataclass(frozen=True)
class Report:
    """Where the result of a measurement goes; `saved` is a results.json to render again."""

    format: str = "table"
    output: str | None = None
    saved: str | None = None

    def __post_init__(self) -> None:
        require_choice(self.format, "format", FORMATS)
        require_given("output", self.output)
        require_given("saved", self.saved)


def parse_names(text: str, field: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    require(bool(names), field, "a name, or several with commas", repr(text))
    return names


_CHECKPOINT = "the checkpoint's"
_REGIME = "by --regime"
_MODEL = Flag(MODEL, "embedded, embedded-base, a folder, a .gguf file or a hub id.")
_DEVICE = Flag(MACHINE, "auto, cpu, cuda, cuda:N or mps.")
_DTYPE = Flag(MACHINE, "auto, fp32 or bf16.")
_BATCH_SIZE = Flag(MEASUREMENT, "Prompts answered together, for quality; speed is measured at batch size 1.")
_TIMED = Flag(MEASUREMENT, "With --batch-size: the number of prompts that speed is measured on.", default="8")

OPTIONS: dict[type, dict[str, Flag]] = {
    PromptingConfig: {
        "template": Flag(
            PROMPTING,
            "Prompt template: chat, raw, or a text with {prompt} in it.",
            "--template/--prompt-template",
            default="the task's or checkpoint's, else the tokenizer's chat template",
        ),
        "system": Flag(PROMPTING, "System message, for chat templates."),
        "raw": Flag(PROMPTING, "Use no template; text of special tokens in the prompt becomes tokens."),
    },
    PackingConfig: {
        "quantize": Flag(WEIGHTS, "int8 or int4 weights (CPU only).", default="none"),
        "draft_weights": Flag(
            WEIGHTS,
            "Draft with low-bit copies of the weights: int8, int4 or int8,int4. The output stays the same.",
            parse=parse_names,
        ),
        "draft_head": Flag(WEIGHTS, "Precision of the head of these copies: int8 or int4.", default="int8"),
        "draft_vocab": Flag(WEIGHTS, "Draft among the N most frequent tokens only; 0: among all."),
        "exact": Flag(WEIGHTS, "Bit-for-bit the output of autoregressive decoding, in any precision; slower."),
    },
    MachineConfig: {
        "device": _DEVICE,
        "dtype": _DTYPE,
        "threads": Flag(MACHINE, "CPU threads; 0: torch's choice, or 1 to decode with a small model."),
    },
    TaskConfig: {
        "task": Flag(
            TASK,
            f"{', '.join(TASKS)}, data with prompts and references, or {HARNESS}TASK,TASK of lm-evaluation-harness.",
            default="by --data, else commands",
        ),
        "include_path": Flag(TASK, f"Folder with task files of your own, for {HARNESS}."),
        "data": Flag(TASK, "A file, a TOPv2 folder or a hub id.", default="the task's own, from the hub"),
        "split": Flag(TASK, "train, validation or test; compositional too for `commands`."),
        "samples": Flag(TASK, "Number of rows; 0: all, 20000 for `commands`."),
        "seed": Flag(TASK, "Seed of generated rows and of sampling."),
        "max_new_tokens": Flag(DECODING, "Maximum number of tokens in an answer.", default="the task's"),
        "prompt_column": Flag(TASK, "Column of the prompt.", default="the first of the usual names"),
        "completion_column": Flag(TASK, "Column of the reference.", default="the first of the usual names"),
        "metric": Flag(TASK, "For jsonl: exact_match, rouge1, rouge2 or rougeL.", default="by the references"),
        "shots": Flag(TASK, "Solved rows before each prompt.", default="the task's"),
        "pass_k": Flag(TASK, "The k of pass@k, such as 1,10.", parse=parse_counts),
        "problem_samples": Flag(TASK, "Answers to each code problem, for pass@k; needs --temperature if above 1."),
        "allow_code_execution": Flag(
            TASK,
            f"Run the programs that the model writes, in a sandbox; `{UNSANDBOXED}`: even where no layer of the sandbox works.",
            parse=lambda text, field: text or True,
            optional=UNSANDBOXED,
        ),
    },
    BenchConfig: {
        "model": _MODEL,
        "exit_layer": Flag(DECODING, "Layers of the early exit and of the drafts.", "--exit", _CHECKPOINT),
        "num_draft_tokens": Flag(DECODING, "Draft tokens per round.", "--spec", _CHECKPOINT),
        "strategies": Flag(DECODING, "The strategies to run; autoregressive is required.", parse=parse_names),
        "batch_size": _BATCH_SIZE,
        "timed": _TIMED,
        "repeats": Flag(MEASUREMENT, "Number of times that everything is measured; medians are reported."),
        "gguf": Flag(MEASUREMENT, "The model as a GGUF file, for the baseline llama.cpp."),
        "baselines": Flag(MEASUREMENT, f"Also: {','.join(BASELINES)}, or some.", parse=parse_names),
        "draft_model": Flag(MEASUREMENT, "Model that the baseline draft-model drafts with."),
    },
    SweepConfig: {
        "model": _MODEL,
        "exits": Flag(
            DECODING,
            "Exits: 3,6,8 or A:B:STEP, both ends included.",
            default="six of them, and all layers of --draft-weights; the latter alone if no exit was trained",
            parse=parse_counts,
        ),
        "specs": Flag(DECODING, "Draft lengths, in the same form.", parse=parse_counts),
        "keep": Flag(MEASUREMENT, "Share of full depth's quality that an early exit must keep to be the policy `fast`."),
        "exit_confidences": Flag(
            DECODING,
            "Also early exits by confidence (--exit-confidence of generate), for each of 0.8,0.9.",
            default="0.8,0.9,0.95 if the exits were trained; none with --quick or --batch-size",
            parse=parse_shares,
        ),
        "quick": Flag(MEASUREMENT, "Measure only the settings that are predicted to be fastest."),
        "search_skips": Flag(
            MEASUREMENT,
            "Also measure --strategy draft-and-verify, with layers to skip that are searched on validation rows.",
        ),
        "batch_size": _BATCH_SIZE,
        "timed": _TIMED,
    },
    VerifyConfig: {
        "data": Flag(DATA, "Real prompts: commands, a file, a TOPv2 folder or a hub id."),
        "samples": Flag(DATA, "Number of prompts; half of them are random token ids."),
        "max_new_tokens": Flag(DECODING, "Maximum number of tokens in an output."),
        "seed": Flag(DATA, "Seed of random prompts and of sampling."),
        "precisions": Flag(WEIGHTS, "Precisions of the weights.", parse=parse_names),
        "kernels": Flag(
            MACHINE,
            "amx, avx512, avx512_vnni, avx_vnni, avx2 or those for ARM (ours), torch (PyTorch's, on repacked weights), exact "
            "(the same with --exact), generic (transformers' layers), transformers (its generate, for comparison), or some.",
            default="all that this machine and this model can run",
            parse=parse_names,
        ),
        "exits": Flag(
            DECODING, "Exits that draft: 3,6,8 or A:B:STEP.", default="the checkpoint's, half and twice it", parse=parse_counts
        ),
        "specs": Flag(DECODING, "Draft lengths, in the same form.", parse=parse_counts),
        "draws": Flag(MEASUREMENT, "Sampled outputs whose first tokens are compared with the model's distribution; 0: none."),
    },
    ServeConfig: {
        "model": _MODEL,
        "host": Flag(SERVER, "Address to listen on; 0.0.0.0 is all of this machine's."),
        "port": Flag(SERVER, "Port to listen on; 0: a free one."),
        "batch_size": Flag(SERVER, "Answers that are decoded together."),
        "queue_size": Flag(SERVER, "Answers that may wait besides; a request beyond gets status 429.", "--queue"),
        "token_limit": Flag(SERVER, "Most tokens that a request may ask for."),
        "body_limit": Flag(SERVER, "Most bytes of a request's body."),
    },
    CalibrationConfig: {
        "model": _MODEL,
        "output": Flag(OUTPUT, "Folder for a copy of the model.", default="--model's folder, or calibrated-model"),
        "data": Flag(DATA, "Rows to calibrate on: commands, topv2, a file or a hub id.", default="what the model writes"),
        "samples": Flag(DATA, "Number of texts; fewer if --data has fewer tokens."),
        "length": Flag(DATA, "Tokens of a text."),
        "tuning_steps": Flag(OPTIMISATION, "Steps of tuning the scales; 0: none.", "--steps"),
        "seed": Flag(RUN, "Seed of the texts and of their order."),
        "overwrite": Flag(RUN, "Replace a model in --output."),
    },
    Report: {
        "format": Flag(OUTPUT, _FORMAT_HELP),
        "output": Flag(OUTPUT, "Folder for report.html, answers.html, results.json, results.csv and plots."),
        "saved": Flag(OUTPUT, "Measure nothing: render this results.json again.", "--from"),
    },
    DataConfig: {
        "name": Flag(DATA, "commands, topv2, a .jsonl/.json/.csv/.parquet/.txt file, a TOPv2 folder or a hub id.", "--data"),
        "split": Flag(DATA, "Split of the data; for `commands` train, validation, test or compositional."),
        "limit": Flag(DATA, "Number of rows; 0: all (of `commands` 20000; in training as many as needed).", "--samples"),
        "seed": Flag(DATA, "Seed of generated rows."),
        "prompt_column": Flag(DATA, "Column of the prompt."),
        "completion_column": Flag(DATA, "Column of what follows the prompt."),
    },
    RecipeSettings: {
        "p_max": Flag(RECIPE, "Dropout rate of the last layer.", "--pmax", _REGIME),
        "dropout_profile": Flag(
            RECIPE,
            "Dropout over depth: exponential, up to --pmax at the last layer, or constant, the same mean at every layer.",
            default="exponential",
        ),
        "e_scale": Flag(RECIPE, "Scale of the early exits' loss.", "--escale", _REGIME),
        "exit_weights": Flag(RECIPE, "Weights of the exits' losses: paper, linear, sqrt or uniform.", default="paper"),
        "curriculum": Flag(RECIPE, "rotational, gradual, all or none.", default=_REGIME),
        "rotation": Flag(RECIPE, "R of the rotational curriculum: each exit is trained every R steps.", default=_REGIME),
        "exits": Flag(
            RECIPE,
            "Exits to train: 3,6,8 or A:B:STEP.",
            default="every layer; with --frozen a third of the layers",
            parse=parse_counts,
        ),
        "distill": Flag(RECIPE, "Share of KL divergence from the last layer in the exits' loss, 0 to 1.", default="0"),
    },
    RetentionSettings: {
        "anchor": Flag(
            RETENTION, "Weight of the KL divergence from the original model at full depth, on the same tokens; 0: none."
        ),
        "anchor_weights": Flag(RETENTION, "Weights of the copy of the original: bf16, or int8 on a CPU.", default="bf16"),
        "replay": Flag(RETENTION, "Share of the rows that are the original's own text, sampled before the training."),
        "replay_tokens": Flag(RETENTION, "Tokens of such a text, after its beginning.", default="the mean row's"),
    },
    ExitBlockSettings: {
        "frozen": Flag(EXIT_BLOCKS, "Leave the model as it is, and train a block at each of --exits that drafts for it."),
        "feature": Flag(
            EXIT_BLOCKS,
            "What a block reads besides the exit's state: none, or final, the model's output state for the token before.",
            default="none",
        ),
        "answers": Flag(EXIT_BLOCKS, "Who writes the answers to the prompts of --data: model or data.", default="model"),
        "answer_tokens": Flag(EXIT_BLOCKS, "Maximum number of tokens in an answer of the model.", default="128"),
        "answer_temperature": Flag(EXIT_BLOCKS, "Temperature of these answers; 0 is greedy.", default="0"),
        "loss": Flag(EXIT_BLOCKS, "kl (divergence) or tv (total variation) from the last layer.", default="kl"),
    },
    FinetuneConfig: {
        "model": Flag(MODEL, "embedded-base, a folder, a .gguf file or a hub id."),
        "output": Flag(RUN, "Folder of the new checkpoint."),
        "regime": Flag(RECIPE, "Preset: finetune, continual, scratch or code."),
        "lr": Flag(OPTIMISATION, "Initial learning rate.", default="by --regime or --frozen, and model size"),
        "steps": Flag(
            OPTIMISATION, "Optimizer steps, with --frozen of each exit; overrides --epochs.", default="300 on `commands`"
        ),
        "epochs": Flag(OPTIMISATION, "Passes over the data.", default="1; 2 with --frozen"),
        "batch_size": Flag(OPTIMISATION, "Rows per forward pass."),
        "accumulation": Flag(OPTIMISATION, "Forward passes per optimizer step."),
        "max_length": Flag(DATA, "Tokens per row, prompt included.", default=_REGIME),
        "warmup": Flag(OPTIMISATION, "Share of the steps over which the learning rate rises."),
        "weight_decay": Flag(OPTIMISATION, "AdamW's weight decay."),
        "seed": Flag(RUN, "Seed of data, order, dropout and fresh weights."),
        "dtype": _DTYPE,
        "device": _DEVICE,
        "lora_rank": Flag(ADAPTERS, "Rank of LoRA adapters; 0 trains all weights."),
        "lora_targets": Flag(ADAPTERS, "Modules with adapters: all-linear, or names with commas."),
        "lora_layers": Flag(ADAPTERS, "Layers with adapters: all, or below-exit, those that the highest of --exits runs."),
        "lora_keep": Flag(ADAPTERS, "Save the adapter alone, not merged; it loads as a model."),
        "gradient_checkpointing": Flag(OPTIMISATION, "Recompute layers in the backward pass: less memory, more time."),
        "fsdp": Flag(MACHINE, "Shard weights, gradients and optimizer over the processes of torchrun (FSDP2)."),
        "save_steps": Flag(RUN, "Steps between checkpoints; 0: none."),
        "resume": Flag(RUN, "Continue from the last checkpoint in --output."),
        "report_to": Flag(RUN, "Also log losses to tensorboard, wandb, ...; several with commas."),
        "streaming": Flag(DATA, "Read a file or hub data set while training; needs --steps."),
        "pack": Flag(DATA, "Pack plain text into full rows.", default="yes, except with --regime finetune"),
        "validation": Flag(DATA, "A split of --data, or other data, to measure every exit on."),
        "validation_samples": Flag(DATA, "Rows of it to use; 0: all.", default="256"),
        "eval_steps": Flag(DATA, "Steps between validations; 0: ten validations per run."),
        "overwrite": Flag(RUN, "Replace a model in --output."),
        "vocab_size": Flag(DATA, "With --regime scratch: train a BPE tokenizer of this size on the data."),
    },
}


# Fields of the configs in a config that have no flag there, because the config has its own instead.
HIDDEN: dict[type, tuple[str, ...]] = {
    BenchConfig: ("strategy", "policy", "exits"),
    SweepConfig: ("strategy", "exit_layer", "num_draft_tokens", "exit_confidence", "policy", "exits"),
    ServeConfig: ("seed",),
    VerifyConfig: ("dtype",),
}


def flags_of(field: str, option: Flag) -> tuple[str, ...]:
    """The flags of a field, --max-new-tokens for `max_new_tokens` unless its Option names others. Errors show the first."""
    return tuple((option.flag or "--" + field.replace("_", "-")).split("/"))


def flags_in(kind: Any) -> dict[str, Flag]:
    """The flags of a kind's fields."""
    if kind in OPTIONS:
        return OPTIONS[kind]
    named = {field: flag_of(hint) for field, hint in hints_of(kind).items()} if is_typeddict(kind) else {}
    return {field: flag for field, flag in named.items() if flag is not None}


_NAMED = {field: flags_of(field, option)[0] for kind in (*OPTIONS, DecodingOptions) for field, option in flags_in(kind).items()}
_OF_COMMANDS = ("layers", "save", "engine", "only")
ALONE = {
    flag
    for options in OPTIONS.values()
    for field, option in options.items()
    if option.optional
    for flag in flags_of(field, option)
}  # flags that need no value
FLAGS = _NAMED | {name: "--" + name.replace("_", "-") for name in _OF_COMMANDS}


def with_flags(message: str) -> str:
    """A message of the core, with flags in place of the settings that it names in backquotes."""
    return re.sub(r"`(\w+)`", lambda match: FLAGS.get(match[1], match[0]), message)
