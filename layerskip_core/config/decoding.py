"""How tokens are decoded: what was asked for, and what it means for a checkpoint."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .checks import (
    refused,
    require,
    require_choice,
    require_exit_layer,
    require_given,
    require_skip,
    require_unicode,
)
from .packing import QUANTIZATIONS, PackingConfig, Quantization
from .ranges import counts_text, require_ranges

# Each strategy that drafts, and the module whose `drafter(setup)` drafts for it.
DRAFTERS = {
    "adaptive": "layerskip_core.decoding.drafters.adaptive",
    "self-speculative": "layerskip_core.decoding.drafters.exit",
    "lookup": "layerskip_core.decoding.drafters.lookup",
    "draft-and-verify": "layerskip_core.decoding.drafters.skipping",
}


def strategies() -> tuple[str, ...]:
    """The names of all strategies: those that draft, and those that do not."""
    return (*DRAFTERS, "early-exit", "autoregressive")


MAX_NEW_TOKENS = 256
_SHORTEST, _LONGEST = 1e-4, 1e9  # milliseconds of a pass; differences of such times keep digits enough
_MOST_DRAFTS = 32  # of a round of adaptive drafting
_PLAIN = PackingConfig()


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is chosen from logits. Temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_ranges(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)


@dataclass(frozen=True)
class DraftProfile:
    """What was measured of drafting with a model, where adaptive drafting starts. Drafters by name: `exit 8`, `int8`.

    `acceptance`: the probability that a draft is accepted given that those before it in the round were. `passes`: milliseconds
    of a pass of the target by its rows, from 1 on. `drafts`: milliseconds of a draft token. `draft_head` and `draft_vocab`: how
    drafts were stored, as in PackingConfig.
    """

    acceptance: dict[str, float] = field(default_factory=dict)
    passes: tuple[float, ...] = ()
    drafts: dict[str, float] = field(default_factory=dict)
    draft_head: Quantization | None = None
    draft_vocab: int = 0

    def __post_init__(self) -> None:
        require_ranges(draft_vocab=self.draft_vocab)
        for share in self.acceptance.values():
            require(0 <= share <= 1, "acceptance", "in [0, 1]", share)
        for name, times in (("passes", self.passes), ("drafts", self.drafts.values())):
            for time in times:
                in_range = _SHORTEST <= time <= _LONGEST
                require(in_range, name, f"{_SHORTEST:g} to {_LONGEST:g} milliseconds", time)

    def without(self, exits: Iterable[int]) -> "DraftProfile":
        """Without what was measured of drafts at these exits, by the model's own layers or by copies."""
        names = tuple(f"exit {exit_layer}" for exit_layer in exits)

        def others(measured: dict[str, float]) -> dict[str, float]:
            return {name: value for name, value in measured.items() if not name.endswith(names)}

        return replace(self, acceptance=others(self.acceptance), drafts=others(self.drafts))

    def document(self) -> dict[str, object]:
        """The profile as plain values, without a head and a vocabulary that are the usual ones."""
        usual = {"draft_head": None, "draft_vocab": 0}
        return {name: value for name, value in vars(self).items() if name not in usual or value != usual[name]}


_UNKNOWN = DraftProfile()


