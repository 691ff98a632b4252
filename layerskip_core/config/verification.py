"""What a verification compares, and on which kernels and precisions."""

from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta

from .checks import require, require_choice
from .machine import MachineConfig
from .options import DATA, DECODING, MACHINE, MEASUREMENT, WEIGHTS, Flag, Seed, Text, parse_counts, parse_names

PRECISIONS = ("fp32", "bf16", "int8", "int4")  # of the weights


@dataclass(frozen=True)
class VerifyConfig:
    """Half of the `samples` prompts come from `data`, the others are random token ids.

    `precisions` and `kernels`: those to verify; no `kernels`: all that this machine can run. `exits` and `specs` are those of
    the drafts; no exits: the recommended one, one below and one above. `draws`: sampled outputs that are compared with the
    model's distribution; 0: none.
    """

    model: Text = "embedded"
    data: Annotated[Text, Flag(DATA, "Real prompts: commands, a file, a TOPv2 folder or a hub id.")] = "commands"
    samples: Annotated[int, Meta(ge=0, le=10_000_000), Flag(DATA, "Number of prompts; half of them are random token ids.")] = 8
    max_new_tokens: Annotated[int, Meta(ge=1, le=10_000_000), Flag(DECODING, "Maximum number of tokens in an output.")] = 16
    seed: Annotated[Seed, Flag(DATA, "Seed of random prompts and of sampling.")] = 0
    precisions: Annotated[tuple[str, ...], Flag(WEIGHTS, "Precisions of the weights.", parse=parse_names)] = PRECISIONS
    kernels: Annotated[
        tuple[str, ...],
        Flag(
            MACHINE,
            "amx, avx512, avx512_vnni, avx_vnni, avx2 or those for ARM (ours), torch (PyTorch's, on repacked weights), exact "
            "(the same with --exact), generic (transformers' layers), transformers (its generate, for comparison), or some.",
            default="all that this machine and this model can run",
            parse=parse_names,
        ),
    ] = ()
    exits: Annotated[
        tuple[int, ...],
        Flag(
            DECODING, "Exits that draft: 3,6,8 or A:B:STEP.", default="the checkpoint's, half and twice it", parse=parse_counts
        ),
    ] = ()
    specs: Annotated[tuple[int, ...], Flag(DECODING, "Draft lengths, in the same form.", parse=parse_counts)] = (1, 4, 7)
    draws: Annotated[
        int,
        Meta(ge=0, le=1_000_000),
        Flag(MEASUREMENT, "Sampled outputs whose first tokens are compared with the model's distribution; 0: none."),
    ] = 400
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        require(self.samples >= 2, "samples", "at least 2, because prompts share batches", self.samples)
        require(self.max_new_tokens >= 3, "max_new_tokens", "at least 3, to cut an output in two", self.max_new_tokens)
        for name in self.precisions:
            require_choice(name, "precisions", PRECISIONS)
        for name, values in (("exits", self.exits), ("specs", self.specs)):
            require(all(value >= 1 for value in values), name, "counts of at least 1", ",".join(map(str, values)))
        require(bool(self.specs), "specs", "at least one draft length", "none")
        require(self.machine.dtype == "auto", "dtype", "left out: `precisions` names them", self.machine.dtype)
