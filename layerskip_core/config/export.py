"""What is exported of a model, and for which engine."""

from dataclasses import dataclass
from typing import Literal, get_args

from .checks import require, require_choice
from .machine import DTYPES
from .options import Text
from .packing import QUANTIZATIONS, Quantization

Engine = Literal["vllm", "llama.cpp", "transformers"]
Format = Literal["transformers", "gguf", "packed"]
ENGINES: tuple[str, ...] = get_args(Engine)
FORMATS: tuple[str, ...] = get_args(Format)
GGUF_DTYPES = ("auto", "f16", "q8_0", "q4_0")


@dataclass(frozen=True)
class ExportConfig:
    """The first `exit_layer` layers of a model, with its exit block if there is one; None: the recommended exit.

    With an `engine` the export describes how it decodes the model with this draft. `format` None: that of the engine, else
    transformers. `dtype`, of the weights written, has other names in GGUF; auto is as stored, and f16 there. The format
    `packed` has the whole model, as `generate` packs it, with low bits if `quantize` says so; auto is then what `generate`
    chooses here.
    """

    model: Text = "embedded"
    exit_layer: int | None = None
    output: Text = "draft-model"
    format: Format | None = None
    engine: Engine | None = None
    dtype: str = "auto"
    overwrite: bool = False
    quantize: Quantization | None = None

    def __post_init__(self) -> None:
        if self.format is not None:
            require_choice(self.format, "format", FORMATS)
        if self.engine is not None:
            require_choice(self.engine, "engine", ENGINES)
            needed = "gguf" if self.is_gguf_engine else "transformers"
            require(self.format in (None, needed), "format", f"{needed} for `engine` {self.engine}", self.format)
        if self.quantize is not None:
            require_choice(self.quantize, "quantize", QUANTIZATIONS)
            require(self.is_packed, "quantize", "used with `format` packed", self.quantize)
        if self.is_packed:
            require(
                self.exit_layer is None, "exit_layer", "left out with `format` packed, which has all layers", self.exit_layer
            )
        require_choice(self.dtype, "dtype", GGUF_DTYPES if self.as_gguf else DTYPES)

    @property
    def is_gguf_engine(self) -> bool:
        return self.engine == "llama.cpp"

    @property
    def is_packed(self) -> bool:
        return self.format == "packed"

    @property
    def as_gguf(self) -> bool:
        return self.format == "gguf" or self.is_gguf_engine
