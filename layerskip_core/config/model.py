"""Settings of the machine, the weights, prompting, data, calibration and export."""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from msgspec import Meta

from ..errors import require, require_choice
from .options import Count, CountOrNone, Flag, ModelName, Seed, Text, Threads

DType = Literal["auto", "fp32", "bf16"]
Engine = Literal["vllm", "llama.cpp", "transformers"]
ExportFormat = Literal["transformers", "gguf", "packed"]
Quantization = Literal["int8", "int4"]
DTYPES: tuple[str, ...] = get_args(DType)
DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16"}  # ours, by torch's and the hub's
GGUF_DTYPES = ("auto", "f16", "q8_0", "q4_0")
# The usual names; the first one present counts
PROMPT_COLUMNS = ("prompt", "instruction", "question", "input")
COMPLETION_COLUMNS = ("completion", "response", "answer", "output", "text")
# Most tokens of an exact call; longer calls are prefills, the same for every strategy
EXACT_TOKENS = 64
_Unicode = Annotated[str, Meta(pattern="^[^\ud800-\udfff]*$", description="valid Unicode")]


@dataclass(frozen=True)
class MachineConfig:
    """Device, precision of the weights, CPU threads (0: torch's choice, or 1 for decoding with a
    small model), and cache.
    """

    device: Annotated[str, Flag("auto, cpu, cuda, cuda:N or mps.", panel="Machine")] = "auto"
    dtype: Annotated[DType, Flag("Precision of the weights.")] = "auto"
    threads: Annotated[
        Threads, Flag("CPU threads; 0: torch's choice, or 1 to decode with a small model.")
    ] = 0
    no_cache: Annotated[
        bool, Flag("Neither read packed weights from the user's cache nor write them there.")
    ] = False


DraftModel = Annotated[
    Text | None,
    Flag("Also draft with this smaller model of the same tokenizer.", None, "none", reads="model"),
]


@dataclass(frozen=True)
class PackingConfig:
    """How the weights of a model that only decodes are stored, and what drafts for it.

    `quantize`: linear layers and head; the embedding keeps its precision. `draft_weights`: low-bit
    copies that draft, with a head in `draft_head` (int4 costs much acceptance). `draft_vocab`: in
    the order of token_order.json, else of the ids.
    """

    quantize: Annotated[
        Quantization | None, Flag("Low-bit weights (CPU only).", default="none", panel="Weights")
    ] = None
    draft_weights: Annotated[
        tuple[Quantization, ...], Flag("Draft with low-bit copies of the weights; the same output.")
    ] = ()
    draft_layers: int = 0  # the copies' first layers; 0: all
    draft_head: Annotated[
        Quantization | None, Flag("Precision of the head of these copies.", default="int8")
    ] = None
    draft_vocab: Annotated[
        CountOrNone,
        Flag("Draft the N most frequent tokens only.", None, "all; 4096 at trained exits"),
    ] = 0
    draft_model: DraftModel = None
    exact: Annotated[bool, Flag("Bit-for-bit the output of autoregressive decoding; slower.")] = (
        False
    )
    adaptive: bool = False  # adds a low-bit copy if compiled kernels run and nothing else drafts

    def __post_init__(self) -> None:
        used = self.draft_head is None or bool(self.draft_weights)
        require(used, "draft_head", "used with `draft_weights`", self.draft_head)

    @property
    def drafts_apart(self) -> bool:
        """Whether drafts use a head, layers or a model of their own."""
        return bool(self.draft_weights or self.draft_vocab or self.draft_model)

    @property
    def drafter(self) -> tuple[Quantization | None, Quantization | None]:
        """The precision of layer and head of a drafter (EAGLE-3, MTP), by default int8, which keeps
        the acceptance rate.
        """
        return next(iter(self.draft_weights), self.quantize or "int8"), self.draft_head or "int8"

    @property
    def drafting(self) -> str:
        """The low-bit copies in reports: `, int8 drafts`."""
        return f", {' and '.join(self.draft_weights)} drafts" if self.draft_weights else ""


PLAIN = PackingConfig()


