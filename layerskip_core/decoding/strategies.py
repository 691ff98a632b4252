"""The strategies: each is a number of layers as the target, and perhaps a drafter, for the one loop."""

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from ..config.checks import require, require_exit_layer
from ..config.decoding import DRAFTERS, DecodingConfig
from ..model.backend import Backend
from ..model.exit_blocks import target_block
from .depth import Depth, DynamicDepth, FixedDepth
from .drafters import DrafterSetup, drafter_for
from .growing_text import Detokenize
from .loop import DecodingLoop, Token
from .prefix import PrefixCache
from .recorded import RecordedDepth, Recorder, recorded_sides
from .sampling import sampler_for
from .stats import DecodeStats
from .stopping import Stopping, StopReason
from .true_states import TrueStates


class Finished(NamedTuple):
    """One prompt's whole output. Its stats are counts alone: the seconds of a batch belong to no single row."""

    row: int
    ids: list[int]
    finish_reason: StopReason
    stats: DecodeStats


class Decoding:
    """One prompt: iterates over the lists of newly verified tokens, one list per step, then says why the output ended."""

    def __init__(self, loop: DecodingLoop) -> None:
        """`loop`: of one row."""
        self._loop = loop
        self.finish_reason: StopReason | None = None

    @property
    def stats(self) -> DecodeStats:
        """Counts and seconds of the steps so far."""
        return self._loop.counts(0) + self._loop.seconds

    @property
    def drafter(self) -> str | None:
        """What drafted in the last step, as in `DecodeStats.steps_by_drafter`; None if nothing could, as in the prefill."""
        return next(iter(self._loop.last_step(0).steps_by_drafter), None)

    @property
    def reused_tokens(self) -> int:
        """How many of the prompt's first tokens needed no pass."""
        return self._loop.reused_tokens

    def __iter__(self) -> Iterator[list[Token]]:
        return self

    def __next__(self) -> list[Token]:
        step = next(self._loop)[0]
        self.finish_reason = step.finish_reason
        return step.tokens


def decode(
    model: Backend,
    prompt_ids: list[int],
    config: DecodingConfig,
    eos_ids: frozenset[int] = frozenset(),
    detokenize: Detokenize | None = None,
    *,
    reuse_exit_states: bool = True,
    prefix: PrefixCache | None = None,
) -> Decoding:
    """Decodes a prompt by the config's strategy.

    Greedy self-speculative decoding gives the tokens of autoregressive decoding; sampled, it gives their distribution.
    `detokenize` (ids to text) is needed for stop strings only. `reuse_exit_states=False` makes the target recompute the layers
    below the exit, to measure what reuse saves. `prefix`: what the decoding before left; that one must not go on. Raises
    ConfigError for an exit that the model does not have and a prompt that does not fit.
    """
    return Decoding(loop_of(model, [prompt_ids], config, eos_ids, detokenize, reuse_exit_states, prefix=prefix, alone=True))


def decode_batch(
    model: Backend,
    prompts: Sequence[list[int]],
    config: DecodingConfig,
    eos_ids: frozenset[int] = frozenset(),
    detokenize: Detokenize | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[Finished]:
    """Decodes prompts together by the config's strategy; yields each output when it is complete.

    In fp32 and above a row's greedy output is the one that `decode` gives for its prompt alone, near-ties excepted. Each
    sampled row has the config's seed, or its own of `seeds`. Rows stand at different positions, because a key's place in the
    cache is its token's position. Raises ConfigError for a prompt or an exit that does not fit, and for several prompts with
    exact weights or with an `exit_confidence`, with which the rows would leave at different exits.
    """
    single = len(prompts) == 1
    require(single or not model.exact, "batch_size", "1 with `exact`", len(prompts))
    require(single or not config.exit_confidence, "batch_size", "1 with `exit_confidence`", len(prompts))
    loop = loop_of(model, prompts, config, eos_ids, detokenize, seeds=seeds)
    ids: list[list[int]] = [[] for _ in prompts]
    for steps in loop:
        for row, tokens, reason, _ in steps:
            ids[row] += [token.id for token in tokens]
            if reason is not None:
                yield Finished(row, ids[row], reason, loop.counts(row))


def loop_of(
    model: Backend,
    prompts: Sequence[list[int]],
    config: DecodingConfig,
    eos_ids: frozenset[int],
    detokenize: Detokenize | None,
    reuse_exit_states: bool = True,
    seeds: Sequence[int] | None = None,
    prefix: PrefixCache | None = None,
    alone: bool = False,
) -> DecodingLoop:
    """The loop that decodes prompts by the config's strategy. Raises ConfigError as `decode` does.

    `alone`: it has one row, and no others will join. Its passes are recorded where the model allows it.
    """
    sampler, drafter = sampler_for(config, model.device, len(prompts), seeds), None
    true_states = _true_states(model, config)
    depth = _depth_of(model, config, true_states)
    recorder = sides = None
    carries = true_states is not None and true_states.needs_finals
    if alone and model.recordable and prefix is None and not carries and isinstance(depth, FixedDepth):
        recorder = Recorder.of(model, min(len(prompts[0]) + config.max_new_tokens, model.max_positions))
        depth, sides = RecordedDepth(depth, recorder), recorded_sides(model, recorder)
    if config.strategy in DRAFTERS:
        drafter = drafter_for(DrafterSetup(model, sampler, config, eos_ids, reuse_exit_states, sides))
    stopping = Stopping(eos_ids, config.stop, config.max_new_tokens)
    if prefix is not None:
        prefix.suit(model, config)
    return DecodingLoop(
        *(model, prompts, stopping, sampler, depth, drafter, config.num_draft_tokens, detokenize, true_states, prefix),
        cache=None if recorder is None else recorder.cache,
        at_end=None if recorder is None else partial(recorder.give_back, model),
    )


def _true_states(model: Backend, config: DecodingConfig) -> TrueStates | None:
    """For the blocks of the exits that draft; None if there are none."""
    exits: dict[str, Collection[int | None]] = {"self-speculative": (config.exit_layer,), "adaptive": config.exits}
    drafting = exits.get(config.strategy, ())
    blocks = [block for exit_layer, block in model.exit_blocks.items() if exit_layer in drafting]
    return TrueStates(model, blocks) if blocks else None


def _depth_of(model: Backend, config: DecodingConfig, true_states: TrueStates | None) -> Depth:
    """Raises ConfigError for an exit that the model does not have, or that can only draft."""
    early, layers, greedy = config.strategy == "early-exit", model.num_layers, config.temperature == 0
    if early and config.exit_confidence:
        require(bool(config.exits), "exits", "given with `exit_confidence`", "none")
        for exit_layer in config.exits:
            require_exit_layer(exit_layer, layers, field="exits")
        return DynamicDepth(model, tuple(sorted(set(config.exits))), config.exit_confidence)
    if config.exit_layer is not None and config.strategy in ("early-exit", "self-speculative"):
        require_exit_layer(config.exit_layer, layers, early or config.draft_weights is not None)
    if early and config.exit_layer is not None:
        return FixedDepth(model, config.exit_layer, block=target_block(model.exit_blocks, config.exit_layer), greedy=greedy)
    return FixedDepth(model, layers, true_states, greedy=greedy)
