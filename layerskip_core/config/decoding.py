"""How tokens are decoded: options as requested (DecodingOptions), and resolved for a checkpoint (DecodingConfig)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, cast

from msgspec import Meta

from ..errors import refused, require
from .model import PackingConfig, Quantization
from .options import UNICODE, Count, CountOrNone, Drafts, Flag, Layer, Seed, Share, Text, counts_text, hints_of, one_of

if TYPE_CHECKING:
    from ..grammar import Guide

# Each strategy that drafts, and the module whose `drafter(setup)` drafts for it.
DRAFTERS = {
    "adaptive": "layerskip_core.decoding.drafters.adaptive",
    "self-speculative": "layerskip_core.decoding.drafters.exit",
    "eagle3": "layerskip_core.decoding.drafters.exit",
    "lookup": "layerskip_core.decoding.drafters.lookup",
    "draft-and-verify": "layerskip_core.decoding.drafters.exit",
}
STRATEGIES = (*DRAFTERS, "early-exit", "autoregressive")
EXACT = "exact"  # the policy with the fastest setting that has the outputs of plain decoding; used where nothing is said
FAST = "fast"  # the policy with the fastest early exit that keeps a share of the quality
MAX_NEW_TOKENS = 256
UNLIMITED = 10_000_000  # new tokens: an answer may take all that is left of the context
REMEMBERED = 131_072

_MOST_DRAFTS = 32  # of a round of adaptive drafting
_PLAIN = PackingConfig()

Penalty = Annotated[float, Meta(ge=-2, le=2)]
Milliseconds = Annotated[float, Meta(ge=1e-4, le=1e9)]  # of a pass; differences of such times keep digits enough


Remember = Annotated[
    CountOrNone,
    Flag(
        "Tokens of this run's earlier answers that lookups search too; 0: none. They leave traces in the times of later "
        "answers, in a server in those of other clients.",
        panel="Decoding",
    ),
]


class UsedBy(tuple[str, ...]):
    """The strategies that use an option; without it in an option's annotation, all do."""


class DecodingOptions(TypedDict, total=False):
    """How to decode, as asked for: by flags, by options in Python, by a row of JSON. The checkpoint decides what is left out.

    Exits and layers are counts, 1..L: layer E is the last that runs before exit E.
    """

    strategy: Annotated[
        str,
        one_of(*STRATEGIES),
        Flag(
            "Decoding strategy.",
            default="adaptive; self-speculative with a flag about an exit or about drafts",
            panel="Decoding",
        ),
    ]
    exit_layer: Annotated[
        Layer,
        UsedBy(("self-speculative", "early-exit")),
        Flag("Draft with (or exit after) this many layers.", "--exit", "the checkpoint's"),
    ]
    num_draft_tokens: Annotated[Drafts, UsedBy(DRAFTERS), Flag("Most draft tokens per round.", "--spec", "the checkpoint's")]
    max_new_tokens: Annotated[
        Count, Flag("Maximum number of tokens in an answer.", default="256; in chat and serve what the context has room for")
    ]
    draft_confidence: Annotated[
        float,
        Meta(ge=0, lt=1),
        UsedBy(("adaptive", "self-speculative", "eagle3", "draft-and-verify")),
        Flag("Stop drafting when the draft's best token is less probable than this; 0: never.", default="0"),
    ]
    stop: Annotated[
        Annotated[str, Meta(min_length=1)] | Sequence[Text],  # msgspec 0.22 crashes on a pattern beside a list
        Meta(description=f"{UNICODE.description}, or several"),
        Flag("End the answer before this text. Can be repeated.", repeated=True),
    ]
    lookup: Annotated[
        int,
        Meta(ge=0, le=1_000),
        UsedBy(DRAFTERS),
        Flag("First draft the text after an earlier occurrence of the last N tokens or more; 0: do not.", default="0"),
    ]
    exit_confidence: Annotated[
        float,
        Meta(ge=0, le=1),
        UsedBy(("early-exit",)),
        Flag(
            "Early exit: each token leaves at the first exit that gives its best token more than this probability.", default="0"
        ),
    ]
    skip: Annotated[
        Sequence[Layer],
        UsedBy(("draft-and-verify",)),
        Flag(
            "Draft with all layers but these, by number from 1, as inspect shows them: 8,9,14:18.",
            default="with --strategy draft-and-verify those that sweep-exits --search-skips --save stored",
        ),
    ]
    policy: Annotated[
        Text,
        Flag(
            "Settings that `sweep-exits --save` stored with the model, instead of a strategy and its flags: exact (the output "
            "of plain decoding) or fast (nearly its quality).",
            default="exact if it is stored and nothing else is said",
        ),
    ]
    exits: Annotated[
        Sequence[Layer],
        UsedBy(("early-exit", "adaptive")),  # which takes the trained ones
        Flag("Exits that --exit-confidence chooses among: 3,6,8 or A:B:STEP.", default="the trained ones, at most six"),
    ]
    temperature: Annotated[
        float,
        Meta(ge=0, le=1_000),
        Flag(
            "Temperature; 0 is greedy.",
            default="0; chat and serve sample and penalise as the model's generation_config.json says",
            panel="Sampling",
        ),
    ]
    top_k: Annotated[CountOrNone, Flag("Sample from the k most probable tokens; 0: from all.", default="0")]
    top_p: Annotated[Share, Flag("Sample from the most probable tokens that add up to this probability.", default="1")]
    seed: Annotated[Seed, Flag("Seed of sampling.", default="0")]


