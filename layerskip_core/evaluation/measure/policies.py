"""The policies that a sweep stores: its rows as settings to decode with, and the fastest early exit that is good enough."""

from collections.abc import Sequence
from dataclasses import fields

from ...config.decoding import USERS
from ...config.evaluation import SweepConfig
from ...config.packing import PackingConfig
from ...config.policies import Measured, Policy
from ..metrics import keeps, quality
from ..results import ExitResult

# The settings that are columns of a sweep.
_COLUMNS = sorted({field.name for field in fields(Policy)} & {field.name for field in fields(ExitResult)})


def policy_of(result: ExitResult, plain: ExitResult, quality_metric: str, config: SweepConfig) -> Policy:
    """A measured row as a policy; `plain` is the row of full depth."""
    settings = {name: getattr(result, name) for name in _COLUMNS if getattr(result, name) is not None}
    for name in ("draft_confidence", "lookup"):
        if result.strategy in USERS[name]:
            settings[name] = getattr(config.generation, name)
    settings |= _drafts_storage(result, config.packing)
    value, full = result.metrics.get(quality_metric, 0.0), plain.metrics.get(quality_metric, 0.0)
    measured = Measured(str(config.task.task), quality_metric, value, full, result.speedup or 0.0)
    return Policy(**settings, measured=measured)


def fast_policy(
    results: Sequence[ExitResult], exact: Policy, plain: ExitResult, quality_metric: str, config: SweepConfig
) -> tuple[Policy | None, str]:
    """The fastest early exit that keeps `config.keep` of full depth's quality, and why. None if none is faster than `exact`.

    Perplexity is measured through one exit: it says nothing of a row whose tokens leave at different exits.
    """
    full = plain.metrics.get(quality_metric, 0.0)
    if not full:
        return None, f"none, because {quality_metric} is 0 at full depth"
    exits = [
        policy_of(result, plain, quality_metric, config)
        for result in results
        if result.strategy == "early-exit" and quality_metric in result.metrics
        if result.exit_layer is not None or quality_metric != "perplexity"
    ]
    good = [policy for policy in exits if keeps(_value(policy), full, config.keep, quality_metric)]
    if not exits:
        return None, "none, because no early exit was measured"
    if not good:
        best = max(exits, key=lambda policy: quality({quality_metric: _value(policy)}, quality_metric))
        missed = f"no early exit keeps {config.keep:.4g} of {quality_metric}, {full:.3g} at full depth"
        return None, f"none, because {missed}; the best, {best}, has {_value(best):.3g}"
    best = max(good, key=_speedup)
    figures = (
        f"{_speedup(best):.2f}x the speed of plain decoding, {quality_metric} {_value(best):.3g} ({full:.3g} at full depth)"
    )
    if _speedup(best) <= _speedup(exact):
        return None, f"none, because {best} ({figures}) is not faster than the policy exact ({_speedup(exact):.2f}x)"
    return best, f"{best}: {figures}"


def _drafts_storage(result: ExitResult, packing: PackingConfig) -> dict[str, object]:
    """How the drafts of a row were stored. Exits that are chosen by confidence are tested with the head of drafts too."""
    if result.strategy in ("autoregressive", "lookup") or (result.strategy == "early-exit" and not result.exit_confidence):
        return {}
    copies = packing.draft_weights if result.strategy == "adaptive" else ()
    head = packing.draft_head if copies or result.draft_weights else None
    return {"draft_copies": copies, "draft_head": head, "draft_vocab": packing.draft_vocab}


def _value(policy: Policy) -> float:
    return policy.measured.value if policy.measured else 0.0


def _speedup(policy: Policy) -> float:
    return policy.measured.speedup if policy.measured else 0.0
