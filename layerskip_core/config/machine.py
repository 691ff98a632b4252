"""What a command runs on."""

from dataclasses import dataclass
from typing import Literal, get_args

from .checks import require_choice
from .ranges import require_ranges

DType = Literal["auto", "fp32", "bf16"]
DTYPES: tuple[str, ...] = get_args(DType)


@dataclass(frozen=True)
class MachineConfig:
    """Device, precision of the weights, and CPU threads (0: torch's choice, or 1 for decoding with a small model)."""

    device: str = "auto"
    dtype: DType = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        require_choice(self.dtype, "dtype", DTYPES)
        require_ranges(threads=self.threads)