class RequestOptions(DecodingOptions, total=False):
    """Options of answers that are not measured: what is done to logits before a token is chosen, and what is told of tokens.

    With drafts as without: the logits of each position are changed by what the tokens before it say, drafts included.
    """

    min_p: Annotated[
        float,
        Meta(ge=0, le=1),
        Flag("Sample from tokens that have this share of the best one's probability at least.", default="0", panel="Sampling"),
    ]
    frequency_penalty: Annotated[
        Penalty, Flag("Subtract this from a token's logit each time it occurs in the answer.", default="0")
    ]
    presence_penalty: Annotated[Penalty, Flag("Subtract this from the logit of each token of the answer.", default="0")]
    repetition_penalty: Annotated[
        float,
        Meta(gt=0, le=100),
        Flag("Divide the positive logits of tokens of prompt and answer by this, multiply the negative ones.", default="1"),
    ]
    logit_bias: Annotated[
        dict[Annotated[int, Meta(ge=0)], Annotated[float, Meta(ge=-100, le=100)]],
        Meta(description="an object of token ids with numbers in [-100, 100]"),
        Flag('Add these numbers to the logits of tokens, such as {"15": -100}.'),
    ]
    min_tokens: Annotated[CountOrNone, Flag("No token ends the answer before it has so many.", default="0", panel="Decoding")]
    ignore_eos: Annotated[bool, Flag("Go on after the tokens that end an answer.", default="no")]
    stop_token_ids: Annotated[Sequence[Annotated[int, Meta(ge=0)]], Flag("End the answer at these token ids, too: 5,17.")]
    schema: Annotated[
        dict[str, Any],
        Meta(description="a JSON schema, an object"),
        Flag("Answer in JSON that matches the JSON schema in this file.", reads="file"),
    ]
    regex: Annotated[Text, Flag("Answer with a text that matches this regular expression.")]
    grammar: Annotated[Text, Flag("Answer with a text of the Lark grammar in this file.", reads="file")]
    choice: Annotated[
        Sequence[Text],
        Meta(min_length=1, description="a list of texts, at least one"),
        Flag("Answer with this text. Repeated: with one of these.", repeated=True),
    ]
    logprobs: Annotated[
        int,
        Meta(ge=0, le=20),
        Flag("In answers of --jsonl: log probabilities of the tokens, and of so many of the best in their places."),
    ]
    prompt_logprobs: Annotated[bool, Flag("The same of the prompt's tokens.", default="no")]


_OF_A_REQUEST = (  # what a policy does not set
    *("max_new_tokens", "stop", "temperature", "top_k", "top_p", "seed"),
    *(name for name in RequestOptions.__annotations__ if name not in DecodingOptions.__annotations__),
)


GUIDES = ("schema", "regex", "grammar", "choice")


class Measured(TypedDict):
    """What a sweep measured of a policy: the task's metric, its value at full depth, and the speed over plain decoding."""

    task: str
    metric: str
    value: float
    full_depth: float
    speedup: float


class Policy(DecodingOptions, total=False):
    """Options that a sweep saved with a model, with what it measured. Limit, stop strings and sampling are the request's.

    `draft_weights` is the copy that drafts. `draft_copies`, `draft_head` and `draft_vocab` say how drafts were stored, as in
    PackingConfig; the copies are those of adaptive drafting, none: the one that it gets without being asked.
    """

    draft_weights: Quantization
    draft_copies: Sequence[Quantization]
    draft_head: Quantization
    draft_vocab: CountOrNone
    measured: Measured


