"""Every flag, declared once: the option of each field of the configs, and commands made of configs.

A command takes configs, and `signature.command` makes a flag of each of their fields that has an Option here. A new field of
GenerationSettings with its Option is thereby a flag of generate, chat, bench and sweep-exits.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import typer

from layerskip_core.config.calibration import CalibrationConfig
from layerskip_core.config.checks import require, require_choice, require_given
from layerskip_core.config.data import DataConfig
from layerskip_core.config.decoding import DecodingSettings, GenerationSettings, SamplingConfig, strategies
from layerskip_core.config.evaluation import BASELINES, HARNESS, UNSANDBOXED, BenchConfig, SweepConfig, TaskConfig
from layerskip_core.config.machine import MachineConfig
from layerskip_core.config.packing import PackingConfig
from layerskip_core.config.prompting import PromptingConfig
from layerskip_core.config.ranges import parse_counts, parse_shares
from layerskip_core.config.serving import ServeConfig
from layerskip_core.config.training import ExitBlockSettings, FinetuneConfig, RecipeSettings, RetentionSettings
from layerskip_core.config.verification import VerifyConfig
from layerskip_core.evaluation.tasks import TASKS

MODEL = "Model"
DATA = "Data"
TASK = "Task"
DECODING = "Decoding"
SAMPLING = "Sampling"
PROMPTING = "Prompting"
WEIGHTS = "Weights"
MEASUREMENT = "Measurement"
RECIPE = "Recipe"
RETENTION = "Retention"
EXIT_BLOCKS = "Exit blocks"
OPTIMISATION = "Optimisation"
ADAPTERS = "Adapters"
RUN = "Run"
INPUT = "Input"
OUTPUT = "Output"
MACHINE = "Machine"
SERVER = "Server"
PANELS = (
    INPUT, MODEL, SERVER, RECIPE, RETENTION, EXIT_BLOCKS, OPTIMISATION, TASK, DATA, DECODING, SAMPLING, PROMPTING, ADAPTERS,
    RUN, MEASUREMENT, WEIGHTS, MACHINE, OUTPUT,
)  # in the order of --help  # fmt: skip


@dataclass(frozen=True)
class Option:
    """How a field is given on the command line, under which heading of --help.

    `flag`: where it is not the field's name; several with slashes between. `default`: shown if the field's own is None, decided
    later. `parse` makes the value from a text, given the field's name for errors.
    `optional`: a value that may follow the flag; without one `parse` gets an empty text.
    """

    panel: str
    help: str
    flag: str | None = None
    default: str | None = None
    parse: Callable[[str, str], object] | None = None
    optional: str | None = None


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
_MODEL = Option(MODEL, "embedded, embedded-base, a folder, a .gguf file or a hub id.")
_DEVICE = Option(MACHINE, "auto, cpu, cuda, cuda:N or mps.")
_DTYPE = Option(MACHINE, "auto, fp32 or bf16.")
_BATCH_SIZE = Option(MEASUREMENT, "Prompts answered together, for quality; speed is measured at batch size 1.")
_TIMED = Option(MEASUREMENT, "With --batch-size: the number of prompts that speed is measured on.", default="8")

OPTIONS: dict[type, dict[str, Option]] = {
    GenerationSettings: {
        "max_new_tokens": Option(DECODING, "Maximum number of tokens in an answer.", default="256"),
        "draft_confidence": Option(DECODING, "Stop drafting when the draft's best token is less probable than this; 0: never."),
        "stop": Option(DECODING, "End the answer before this text. Can be repeated."),
        "exit_confidence": Option(
            DECODING, "Early exit: each token leaves at the first exit that gives its best token more than this probability."
        ),
        "skip": Option(
            DECODING,
            "Draft with all layers but these, by number from 1, as inspect shows them: 8,9,14:18.",
            default="with --strategy draft-and-verify those that sweep-exits --search-skips --save stored",
            parse=parse_counts,
        ),
        "lookup": Option(DECODING, "First draft the text after an earlier occurrence of the last N tokens or more; 0: do not."),
    },
    SamplingConfig: {
        "temperature": Option(SAMPLING, "Temperature; 0 is greedy."),
        "top_k": Option(SAMPLING, "Sample from the k most probable tokens; 0: from all."),
        "top_p": Option(SAMPLING, "Sample from the most probable tokens that add up to this probability."),
        "seed": Option(SAMPLING, "Seed of sampling."),
    },
    DecodingSettings: {
        "strategy": Option(
            DECODING,
            f"{', '.join(strategies())}.",
            default="adaptive; self-speculative with a flag about an exit or about drafts",
        ),
        "exit_layer": Option(DECODING, "Draft with (or exit after) this many layers.", "--exit", _CHECKPOINT),
        "num_draft_tokens": Option(DECODING, "Most draft tokens per round.", "--spec", _CHECKPOINT),
        "policy": Option(
            DECODING,
            "Settings that `sweep-exits --save` stored with the model, instead of a strategy and its flags: exact (the output "
            "of plain decoding) or fast (nearly its quality).",
            default="exact if it is stored and nothing else is said",
        ),
        "exits": Option(
            DECODING,
            "Exits that --exit-confidence chooses among: 3,6,8 or A:B:STEP.",
            default="the trained ones, at most six",
            parse=parse_counts,
        ),
    },
    PromptingConfig: {
        "template": Option(
            PROMPTING,
            "Prompt template: chat, raw, or a text with {prompt} in it.",
            "--template/--prompt-template",
            default="the task's or checkpoint's, else the tokenizer's chat template",
        ),
        "system": Option(PROMPTING, "System message, for chat templates."),
        "raw": Option(PROMPTING, "Use no template; text of special tokens in the prompt becomes tokens."),
    },
    PackingConfig: {
        "quantize": Option(WEIGHTS, "int8 or int4 weights (CPU only).", default="none"),
        "draft_weights": Option(
            WEIGHTS,
            "Draft with low-bit copies of the weights: int8, int4 or int8,int4. The output stays the same.",
            parse=parse_names,
        ),
        "draft_head": Option(WEIGHTS, "Precision of the head of these copies: int8 or int4.", default="int8"),
        "draft_vocab": Option(WEIGHTS, "Draft among the N most frequent tokens only; 0: among all."),
        "exact": Option(WEIGHTS, "Bit-for-bit the output of autoregressive decoding, in any precision; slower."),
    },
    MachineConfig: {
        "device": _DEVICE,
        "dtype": _DTYPE,
        "threads": Option(MACHINE, "CPU threads; 0: torch's choice, or 1 to decode with a small model."),
    },
    TaskConfig: {
        "task": Option(
            TASK,
            f"{', '.join(TASKS)}, data with prompts and references, or {HARNESS}TASK,TASK of lm-evaluation-harness.",
            default="by --data, else commands",
        ),
        "include_path": Option(TASK, f"Folder with task files of your own, for {HARNESS}."),
        "data": Option(TASK, "A file, a TOPv2 folder or a hub id.", default="the task's own, from the hub"),
        "split": Option(TASK, "train, validation or test; compositional too for `commands`."),
        "samples": Option(TASK, "Number of rows; 0: all, 20000 for `commands`."),
        "seed": Option(TASK, "Seed of generated rows and of sampling."),
        "max_new_tokens": Option(DECODING, "Maximum number of tokens in an answer.", default="the task's"),
        "prompt_column": Option(TASK, "Column of the prompt.", default="the first of the usual names"),
        "completion_column": Option(TASK, "Column of the reference.", default="the first of the usual names"),
        "metric": Option(TASK, "For jsonl: exact_match, rouge1, rouge2 or rougeL.", default="by the references"),
        "shots": Option(TASK, "Solved rows before each prompt.", default="the task's"),
        "pass_k": Option(TASK, "The k of pass@k, such as 1,10.", parse=parse_counts),
        "problem_samples": Option(TASK, "Answers to each code problem, for pass@k; needs --temperature if above 1."),
        "allow_code_execution": Option(
            TASK,
            f"Run the programs that the model writes, in a sandbox; `{UNSANDBOXED}`: even where no layer of the sandbox works.",
            parse=lambda text, field: text or True,
            optional=UNSANDBOXED,
        ),
    },
    BenchConfig: {
        "model": _MODEL,
        "exit_layer": Option(DECODING, "Layers of the early exit and of the drafts.", "--exit", _CHECKPOINT),
        "num_draft_tokens": Option(DECODING, "Draft tokens per round.", "--spec", _CHECKPOINT),
        "strategies": Option(DECODING, "The strategies to run; autoregressive is required.", parse=parse_names),
        "batch_size": _BATCH_SIZE,
        "timed": _TIMED,
        "repeats": Option(MEASUREMENT, "Number of times that everything is measured; medians are reported."),
        "gguf": Option(MEASUREMENT, "The model as a GGUF file, for the baseline llama.cpp."),
        "baselines": Option(MEASUREMENT, f"Also: {','.join(BASELINES)}, or some.", parse=parse_names),
        "draft_model": Option(MEASUREMENT, "Model that the baseline draft-model drafts with."),
    },
    SweepConfig: {
        "model": _MODEL,
        "exits": Option(
            DECODING,
            "Exits: 3,6,8 or A:B:STEP, both ends included.",
            default="six of them, and all layers of --draft-weights; the latter alone if no exit was trained",
            parse=parse_counts,
        ),
        "specs": Option(DECODING, "Draft lengths, in the same form.", parse=parse_counts),
        "keep": Option(MEASUREMENT, "Share of full depth's quality that an early exit must keep to be the policy `fast`."),
        "exit_confidences": Option(
            DECODING,
            "Also early exits by confidence (--exit-confidence of generate), for each of 0.8,0.9.",
            default="0.8,0.9,0.95 if the exits were trained; none with --quick or --batch-size",
            parse=parse_shares,
        ),
        "quick": Option(MEASUREMENT, "Measure only the settings that are predicted to be fastest."),
        "search_skips": Option(
            MEASUREMENT,
            "Also measure --strategy draft-and-verify, with layers to skip that are searched on validation rows.",
        ),
        "batch_size": _BATCH_SIZE,
        "timed": _TIMED,
    },
    VerifyConfig: {
        "data": Option(DATA, "Real prompts: commands, a file, a TOPv2 folder or a hub id."),
        "samples": Option(DATA, "Number of prompts; half of them are random token ids."),
        "max_new_tokens": Option(DECODING, "Maximum number of tokens in an output."),
        "seed": Option(DATA, "Seed of random prompts and of sampling."),
        "precisions": Option(WEIGHTS, "Precisions of the weights.", parse=parse_names),
        "kernels": Option(
            MACHINE,
            "amx, avx512, avx512_vnni, avx_vnni, avx2 or those for ARM (ours), torch (PyTorch's, on repacked weights), exact "
            "(the same with --exact), generic (transformers' layers), transformers (its generate, for comparison), or some.",
            default="all that this machine and this model can run",
            parse=parse_names,
        ),
        "exits": Option(
            DECODING, "Exits that draft: 3,6,8 or A:B:STEP.", default="the checkpoint's, half and twice it", parse=parse_counts
        ),
        "specs": Option(DECODING, "Draft lengths, in the same form.", parse=parse_counts),
        "draws": Option(MEASUREMENT, "Sampled outputs whose first tokens are compared with the model's distribution; 0: none."),
    },
    ServeConfig: {
        "model": _MODEL,
        "host": Option(SERVER, "Address to listen on; 0.0.0.0 is all of this machine's."),
        "port": Option(SERVER, "Port to listen on; 0: a free one."),
        "batch_size": Option(SERVER, "Answers that are decoded together."),
        "queue_size": Option(SERVER, "Answers that may wait besides; a request beyond gets status 429.", "--queue"),
        "token_limit": Option(SERVER, "Most tokens that a request may ask for."),
        "body_limit": Option(SERVER, "Most bytes of a request's body."),
    },
    CalibrationConfig: {
        "model": _MODEL,
        "output": Option(OUTPUT, "Folder for a copy of the model.", default="--model's folder, or calibrated-model"),
        "data": Option(DATA, "Rows to calibrate on: commands, topv2, a file or a hub id.", default="what the model writes"),
        "samples": Option(DATA, "Number of texts; fewer if --data has fewer tokens."),
        "length": Option(DATA, "Tokens of a text."),
        "tuning_steps": Option(OPTIMISATION, "Steps of tuning the scales; 0: none.", "--steps"),
        "seed": Option(RUN, "Seed of the texts and of their order."),
        "overwrite": Option(RUN, "Replace a model in --output."),
    },
    Report: {
        "format": Option(OUTPUT, _FORMAT_HELP),
        "output": Option(OUTPUT, "Folder for report.html, answers.html, results.json, results.csv and plots."),
        "saved": Option(OUTPUT, "Measure nothing: render this results.json again.", "--from"),
    },
    DataConfig: {
        "name": Option(DATA, "commands, topv2, a .jsonl/.json/.csv/.parquet/.txt file, a TOPv2 folder or a hub id.", "--data"),
        "split": Option(DATA, "Split of the data; for `commands` train, validation, test or compositional."),
        "limit": Option(DATA, "Number of rows; 0: all (of `commands` 20000; in training as many as needed).", "--samples"),
        "seed": Option(DATA, "Seed of generated rows."),
        "prompt_column": Option(DATA, "Column of the prompt."),
        "completion_column": Option(DATA, "Column of what follows the prompt."),
    },
    RecipeSettings: {
        "p_max": Option(RECIPE, "Dropout rate of the last layer.", "--pmax", _REGIME),
        "dropout_profile": Option(
            RECIPE,
            "Dropout over depth: exponential, up to --pmax at the last layer, or constant, the same mean at every layer.",
            default="exponential",
        ),
        "e_scale": Option(RECIPE, "Scale of the early exits' loss.", "--escale", _REGIME),
        "exit_weights": Option(RECIPE, "Weights of the exits' losses: paper, linear, sqrt or uniform.", default="paper"),
        "curriculum": Option(RECIPE, "rotational, gradual, all or none.", default=_REGIME),
        "rotation": Option(RECIPE, "R of the rotational curriculum: each exit is trained every R steps.", default=_REGIME),
        "exits": Option(
            RECIPE,
            "Exits to train: 3,6,8 or A:B:STEP.",
            default="every layer; with --frozen a third of the layers",
            parse=parse_counts,
        ),
        "distill": Option(RECIPE, "Share of KL divergence from the last layer in the exits' loss, 0 to 1.", default="0"),
    },
    RetentionSettings: {
        "anchor": Option(
            RETENTION, "Weight of the KL divergence from the original model at full depth, on the same tokens; 0: none."
        ),
        "anchor_weights": Option(RETENTION, "Weights of the copy of the original: bf16, or int8 on a CPU.", default="bf16"),
        "replay": Option(RETENTION, "Share of the rows that are the original's own text, sampled before the training."),
        "replay_tokens": Option(RETENTION, "Tokens of such a text, after its beginning.", default="the mean row's"),
    },
    ExitBlockSettings: {
        "frozen": Option(EXIT_BLOCKS, "Leave the model as it is, and train a block at each of --exits that drafts for it."),
        "feature": Option(
            EXIT_BLOCKS,
            "What a block reads besides the exit's state: none, or final, the model's output state for the token before.",
            default="none",
        ),
        "answers": Option(EXIT_BLOCKS, "Who writes the answers to the prompts of --data: model or data.", default="model"),
        "answer_tokens": Option(EXIT_BLOCKS, "Maximum number of tokens in an answer of the model.", default="128"),
        "answer_temperature": Option(EXIT_BLOCKS, "Temperature of these answers; 0 is greedy.", default="0"),
        "loss": Option(EXIT_BLOCKS, "kl (divergence) or tv (total variation) from the last layer.", default="kl"),
    },
    FinetuneConfig: {
        "model": Option(MODEL, "embedded-base, a folder, a .gguf file or a hub id."),
        "output": Option(RUN, "Folder of the new checkpoint."),
        "regime": Option(RECIPE, "Preset: finetune, continual, scratch or code."),
        "lr": Option(OPTIMISATION, "Initial learning rate.", default="by --regime or --frozen, and model size"),
        "steps": Option(
            OPTIMISATION, "Optimizer steps, with --frozen of each exit; overrides --epochs.", default="300 on `commands`"
        ),
        "epochs": Option(OPTIMISATION, "Passes over the data.", default="1; 2 with --frozen"),
        "batch_size": Option(OPTIMISATION, "Rows per forward pass."),
        "accumulation": Option(OPTIMISATION, "Forward passes per optimizer step."),
        "max_length": Option(DATA, "Tokens per row, prompt included.", default=_REGIME),
        "warmup": Option(OPTIMISATION, "Share of the steps over which the learning rate rises."),
        "weight_decay": Option(OPTIMISATION, "AdamW's weight decay."),
        "seed": Option(RUN, "Seed of data, order, dropout and fresh weights."),
        "dtype": _DTYPE,
        "device": _DEVICE,
        "lora_rank": Option(ADAPTERS, "Rank of LoRA adapters; 0 trains all weights."),
        "lora_targets": Option(ADAPTERS, "Modules with adapters: all-linear, or names with commas."),
        "lora_layers": Option(ADAPTERS, "Layers with adapters: all, or below-exit, those that the highest of --exits runs."),
        "lora_keep": Option(ADAPTERS, "Save the adapter alone, not merged; it loads as a model."),
        "gradient_checkpointing": Option(OPTIMISATION, "Recompute layers in the backward pass: less memory, more time."),
        "fsdp": Option(MACHINE, "Shard weights, gradients and optimizer over the processes of torchrun (FSDP2)."),
        "save_steps": Option(RUN, "Steps between checkpoints; 0: none."),
        "resume": Option(RUN, "Continue from the last checkpoint in --output."),
        "report_to": Option(RUN, "Also log losses to tensorboard, wandb, ...; several with commas."),
        "streaming": Option(DATA, "Read a file or hub data set while training; needs --steps."),
        "pack": Option(DATA, "Pack plain text into full rows.", default="yes, except with --regime finetune"),
        "validation": Option(DATA, "A split of --data, or other data, to measure every exit on."),
        "validation_samples": Option(DATA, "Rows of it to use; 0: all.", default="256"),
        "eval_steps": Option(DATA, "Steps between validations; 0: ten validations per run."),
        "overwrite": Option(RUN, "Replace a model in --output."),
        "vocab_size": Option(DATA, "With --regime scratch: train a BPE tokenizer of this size on the data."),
    },
}


# Fields of the configs in a config that have no flag there, because the config has its own instead.
HIDDEN: dict[type, tuple[str, ...]] = {SweepConfig: ("exit_confidence",), ServeConfig: ("seed",), VerifyConfig: ("dtype",)}


def flags_of(field: str, option: Option) -> tuple[str, ...]:
    """The flags of a field, --max-new-tokens for `max_new_tokens` unless its Option names others. Errors show the first."""
    return tuple((option.flag or "--" + field.replace("_", "-")).split("/"))


_NAMED = {field: flags_of(field, option)[0] for options in OPTIONS.values() for field, option in options.items()}
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
