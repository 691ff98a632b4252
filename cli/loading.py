"""Sets CPU threads and loads the model as a command's flags say."""

import math
import shlex
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Timer
from typing import TYPE_CHECKING

from layerskip_core.config.decoding import (
    UNLIMITED,
    DecodingConfig,
    RequestOptions,
    choices,
    used_by,
)
from layerskip_core.config.model import PLAIN, MachineConfig, PackingConfig, PromptingConfig
from layerskip_core.config.options import ModelName
from layerskip_core.config.resolution import EXACT, implied_strategy
from layerskip_core.errors import plural, refused

from .console import narrate

if TYPE_CHECKING:
    from layerskip_core.checkpoint.loaded import Decoder

_SMALL_WIDTH = 256  # hidden size below which one thread is fastest
_PATIENCE = 2.0  # seconds of loading without a message
_INTERVAL = 0.25  # seconds over which the load of the cores is measured before the work
_BETWEEN_LOOKS = 1.0  # seconds between two later looks
# Load of a core that takes a thread away, and that does not let it come back
_BUSY = 0.4
_STILL_BUSY = 0.25
_QUIET = 3.0  # seconds before a thread comes back


def load_model(
    model: str,
    machine: MachineConfig,
    packing: PackingConfig = PLAIN,
    policies: Collection[str] | None = (),
    prompting: PromptingConfig | None = None,
    memory: int | None = None,
) -> "Decoder":
    """Loads a model with its template and the low-bit copies of these policies (None: all); prints
    notes, sets threads.
    """
    use_threads(machine.threads)
    from layerskip_core.checkpoint.open import for_decoding

    with _telling_slowness(model):
        loaded = for_decoding(
            model,
            machine.device,
            machine.dtype,
            packing,
            policies,
            memory,
            cache=not machine.no_cache,
        )
    if prompting is not None:
        loaded = loaded.with_template(prompting.asked, prompting.system)
    for note in loaded.notes:
        narrate(note)
    use_threads(machine.threads, loaded)
    return loaded


def offer_calibration(loaded: "Decoder") -> None:
    """Says what `layerskip calibrate` would gain, if the model was not calibrated."""
    if loaded.gains_by_calibration:
        narrate(
            "int4 drafts would be 1.1 to 1.2 times as fast as these in int8; once, a minute for 135M parameters: "
            f"layerskip calibrate --model {shlex.quote(loaded.name)}"
        )


@dataclass(frozen=True)
class DecoderFlags:
    """A model and how to decode with it."""

    model: ModelName = "embedded"
    decoding: RequestOptions = field(default_factory=RequestOptions)
    prompting: PromptingConfig = field(default_factory=PromptingConfig)
    packing: PackingConfig = PLAIN
    machine: MachineConfig = field(default_factory=MachineConfig)


def load_to_decode(
    flags: DecoderFlags, all_policies: bool = False, memory: int | None = None
) -> "tuple[Decoder, DecodingConfig]":
    """Loads the model, packed for the flags (or for all policies), and resolves its decoding.
    `memory`: see `for_decoding`.
    """
    decoding = flags.decoding
    packing = flags.packing
    given = choices(decoding)
    policies: Collection[str] | None = None
    if not all_policies:
        policy: str | None = EXACT
        if given or packing.drafts_apart:
            policy = decoding.get("policy")
        policies = () if policy is None else (policy,)
    may_be_adaptive = implied_strategy(decoding) in (None, "adaptive")
    asked = replace(
        packing,
        draft_layers=decoding.get("exit_layer", 0),
        adaptive=may_be_adaptive and "policy" not in given,
    )
    loaded = load_model(flags.model, flags.machine, asked, policies, flags.prompting, memory)
    config = loaded.resolve(decoding, packing)
    users = used_by("draft_model")
    if packing.draft_model and config.strategy not in users:
        needed = f"used with `strategy` {' or '.join(users)}"
        raise refused("draft_model", needed, f"`strategy` {config.strategy}")
    return loaded, config


@contextmanager
def _telling_slowness(model: str) -> Iterator[None]:
    """Says on stderr that the model is still loading, if it takes long."""
    timer = Timer(_PATIENCE, narrate, (f"loading {model} ...",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def of_answers(loaded: "Decoder", flags: RequestOptions) -> RequestOptions:
    """Flags of `chat` and `serve` with their defaults: answers without limit, sampling by
    generation_config.json.
    """
    own = loaded.own_sampling
    if own:
        numbers = [(name, value) for name, value in own.items() if isinstance(value, int | float)]
        listed = ", ".join(f"{name} {value:g}" for name, value in numbers)
        narrate(
            f"generation_config.json: {listed}, unless a flag or a request says otherwise; `temperature` 0 is greedy"
        )
    return {"max_new_tokens": UNLIMITED, **own, **flags}


def use_threads(threads: int, loaded: "Decoder | None" = None) -> None:
    """Sets torch's CPU threads. 0: torch's choice, but 1 for a small model (`loaded`), where
    barriers take as long as work.
    """
    small = (
        loaded is not None
        and loaded.backend.device.type == "cpu"
        and loaded.backend.spec.hidden < _SMALL_WIDTH
    )
    if threads or small:
        import torch

        torch.set_num_threads(threads or 1)


class FreeThreads:
    """Sets torch's CPU threads to the cores that other processes leave free, and looks again while
    the work goes on.

    All threads of a PyTorch operation wait for the slowest one: beside one busy process, training
    on all cores takes many times as long as on one core fewer. (Our own kernels adapt by
    themselves.)
    """

    def __init__(self, threads: int = 0) -> None:
        """`threads`: a fixed number; 0: torch's choice minus busy cores."""
        import torch

        from layerskip_core.processor import OtherLoad, usable_cores

        self._most = threads or torch.get_num_threads()
        self._is_fixed = bool(threads) or self._most == 1
        self._cores = len(usable_cores())
        self._threads = self._most
        self._quiet = 0.0  # seconds since more threads would have been chosen
        self._load = OtherLoad()
        torch.set_num_threads(self._most)

    def start(self) -> None:
        """Measures the load for a moment, before any work of our own."""
        if not self._is_fixed:
            time.sleep(_INTERVAL)
            self._choose(self._free(self._load.busy_cores(), _BUSY))

    def look(self) -> None:
        """Chooses again, at most once a second; between two steps of the work.

        A process that shares a core with a thread of ours gets about half of it, so less than half
        of a core takes a thread away. One comes back after some quiet seconds only, so that the
        number does not go up and down.
        """
        passed = self._load.seconds
        if self._is_fixed or passed < _BETWEEN_LOOKS:
            return
        busy = self._load.busy_cores()
        free = self._free(busy, _BUSY)
        if free <= self._threads:
            self._quiet = 0.0
            self._choose(free)
            return
        free = self._free(busy, _STILL_BUSY)
        if free <= self._threads:
            self._quiet = 0.0
            return
        self._quiet += passed
        if self._quiet >= _QUIET:
            self._choose(free)

    def _free(self, busy: float, least: float) -> int:
        """How many threads find a free core. A load of `least` cores or more above a whole number
        takes another one.
        """
        taken = math.floor(busy + 1 - least)
        return max(1, min(self._most, self._cores - taken))

    def _choose(self, threads: int) -> None:
        if threads == self._threads:
            return
        import torch

        self._threads = threads
        self._quiet = 0.0
        torch.set_num_threads(threads)
        reason = "; --threads sets another number"
        if threads < self._most:
            reason = f", because other processes keep {plural(self._cores - threads, 'core')} busy{reason}"
        narrate(f"{threads} of {plural(self._most, 'CPU thread')}{reason}")