@dataclass(frozen=True)
class DraftProfile:
    """What was measured of drafting with a model, where adaptive drafting starts. Drafters by name: `exit 8`, `int8`.

    `acceptance`: the probability that a draft is accepted given that those before it in the round were. `passes`: milliseconds
    of a pass of the target by its rows, from 1 on. `drafts`: milliseconds of a draft token. `draft_head` and `draft_vocab`: how
    drafts were stored, as in PackingConfig.
    """

    acceptance: dict[str, Annotated[float, Meta(ge=0, le=1)]] = field(default_factory=dict)
    passes: tuple[Milliseconds, ...] = ()
    drafts: dict[str, Milliseconds] = field(default_factory=dict)
    draft_head: Quantization | None = None
    draft_vocab: CountOrNone = 0


_UNKNOWN = DraftProfile()


@dataclass(frozen=True)
class DecodingConfig:
    """A strategy with all that it needs: DecodingOptions, completed for a checkpoint.

    `draft_weights`: the low-bit copy that drafts; None for the model's own weights. `exits`: those that adaptive drafting and
    `exit_confidence` choose among. `profile`: where adaptive drafting starts. `policy`: the saved one that this is. `guided`:
    one of GUIDES and its text, JSON but for a `regex` and a `grammar`; `guide`: this compiled for the checkpoint's tokenizer.
    """

    strategy: str = "self-speculative"
    exit_layer: int | None = None  # of self-speculative decoding and early exit
    num_draft_tokens: int = 6  # per round
    max_new_tokens: int = MAX_NEW_TOKENS
    draft_confidence: float = 0.0
    stop: tuple[str, ...] = ()
    draft_weights: Quantization | None = None
    lookup: int = 0
    exits: tuple[int, ...] = ()
    exit_confidence: float = 0.0
    skip: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    guided: tuple[str, str] | None = None
    guide: "Guide | None" = None
    logprobs: int | None = None
    prompt_logprobs: bool = False
    profile: DraftProfile = field(default=_UNKNOWN, hash=False)
    policy: str | None = field(default=None, compare=False)

    @property
    def penalises(self) -> bool:
        return bool(self.frequency_penalty or self.presence_penalty) or self.repetition_penalty != 1

    @property
    def changes_logits(self) -> bool:
        """Whether a row's own options change its logits before a token is chosen."""
        return self.penalises or bool(self.logit_bias or self.min_tokens or self.guided)

    @property
    def shared(self) -> "DecodingConfig":
        """What the rows of one loop have in common: their limits, stops, seeds and changes of logits are each row's own."""
        return replace(self, **{name: getattr(_ROWS_OWN, name) for name in _OF_A_ROW})


_ROWS_OWN = DecodingConfig(max_new_tokens=1)
_OF_A_ROW = (
    *("max_new_tokens", "stop", "seed", "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias"),
    *("min_tokens", "ignore_eos", "stop_token_ids", "guided", "guide", "logprobs", "prompt_logprobs"),
)


@dataclass(frozen=True)
class Recommended:
    """What a checkpoint recommends. No `strategy`: its exits were not trained or measured.

    `exits`: those that were trained. `skip`: the layers that a search found, with its draft length.
    """

    exit_layer: int
    num_draft_tokens: int
    strategy: str | None = None
    exits: tuple[int, ...] = ()
    skip: DecodingOptions | None = None
    profile: DraftProfile = _UNKNOWN


def resolve(options: DecodingOptions, known: Recommended, num_layers: int, packing: PackingConfig = _PLAIN) -> DecodingConfig:
    """What was asked, completed by what the checkpoint of `num_layers` layers recommends.

    A strategy that is left open is the checkpoint's, or adaptive. Raises ConfigError for an exit outside the model and for
    options that contradict each other.
    """
    strategy = implied_strategy(options)
    if strategy is None:
        strategy = "adaptive" if packing.drafts_apart or known.strategy is None else known.strategy
        if options.get("lookup") and strategy not in used_by("lookup"):
            strategy = "adaptive"
    given = choices(options)
    if "exit_confidence" in given:
        for name in given.keys() & {"exit_layer", "num_draft_tokens", "draft_confidence"}:
            reason = "chooses exits itself" if name == "exit_layer" else "drafts nothing"
            raise refused(name, f"left out with `exit_confidence`, which {reason}", str(given[name]))
    said = _said(options)
    if said.get("prompt_logprobs"):
        require("logprobs" in said, "prompt_logprobs", "used with `logprobs`", "none")
        require("exit_confidence" not in given, "prompt_logprobs", "left out with `exit_confidence`", "both")
    require("exits" not in given or "exit_confidence" in given, "exits", "used with `exit_confidence`", "none")
    for name in given:
        users = used_by(name)
        require(strategy in users, name, f"used with `strategy` {' or '.join(users)}", f"`strategy` {strategy}")
    return resolve_as(strategy, options, known, num_layers, packing)


