"""Loads the model of a command that decodes as its flags say."""

from dataclasses import replace
from typing import TYPE_CHECKING

from layerskip_core.config.checks import require_given
from layerskip_core.config.decoding import EXACT, DecodingConfig, DecodingOptions, implied_strategy, is_open
from layerskip_core.config.machine import MachineConfig
from layerskip_core.config.packing import PackingConfig
from layerskip_core.config.prompting import PromptingConfig

from .console import narrate_notes
from .threads import use_threads

if TYPE_CHECKING:
    from layerskip_core.checkpoint.loaded import Decoder


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
