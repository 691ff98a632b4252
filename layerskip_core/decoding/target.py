"""The target: the layers that verify drafts and choose tokens, a fixed number or as many as a token
needs.
"""

from collections.abc import Collection, Hashable, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..config.decoding import DecodingConfig
from ..model.backend import Backend, DraftBlock, Submodel, TokenPass, states_at
from ..model.cache import Places, on_device
from ..model.noise import Noise
from ..model.spec import ModelSpec
from .block_writer import BlockWriter
from .graphs import GraphRecorder


class TargetOutput(NamedTuple):
    """One pass of the target over N tokens, of which S are scored."""

    logits: Tensor | None  # (S, V)
    layers: int  # how many layers gave them
    # (S,), the most probable tokens, in place of logits that nothing else reads
    choices: Tensor | None = None
    states: Tensor | None = None  # (N, D), the input of `head`, of a prefill


class FixedTarget:
    """Layers 0..E-1 for every token; E = L is the whole model. The exit's block follows if it has
    one.
    """

    # Whether decoding writes the same KV entries as prefilling the same tokens
    decodes_like_prefill = True

    def __init__(self, model: Backend, config: DecodingConfig) -> None:
        self._model = model
        self._layers = model.num_layers
        self._block = None
        if config.strategy == "early-exit":
            assert config.exit_layer is not None
            self._layers = config.exit_layer
            self._block = model.exit_blocks.get(config.exit_layer)
        # Hidden states (..., D) to logits (..., V)
        self.head = model.unembed if self._block is None else self._block.head
        exits: dict[str, Collection[int | None]] = {
            "self-speculative": (config.exit_layer,),
            "adaptive": config.exits,
        }
        drafting = exits.get(config.strategy, ())
        known = model.exit_blocks.items()
        blocks: dict[int | str, DraftBlock] = {
            exit_layer: block for exit_layer, block in known if exit_layer in drafting
        }
        blocks |= {
            name: block
            for name, block in model.drafters.items()
            if config.strategy in ("adaptive", name)
        }
        self.exit_cache = BlockWriter(model, blocks) if blocks else None  # of blocks that draft
        # Which layers and blocks write KV entries; how many tokens of a cached prefix a prefill
        # reruns.
        self.writes: Hashable = self._layers, self._block is not None, tuple(blocks)
        self.rerun = int(any(block.needs_feature for block in blocks.values()))
        self.records = model.recordable and not self.rerun  # whether its passes can be recorded
        # Layers that all tokens run; later ones write no KV entries
        self._writing = self._layers
        spec = model.spec
        if (
            isinstance(spec, ModelSpec)
            and spec.sizes
            and not (any(block.taps for block in blocks.values()) or self._block)
        ):
            self._writing = spec.attending[-1] + 1

    def run_mixed(
        self, tokens: Tensor, places: Places, scored: list[int], needs_states: bool = False
    ) -> TargetOutput:
        """A pass over N tokens, pieces of prompts among them: logits (S, V) after the tokens at the
        indices `scored`.

        These are the last of their rows. `needs_states`: those of all tokens.
        """
        if self._writing < self._layers and not needs_states:
            hidden = self._model.embed(tokens)
            writing = self._writing
            logits = None
            hidden = self._model.run_layers(hidden, 0, writing, places)
            if scored:
                counts = [
                    sum(first <= place < end for place in scored)
                    for first, end in pairwise(places.bounds)
                ]
                ends = places.moved(
                    0, [count - own for count, own in zip(places.counts, counts, strict=True)]
                )
                index = on_device(scored, hidden)
                hidden[index] = finals = self._model.run_layers(
                    hidden[index], writing, self._layers, ends
                )
                logits = self.head(finals)
            # Of blocks without KV entries, which read states of scored tokens only
            if self.exit_cache is not None:
                self.exit_cache.record({}, hidden, places)
            return TargetOutput(logits, self._layers)
        states, _ = self._run(tokens, {}, places, chooses=False)
        return TargetOutput(
            self.head(states[on_device(scored, states)]) if scored else None,
            self._layers,
            states=states,
        )

    def run_drafts(
        self,
        tokens: Tensor,
        exit_states: Mapping[int, Tensor],
        places: Places,
        recorder: GraphRecorder | None = None,
        noise: Noise | None = None,
        needs_logits: bool = True,
    ) -> TargetOutput:
        """A pass over each row's newest token and drafts, (N,), from their states at an exit, if
        there are any. Returns the choice after each token, or logits (N, V) if they are needed.

        `recorder`: of such passes, if they are recorded. `noise`: of choices.
        """
        chooses = not needs_logits and self._block is None
        if recorder is None:
            return self._pass(tokens, exit_states, places, chooses, noise)
        # A recorded pass writes the entries of its own tokens, so no earlier ones may wait
        if self.exit_cache is not None:
            self.exit_cache.write(places.cache, places.starts)
        stops = tuple(exit_states)
        inputs = (tokens, *exit_states.values())
        positions, index, kept = places.padded(places.counts, recorder.slots)
        is_padded = index.numel() > len(tokens)
        if is_padded:
            index, kept = (
                part.flatten().to(tokens.device, non_blocking=True) for part in (index, kept)
            )
            inputs = tuple(part[index] for part in inputs)

        def work(positions: Tensor, tokens: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            recorded = Places(places.cache, (), (), recorded=positions)
            output = self._pass(tokens, dict(zip(stops, states, strict=True)), recorded, chooses)
            return tuple(part for part in (output.logits, output.choices) if part is not None)

        (found,) = recorder.run(("pass", self.writes, chooses, stops), work, positions, *inputs)
        if is_padded:
            found = found[kept]
        if chooses:
            return TargetOutput(None, self._layers, found)
        return TargetOutput(found, self._layers)

    def _pass(
        self,
        tokens: Tensor,
        states: Mapping[int, Tensor],
        places: Places,
        chooses: bool,
        noise: Noise | None = None,
    ) -> TargetOutput:
        hidden, choices = self._run(tokens, states, places, chooses, noise)
        return TargetOutput(self.head(hidden) if choices is None else None, self._layers, choices)

    def _run(
        self,
        tokens: Tensor,
        states: Mapping[int, Tensor],
        places: Places,
        chooses: bool,
        noise: Noise | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs tokens (N,) from their highest exit states; returns what the head reads and, if it
        `chooses`, tokens (N,).
        """
        start = max(states, default=0)
        blocks = self.exit_cache
        choices = None
        kept = (
            () if blocks is None else (*(tap for tap in blocks.taps if tap > start), self._layers)
        )
        if 0 not in states and (
            (start == 0 and not chooses) or (blocks is not None and 0 in blocks.taps)
        ):
            states = {0: self._model.embed(tokens), **states}
        if chooses:
            step = TokenPass(tokens, places, self._layers, start, states.get(start), kept, noise)
            choices, reached = self._model.choose(step)
        else:
            reached = states_at(self._model, states[start], kept or (self._layers,), places, start)
        hidden = reached.get(self._layers, tokens)  # unused after a choice without blocks
        if blocks is not None:
            blocks.record({**states, **reached}, hidden, places)
        if self._block is not None:
            hidden = self._model.run_layers(
                hidden, self._block.layer, self._block.layer + 1, places
            )
        return hidden, choices


class CalmTarget:
    """Each token leaves at the first exit whose top probability exceeds `exit_confidence`.

    Confident Adaptive Language Modeling (CALM), Schuster et al., NeurIPS 2022, with the exit's
    softmax as its confidence. Later tokens attend, also in the layers above E, to a token that left
    at exit E. Its KV entries there are computed from its state at E (state propagation), lazily:
    once a later token needs them, for several tokens in one pass.

    For one prompt, without drafts. The prompt runs through all layers, and its last token leaves as
    every other. Exits are tested with the draft head, which may score the most frequent tokens
    only; the full head chooses the token. Where an exit has a block, the block decides.
    """

    decodes_like_prefill = False  # a prompt runs through all layers
    exit_cache = None
    records = False
    rerun = 0

    def __init__(self, model: Backend, config: DecodingConfig) -> None:
        self._model = model
        self._draft_side = model.draft_sides[None]
        self._confidence = config.exit_confidence
        self._spans = tuple(pairwise((0, *sorted(set(config.exits)), model.num_layers)))
        self._blocks = {stop: model.exit_blocks.get(stop) for _, stop in self._spans}
        self.writes: Hashable = self._spans
        self._begin = 0  # position of the first token after the prompt
        self._left = list[Tensor]()  # the states (1, D) with which tokens after the prompt left
        self._written = list[int]()  # by span: how many of these tokens have KV entries there

    def run_mixed(
        self, tokens: Tensor, places: Places, scored: list[int], needs_states: bool = False
    ) -> TargetOutput:
        """A pass over the next tokens of the only row's prompt."""
        chosen = None
        hidden = self._model.embed(tokens)
        self._begin = places.end
        # A row that was preempted is decoded once more, in a new cache
        self._left = []
        self._written = [0] * len(self._spans)
        for start, stop in self._spans:
            hidden = self._model.run_layers(hidden, start, stop, places)
            after = self._through_block(hidden, stop, places)
            if scored:
                chosen = chosen or self._leaving(after[on_device(scored, after)], stop)
        return chosen or TargetOutput(None, self._model.num_layers)

    def run_drafts(
        self,
        tokens: Tensor,
        exit_states: Mapping[int, Tensor],
        places: Places,
        recorder: GraphRecorder | None = None,
        noise: Noise | None = None,
        needs_logits: bool = True,
    ) -> TargetOutput:
        """A pass over the newest token of the only row, which returns its logits."""
        count = places.starts[0] - self._begin  # of the tokens between the prompt and this one
        hidden = self._model.embed(tokens)
        chosen = None
        for span, (start, stop) in enumerate(self._spans):
            if (written := self._written[span]) < count:  # some tokens left below this span
                left = torch.cat(self._left[written:count])
                earlier = places.cache.span(self._begin + written, places.starts[0])
                self._model.write_kv(left, start, stop, earlier)
                if (block := self._blocks[stop]) is not None:
                    self._model.write_kv(left, block.layer, block.layer + 1, earlier)
            hidden = self._model.run_layers(hidden, start, stop, places)
            self._written[span] = count + 1
            chosen = self._leaving(self._through_block(hidden, stop, places), stop)
            if chosen is not None:
                break
        assert chosen is not None
        self._left.append(hidden)
        return chosen

    def _through_block(self, hidden: Tensor, layers: int, places: Places) -> Tensor:
        """The states after `layers` layers, and after the block of that exit if it has one."""
        block = self._blocks[layers]
        return (
            hidden
            if block is None
            else self._model.run_layers(hidden, block.layer, block.layer + 1, places)
        )

    def _leaving(self, hidden: Tensor, layers: int) -> TargetOutput | None:
        """The output after `layers` layers (and the exit's block) if the token leaves there, else
        None.
        """
        block = self._blocks[layers]
        if layers < self._model.num_layers:
            head, few = self._draft_side.head(
                Submodel(layers, block=block and self._draft_side.exit_blocks[layers])
            )
            if float((logits := head(hidden)).float().softmax(-1).amax()) <= self._confidence:
                return None
            if few is None:
                return TargetOutput(logits, layers)
        return TargetOutput(
            self._model.unembed(hidden) if block is None else block.head(hidden), layers
        )


Target = FixedTarget | CalmTarget


def target_of(model: Backend, config: DecodingConfig) -> Target:
    by_token = config.strategy == "early-exit" and config.exit_confidence
    return CalmTarget(model, config) if by_token else FixedTarget(model, config)
