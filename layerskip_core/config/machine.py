"""What a command runs on."""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from .options import MACHINE, Flag, Threads

DType = Literal["auto", "fp32", "bf16"]
DTYPES: tuple[str, ...] = get_args(DType)


@dataclass(frozen=True)
class MachineConfig:
    """Device, precision of the weights, and CPU threads (0: torch's choice, or 1 for decoding with a small model)."""

    device: Annotated[str, Flag(MACHINE, "auto, cpu, cuda, cuda:N or mps.")] = "auto"
    dtype: Annotated[DType, Flag(MACHINE, "auto, fp32 or bf16.")] = "auto"
    threads: Annotated[
        Threads,
        Flag(MACHINE, "CPU threads; 0: torch's choice, or 1 to decode with a small model."),
    ] = 0
