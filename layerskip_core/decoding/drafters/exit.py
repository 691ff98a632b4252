"""Drafts by layers: a part of the model, a block beside it, or a smaller model (Leviathan et al.,
ICML 2023).

Self-speculative decoding (Elhoushi et al., ACL 2024, section 4.3) drafts with the first layers,
Draft & Verify (Zhang et al., ACL 2024) with all layers but some, and a drafter beside the model
(MTP, EAGLE-3) with none of them. The paper of Draft & Verify skips attention and MLP blocks one by
one; we skip whole layers, and the target continues from the first skipped layer.
"""

from array import array
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config.decoding import WITH_DRAFTER, DecodingConfig
from ...config.model import Quantization
from ...errors import ConfigError, require
from ...model.backend import DraftCall, DraftEnds, DraftKernel, Spans, Submodel
from ...model.eagle3 import NO_DRAFTER
from ..graphs import GraphRecorder
from ..output import Row
from ..sampling import Span, noise_of, truncates
from ..target import NO_PREFIXES, FixedTarget
from . import Draft, DrafterSetup, DraftInput
from .lookup import SHORTEST, RowLookup
from .stepwise import DraftingPart, StepwiseDraft

DRAFT_MODEL = "draft model"  # in reports
_KEPT = 32  # least length of a prefill whose KV entries are kept for later prompts
_NO_ENDS = DraftEnds()


