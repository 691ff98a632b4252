"""Completes requested options by the recommendation, the saved policies and the exits of a
checkpoint.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, cast

from ..errors import plural, refused, require
from .decoding import (
    GUIDES,
    STRATEGIES,
    DecodingConfig,
    DecodingOptions,
    DraftProfile,
    changed,
    choices,
    decoding,
    normalized,
    used_by,
)
from .model import PLAIN, PackingConfig, Quantization
from .options import CountOrNone, counts_text

# The policy with the fastest setting whose outputs equal plain decoding; the default
EXACT = "exact"
FAST = "fast"  # the policy with the fastest early exit that keeps a share of the quality
MOST_DRAFTS = 32  # per round of adaptive drafting


class PolicyMeasurement(TypedDict):
    """A sweep's measurement of a policy: the task's metric, also at full depth, and the speedup
    over plain decoding.
    """

    task: str
    metric: str
    value: float
    full_depth: float
    speedup: float


class Policy(DecodingOptions, total=False):
    """Options that a sweep saved with a model, and their measurement. A request sets limit, stop
    strings and sampling.
    """

    draft_weights: Quantization  # the copy that drafts
    # `draft_weights` of PackingConfig; without it the default of adaptive drafting
    draft_copies: Sequence[Quantization]
    draft_head: Quantization  # as in PackingConfig
    draft_vocab: CountOrNone
    measured: PolicyMeasurement


@dataclass(frozen=True)
class Recommended:
    """A checkpoint's recommendation."""

    exit_layer: int
    num_draft_tokens: int
    strategy: str | None = None  # None: no sweep measured its exits
    exits: tuple[int, ...] = ()  # the trained ones
    profile: DraftProfile = field(default_factory=DraftProfile)


def implied_strategy(options: DecodingOptions) -> str | None:
    """The named strategy, or the one that another option implies."""
    if options.get("strategy"):
        return options["strategy"]
    # The more special ones come last: --skip 8 --spec 4 is draft-and-verify
    for name, strategy in reversed(STRATEGIES.items()):
        if any(options.get(option) for option in strategy.implied_by):
            return name
    return None


def resolve(
    options: DecodingOptions, known: Recommended, num_layers: int, packing: PackingConfig = PLAIN
) -> DecodingConfig:
    """The requested options, completed by the checkpoint's recommendation. Raises ConfigError for
    contradictions.
    """
    strategy = implied_strategy(options)
    given = choices(options)
    asked = normalized(options)
    if (
        strategy == "self-speculative"
        and packing.draft_model
        and given.keys().isdisjoint(("strategy", "exit_layer"))
    ):
        strategy = "draft-model"
    if strategy is None:
        strategy = "adaptive" if packing.drafts_apart or known.strategy is None else known.strategy
        if options.get("lookup") and strategy not in used_by("lookup"):
            strategy = "adaptive"
    if "exit_confidence" in given:
        for name in given.keys() & {"exit_layer", "num_draft_tokens"}:
            reason = "chooses exits itself" if name == "exit_layer" else "drafts nothing"
            raise refused(
                name, f"left out with `exit_confidence`, which {reason}", str(given[name])
            )
    if asked.get("prompt_logprobs"):
        require("logprobs" in asked, "prompt_logprobs", "used with `logprobs`", "none")
        require(
            "exit_confidence" not in given,
            "prompt_logprobs",
            "left out with `exit_confidence`",
            "both",
        )
    require(
        "exits" not in given or "exit_confidence" in given,
        "exits",
        "used with `exit_confidence`",
        "none",
    )
    for name in given:
        users = used_by(name)
        require(
            strategy in users,
            name,
            f"used with `strategy` {' or '.join(users)}",
            f"`strategy` {strategy}",
        )
    return resolve_as(strategy, options, known, num_layers, packing)


