"""The machine, prompting, calibration and export of a model."""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from msgspec import Meta

from .checks import require, require_choice
from .options import Count, Flag, ModelName, Seed, Text, Threads
from .packing import Quantization

DType = Literal["auto", "fp32", "bf16"]
Engine = Literal["vllm", "llama.cpp", "transformers"]
Format = Literal["transformers", "gguf", "packed"]
DTYPES: tuple[str, ...] = get_args(DType)
GGUF_DTYPES = ("auto", "f16", "q8_0", "q4_0")
_Unicode = Annotated[str, Meta(pattern="^[^\ud800-\udfff]*$", description="valid Unicode")]


@dataclass(frozen=True)
class MachineConfig:
    """Device, precision of the weights, and CPU threads (0: torch's choice, or 1 for decoding with a small model)."""

    device: Annotated[str, Flag("Machine", "auto, cpu, cuda, cuda:N or mps.")] = "auto"
    dtype: Annotated[DType, Flag("Machine", "auto, fp32 or bf16.")] = "auto"
    threads: Annotated[Threads, Flag("Machine", "CPU threads; 0: torch's choice, or 1 to decode with a small model.")] = 0


@dataclass(frozen=True)
class PromptingConfig:
    """What was asked; None: the checkpoint's own template, else the tokenizer's chat template if it has one.

    `template` is `chat`, `raw` or a text with {prompt} in it. `system` is a system message, for chat templates only. `raw` is
    short for `template` raw: nothing is added, and special tokens in the prompt count.
    """

    template: Annotated[
        _Unicode | None,
        Flag(
            "Prompting",
            "Prompt template: chat, raw, or a text with {prompt} in it.",
            "--template/--prompt-template",
            default="the task's or checkpoint's, else the tokenizer's chat template",
        ),
    ] = None
    system: Annotated[_Unicode | None, Flag("Prompting", "System message, for chat templates.")] = None
    raw: Annotated[bool, Flag("Prompting", "Use no template; text of special tokens in the prompt becomes tokens.")] = False

    def __post_init__(self) -> None:
        text = self.template
        known = text is None or text in ("raw", "chat") or "{prompt}" in text
        require(known, "template", "raw, chat or a text with {prompt} in it", text)
        require(not self.raw or text in (None, "raw"), "raw", "given without `template`", f"`template` {text}")
        require(self.system is None or self.asked != "raw", "system", "given with a chat template", "a raw prompt")

    @property
    def asked(self) -> str | None:
        """The template: `chat`, `raw`, a text with {prompt} in it, or None where nothing was said."""
        return "raw" if self.raw else self.template


@dataclass(frozen=True)
class CalibrationConfig:
    """`samples` texts of `length` tokens, from `data` or else written by the model, and `tuning_steps` (0: none) on them.

    `output`: a folder for a copy of the model; None for the model's own folder, or for a copy where it is no folder.
    """

    model: ModelName = "embedded"
    output: Annotated[
        Text | None, Flag("Output", "Folder for a copy of the model.", default="--model's folder, or calibrated-model")
    ] = None
    data: Annotated[
        Text | None, Flag("Data", "Rows to calibrate on: commands, topv2, a file or a hub id.", default="what the model writes")
    ] = None
    samples: Annotated[Count, Flag("Data", "Number of texts; fewer if --data has fewer tokens.")] = 256
    length: Annotated[int, Meta(ge=2, le=10_000_000), Flag("Data", "Tokens of a text.")] = 256
    tuning_steps: Annotated[
        int, Meta(ge=0, le=1_000_000_000), Flag("Optimisation", "Steps of tuning the scales; 0: none.", "--steps")
    ] = 32
    seed: Annotated[Seed, Flag("Run", "Seed of the texts and of their order.")] = 0
    overwrite: Annotated[bool, Flag("Run", "Replace a model in --output.")] = False


@dataclass(frozen=True)
class ExportConfig:
    """The first `exit_layer` layers of a model, with its exit block if there is one; None: the recommended exit.

    With an `engine` the export describes how it decodes the model with this draft. `format` None: that of the engine, else
    transformers. `dtype`, of the weights written, has other names in GGUF; auto is as stored, and f16 there. The format
    `packed` has the whole model, as `generate` packs it, with low bits if `quantize` says so; auto is then what `generate`
    chooses here.
    """

    model: Text = "embedded"
    exit_layer: Annotated[
        int | None, Flag("Output", "Layers of the draft; the last: the whole model.", "--exit", "the checkpoint's")
    ] = None
    output: Annotated[Text, Flag("Output", "Folder for the draft model.")] = "draft-model"
    format: Annotated[
        Format | None,
        Flag("Output", f"{', '.join(get_args(Format))}.", default="gguf with --engine llama.cpp, else transformers"),
    ] = None
    engine: Annotated[
        Engine | None, Flag("Output", f"Also print how it drafts in this engine: {', '.join(get_args(Engine))}.")
    ] = None
    dtype: Annotated[
        str,
        Flag(
            "Output",
            "Of the weights written: fp32, bf16, or auto: as stored, packed as generate chooses; in GGUF f16, q8_0, q4_0, or "
            "auto: f16.",
        ),
    ] = "auto"
    quantize: Annotated[Quantization | None, Flag("Output", "int8 or int4 weights, with --format packed.", default="none")] = (
        None
    )
    overwrite: Annotated[bool, Flag("Output", "Replace a model that --output holds.")] = False

    def __post_init__(self) -> None:
        if self.engine is not None:
            needed = "gguf" if self.engine == "llama.cpp" else "transformers"
            require(self.format in (None, needed), "format", f"{needed} for `engine` {self.engine}", self.format)
        packed = self.format == "packed"
        require(packed or self.quantize is None, "quantize", "used with `format` packed", self.quantize)
        whole = "left out with `format` packed, which has all layers"
        require(not packed or self.exit_layer is None, "exit_layer", whole, self.exit_layer)
        require_choice(self.dtype, "dtype", GGUF_DTYPES if self.as_gguf else DTYPES)

    @property
    def as_gguf(self) -> bool:
        return self.format == "gguf" or self.engine == "llama.cpp"