class ExitDrafter:
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
        require(
            weights in sides,
            "draft_weights",
            f"a copy that was made: {', '.join(filter(None, sides)) or 'none'}",
            weights,
        )
        side = sides[weights]
        if config.skip:
            last = submodel.beyond[-1][1] if submodel.beyond else submodel.exit_layer
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
        reads = side.layers.device.type == "cpu"
        # Layers with other weights give other states than the target's
        reuses = setup.reuse_exit_states and side.shares_states and runs_layers
        # A block that reads embeddings has a kernel of its own
        self._kernel = side.kernel if block is None or runs_layers else block.kernel
        head = side.head(submodel)
        self.vocabulary = head.vocabulary
        # A whole copy or draft model verifies guesses while it drafts. Our kernels search the row's
        # text themselves for a draft of one row
        guesses = None
        if reads and not reuses and submodel == Submodel(side.num_layers):
            guesses = RowLookup(SHORTEST)
        self._part = DraftingPart(side, submodel, head, source, reuses, reads, guesses)
        self._text: tuple[Row | None, array[int]] = None, array("q")

    def draft(self, given: DraftInput, limits: Sequence[int], ends: DraftEnds = _NO_ENDS) -> Draft:
        """Each row's draft stops after an EOS, and a draft of one row also by `ends.survival`."""
        if self.submodel.block is not None:
            given.write_blocks()
        config = given.rows[0].config
        is_changed = any(row.processor is not None for row in given.rows)
        is_truncated = config.temperature > 0 and truncates(config)
        if self._kernel and len(limits) == 1 and not (is_changed or is_truncated):
            return self._by_kernel(self._kernel, given, limits[0], ends)
        # A recording has one length for all rows of the cache, and no noise
        is_even = len({*limits}) == 1 and len(limits) == len(given.num_computed_tokens)
        is_greedy = all(row.config.temperature == 0 for row in given.rows)
        is_plain = is_even and is_greedy and not (is_changed or ends.needs_probs)
        if given.recorder and is_plain and given.feature(self._feature_key) is None:
            return self._by_recording(given.recorder, given, limits, ends)
        return StepwiseDraft(self._part, given, limits, ends).make()

    def _by_kernel(
        self, kernel: DraftKernel, given: DraftInput, limit: int, ends: DraftEnds
    ) -> Draft:
        """A draft of one row, in one call."""
        [row] = given.rows
        if self._part.reads:
            ends = ends._replace(ids=row.eos_ids)
        call = DraftCall(
            self._part.head,
            given.newest if self._part.guesses is None else self._searched(row),
            self.submodel,
            given.places([limit + 1], [0]),
            ends,
            noise_of([Span(row, limit)]),
            given.feature(self._feature_key),
            self._part.reuses_states,
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
        stops = submodel.state_layers if self._part.reuses_states else ()
        return Draft(tokens, tuple(limits), dict(zip(stops, states, strict=True)), self.source)

    def observe(self, row: Row, drafted: int, verified: Sequence[int]) -> None:
        """Ignores the outcome: every round drafts in the same way."""


class ModelDrafter:
    """Drafts with all layers of the draft model, whose cache has the rows of the last input.

    A row drafts as far as the draft model's context and memory reach.
    """

    def __init__(self, setup: DrafterSetup) -> None:
        assert setup.model.draft_model is not None
        self.model = setup.model.draft_model
        self._prefixes = setup.prefixes or NO_PREFIXES
        # Whose KV entries the prefixes keep
        self._target = FixedTarget(self.model, DecodingConfig("autoregressive"))
        own = replace(setup, model=self.model, reuse_exit_states=False)
        self._drafter = ExitDrafter(own, None, Submodel(self.model.num_layers), DRAFT_MODEL)
        self._cache = self.model.new_cache(0)
        self._cache.steps_back = setup.config.num_draft_tokens
        self._max_tokens = self.model.context_length(setup.config.num_draft_tokens)  # of a text
        # In the order of the cache's rows: how many tokens have KV entries
        self._num_computed = dict[Row, int]()
        self._ran = dict[Row, int]()  # how many more the last draft wrote

    def draft(self, given: DraftInput, limits: Sequence[int], ends: DraftEnds = _NO_ENDS) -> Draft:
        limits = self.prefill(given, limits)
        if not any(limits):
            return Draft(given.newest, (0,) * len(limits), source=DRAFT_MODEL)
        draft = self._drafter.draft(self._own_input(given), limits, ends)
        self._ran = dict(zip(given.rows, draft.ran, strict=True))
        return draft

    def prefill(self, given: DraftInput, limits: Sequence[int]) -> list[int]:
        """Prefills each row that may draft, without its newest token. Returns the limits; 0 for a
        row that cannot draft yet.
        """
        self._take_rows(given)
        counts = list[int]()
        allowed = list[int]()
        # A row without company stalls none
        is_alone = len(given.num_computed_tokens) == 1
        left = inf if is_alone else given.max_prefill_tokens
        for row, limit in zip(given.rows, limits, strict=True):
            limit = max(0, min(limit, self._max_tokens - len(row.ids)))
            lacking = len(row.ids) - 1 - self._num_computed[row] if limit else 0
            count = int(min(lacking, left))
            left -= count
            counts.append(count)
            allowed.append(limit if count == lacking else 0)
        self._free_pages_for(counts, allowed)
        if any(counts):
            self._run(given, counts)
            self._keep(given, counts, allowed)
        return allowed

    def _free_pages_for(self, counts: list[int], limits: list[int]) -> None:
        """Frees memory for so many tokens and drafts: of kept prefixes, then the youngest rows give
        way, and get 0 in both lists.
        """
        while self._free_pages(counts, limits) < 0 and self._prefixes.drop(self.model):
            pass
        for index in reversed(range(len(counts))):
            if self._free_pages(counts, limits) < 0:
                counts[index] = 0
                limits[index] = 0

    def _run(self, given: DraftInput, counts: Sequence[int]) -> None:
        """Prefills the next `counts` tokens of each row."""
        places = self._own_input(given).places(counts, [0] * len(counts))
        tokens = list[int]()
        for row, count in zip(given.rows, counts, strict=True):
            start = self._num_computed[row]
            tokens += row.ids[start : start + count]
            self._num_computed[row] += count
        hidden = self.model.embed(torch.tensor(tokens).to(self.model.device, non_blocking=True))
        self.model.run_layers(hidden, 0, self.model.num_layers, places)

    def _keep(self, given: DraftInput, counts: Sequence[int], limits: Sequence[int]) -> None:
        """Adds texts of which much was prefilled to the prefixes."""
        for index, (row, count) in enumerate(zip(given.rows, counts, strict=True)):
            if count >= _KEPT and self._free_pages([0] * len(counts), limits) >= 1:
                ids = row.ids[: self._num_computed[row]]
                self._prefixes.keep(self.model, self._target, ids, self._cache, index)

    def _free_pages(self, counts: Sequence[int], limits: Sequence[int]) -> float:
        """Pages left by these tokens and drafts of the rows; negative if they need more."""
        stops = []
        for computed, count, limit in zip(self._num_computed.values(), counts, limits, strict=True):
            newest = 1 if limit else 0
            stops.append(computed + count + newest + limit)
        return self._cache.free_pages(stops)

    def _own_input(self, given: DraftInput) -> DraftInput:
        computed = list(self._num_computed.values())
        return replace(
            given,
            cache=self._cache,
            indices=range(len(computed)),
            num_computed_tokens=computed,
            recorder=None,
        )

    def _take_rows(self, given: DraftInput) -> None:
        """Gives the cache the rows of the input, in their order."""
        for row in given.rows:
            if row not in self._num_computed:
                cache, self._num_computed[row] = self._prefixes.begin(
                    self.model, self._target, row.ids, self._max_tokens
                )
                self._cache.join(cache)
        rows = list(self._num_computed)
        order = [rows.index(row) for row in given.rows]
        if order != list(range(len(rows))):
            self._cache.keep_rows(order)
            self._num_computed = {row: self._num_computed[row] for row in given.rows}

    def observe(self, row: Row, drafted: int, verified: Sequence[int]) -> None:
        # Of what ran, the accepted drafts and the newest token stay
        self._num_computed[row] += min(self._ran.pop(row, 0), len(verified))


def drafter(setup: DrafterSetup) -> ExitDrafter | ModelDrafter:
    """Makes the strategy's drafter. Raises ConfigError as `ExitDrafter` does, and if the model
    lacks the drafter.
    """
    config = setup.config
    model = setup.model
    weights = setup.config.draft_weights
    if config.strategy == "draft-model":
        return ModelDrafter(setup)
    if (name := config.strategy) in WITH_DRAFTER:
        if name not in model.drafters:
            raise ConfigError(f"`strategy` {name}: {NO_DRAFTER.format(name)}", "strategy")
        return ExitDrafter(setup, None, Submodel(0, block=model.drafters[name]), name)
    if config.strategy == "draft-and-verify":
        kept = Submodel(*kept_layers(config.skip, model.num_layers))
        name = f"{weights or ''} {model.num_layers - len(set(config.skip))} of {model.num_layers} layers"
        return ExitDrafter(setup, weights, kept, name.strip())
    assert config.exit_layer is not None
    return ExitDrafter(
        setup,
        weights,
        Submodel(config.exit_layer),
        drafter_name(weights, config.exit_layer, model.num_layers),
    )


def kept_layers(skip: tuple[int, ...], num_layers: int) -> tuple[int, Spans]:
    """How many layers come before the first skipped one, and the spans of layers that run after it,
    by index from 0.

    `skip` numbers layers from 1.
    """
    ascending = sorted(set(skip))
    spans = tuple(
        (before, after - 1)
        for before, after in pairwise([*ascending, num_layers + 1])
        if before < after - 1
    )
    return ascending[0] - 1, spans


def drafter_name(weights: Quantization | None, exit_layer: int, num_layers: int) -> str:
    """The name of a drafter in reports: `exit 8`, `int8 exit 8`, or `int8` for a copy of all
    layers.
    """
    layers = "" if exit_layer == num_layers else f"exit {exit_layer}"
    return " ".join(filter(None, (weights, layers)))
