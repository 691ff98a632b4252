"""Sets CPU threads and loads the model as a command's flags say."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Timer
from typing import TYPE_CHECKING

from layerskip_core.config.decoding import UNLIMITED, DecodingConfig, RequestOptions, choices, used_by
from layerskip_core.config.model import PLAIN, MachineConfig, PackingConfig, PromptingConfig
from layerskip_core.config.options import ModelName
from layerskip_core.config.resolution import EXACT, implied_strategy
from layerskip_core.errors import refused

from .console import narrate

if TYPE_CHECKING:
    from layerskip_core.checkpoint.loaded import Decoder

_SMALL_WIDTH = 256  # hidden size below which one thread is fastest
_PATIENCE = 2.0  # seconds of loading without a message
_INTERVAL = 0.25  # seconds over which the load of the cores is measured


def load_model(
    model: str,
    machine: MachineConfig,
    packing: PackingConfig = PLAIN,
    policies: Collection[str] | None = (),
    prompting: PromptingConfig | None = None,
    memory: int | None = None,
) -> "Decoder":
    """Loads a model with its template and the low-bit copies of these policies (None: all); prints notes, sets threads."""
    use_threads(machine.threads)
    from layerskip_core.checkpoint.open import for_decoding

    with _telling_slowness(model):
        loaded = for_decoding(model, machine.device, machine.dtype, packing, policies, memory, cache=not machine.no_cache)
    if prompting is not None:
        loaded = loaded.with_template(prompting.asked, prompting.system)
    for note in loaded.notes:
        narrate(note)
    use_threads(machine.threads, loaded)
    return loaded


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
    """Loads the model, packed for the flags (or for all policies), and resolves its decoding. `memory`: see `for_decoding`."""
    decoding, packing = flags.decoding, flags.packing
    given = choices(decoding)
    policy = decoding.get("policy") if given or packing.drafts_apart else EXACT
    adaptive = "policy" not in given and implied_strategy(decoding) in (None, "adaptive")
    kept = replace(packing, draft_layers=decoding.get("exit_layer", 0), adaptive=adaptive)
    policies = None if all_policies else () if policy is None else (policy,)
    loaded = load_model(flags.model, flags.machine, kept, policies, flags.prompting, memory)
    config, users = loaded.resolve(decoding, packing), used_by("draft_model")
    if packing.draft_model and config.strategy not in users:
        raise refused("draft_model", f"used with `strategy` {' or '.join(users)}", f"`strategy` {config.strategy}")
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
    """Flags of `chat` and `serve` with their defaults: answers without limit, sampling by generation_config.json."""
    if own := loaded.own_sampling:
        listed = ", ".join(f"{name} {value:g}" for name, value in own.items() if isinstance(value, int | float))
        narrate(f"generation_config.json: {listed}, unless a flag or a request says otherwise; `temperature` 0 is greedy")
    return {"max_new_tokens": UNLIMITED, **own, **flags}


def use_threads(threads: int, loaded: "Decoder | None" = None) -> None:
    """Sets torch's CPU threads. 0: torch's choice, but 1 for a small model (`loaded`), where barriers take as long as work."""
    small = loaded is not None and loaded.backend.device.type == "cpu" and loaded.backend.spec.hidden < _SMALL_WIDTH
    if threads or small:
        import torch

        torch.set_num_threads(threads or 1)


def use_free_threads(threads: int) -> None:
    """Sets torch's CPU threads for training. 0: torch's choice minus busy cores, whose threads would hold up all others."""
    import torch

    busy, most = 0 if threads else round(busy_cores()), torch.get_num_threads()
    chosen = threads or max(1, most - busy)
    if chosen < most and not threads:
        narrate(f"{chosen} of {most} CPU threads, because other processes keep {busy} busy; --threads sets another number")
    torch.set_num_threads(chosen)


def busy_cores() -> float:
    """How many of the cores that this process may use are busy now; processes with a positive nice value do not count."""
    import psutil

    times = psutil.cpu_times_percent(_INTERVAL, percpu=True)
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(times))
    return float(sum(times[core].user + times[core].system for core in usable if core < len(times))) / 100
