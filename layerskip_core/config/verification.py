"""What a verification compares, and on which kernels and precisions."""

from dataclasses import dataclass, field

from .checks import require, require_choice, require_given
from .machine import MachineConfig
from .ranges import require_ranges

PRECISIONS = ("fp32", "bf16", "int8", "int4")  # of the weights


@dataclass(frozen=True)
class VerifyConfig:
    """Half of the `samples` prompts come from `data`, the others are random token ids.

    `precisions` and `kernels`: those to verify; no `kernels`: all that this machine can run. `exits` and `specs` are those of
    the drafts; no exits: the recommended one, one below and one above. `draws`: sampled outputs that are compared with the
    model's distribution; 0: none.
    """

    model: str = "embedded"
    data: str = "commands"
    samples: int = 8
    max_new_tokens: int = 16
    seed: int = 0
    precisions: tuple[str, ...] = PRECISIONS
    kernels: tuple[str, ...] = ()
    exits: tuple[int, ...] = ()
    specs: tuple[int, ...] = (1, 4, 7)
    draws: int = 400
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        require_given("model", self.model)
        require_given("data", self.data)
        require_ranges(samples=self.samples, max_new_tokens=self.max_new_tokens, seed=self.seed, draws=self.draws)
        require(self.samples >= 2, "samples", "at least 2, because prompts share batches", self.samples)
        require(self.max_new_tokens >= 3, "max_new_tokens", "at least 3, to cut an output in two", self.max_new_tokens)
        for name in self.precisions:
            require_choice(name, "precisions", PRECISIONS)
        for name, values in (("exits", self.exits), ("specs", self.specs)):
            require(all(value >= 1 for value in values), name, "counts of at least 1", ",".join(map(str, values)))
        require(bool(self.specs), "specs", "at least one draft length", "none")
        require_ranges(num_draft_tokens=max(self.specs))
        require(self.machine.dtype == "auto", "dtype", "left out: `precisions` names them", self.machine.dtype)
