"""Drafts by layers: a part of the model, or a block beside it.

Self-speculative decoding (Elhoushi et al., ACL 2024, section 4.3) drafts with the first layers,
Draft & Verify (Zhang et al., ACL 2024) with all layers but some, and a drafter beside the model
(MTP, EAGLE-3) with none of them. The paper of Draft & Verify skips attention and MLP blocks one by
one; we skip whole layers, and the target continues from the first skipped layer.
"""

from array import array
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config.decoding import STRATEGIES
from ...config.model import Quantization
from ...errors import ConfigError, require
from ...model.backend import DraftCall, DraftEnds, DraftKernel, Spans, Submodel
from ...model.eagle3 import NO_DRAFTER
from ..graphs import GraphRecorder
from ..row import Row
from ..sampling import ChoiceRun, noise_of, truncates
from .lookup import SHORTEST, RowLookup
from .protocol import Draft, DrafterSetup, DraftInput
from .stepwise import DraftingPart, StepwiseDraft

NO_ENDS = DraftEnds()


class SubmodelDrafter:
    """Drafts with a part of the model, on the target's own cache."""

    def __init__(
        self,
        setup: DrafterSetup,
        weights: Quantization | None,
        submodel: Submodel,
        source: str = "drafts",
    ) -> None:
        """Drafts with `submodel` in precision `weights`, and the exit's block if any; `source`
        names the drafter in reports.

        Raises ConfigError if no such copy was made, or with too few layers.
        """
        config = setup.config
        sides = setup.model.draft_sides
        made = ", ".join(filter(None, sides)) or "none"
        require(weights in sides, "draft_weights", f"a copy that was made: {made}", weights)
        side = sides[weights]
        if config.skip:
            last = submodel.exit_layer
            if submodel.beyond:
                last = submodel.beyond[-1][1]
            needed = f"a list with all layers after the {side.num_layers} layers kept for drafting"
            require(last <= side.num_layers, "skip", needed, last)
        else:
            last = submodel.exit_layer
            needed = f"at most the {side.num_layers} layers kept for drafting"
            require(last <= side.num_layers, "exit_layer", needed, last)
            if submodel.block is None:
                submodel = replace(submodel, block=side.exit_blocks.get(submodel.exit_layer))
        block = submodel.block
        runs_layers = block is None or submodel.exit_layer > 0
        self.source = source
        self.weights = weights
        self.submodel = submodel
        self._feature_key = submodel.exit_layer or source
        # Reading a draft from another device waits for it, which costs more than surplus drafts
        reads_each_draft = side.layers.device.type == "cpu"
        # Layers with other weights give other states than the target's
        reuses = setup.reuse_exit_states and side.shares_states and runs_layers
        self._kernel = side.kernel
        if block is not None and not runs_layers:  # such a block has a kernel of its own
            self._kernel = block.kernel
        head = side.head(submodel)
        self.vocabulary = head.vocabulary
        # A whole copy or draft model verifies guesses while it drafts. Our kernels search the row's
        # text themselves for a draft of one row
        guesses = None
        if reads_each_draft and not reuses and submodel == Submodel(side.num_layers):
            guesses = RowLookup(SHORTEST)
        self._part = DraftingPart(side, submodel, head, source, reuses, reads_each_draft, guesses)
        self._text: tuple[Row | None, array[int]] = None, array("q")

    def draft(self, given: DraftInput, limits: Sequence[int], ends: DraftEnds = NO_ENDS) -> Draft:
        """Each row's draft stops after an EOS, and a draft of one row also by `ends.survival`."""
        if self.submodel.block is not None:
            given.write_blocks()
        config = given.rows[0].config
        is_changed = any(row.processor is not None for row in given.rows)
        is_truncated = config.temperature > 0 and truncates(config)
        # A kernel drafts for one row, and chooses by the logits as they are
        if self._kernel and len(limits) == 1 and not (is_changed or is_truncated):
            return self._by_kernel(self._kernel, given, limits[0], ends)
        if given.recorder and not is_changed and self._can_record(given, limits, ends):
            return self._by_recording(given.recorder, given, limits, ends)
        return StepwiseDraft(self._part, given, limits, ends).make()

    def _can_record(self, given: DraftInput, limits: Sequence[int], ends: DraftEnds) -> bool:
        """A recording has one length for all rows of the cache, no noise, and no ends."""
        return (
            len({*limits}) == 1
            and len(limits) == len(given.num_computed_tokens)
            and all(row.config.temperature == 0 for row in given.rows)
            and not ends.needs_probs
            and given.feature(self._feature_key) is None
        )

    def _by_kernel(
        self, kernel: DraftKernel, given: DraftInput, limit: int, ends: DraftEnds
    ) -> Draft:
        """A draft of one row, in one call."""
        [row] = given.rows
        if self._part.reads_each_draft:
            ends = ends._replace(ids=row.eos_ids)
        text = given.newest
        if self._part.guesses is not None:
            text = self._searched(row)
        call = DraftCall(
            head=self._part.head,
            text=text,
            submodel=self.submodel,
            places=given.places([limit + 1], [0]),
            ends=ends,
            noise=noise_of([ChoiceRun(row, limit)]),
            feature=given.feature(self._feature_key),
            runs_last=self._part.reuses_states,
        )
        tokens, states, probs = kernel(call)
        count = len(tokens) - 1
        if not self._part.reuses_states:
            return Draft(tokens, (count,), {}, self.source, probs, (count,))
        return Draft(tokens, (count,), states, self.source, probs, (count + 1,))

    def _searched(self, row: Row) -> Tensor:
        """The row's ids (n,); a call copies only new ones."""
        if self._text[0] is not row:
            self._text = row, array("q")
        text = self._text[1]
        text.extend(row.ids[len(text) :])
        return torch.frombuffer(text, dtype=torch.long)

    def _by_recording(
        self, recorder: GraphRecorder, given: DraftInput, limits: Sequence[int], ends: DraftEnds
    ) -> Draft:
        """Equally long drafts of all rows, as one CUDA graph."""
        count = len(limits)
        slots = recorder.slots
        submodel = self.submodel
        places = given.places([limit + 1 for limit in limits], [0] * count)

        def work(newest: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
            rows = [given.rows[0]] * slots
            of_slots = replace(given, rows=rows, newest=newest, recorded=positions)
            draft = StepwiseDraft(self._part, of_slots, [limits[0]] * slots, ends).make()
            return (draft.tokens, *draft.exit_states.values())

        name = (
            "draft",
            self.weights,
            submodel.exit_layer,
            submodel.beyond,
            submodel.block is not None,
            submodel.taps,
            self._part.reuses_states,
        )
        newest = F.pad(given.newest, (0, slots - count))
        positions, _, _ = places.padded(places.counts, slots)
        # Slots without a row come last
        used = sum(places.counts)
        tokens, *states = (part[:used] for part in recorder.run(name, work, newest, positions))
        exit_states = {}
        if self._part.reuses_states:
            exit_states = dict(zip(submodel.state_layers, states, strict=True))
        return Draft(tokens, tuple(limits), exit_states, self.source)

    def observe(self, row: Row, drafted: int, verified: Sequence[int]) -> None:
        """Ignores the outcome: every round drafts in the same way."""


def drafter(setup: DrafterSetup) -> SubmodelDrafter:
    """Makes the strategy's drafter. Raises ConfigError as `SubmodelDrafter` does, and if the model
    lacks the drafter.
    """
    config = setup.config
    model = setup.model
    weights = setup.config.draft_weights
    name = config.strategy
    if name in STRATEGIES[name].needs:  # a drafter beside the model
        if name not in model.drafters:
            raise ConfigError(f"`strategy` {name}: {NO_DRAFTER.format(name)}", "strategy")
        return SubmodelDrafter(setup, None, Submodel(0, block=model.drafters[name]), name)
    if config.strategy == "draft-and-verify":
        kept = Submodel(*kept_layers(config.skip, model.num_layers))
        name = f"{weights or ''} {model.num_layers - len(set(config.skip))} of {model.num_layers} layers"
        return SubmodelDrafter(setup, weights, kept, name.strip())
    assert config.exit_layer is not None
    name = drafter_name(weights, config.exit_layer, model.num_layers)
    return SubmodelDrafter(setup, weights, Submodel(config.exit_layer), name)


def kept_layers(skip: tuple[int, ...], num_layers: int) -> tuple[int, Spans]:
    """How many layers come before the first skipped one, and the spans of layers that run after it,
    by index from 0.

    `skip` numbers layers from 1.
    """
    ascending = sorted(set(skip))
    spans = []
    for before, after in pairwise([*ascending, num_layers + 1]):
        if before < after - 1:
            spans.append((before, after - 1))
    return ascending[0] - 1, tuple(spans)


def drafter_name(weights: Quantization | None, exit_layer: int, num_layers: int) -> str:
    """The name of a drafter in reports: `exit 8`, `int8 exit 8`, or `int8` for a copy of all
    layers.
    """
    if exit_layer == num_layers:
        return weights or ""
    return f"{weights or ''} exit {exit_layer}".strip()
