"""How tokens are decoded: requested options (DecodingOptions), and a strategy with all of its
settings (DecodingConfig).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, cast

from msgspec import Meta

from .model import Quantization
from .options import (
    BatchSize,
    Count,
    CountOrNone,
    Drafts,
    Flag,
    Layer,
    ModelName,
    Ratio,
    Seed,
    Share,
    Temperature,
    Text,
    Texts,
    Without,
    one_of,
)

if TYPE_CHECKING:
    from ..grammar import Matcher

_DRAFTERS = "layerskip_core.decoding.drafters"
_OF_DRAFTERS = ("num_draft_tokens", "lookup")  # options that every drafter uses
_BY_A_MODEL = (*_OF_DRAFTERS, "draft_vocab")  # and every drafter with a head


@dataclass(frozen=True)
class Strategy:
    """What options, benchmarks and sweeps know of a strategy. A new drafter is one of these, and
    its module.
    """

    drafter: str | None = None  # the module of its `drafter(setup)`; None: it drafts nothing
    # Its options, also of the packing, that some strategies do not use; others are used by all
    options: tuple[str, ...] = ()
    implied_by: tuple[str, ...] = ()  # options that choose it if none is named
    # It is measured if the model or the options have one of these, see `suiting_strategies`
    needs: tuple[str, ...] = ()
    # Draft lengths that a sweep measures, or predicts; empty: it has no fixed one, or none at all
    lengths: tuple[int, ...] = (4, 8, 16)

    @property
    def drafts(self) -> bool:
        return self.drafter is not None

    @property
    def has_exit(self) -> bool:
        return "exit_layer" in self.options


STRATEGIES = {
    "adaptive": Strategy(
        f"{_DRAFTERS}.adaptive",
        (*_BY_A_MODEL, "draft_model", "exits"),
        lengths=(),
    ),
    "self-speculative": Strategy(
        f"{_DRAFTERS}.submodel",
        (*_BY_A_MODEL, "exit_layer", "draft_weights"),
        implied_by=("exit_layer", "num_draft_tokens"),
        needs=("exits", "draft_weights"),
        lengths=(2, 4, 6, 8, 12, 16, 24, 32),
    ),
    "mtp": Strategy(f"{_DRAFTERS}.submodel", _BY_A_MODEL, needs=("mtp",)),
    "eagle3": Strategy(f"{_DRAFTERS}.submodel", _BY_A_MODEL, needs=("eagle3",)),
    "lookup": Strategy(f"{_DRAFTERS}.lookup_drafter", _OF_DRAFTERS),
    "draft-and-verify": Strategy(
        f"{_DRAFTERS}.submodel",
        (*_BY_A_MODEL, "skip", "draft_weights"),
        implied_by=("skip",),
        needs=("skip",),
    ),
    "draft-model": Strategy(
        f"{_DRAFTERS}.draft_model",
        (*_BY_A_MODEL, "draft_model"),
        needs=("draft_model",),
        lengths=(),  # a policy could not name the model
    ),
    "early-exit": Strategy(
        options=("exit_layer", "exit_confidence", "exits"),
        implied_by=("exit_confidence",),
        needs=("exits",),
        lengths=(),
    ),
    "autoregressive": Strategy(lengths=()),
}
KEY = "LAYERSKIP_API_KEY"  # environment variable of a server
GUIDES = ("schema", "regex", "grammar", "choice")
MAX_NEW_TOKENS = 256
UNLIMITED = 10_000_000  # new tokens: an answer may fill the context
REMEMBERED = 131_072

Penalty = Annotated[float, Meta(ge=-2, le=2)]
Milliseconds = Annotated[float, Meta(ge=1e-4, le=1e9)]  # differences of these stay precise
Remember = Annotated[
    CountOrNone,
    Flag(
        "Tokens of earlier answers (of all clients) that lookups search too; 0: none.",
        panel="Decoding",
    ),
]


class StrategyOptions(TypedDict, total=False):
    """Which strategy, and how it drafts. Policies set these; rows that are decoded in one pass share
    them. Layers are counts: exit E is after E layers.

    Of an option without a `default` text --help shows the default of DecodingConfig.
    """

    strategy: Annotated[
        str,
        one_of(*STRATEGIES),
        Flag("Decoding strategy.", None, "adaptive, or by other flags", "Decoding"),
    ]
    exit_layer: Annotated[
        Layer, Flag("Draft with (or exit after) this many layers.", "--exit", "the checkpoint's")
    ]
    num_draft_tokens: Annotated[
        Drafts, Flag("Most draft tokens per round.", "--spec", "the checkpoint's")
    ]
    lookup: Annotated[
        int,
        Meta(ge=0, le=1_000),
        Flag("First draft what followed the last N tokens before; 0: no."),
    ]
    exit_confidence: Annotated[
        Ratio,
        Flag("Each token leaves at the first exit with more than this probability."),
    ]
    skip: Annotated[
        Sequence[Layer],
        Flag("Draft without these layers, from 1: 8,9,14:18.", None, "as stored by sweep-exits"),
    ]
    policy: Annotated[
        Text,
        Flag(
            "Settings stored by sweep-exits --save: exact (same output) or fast.",
            None,
            "exact, if nothing else is given",
        ),
    ]
    exits: Annotated[
        Sequence[Layer],
        Flag("Exits for --exit-confidence: 3,6,8 or A:B:STEP.", None, "the trained, at most six"),
    ]


class DecodingOptions(StrategyOptions, total=False):
    """Requested decoding options; the checkpoint completes them."""

    max_new_tokens: Annotated[
        Count,
        Flag(
            "Most tokens in an answer.",
            None,
            f"{MAX_NEW_TOKENS}; in chat and serve all that fit the context",
            "Decoding",
        ),
    ]
    stop: Annotated[Texts, Flag("End the answer before this text. Can be repeated.", repeated=True)]
    temperature: Annotated[
        Temperature,
        Flag(
            "Temperature; 0 is greedy.",
            None,
            "0; in chat and serve by generation_config.json",
            "Sampling",
        ),
    ]
    top_k: Annotated[CountOrNone, Flag("Sample from the k most probable tokens; 0: from all.")]
    top_p: Annotated[
        Share, Flag("Sample from the most probable tokens that add up to this probability.")
    ]
    seed: Annotated[Seed, Flag("Seed of sampling.")]


class RequestOptions(DecodingOptions, total=False):
    """Options of a request. Measurements take those of DecodingOptions only."""

    min_p: Annotated[
        Ratio,
        Flag("Sample from tokens with this share of the best one's probability.", panel="Sampling"),
    ]
    frequency_penalty: Annotated[
        Penalty, Flag("Subtract this from a token's logit per occurrence in the answer.")
    ]
    presence_penalty: Annotated[
        Penalty, Flag("Subtract this from the logits of tokens in the answer.")
    ]
    repetition_penalty: Annotated[
        float,
        Meta(gt=0, le=100),
        Flag("Divide positive logits of earlier tokens by this, multiply negative ones."),
    ]
    logit_bias: Annotated[
        dict[Annotated[int, Meta(ge=0)], Annotated[float, Meta(ge=-100, le=100)]],
        Meta(description="an object of token ids with numbers in [-100, 100]"),
        Flag('Add these numbers to the logits of tokens, such as {"15": -100}.'),
    ]
    min_tokens: Annotated[CountOrNone, Flag("Least tokens in an answer.", panel="Decoding")]
    ignore_eos: Annotated[bool, Flag("Go on after the tokens that end an answer.")]
    stop_token_ids: Annotated[
        Sequence[Annotated[int, Meta(ge=0)]], Flag("End the answer at these token ids, too: 5,17.")
    ]
    schema: Annotated[
        dict[str, Any],
        Meta(description="a JSON schema, an object"),
        Flag("JSON schema of the answer, a file.", reads="file"),
    ]
    regex: Annotated[Text, Flag("Answer with a text that matches this regular expression.")]
    grammar: Annotated[
        Text, Flag("Answer with a text of the Lark grammar in this file.", reads="file")
    ]
    choice: Annotated[
        Sequence[Text],
        Meta(min_length=1, description="a list of texts, at least one"),
        Flag("Answer with this text. Repeated: with one of these.", repeated=True),
    ]
    logprobs: Annotated[
        int,
        Meta(ge=0, le=20),
        Flag("With --jsonl: log probabilities of tokens and of N alternatives."),
    ]
    prompt_logprobs: Annotated[bool, Flag("The same of the prompt's tokens.")]


_OF_A_STRATEGY = StrategyOptions.__annotations__.keys()


@dataclass(frozen=True)
class DraftProfile:
    """Measurements that adaptive drafting starts from; `acceptance` and `drafts` by drafter: `exit
    8`, `int8`.
    """

    # Acceptance rate of a draft after accepted ones
    acceptance: dict[str, Ratio] = field(default_factory=dict)
    passes: tuple[Milliseconds, ...] = ()  # of the target over 1, 2, ... tokens
    drafts: dict[str, Milliseconds] = field(default_factory=dict)  # per draft token
    draft_head: Quantization | None = None  # as in PackingConfig
    draft_vocab: CountOrNone = 0


@dataclass(frozen=True)
class DecodingConfig:
    """A strategy with all its options: DecodingOptions, completed for a checkpoint."""

    strategy: str = "self-speculative"
    exit_layer: int | None = None  # of self-speculative decoding and early exit
    num_draft_tokens: int = 6  # per round
    max_new_tokens: int = MAX_NEW_TOKENS
    stop: tuple[str, ...] = ()
    # The low-bit copy that drafts; None: the model's own weights
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
    # One of GUIDES and its text, JSON except for `regex` and `grammar`
    guided: tuple[str, str] | None = None
    # The same, compiled for the tokenizer
    guide: "Matcher | None" = field(default=None, compare=False)
    logprobs: int | None = None
    prompt_logprobs: bool = False
    profile: DraftProfile = field(default_factory=DraftProfile, hash=False)
    policy: str | None = field(default=None, compare=False)  # the saved policy that it comes from

    @property
    def penalises(self) -> bool:
        return bool(self.frequency_penalty or self.presence_penalty) or self.repetition_penalty != 1

    @property
    def changes_logits(self) -> bool:
        """Whether options of a row change its logits."""
        return self.penalises or bool(self.logit_bias or self.min_tokens or self.guided)

    @property
    def engine_settings(self) -> "DecodingConfig":
        """The options that rows decoded in one pass share; all others have their defaults."""
        names = (_OF_A_STRATEGY - {"policy"}) | {"draft_weights", "profile"}
        return DecodingConfig(**{name: getattr(self, name) for name in names})


def decoding(
    strategy: str, options: DecodingOptions | None = None, **fields: Any
) -> DecodingConfig:
    """The DecodingConfig of a strategy: the `options` that it uses, and further `fields`."""
    used = {
        name: value
        for name, value in normalized(options or {}).items()
        if strategy in used_by(name)
    }
    return DecodingConfig(**used | fields | {"strategy": strategy})


def choices(options: DecodingOptions) -> dict[str, Any]:
    """The requested options that a policy could set, and `policy`. Empty: the checkpoint
    chooses.
    """
    return {
        name: value
        for name, value in normalized(options).items()
        if value and name in _OF_A_STRATEGY
    }


def changed(options: DecodingOptions, changes: DecodingOptions) -> RequestOptions:
    """`options` with `changes`. A new policy replaces all options that policies set; such an option
    drops the policy.
    """
    replaced = set() if changes.keys().isdisjoint(GUIDES) else set(GUIDES)
    if "policy" in changes:
        replaced |= options.keys() & _OF_A_STRATEGY
    elif choices(changes):
        replaced.add("policy")
    return cast(
        RequestOptions,
        {name: value for name, value in options.items() if name not in replaced} | dict(changes),
    )


def used_by(option: str) -> Sequence[str]:
    """The strategies that use an option."""
    users = tuple(name for name, strategy in STRATEGIES.items() if option in strategy.options)
    return users or tuple(STRATEGIES)


def normalized(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with tuples for lists and objects, without empty ones."""
    stop = options.get("stop")
    bias = dict(options.get("logit_bias") or {})
    listed = {
        **options,
        "stop": [stop] if isinstance(stop, str) else stop,
        "logit_bias": sorted(bias.items()),
    }
    tuples = {
        name: tuple(value) if isinstance(value, list) else value for name, value in listed.items()
    }
    return {name: value for name, value in tuples.items() if value not in (None, ())}