def resolve_as(
    strategy: str,
    options: DecodingOptions,
    known: Recommended,
    num_layers: int,
    packing: PackingConfig = PLAIN,
) -> DecodingConfig:
    """As `resolve`, for a given strategy and without its checks for contradictions. The first
    low-bit copy drafts.
    """
    asked = normalized(options)
    completed: dict[str, Any] = {
        "num_draft_tokens": known.num_draft_tokens,
        "guided": _guided(asked),
    }
    if strategy in used_by("draft_weights") and packing.draft_weights:
        completed["draft_weights"] = packing.draft_weights[0]
    match strategy:
        case "early-exit" if asked.get("exit_confidence"):
            needed = (
                "used with a model whose exits were trained (`layerskip finetune`), or with `exits`"
            )
            require(bool(asked.get("exits") or known.exits), "exit_confidence", needed, "neither")
            for exit_layer in asked.get("exits", ()):
                require_exit_layer(exit_layer, num_layers, field="exits")
            completed["exits"] = spread_exits(known.exits, num_layers)
        case _ if STRATEGIES[strategy].has_exit:
            of_copies = "draft_weights" in completed
            all_layers = of_copies and "exit_layer" not in asked and not known.exits
            completed["exit_layer"] = exit_layer = (
                num_layers if all_layers else asked.get("exit_layer", known.exit_layer)
            )
            require_exit_layer(
                exit_layer, num_layers, may_be_last=of_copies or strategy == "early-exit"
            )
        case "draft-and-verify":
            skip = asked.get("skip", ())
            require(bool(skip), "skip", "given for `strategy` draft-and-verify", "none")
            for layer in skip:
                require_exit_layer(layer, num_layers, may_be_last=True, field="skip")
            require(
                len(set(skip)) < num_layers,
                "skip",
                "a list that leaves at least one layer",
                f"all {num_layers} layers",
            )
        case "draft-model":
            require(
                packing.draft_model is not None,
                "draft_model",
                "given for `strategy` draft-model",
                "none",
            )
        case "adaptive":
            completed |= {
                "exits": known.exits,
                "num_draft_tokens": MOST_DRAFTS,
                "profile": known.profile,
            }
    return decoding(strategy, cast(DecodingOptions, completed | asked))


def _guided(asked: dict[str, Any]) -> tuple[str, str] | None:
    """Removes and returns the constraint of the answer. Raises ConfigError for two, and for options
    that exclude it.
    """
    given = {name: asked.pop(name) for name in GUIDES if name in asked}
    if not given:
        return None
    (kind, value), *others = given.items()
    for other in [
        *dict(others),
        *(name for name in ("min_tokens", "ignore_eos") if asked.get(name)),
    ]:
        raise refused(other, f"left out with `{kind}`", "both")
    return kind, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def policy_named(policies: Mapping[str, Policy], name: str) -> Policy:
    """Raises ConfigError, which lists the saved policies, for an unknown name."""
    there = ", ".join(policies) or "there are none"
    how = f"`layerskip sweep-exits --save` saves {EXACT}, and {FAST} where an early exit keeps the quality"
    require(name in policies, "policy", f"one that is saved with the model ({there}; {how})", name)
    return policies[name]


def policy_options(policy: Policy, request: DecodingOptions) -> DecodingOptions:
    """A policy with the request's limit, stop strings and sampling. Raises ConfigError for other
    options.
    """
    for name, value in choices(request).items():
        if name != "policy":
            text = counts_text(value) if isinstance(value, tuple) else value
            raise refused("policy", f"given without `{name}`", f"`{name}` {text}")
    own = {name: value for name, value in policy.items() if name in DecodingOptions.__annotations__}
    return changed(request, cast(DecodingOptions, own))


def policy_packing(policy: Policy) -> PackingConfig:
    """The packing of a policy's drafts."""
    copies = (
        (policy["draft_weights"],)
        if "draft_weights" in policy
        else tuple(policy.get("draft_copies", ()))
    )
    return PackingConfig(
        draft_weights=copies,
        draft_head=policy.get("draft_head"),
        draft_vocab=policy.get("draft_vocab", 0),
    )


def policy_text(policy: Policy) -> str:
    """A policy in reports: `exit 8 with 6 draft tokens`."""
    strategy = policy["strategy"]
    exit_layer = policy.get("exit_layer")
    drafts = policy.get("num_draft_tokens")
    if strategy == "early-exit":
        confidence = policy.get("exit_confidence")
        return f"exits by confidence {confidence:g}" if confidence else f"exit {exit_layer}"
    name = "plain decoding" if strategy == "autoregressive" else strategy
    if strategy == "self-speculative":
        name = f"exit {exit_layer}" + (
            f" of the {policy['draft_weights']} copies" if "draft_weights" in policy else ""
        )
    return name if drafts is None else f"{name} with {plural(drafts, 'draft token')}"


def default_exits(num_layers: int) -> tuple[int, ...]:
    """Six exits, denser among the early layers, where drafts are cheap. Of 24 layers: 3, 4, 6, 8,
    12 and 18.
    """
    shares = (1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 3 / 4)
    return tuple(
        sorted({max(1, min(round(num_layers * share), num_layers - 1)) for share in shares})
    )


def spread_exits(exits: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """At most six exits, the nearest to `default_exits`: every exit costs a pass of the head."""
    if len(exits) <= 6:
        return exits
    return tuple(
        sorted(
            {
                min(exits, key=lambda known: abs(known - wanted))
                for wanted in default_exits(num_layers)
            }
        )
    )


def require_exit_layer(
    exit_layer: int, num_layers: int, may_be_last: bool = False, field: str = "exit_layer"
) -> None:
    """Raises ConfigError unless in 1..L-1, or in 1..L for an early exit and for drafts by a low-bit
    copy.
    """
    last = num_layers if may_be_last else num_layers - 1
    require(
        1 <= exit_layer <= last,
        field,
        f"in 1..{last}",
        f"{exit_layer} (model has {num_layers} layers)",
    )
