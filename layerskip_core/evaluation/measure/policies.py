"""The policies that a sweep stores: its rows as settings to decode with, and the fastest early exit that is good enough."""

from collections.abc import Sequence
from dataclasses import fields
from typing import cast

from ...config.decoding import Measured, Policy, policy_text, used_by
from ...config.evaluation import SweepConfig
from ...config.options import hints_of
from ...config.packing import PackingConfig
from ...wording import plural
from ..bootstrap import Margin
from ..results import Result

# The settings that are columns of a sweep.
_COLUMNS = sorted(hints_of(Policy).keys() & {field.name for field in fields(Result)})


def policy_of(result: Result, plain: Result, quality_metric: str, config: SweepConfig) -> Policy:
    """A measured row as a policy; `plain` is the row of full depth."""
    settings = {name: getattr(result, name) for name in _COLUMNS}
    for name in ("draft_confidence", "lookup"):
        if result.strategy in used_by(name):
            settings[name] = config.generation.get(name)
    settings |= _drafts_storage(result, config.packing)
    value, full = result.metrics.get(quality_metric, 0.0), plain.metrics.get(quality_metric, 0.0)
    measured: Measured = {
        "task": str(config.task.task),
        "metric": quality_metric,
        "value": value,
        "full_depth": full,
        "speedup": result.speedup or 0.0,
    }
    said = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items() if value}
    return cast(Policy, said | {"measured": measured})


def fast_policy(
    results: Sequence[Result],
    margins: Sequence[Margin | None],
    exact: Policy,
    plain: Result,
    quality_metric: str,
    config: SweepConfig,
) -> tuple[Policy | None, str]:
    """The fastest early exit that certainly keeps `config.keep` of full depth's quality, and why; None if there is none.

    `margins`: of each result, None where its quality was not measured. Certainly: by the lower end of the margin's interval.
    An exit must also be faster than `exact`.
    """
    full = plain.metrics.get(quality_metric, 0.0)
    if not full:
        return None, f"none, because {quality_metric} is 0 at full depth"
    exits = [
        (policy_of(result, plain, quality_metric, config), found)
        for result, found in zip(results, margins, strict=False)
        if result.strategy == "early-exit" and found is not None
    ]
    if not exits:
        return None, "none, because no early exit was measured"

    def described(policy: Policy) -> str:
        speed = f"{_speedup(policy):.2f}x the speed of plain decoding"
        return f"{speed}, {quality_metric} {_value(policy):.3g} ({full:.3g} at full depth)"

    good = [(policy, found) for policy, found in exits if found.needed is not None]
    if not good:
        best, _ = max(exits, key=lambda exit: exit[1].mean)
        missed = f"no early exit keeps more than {config.keep:.4g} of {quality_metric}, {full:.3g} at full depth"
        return None, f"none, because {missed}; the best, {policy_text(best)}, has {_value(best):.3g}"
    faster = [(policy, found) for policy, found in good if _speedup(policy) > _speedup(exact)]
    if not faster:
        best = max((policy for policy, _ in good), key=_speedup)
        name, its_speed = policy_text(best), f"{_speedup(exact):.2f}x"
        return None, f"none, because {name} ({described(best)}) is not faster than the policy exact ({its_speed})"
    certain = [policy for policy, found in faster if found.low >= 0]
    if certain:
        best = max(certain, key=_speedup)
        return best, f"{policy_text(best)}: {described(best)}"
    best, found = min(faster, key=lambda exit: exit[1].needed or 0)
    return None, (
        f"none, because {plural(found.prompts, 'prompt')} cannot show that an early exit keeps {config.keep:.4g} of "
        f"{quality_metric}; for {policy_text(best)} ({described(best)}) it would take about {found.needed} (`samples`)"
    )


def _drafts_storage(result: Result, packing: PackingConfig) -> dict[str, object]:
    """How the drafts of a row were stored. Exits that are chosen by confidence are tested with the head of drafts too."""
    if result.strategy in ("autoregressive", "lookup") or (result.strategy == "early-exit" and not result.exit_confidence):
        return {}
    copies = packing.draft_weights if result.strategy == "adaptive" else ()
    head = packing.draft_head if copies or result.draft_weights else None
    return {"draft_copies": copies, "draft_head": head, "draft_vocab": packing.draft_vocab}


def _value(policy: Policy) -> float:
    return policy["measured"]["value"]


def _speedup(policy: Policy) -> float:
    return policy["measured"]["speedup"]