@dataclass(frozen=True)
class DecodingConfig:
    """A strategy with all that it needs. `exit_layer` counts layers, 1..L; `num_draft_tokens` is the draft length per round.

    `draft_confidence`: a round stops drafting when the draft's most probable token has less than this probability (0: never).
    `draft_weights`: the low-bit copy that drafts; None for the model's own weights. `lookup`: before anything else drafts, the
    text after an earlier occurrence of at least this many last tokens is the draft (0: no lookup). `exit_confidence`: each
    token leaves at the first of `exits` that gives its best token more than this probability (0: at `exit_layer`). `skip`: the
    layers that the drafts of draft-and-verify leave out, by number, 1..L: layer E is the last that runs before exit E.
    `profile`: where adaptive drafting starts.
    """

    strategy: str = "self-speculative"
    exit_layer: int | None = None  # of self-speculative decoding and early exit
    num_draft_tokens: int = 6
    max_new_tokens: int = MAX_NEW_TOKENS
    draft_confidence: float = 0.0
    stop: tuple[str, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    draft_weights: Quantization | None = None
    lookup: int = 0
    exits: tuple[int, ...] = ()  # that adaptive drafting and `exit_confidence` choose among
    exit_confidence: float = 0.0
    skip: tuple[int, ...] = ()
    profile: DraftProfile = field(default=_UNKNOWN, hash=False)

    def __post_init__(self) -> None:
        require_choice(self.strategy, "strategy", strategies())
        if self.strategy in ("self-speculative", "early-exit") and not self.exit_confidence:
            require(self.exit_layer is not None, "exit_layer", f"given for `strategy` {self.strategy}", "none")
        if self.strategy == "draft-and-verify":
            require(bool(self.skip), "skip", f"given for `strategy` {self.strategy}", "none")
        if self.draft_weights is not None:
            require_choice(self.draft_weights, "draft_weights", QUANTIZATIONS)
        require_ranges(num_draft_tokens=self.num_draft_tokens, max_new_tokens=self.max_new_tokens)
        _require_generation(self)


@dataclass(frozen=True)
class GenerationSettings:
    """What is asked of an answer, whatever the strategy; the fields are those of DecodingConfig. None: the caller's default."""

    max_new_tokens: int | None = None
    draft_confidence: float = 0.0
    stop: tuple[str, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    lookup: int = 0
    exit_confidence: float = 0.0
    skip: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_ranges(max_new_tokens=self.max_new_tokens)
        _require_generation(self)

    def decoding(
        self,
        strategy: str,
        exit_layer: int | None = None,
        num_draft_tokens: int = 6,
        max_new_tokens: int = MAX_NEW_TOKENS,
        draft_weights: Quantization | None = None,
        exits: tuple[int, ...] = (),
        profile: DraftProfile = _UNKNOWN,
    ) -> DecodingConfig:
        """A strategy with these settings; `max_new_tokens` is the default. What the strategy does not use is left out."""
        settings = vars(self) | {"max_new_tokens": self.max_new_tokens or max_new_tokens, "draft_weights": draft_weights}
        unused = {name: value for name, value in _UNSET.items() if strategy not in USERS[name]}
        return DecodingConfig(
            strategy, exit_layer, num_draft_tokens, **settings | {"exits": exits, "profile": profile} | unused
        )


# The strategies that use a setting.
USERS = {
    "exit_layer": ("self-speculative", "early-exit"),
    "num_draft_tokens": tuple(DRAFTERS),
    "draft_confidence": ("adaptive", "self-speculative", "draft-and-verify"),
    "draft_weights": ("self-speculative", "draft-and-verify"),
    "lookup": tuple(DRAFTERS),
    "skip": ("draft-and-verify",),
    "exits": ("early-exit", "adaptive"),
    "profile": ("adaptive",),
    "exit_confidence": ("early-exit",),
}
_UNSET: dict[str, object] = {  # for the others, unless the caller gives it
    "draft_confidence": 0.0,
    "draft_weights": None,
    "lookup": 0,
    "exits": (),
    "exit_confidence": 0.0,
    "skip": (),
    "profile": _UNKNOWN,
}


@dataclass(frozen=True)
class SkipChoice:
    """The layers that drafts skip, and a draft length, as `sweep-exits --search-skips` found them."""

    layers: tuple[int, ...]
    num_draft_tokens: int


@dataclass(frozen=True)
class ExitChoice:
    """An exit and a draft length, as a checkpoint recommends them. No `strategy`: its exits were not trained or measured.

    `exits`: those that were trained. `skip`: None if no search was made.
    """

    exit_layer: int
    num_draft_tokens: int
    strategy: str | None = None
    exits: tuple[int, ...] = ()
    skip: SkipChoice | None = None
    profile: DraftProfile = _UNKNOWN


@dataclass(frozen=True)
class DecodingSettings:
    """What is asked of decoding. None, or no `exits`: not said, so that the checkpoint decides.

    `policy` names settings that are saved with the checkpoint, and stands for all that it sets.
    """

    strategy: str | None = None
    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    policy: str | None = None
    exits: tuple[int, ...] = ()  # that `exit_confidence` chooses among

    def __post_init__(self) -> None:
        if self.strategy is not None:
            require_choice(self.strategy, "strategy", strategies())
        require_ranges(num_draft_tokens=self.num_draft_tokens)
        require_given("policy", self.policy)
        if self.policy is not None:
            for name, value in self._choices.items():
                text = counts_text(value) if isinstance(value, tuple) else value
                require(not value, "policy", f"given without `{name}`", f"`{name}` {text}")

    def changed(self, **options: Any) -> "DecodingSettings":
        """The same with these values of its fields, of those of `generation` and of its `sampling`; `stop` may be one text.

        Raises TypeError for an unknown name, ConfigError for a value out of its range.
        """
        for name in ("stop", "skip", "exits"):
            if name in options:
                options[name] = (options[name],) if isinstance(options[name], str) else tuple(options[name])

        def taken(config: type) -> dict[str, Any]:
            return {field.name: options.pop(field.name) for field in fields(config) if field.name in options}

        sampling = replace(self.generation.sampling, **taken(SamplingConfig))
        generation = replace(self.generation, **taken(GenerationSettings), sampling=sampling)
        return replace(self, **options, generation=generation)

    @property
    def is_open(self) -> bool:
        """Whether nothing is said about how to draft or where to exit."""
        return self.policy is None and not any(self._choices.values())

    @property
    def _choices(self) -> dict[str, object]:
        """All that a policy sets."""
        names = ("draft_confidence", "lookup", "exit_confidence", "skip")
        own = {
            "strategy": self.strategy,
            "exit_layer": self.exit_layer,
            "num_draft_tokens": self.num_draft_tokens,
            "exits": self.exits,
        }
        return own | {name: getattr(self.generation, name) for name in names}

    @property
    def implied_strategy(self) -> str | None:
        """The strategy that was named, or that another setting implies; None if it is left open."""
        if self.strategy is not None:
            return self.strategy
        if self.generation.exit_confidence:
            return "early-exit"
        if self.generation.skip:
            return "draft-and-verify"
        drafting = (self.exit_layer, self.num_draft_tokens) != (None, None) or self.generation.draft_confidence > 0
        return "self-speculative" if drafting else None

    def resolve(self, recommended: ExitChoice, num_layers: int, packing: PackingConfig = _PLAIN) -> DecodingConfig:
        """What was asked, completed by what the checkpoint of `num_layers` layers recommends.

        A strategy that is left open is the checkpoint's, or adaptive. Raises ConfigError for an exit outside the model and for
        settings that contradict each other.
        """
        strategy = self.implied_strategy or self._strategy_of(recommended, packing)
        self._require_consistent(strategy)
        return self.resolve_as(strategy, recommended, num_layers, packing)

    def _strategy_of(self, recommended: ExitChoice, packing: PackingConfig) -> str:
        """What the checkpoint recommends, if that uses what was asked for; else adaptive."""
        strategy = None if packing.drafts_apart else recommended.strategy
        unused = self.generation.lookup > 0 and strategy not in USERS["lookup"]
        return "adaptive" if strategy is None or unused else strategy

    def _require_consistent(self, strategy: str) -> None:
        """Raises ConfigError for settings that this strategy does not use, or that contradict each other."""
        confidence, given = self.generation.exit_confidence, self._choices
        for name in ("exit_layer", "num_draft_tokens", "draft_confidence"):
            reason = "chooses exits itself" if name == "exit_layer" else "drafts nothing"
            require(not (confidence and given[name]), name, f"left out with `exit_confidence`, which {reason}", given[name])
        require(bool(confidence) or not self.exits, "exits", "used with `exit_confidence`", "none")
        for name, users in USERS.items():
            unused = given.get(name) and strategy not in users
            require(not unused, name, f"used with `strategy` {' or '.join(users)}", f"`strategy` {strategy}")

    def resolve_as(
        self, strategy: str, recommended: ExitChoice, num_layers: int, packing: PackingConfig = _PLAIN
    ) -> DecodingConfig:
        """The same for one strategy; settings that it does not use have no effect.

        The first of the low-bit copies drafts: with all its layers, unless an exit was given or trained.
        """
        if strategy == "early-exit" and self.generation.exit_confidence:
            return self.generation.decoding(strategy, exits=self._exits_to_test(recommended.exits, num_layers))
        weights = packing.draft_weights[0] if packing.draft_weights else None
        if strategy == "draft-and-verify":
            skip = self._skip(recommended, num_layers)
            drafts = self.num_draft_tokens or skip.num_draft_tokens
            return replace(self.generation, skip=skip.layers).decoding(strategy, None, drafts, draft_weights=weights)
        exit_layer = recommended.exit_layer if self.exit_layer is None else self.exit_layer
        if strategy == "self-speculative":
            if weights and self.exit_layer is None and not recommended.exits:
                exit_layer = num_layers
            require_exit_layer(exit_layer, num_layers, weights is not None)
        elif strategy == "early-exit":
            require_exit_layer(exit_layer, num_layers, may_be_last=True)
        elif strategy == "adaptive":
            for trained in recommended.exits:
                require_exit_layer(trained, num_layers)
        drafts = _MOST_DRAFTS if strategy == "adaptive" else recommended.num_draft_tokens
        if self.num_draft_tokens is not None:
            drafts = self.num_draft_tokens
        return self.generation.decoding(
            *(strategy, exit_layer, drafts), draft_weights=weights, exits=recommended.exits, profile=recommended.profile
        )

    def _skip(self, recommended: ExitChoice, num_layers: int) -> SkipChoice:
        """The layers to skip that were given, else those that a search found. Raises ConfigError if there are none."""
        skip = recommended.skip
        if self.generation.skip:
            skip = SkipChoice(self.generation.skip, recommended.num_draft_tokens)
        if skip is None:
            needed = "given for `strategy` draft-and-verify, or found by `layerskip sweep-exits --search-skips --save`"
            raise refused("skip", needed, "none")
        require_skip(skip.layers, num_layers)
        return skip

    def _exits_to_test(self, trained: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
        """The exits that `exit_confidence` chooses among: those given, else a spread of the trained ones."""
        needed = "used with a model whose exits were trained (`layerskip finetune`), or with `exits`"
        require(bool(self.exits or trained), "exit_confidence", needed, "neither")
        for exit_layer in self.exits:
            require_exit_layer(exit_layer, num_layers, field="exits")
        return self.exits or spread_exits(trained, num_layers)


def default_exits(num_layers: int) -> tuple[int, ...]:
    """Six exits, denser among the early layers, where drafts are cheap. Of 24 layers: 3, 4, 6, 8, 12 and 18."""
    shares = (1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 3 / 4)
    return tuple(sorted({max(1, min(round(num_layers * share), num_layers - 1)) for share in shares}))


def spread_exits(exits: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """At most six of the exits, the nearest to `default_exits`: each one that is tested costs a pass of the head."""
    if len(exits) <= 6:
        return exits
    return tuple(sorted({min(exits, key=lambda known: abs(known - wanted)) for wanted in default_exits(num_layers)}))


def _require_generation(settings: DecodingConfig | GenerationSettings) -> None:
    require_ranges(draft_confidence=settings.draft_confidence, lookup=settings.lookup, exit_confidence=settings.exit_confidence)
    require(all(settings.stop), "stop", "a text that is not empty", "an empty one")
    require(all(layer >= 1 for layer in settings.skip), "skip", "layers of at least 1", ",".join(map(str, settings.skip)))
    for text in settings.stop:
        require_unicode("stop", text)