def resolve_as(
    strategy: str, options: DecodingOptions, known: Recommended, num_layers: int, packing: PackingConfig = _PLAIN
) -> DecodingConfig:
    """The same for one strategy; options that it does not use have no effect.

    The first of the low-bit copies drafts: with all its layers, unless an exit was given or trained.
    """
    asked = _said(options)
    completed: dict[str, Any] = {"num_draft_tokens": known.num_draft_tokens, "guided": _guided(asked)}
    if strategy in ("self-speculative", "draft-and-verify") and packing.draft_weights:
        completed["draft_weights"] = packing.draft_weights[0]
    match strategy:
        case "early-exit" if asked.get("exit_confidence"):
            needed = "used with a model whose exits were trained (`layerskip finetune`), or with `exits`"
            require(bool(asked.get("exits") or known.exits), "exit_confidence", needed, "neither")
            for exit_layer in asked.get("exits", ()):
                require_exit_layer(exit_layer, num_layers, field="exits")
            completed["exits"] = spread_exits(known.exits, num_layers)
        case "early-exit" | "self-speculative":
            of_copies = "draft_weights" in completed
            all_layers = of_copies and "exit_layer" not in asked and not known.exits
            completed["exit_layer"] = exit_layer = num_layers if all_layers else asked.get("exit_layer", known.exit_layer)
            require_exit_layer(exit_layer, num_layers, may_be_last=of_copies or strategy == "early-exit")
        case "draft-and-verify":
            completed |= {} if "skip" in asked else _said(known.skip or {})
            skip = (completed | asked).get("skip", ())
            needed = "given for `strategy` draft-and-verify, or found by `layerskip sweep-exits --search-skips --save`"
            require(bool(skip), "skip", needed, "none")
            for layer in skip:
                require_exit_layer(layer, num_layers, may_be_last=True, field="skip")
            require(len(set(skip)) < num_layers, "skip", "a list that leaves at least one layer", f"all {num_layers} layers")
        case "adaptive":
            completed |= {"exits": known.exits, "num_draft_tokens": _MOST_DRAFTS, "profile": known.profile}
    return decoding(strategy, cast(DecodingOptions, completed | asked))


def _guided(asked: dict[str, Any]) -> tuple[str, str] | None:
    """Takes from the options what the answer must match. Raises ConfigError for two such options, and others that forbid it."""
    given = {name: asked.pop(name) for name in GUIDES if name in asked}
    if not given:
        return None
    (kind, value), *others = given.items()
    for other in [*dict(others), *(name for name in ("min_tokens", "ignore_eos") if asked.get(name))]:
        raise refused(other, f"left out with `{kind}`", "both")
    return kind, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def decoding(strategy: str, options: DecodingOptions | None = None, **fields: Any) -> DecodingConfig:
    """A strategy with the options that it uses and other fields of DecodingConfig; the rest are defaults."""
    used = {name: value for name, value in _said(options or {}).items() if strategy in used_by(name)}
    return DecodingConfig(**used | fields | {"strategy": strategy})


def implied_strategy(options: DecodingOptions) -> str | None:
    """The strategy that was named, or that another option implies; None if it is left open."""
    if strategy := options.get("strategy"):
        return strategy
    if options.get("exit_confidence"):
        return "early-exit"
    if options.get("skip"):
        return "draft-and-verify"
    drafting = any(options.get(name) for name in ("exit_layer", "num_draft_tokens", "draft_confidence"))
    return "self-speculative" if drafting else None


def choices(options: DecodingOptions) -> dict[str, Any]:
    """The requested policy, or the requested options that a policy sets. Empty: the checkpoint chooses."""
    return {name: value for name, value in _said(options).items() if value and name not in _OF_A_REQUEST}


