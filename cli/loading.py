"""What a command runs on: CPU threads, and the model that it decodes with, as its flags say."""

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from layerskip_core.config.checks import require_given
from layerskip_core.config.decoding import EXACT, DecodingConfig, DecodingOptions, implied_strategy, is_open
from layerskip_core.config.machine import MachineConfig
from layerskip_core.config.packing import PackingConfig
from layerskip_core.config.prompting import PromptingConfig

from .console import narrate, narrate_notes

if TYPE_CHECKING:
    from layerskip_core.checkpoint.loaded import Decoder

_SMALL_WIDTH = 256  # of the hidden states
_INTERVAL = 0.25  # seconds in which other processes are watched


def load_to_decode(
    model: str,
    decoding: DecodingOptions,
    prompting: PromptingConfig,
    packing: PackingConfig,
    machine: MachineConfig,
    all_policies: bool = False,
) -> "tuple[Decoder, DecodingConfig]":
    """The model with its template and with what these options draft with, and what they mean for it.

    `all_policies`: with what any saved policy drafts with too.

    Raises as `for_decoding`, `with_template` and `Decoder.resolve` do: a wrong flag is one error, before the first prompt.
    """
    require_given("model", model)
    use_threads(machine.threads)
    from layerskip_core.checkpoint.open import for_decoding

    policy = decoding.get("policy")
    adaptive = policy is None and implied_strategy(decoding) in (None, "adaptive")
    kept = replace(packing, draft_layers=decoding.get("exit_layer", 0), adaptive=adaptive)
    used = policy or (EXACT if is_open(decoding) and not packing.drafts_apart else None)
    policies = None if all_policies else () if used is None else (used,)
    loaded = for_decoding(model, machine.device, machine.dtype, kept, policies)
    loaded = loaded.with_template(prompting.asked, prompting.system)
    narrate_notes(loaded)
    use_threads(machine.threads, loaded)
    return loaded, loaded.resolve(decoding, packing)


def use_threads(threads: int, loaded: "Decoder | None" = None) -> None:
    """Sets torch's CPU threads. With 0 they stay torch's choice, except for decoding with a small model (`loaded`): then 1.

    A small model's products take no longer than the threads' barriers, and if another process holds a core, every barrier
    waits for it. Measured on two cores with layers of width 160 and torch's kernels: the same speed on a quiet machine, far
    below half on a busy one. Our own kernels gain 1.6 times from a second thread on a quiet machine.
    """
    small = loaded is not None and loaded.backend.device.type == "cpu" and loaded.backend.hidden_size < _SMALL_WIDTH
    if threads or small:
        import torch

        torch.set_num_threads(threads or 1)


def use_free_threads(threads: int) -> None:
    """`use_threads` for a training. With 0 torch's choice is reduced by the cores that other processes keep busy, and says so.

    In torch's products every thread waits for the slowest, which on a busy core is one that does not run.
    """
    busy = 0 if threads else round(busy_cores())
    if not busy:
        return use_threads(threads)
    import torch

    most = torch.get_num_threads()
    chosen = max(1, most - busy)
    if chosen < most:
        narrate(f"{chosen} of {most} CPU threads, because other processes keep {busy} busy; --threads sets another number")
        torch.set_num_threads(chosen)


def busy_cores() -> float:
    """How many of the cores that this process may use are busy now, while it waits.

    Processes with a positive nice value are not counted: they make way.
    """
    import psutil

    def seconds() -> float:
        times = psutil.cpu_times(percpu=True)
        usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(times))
        return float(sum(times[core].user + times[core].system for core in usable if core < len(times)))

    before, started = seconds(), time.monotonic()
    time.sleep(_INTERVAL)
    return (seconds() - before) / (time.monotonic() - started)
