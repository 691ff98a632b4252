"""Decides how a model is loaded: the backend, the low-bit copies and the drafters."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..config.decoding import DraftProfile
from ..config.model import PackingConfig, Quantization
from ..config.resolution import policy_packing
from ..errors import ConfigError
from ..model.exit_blocks import StoredDrafters
from ..model.native import can_run_native, suits_kernels
from ..model.native.compiled import kernel_note
from ..model.torch_layer import missing_feature
from ..model.weights import Take
from .info import CheckpointInfo
from .shipped import read_stored_drafters, with_drafters
from .sidecars import StoredInt4, read_int4
from .source import Source

# Usual values of a low-bit copy of all layers: acceptance rate (int4: calibrated), and time per
# draft in target passes.
_COPIES: dict[Quantization, tuple[float, float]] = {"int8": (0.97, 0.55), "int4": (0.93, 0.4)}
_VERIFICATION = 1.12  # time of a verification, in target passes of one token
_MOST_DRAFTS = 8  # per round, in the comparison of copies


@dataclass(frozen=True)
class LoadPlan:
    """How an opened model becomes a Decoder.

    Attributes:
        backend: `native` (C kernels) and `torch` repack the weights, `transformers` runs its own
            layers.
        packing: with the low-bit copies of policies and of adaptive drafting.
        stored_drafters: the exit blocks and drafters.
        int4: calibrated weights, if the packing uses int4.
        uncalibrated: an int8 copy drafts, because the model has no calibrated int4 weights.
    """

    source: Source
    backend: Literal["native", "torch", "transformers"]
    packing: PackingConfig
    stored_drafters: StoredDrafters
    info: CheckpointInfo
    int4: Take | None = None
    notes: tuple[str, ...] = ()  # for the user
    uncalibrated: bool = False


def with_policies(
    packing: PackingConfig,
    info: CheckpointInfo,
    names: Collection[str] | None,
    device: torch.device,
) -> PackingConfig:
    """`packing` with the low-bit copies and the draft head of the named policies (None: all)."""
    used = []
    for name, policy in info.policies.items():
        # Policies with copies are for the CPU only
        runs_here = device.type == "cpu" or not policy_packing(policy).draft_weights
        if runs_here and (names is None or name in names):
            used.append(policy)
    if used and names is not None:  # the policy decides the strategy
        is_adaptive = any(policy["strategy"] == "adaptive" for policy in used)
        packing = replace(packing, adaptive=is_adaptive)
    packings = [each for each in map(policy_packing, used) if each.drafts_apart]
    if not packings:
        return packing
    copies = dict.fromkeys(packing.draft_weights)
    for each in packings:
        copies |= dict.fromkeys(each.draft_weights)
    if not packing.drafts_apart:  # all are of one sweep, with one head
        packing = replace(
            packing,
            draft_weights=tuple(copies),
            draft_head=packings[0].draft_head,
            draft_vocab=packings[0].draft_vocab,
        )
    if any(each.draft_weights for each in packings):
        packing = replace(packing, draft_weights=tuple(copies), draft_layers=0)
    return packing


def resolve(source: Source, memory: float) -> LoadPlan:
    """Plans a load, by the headers of the files.

    `memory`: bytes for the weights and a copy for adaptive drafting. Raises CheckpointError for
    sidecars of other weights, ConfigError for a packing that the model cannot have.
    """
    if source.packed is not None:
        return _of_packed(source)
    spec = source.spec
    missing = missing_feature(spec)
    if missing is not None and not _runs_native(source, source.packing):
        return _on_transformers(source, missing)
    packing = source.packing
    info = source.info
    notes = list[str]()
    # Adaptive drafting gets a copy, unless something else drafts already
    drafts = packing.draft_weights or packing.quantize or packing.exact or source.rows is not None
    wants_copy = packing.adaptive and not drafts
    int4 = None
    if wants_copy or _uses_int4(packing):
        int4 = read_int4(source.model.folder, source.own_spec, source.fingerprint)
        if int4 is not None and int4.agreement is not None:
            info = info.with_int4(int4.agreement)
    if wants_copy:
        packing, note = _with_copy(source, info, int4, memory)
        notes += note
    blocks = _stored_drafters(source)
    if suits_kernels(spec, source.dtype, source.device, packing):
        notes[:0] = _kernel_notes()
    take_int4 = None
    if int4 is not None and _uses_int4(packing):
        take_int4 = int4.take
    return LoadPlan(
        source,
        "native" if _runs_native(source, packing) else "torch",
        packing,
        blocks,
        info,
        take_int4,
        (*notes, *blocks.notes),
        uncalibrated=wants_copy and int4 is None and packing.draft_weights == ("int8",),
    )


def _of_packed(source: Source) -> LoadPlan:
    assert source.packed is not None and source.model.folder is not None
    blocks = with_drafters(source.packed.stored_drafters, source.model.folder, source.spec)
    return LoadPlan(source, "native", source.packing, blocks, source.info, notes=blocks.notes)


def _on_transformers(source: Source, missing: str) -> LoadPlan:
    """The plan of a model that cannot be repacked. Raises ConfigError for a packing of weights."""
    packing = source.packing
    if packing.quantize or packing.draft_weights or packing.draft_vocab or packing.exact:
        raise ConfigError(
            f"low-bit, draft and exact weights need a model that can be repacked, got {source.spec.model_type} with {missing}"
        )
    notes = list[str]()
    if suits_kernels(source.spec, source.dtype, source.device, packing):
        notes += _kernel_notes()
    blocks = _stored_drafters(source)
    notes += blocks.notes
    if blocks.assistant is not None:
        notes.append("drafting without its assistant, which only the compiled kernels run")
    return LoadPlan(source, "transformers", packing, blocks, source.info, notes=tuple(notes))


def _runs_native(source: Source, packing: PackingConfig) -> bool:
    return can_run_native(source.spec, source.dtype, source.device, packing)


def _kernel_notes() -> list[str]:
    note = kernel_note()
    return [] if note is None else [note]


def _stored_drafters(source: Source) -> StoredDrafters:
    folder = source.model.sidecar_folder
    if folder is None:
        return source.stored_drafters
    beside = read_stored_drafters(folder, source.spec, source.fingerprint)
    if beside.mtp is None and source.stored_drafters.mtp is not None:
        return replace(beside, mtp=source.stored_drafters.mtp)
    return beside


def _with_copy(
    source: Source, info: CheckpointInfo, int4: StoredInt4 | None, memory: float
) -> tuple[PackingConfig, list[str]]:
    """The packing with a low-bit copy for adaptive drafting, if kernels run it and `memory` holds
    it; else with a note for the user.
    """
    spec = source.own_spec
    kind: Quantization = "int8"
    if int4 is not None:
        kind = _faster_copy(info.draft_profile(spec.layers))
    packing = replace(source.packing, draft_weights=(kind,))
    if not _runs_native(source, packing):
        return source.packing, []
    needed = (spec.parameters - spec.unread) * (source.dtype.itemsize + 1)
    if needed <= memory:
        return packing, []
    sizes = f"the model needs {needed / 1e6:,.0f} MB, and {memory / 1e6:,.0f} MB are free"
    return source.packing, [
        f"drafting without an {kind} copy of the weights: with it {sizes} beside keys and values"
    ]


def _uses_int4(packing: PackingConfig) -> bool:
    return "int4" in (packing.quantize, packing.draft_head, *packing.draft_weights)


def _faster_copy(profile: DraftProfile) -> Quantization:
    """The copy with the most tokens per second, by a sweep's measurements, else by _COPIES."""

    def rate(kind: Quantization) -> float:
        usual_acceptance, step = _COPIES[kind]
        acceptance = profile.acceptance.get(kind, usual_acceptance)
        if profile.passes and kind in profile.drafts:
            step = profile.drafts[kind] / profile.passes[0]
        best = 0.0
        tokens = 1.0  # of a round: the target's own, and the accepted drafts
        for drafts in range(1, _MOST_DRAFTS + 1):
            tokens += acceptance**drafts
            best = max(best, tokens / (drafts * step + _VERIFICATION))
        return best

    return max(_COPIES, key=rate)
