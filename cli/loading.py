"""Loads the model of a command that decodes as its flags say."""

from dataclasses import replace
from typing import TYPE_CHECKING

from layerskip_core.config.checks import require_given
from layerskip_core.config.decoding import DecodingSettings
from layerskip_core.config.machine import MachineConfig
from layerskip_core.config.packing import PackingConfig
from layerskip_core.config.policies import EXACT
from layerskip_core.config.prompting import PromptingConfig

from .console import narrate_notes
from .threads import use_threads

if TYPE_CHECKING:
    from layerskip_core.checkpoint.loaded import Decoder


def load_to_decode(
    model: str,
    decoding: DecodingSettings,
    prompting: PromptingConfig,
    packing: PackingConfig,
    machine: MachineConfig,
    all_policies: bool = False,
) -> "Decoder":
    """The model, with what these settings draft with and its template. `all_policies`: with what any saved policy needs too.

    Raises as `for_decoding`, `with_template` and `Decoder.resolve` do: a wrong flag is one error, before the first prompt.
    """
    require_given("model", model)
    use_threads(machine.threads)
    from layerskip_core.checkpoint.open import for_decoding

    adaptive = decoding.policy is None and decoding.implied_strategy in (None, "adaptive")
    kept = replace(packing, draft_layers=decoding.exit_layer or 0, adaptive=adaptive)
    used = decoding.policy or (EXACT if decoding.is_open and not packing.drafts_apart else None)
    policies = None if all_policies else () if used is None else (used,)
    loaded = for_decoding(model, machine.device, machine.dtype, kept, policies)
    loaded = loaded.with_template(prompting.asked, prompting.system)
    narrate_notes(loaded)
    use_threads(machine.threads, loaded)
    loaded.resolve(decoding, packing)
    return loaded