def changed(options: RequestOptions, changes: RequestOptions) -> RequestOptions:
    """Options with others in their place. A policy replaces all that it sets, and gives way to any of that."""
    if "policy" in changes:
        kept = {name: value for name, value in options.items() if name in _OF_A_REQUEST}
    else:
        replaced = {"policy"} if choices(changes) else set()
        replaced |= set(GUIDES) if changes.keys() & set(GUIDES) else set()
        kept = {name: value for name, value in options.items() if name not in replaced}
    return cast(RequestOptions, kept | dict(changes))


def used_by(option: str) -> Sequence[str]:
    """The strategies that use an option."""
    notes = getattr(hints_of(Policy).get(option), "__metadata__", ())
    return next((note for note in notes if isinstance(note, UsedBy)), STRATEGIES)


def policy_named(policies: Mapping[str, Policy], name: str) -> Policy:
    """Raises ConfigError, which lists the saved policies, for an unknown name."""
    there = ", ".join(policies) or "there are none"
    how = f"`layerskip sweep-exits --save` saves {EXACT}, and {FAST} where an early exit keeps the quality"
    require(name in policies, "policy", f"one that is saved with the model ({there}; {how})", name)
    return policies[name]


def policy_options(policy: Policy, request: DecodingOptions) -> DecodingOptions:
    """A policy for a request, whose limit, stop strings and sampling stay. Raises ConfigError if it says more."""
    for name, value in choices(request).items():
        if name != "policy":
            text = counts_text(value) if isinstance(value, tuple) else value
            raise refused("policy", f"given without `{name}`", f"`{name}` {text}")
    own = {name: value for name, value in request.items() if name in _OF_A_REQUEST}
    decoding = {name: value for name, value in policy.items() if name in hints_of(DecodingOptions)}
    return cast(DecodingOptions, decoding | own)


def policy_packing(policy: Policy) -> PackingConfig:
    """How the weights that a policy drafts with are stored."""
    copies = (policy["draft_weights"],) if "draft_weights" in policy else tuple(policy.get("draft_copies", ()))
    return PackingConfig(draft_weights=copies, draft_head=policy.get("draft_head"), draft_vocab=policy.get("draft_vocab", 0))


def policy_text(policy: Policy) -> str:
    """`exit 8 with 6 draft tokens`, as reports name it."""
    strategy, exit_layer, drafts = policy["strategy"], policy.get("exit_layer"), policy.get("num_draft_tokens")
    if strategy == "early-exit":
        confidence = policy.get("exit_confidence")
        return f"exits by confidence {confidence:g}" if confidence else f"exit {exit_layer}"
    name = "plain decoding" if strategy == "autoregressive" else strategy
    if strategy == "self-speculative":
        name = f"exit {exit_layer}" + (f" of the {policy['draft_weights']} copies" if "draft_weights" in policy else "")
    return name if drafts is None else f"{name} with {drafts} draft tokens"


def default_exits(num_layers: int) -> tuple[int, ...]:
    """Six exits, denser among the early layers, where drafts are cheap. Of 24 layers: 3, 4, 6, 8, 12 and 18."""
    shares = (1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 3 / 4)
    return tuple(sorted({max(1, min(round(num_layers * share), num_layers - 1)) for share in shares}))


def spread_exits(exits: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """At most six of the exits, the nearest to `default_exits`: each one that is tested costs a pass of the head."""
    if len(exits) <= 6:
        return exits
    return tuple(sorted({min(exits, key=lambda known: abs(known - wanted)) for wanted in default_exits(num_layers)}))


def _said(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with tuples for lists and objects, without None and empty ones."""
    stop, bias = options.get("stop"), dict(options.get("logit_bias") or {})
    listed = {**options, "stop": [stop] if isinstance(stop, str) else stop, "logit_bias": sorted(bias.items())}
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in listed.items()}
    return {name: value for name, value in tuples.items() if value not in (None, ())}


def require_exit_layer(exit_layer: int, num_layers: int, may_be_last: bool = False, field: str = "exit_layer") -> None:
    """1..L for an early exit and for drafts by a low-bit copy; 1..L-1 for drafts that the layers above must verify."""
    last = num_layers if may_be_last else num_layers - 1
    require(1 <= exit_layer <= last, field, f"in 1..{last}", f"{exit_layer} (model has {num_layers} layers)")