@dataclass(frozen=True)
class ServeConfig:
    """Settings of a server. `decoding`: defaults of requests."""

    model: ModelName = "embedded"
    host: Annotated[
        Text, Flag("Address to listen on; 0.0.0.0 is all of this machine's.", panel="Server")
    ] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535), Flag("Port to listen on; 0: a free one.")] = 8000
    batch_size: Annotated[BatchSize, Flag("Answers that are decoded together.")] = 8
    queue_size: Annotated[
        int,
        Meta(ge=0, le=1_000_000),
        Flag("Answers that may wait; more get status 429.", "--queue"),
    ] = 256
    token_limit: Annotated[
        Count | None, Flag("Most tokens of any answer.", None, "the room in the context")
    ] = None
    body_limit: Annotated[
        int, Meta(ge=1_024, le=2**30), Flag("Most bytes of a request's body.")
    ] = 2**20
    api_key: Annotated[
        Text | None,
        Flag("Key that clients must send.", default=f"{KEY} in the environment, else none"),
    ] = None
    remember: Remember = 0
    prefix_cache: Annotated[
        int, Meta(ge=0, le=1_000_000), Flag("Megabytes for KV entries of prompts and answers.")
    ] = 512
    kv_memory: Annotated[
        Count | None, Flag("Megabytes for all KV entries.", None, "a fifth of what is free")
    ] = None
    decoding: Annotated[RequestOptions, Without(("seed", "logprobs", "prompt_logprobs"))] = field(
        default_factory=RequestOptions
    )