@dataclass(frozen=True)
class PromptingConfig:
    """The requested prompt template; None: the checkpoint's, else the tokenizer's chat template, if
    any.
    """

    template: Annotated[
        _Unicode | None,
        Flag(
            "chat, raw, or a text with {prompt} in it.",
            "--template/--prompt-template",
            "the task's or model's",
            "Prompting",
        ),
    ] = None
    system: Annotated[_Unicode | None, Flag("System message, for chat templates.")] = None
    raw: Annotated[
        bool, Flag("Use no template; text of special tokens in the prompt becomes tokens.")
    ] = False

    def __post_init__(self) -> None:
        text = self.template
        known = text is None or text in ("raw", "chat") or "{prompt}" in text
        require(known, "template", "raw, chat or a text with {prompt} in it", text)
        require(
            not self.raw or text in (None, "raw"),
            "raw",
            "given without `template`",
            f"`template` {text}",
        )
        require(
            self.system is None or self.asked != "raw",
            "system",
            "given with a chat template",
            "a raw prompt",
        )

    @property
    def asked(self) -> str | None:
        """`chat`, `raw`, a text with {prompt} in it, or None."""
        return "raw" if self.raw else self.template


@dataclass(frozen=True)
class DataConfig:
    """A data set, its columns, and the number of rows (0: all). `setting`: the field that names it,
    for errors.
    """

    name: Annotated[
        Text,
        Flag(
            "commands, topv2, a file, a TOPv2 folder or a hub id.",
            "--data",
            panel="Data",
            reads="data",
        ),
    ] = "commands"
    split: Annotated[
        str, Flag("train, validation, test; of `commands` compositional, sealed (do not read).")
    ] = "train"
    prompt_column: Annotated[
        str, Flag(f"Column of the prompt, else {', '.join(PROMPT_COLUMNS[1:])}.")
    ] = "prompt"
    completion_column: Annotated[
        str, Flag(f"Column of what follows the prompt, else {', '.join(COMPLETION_COLUMNS[1:])}.")
    ] = "completion"
    limit: Annotated[
        CountOrNone, Flag("Number of rows; 0: all, of `commands` as many as needed.", "--samples")
    ] = 0
    seed: Annotated[Seed, Flag("Seed of generated rows.")] = 0
    setting: str = "data"

    @property
    def is_endless(self) -> bool:
        """Whether a generator makes as many rows as a run will see."""
        return self.name == "commands" and not self.limit


@dataclass(frozen=True)
class CalibrationConfig:
    """A calibration on texts that the model writes."""

    model: ModelName = "embedded"
    samples: Annotated[
        Count, Flag("Number of texts that the model writes, of 256 tokens each.")
    ] = 24
    seed: Annotated[Seed, Flag("Seed of the texts.", panel="Run")] = 0


@dataclass(frozen=True)
class ExportConfig:
    """An export of the first `exit_layer` layers and their exit block (None: the recommended exit);
    `packed`: of all layers.
    """

    model: Text = "embedded"
    exit_layer: Annotated[
        int | None, Flag("Layers of the draft model.", "--exit", "the checkpoint's", "Output")
    ] = None
    output: Annotated[Text, Flag("Folder for the draft model.")] = "draft-model"
    format: Annotated[
        ExportFormat | None, Flag("Of the files.", None, "gguf for llama.cpp, else transformers")
    ] = None
    engine: Annotated[Engine | None, Flag("Also print how it drafts in this engine.")] = None
    dtype: Annotated[
        str,
        Flag("Of the weights: fp32, bf16, or auto: as stored; in GGUF f16 (auto), q8_0 or q4_0."),
    ] = "auto"
    quantize: Annotated[
        Quantization | None, Flag("Low-bit weights, with --format packed.", default="none")
    ] = None
    overwrite: Annotated[bool, Flag("Replace a model that --output holds.")] = False

    def __post_init__(self) -> None:
        if self.engine is not None:
            needed = "gguf" if self.engine == "llama.cpp" else "transformers"
            require(
                self.format in (None, needed),
                "format",
                f"{needed} for `engine` {self.engine}",
                self.format,
            )
        packed = self.format == "packed"
        require(
            packed or self.quantize is None, "quantize", "used with `format` packed", self.quantize
        )
        whole = "left out with `format` packed, which has all layers"
        require(not packed or self.exit_layer is None, "exit_layer", whole, self.exit_layer)
        require_choice(self.dtype, "dtype", GGUF_DTYPES if self.as_gguf else DTYPES)

    @property
    def as_gguf(self) -> bool:
        return self.format == "gguf" or self.engine == "llama.cpp"
