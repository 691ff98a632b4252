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
        drafting: dict[str, Collection[int | None]] = {
            "self-speculative": (config.exit_layer,),
            "adaptive": config.exits,
        }
        blocks = dict[int | str, DraftBlock]()
        for exit_layer, exit_block in model.exit_blocks.items():
            if exit_layer in drafting.get(config.strategy, ()):
                blocks[exit_layer] = exit_block
        for name, block in model.drafters.items():
            if config.strategy in ("adaptive", name):
                blocks[name] = block
        self.block_writer = BlockWriter(model, blocks) if blocks else None
        # Prefixes are shared by targets of equal keys: these layers and blocks write KV entries
        self.kv_key: Hashable = self._layers, self._block is not None, tuple(blocks)
        # How many tokens of a kept prefix a prefill runs again, for their features
        self.rerun = int(any(block.needs_feature for block in blocks.values()))
        self.can_record = model.recordable and not self.rerun  # its passes, as CUDA graphs
        # The layers that all tokens of a prompt run
        self._kv_layers = self._layers
        spec = model.spec
        reads_states = self._block is not None or any(block.taps for block in blocks.values())
        if isinstance(spec, ModelSpec) and spec.sizes and not reads_states:
            # Gemma 3n and 4: layers after the last attending one read its KV entries and write none
            self._kv_layers = spec.attending[-1] + 1

    def run_mixed(
        self, tokens: Tensor, places: Places, scored: list[int], needs_states: bool = False
    ) -> TargetOutput:
        """A pass over N tokens, chunks of prompts among them: logits (S, V) after the tokens at the
        indices `scored`.

        These are the last of their rows. `needs_states`: those of all tokens.
        """
        if self._kv_layers < self._layers and not needs_states:
            return self._run_kv_layers(tokens, places, scored)
        states = self._run_states(tokens, {}, places)
        logits = None
        if scored:
            logits = self.head(states[on_device(scored, states)])
        return TargetOutput(logits, self._layers, states=states)

    def _run_kv_layers(self, tokens: Tensor, places: Places, scored: list[int]) -> TargetOutput:
        """As `run_mixed`; only scored tokens run the layers that write no KV entries."""
        hidden = self._model.run_layers(self._model.embed(tokens), 0, self._kv_layers, places)
        logits = None
        if scored:
            skipped = []
            for start, end in pairwise(places.bounds):
                num_scored = sum(start <= index < end for index in scored)
                skipped.append(end - start - num_scored)
            index = on_device(scored, hidden)
            finals = self._model.run_layers(
                hidden[index], self._kv_layers, self._layers, places.moved(0, skipped)
            )
            hidden[index] = finals
            logits = self.head(finals)
        # Blocks without taps write no KV entries. They read final states, of scored tokens only
        self._take_states({}, hidden, places)
        return TargetOutput(logits, self._layers)

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
        # The model's own choice is by the head of all layers
        chooses = not needs_logits and self._block is None
        if recorder is None:
            return self._run_pass(tokens, exit_states, places, chooses, noise)
        # A recorded pass writes the entries of its own tokens, so no earlier ones may wait
        if self.block_writer is not None:
            self.block_writer.write(places.cache, places.starts)
        exits = tuple(exit_states)
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
            own_states = dict(zip(exits, states, strict=True))
            output = self._run_pass(tokens, own_states, recorded, chooses)
            return tuple(part for part in (output.logits, output.choices) if part is not None)

        (result,) = recorder.run(("pass", self.kv_key, chooses, exits), work, positions, *inputs)
        if is_padded:
            result = result[kept]
        if chooses:
            return TargetOutput(None, self._layers, result)
        return TargetOutput(result, self._layers)

    def _run_pass(
        self,
        tokens: Tensor,
        states: Mapping[int, Tensor],
        places: Places,
        chooses: bool,
        noise: Noise | None = None,
    ) -> TargetOutput:
        if chooses:
            return TargetOutput(
                None, self._layers, self._choose_tokens(tokens, states, places, noise)
            )
        return TargetOutput(self.head(self._run_states(tokens, states, places)), self._layers)

    def _choose_tokens(
        self,
        tokens: Tensor,
        states: Mapping[int, Tensor],
        places: Places,
        noise: Noise | None,
    ) -> Tensor:
        """The model's choices after tokens (N,), from their highest states on."""
        if self._needs_embeddings(states):
            states = {0: self._model.embed(tokens), **states}
        start = max(states, default=0)
        step = TokenPass(
            tokens, places, self._layers, start, states.get(start), self._taps(start), noise
        )
        choices, reached = self._model.choose(step)
        if self.block_writer is not None:
            self._take_states({**states, **reached}, reached[self._layers], places)
        return choices

    def _run_states(self, tokens: Tensor, states: Mapping[int, Tensor], places: Places) -> Tensor:
        """The states (N, D) that the head reads, from the highest of `states` on."""
        if not states or self._needs_embeddings(states):
            states = {0: self._model.embed(tokens), **states}
        start = max(states)
        ends = self._taps(start) or (self._layers,)
        reached = states_at(self._model, states[start], ends, places, start)
        hidden = reached[self._layers]
        self._take_states({**states, **reached}, hidden, places)
        if self._block is not None:
            layer = self._block.layer
            hidden = self._model.run_layers(hidden, layer, layer + 1, places)
        return hidden

    def _needs_embeddings(self, states: Mapping[int, Tensor]) -> bool:
        """Whether a block that drafts reads embeddings, which a draft's states may lack."""
        return self.block_writer is not None and 0 in self.block_writer.taps and 0 not in states

    def _taps(self, start: int) -> tuple[int, ...]:
        """The layers above `start` after which blocks that draft read states."""
        if self.block_writer is None:
            return ()
        return (*(tap for tap in self.block_writer.taps if tap > start), self._layers)

    def _take_states(self, states: Mapping[int, Tensor], finals: Tensor, places: Places) -> None:
        if self.block_writer is not None:
            self.block_writer.take(states, finals, places)


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
    block_writer = None
    can_record = False
    rerun = 0

    def __init__(self, model: Backend, config: DecodingConfig) -> None:
        self._model = model
        self._draft_side = model.draft_sides[None]
        self._confidence = config.exit_confidence
        self._stages = tuple(pairwise((0, *sorted(set(config.exits)), model.num_layers)))
        self._blocks = {end: model.exit_blocks.get(end) for _, end in self._stages}
        self.kv_key: Hashable = self._stages
        self._prompt_end = 0
        # The states (1, D) with which tokens after the prompt left
        self._exit_states = list[Tensor]()
        self._written = list[int]()  # by stage: how many of these tokens have KV entries there

    def run_mixed(
        self, tokens: Tensor, places: Places, scored: list[int], needs_states: bool = False
    ) -> TargetOutput:
        """A pass over the next tokens of the only row's prompt."""
        chosen = None
        hidden = self._model.embed(tokens)
        self._prompt_end = places.end
        # A row that was preempted is decoded once more, in a new cache
        self._exit_states = []
        self._written = [0] * len(self._stages)
        for start, end in self._stages:
            hidden = self._model.run_layers(hidden, start, end, places)
            after = self._through_block(hidden, end, places)
            if scored and chosen is None:
                chosen = self._leaving(after[on_device(scored, after)], end)
        return chosen or TargetOutput(None, self._model.num_layers)

    def run_drafts(
        self, tokens: Tensor, exit_states: Mapping[int, Tensor], places: Places, *_: object
    ) -> TargetOutput:
        """A pass over the newest token of the only row, without drafts; returns its logits."""
        count = places.starts[0] - self._prompt_end  # of the tokens between the prompt and this one
        hidden = self._model.embed(tokens)
        chosen = None
        for stage, (start, end) in enumerate(self._stages):
            written = self._written[stage]
            if written < count:  # some tokens left below this stage
                states = torch.cat(self._exit_states[written:count])
                earlier = places.cache.span(self._prompt_end + written, places.starts[0])
                self._model.write_kv(states, start, end, earlier)
                block = self._blocks[end]
                if block is not None:
                    self._model.write_kv(states, block.layer, block.layer + 1, earlier)
            hidden = self._model.run_layers(hidden, start, end, places)
            self._written[stage] = count + 1
            chosen = self._leaving(self._through_block(hidden, end, places), end)
            if chosen is not None:
                break
        assert chosen is not None
        self._exit_states.append(hidden)
        return chosen

    def _through_block(self, hidden: Tensor, layers: int, places: Places) -> Tensor:
        """The states after `layers` layers, and after the block of that exit if it has one."""
        block = self._blocks[layers]
        if block is None:
            return hidden
        return self._model.run_layers(hidden, block.layer, block.layer + 1, places)

    def _leaving(self, hidden: Tensor, layers: int) -> TargetOutput | None:
        """The output after `layers` layers (and the exit's block) if the token leaves there, else
        None.
        """
        block = self._blocks[layers]
        if layers < self._model.num_layers:
            draft_block = block and self._draft_side.exit_blocks[layers]
            head, vocabulary = self._draft_side.head(Submodel(layers, block=draft_block))
            logits = head(hidden)
            if float(logits.float().softmax(-1).amax()) <= self._confidence:
                return None
            if vocabulary is None:
                return TargetOutput(logits, layers)
        full_head = self._model.unembed if block is None else block.head
        return TargetOutput(full_head(hidden), layers)


Target = FixedTarget | CalmTarget


def target_of(model: Backend, config: DecodingConfig) -> Target:
    by_token = config.strategy == "early-exit" and config.exit_confidence
    return CalmTarget(model, config) if by_token else FixedTarget(model, config)
