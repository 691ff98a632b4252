"""What is exported of a model, and for which engine."""

from dataclasses import dataclass
from typing import Literal, get_args

from .checks import require_choice, require_given
from .machine import DTYPES, DType

Engine = Literal["vllm", "sglang", "tensorrt-llm", "transformers"]
ENGINES: tuple[str, ...] = get_args(Engine)


@dataclass(frozen=True)
class ExportConfig:
    """The first `exit_layer` layers of a model, with its exit block if there is one; None: the recommended exit.

    With an `engine` the export describes how it decodes the model with this draft.
    """

    model: str = "embedded"
    exit_layer: int | None = None
    output: str = "draft-model"
    engine: Engine | None = None
    dtype: DType = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        require_given("the MODEL", self.model)
        require_given("output", self.output)
        require_choice(self.dtype, "dtype", DTYPES)
        if self.engine is not None:
            require_choice(self.engine, "engine", ENGINES)
