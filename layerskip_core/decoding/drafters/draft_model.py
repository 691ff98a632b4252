"""Drafts by a smaller model (Leviathan et al., ICML 2023)."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf

import torch

from ...config.decoding import DecodingConfig
from ...model.backend import DraftEnds, Submodel
from ..row import Row
from ..target import FixedTarget
from .protocol import Draft, DrafterSetup, DraftInput
from .submodel import NO_ENDS, SubmodelDrafter

DRAFT_MODEL = "draft model"  # in reports
_KEPT = 32  # least length of a prefill whose KV entries are kept for later prompts


class ModelDrafter:
    """Drafts with all layers of the draft model, whose cache has the rows of the last input.

    A row drafts as far as the draft model's context and memory reach.
    """

    def __init__(self, setup: DrafterSetup) -> None:
        assert setup.model.draft_model is not None
        self.model = setup.model.draft_model
        self._prefixes = setup.prefixes
        # Prefixes keep KV entries by the target that wrote them
        self._target = FixedTarget(self.model, DecodingConfig("autoregressive"))
        own = replace(setup, model=self.model, reuse_exit_states=False)
        self._drafter = SubmodelDrafter(own, None, Submodel(self.model.num_layers), DRAFT_MODEL)
        self._cache = self.model.new_cache(0)
        self._cache.steps_back = setup.config.num_draft_tokens
        self._max_tokens = self.model.context_length(setup.config.num_draft_tokens)  # of a text
        # In the order of the cache's rows: how many tokens have KV entries
        self._num_computed = dict[Row, int]()
        self._ran = dict[Row, int]()  # how many more the last draft wrote

    def draft(self, given: DraftInput, limits: Sequence[int], ends: DraftEnds = NO_ENDS) -> Draft:
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
        num_prefill_left = inf if is_alone else given.max_prefill_tokens
        for row, limit in zip(given.rows, limits, strict=True):
            limit = max(0, min(limit, self._max_tokens - len(row.ids)))
            num_uncomputed = 0
            if limit:
                num_uncomputed = len(row.ids) - 1 - self._num_computed[row]
            count = int(min(num_uncomputed, num_prefill_left))
            num_prefill_left -= count
            counts.append(count)
            allowed.append(limit if count == num_uncomputed else 0)
        self._free_pages_for(counts, allowed)
        if any(counts):
            self._run(given, counts)
            self._keep(given, counts, allowed)
        return allowed

    def _free_pages_for(self, counts: list[int], limits: list[int]) -> None:
        """Frees memory for so many tokens and drafts: of kept prefixes, then the youngest rows give
        way, and get 0 in both lists.
        """
        self._prefixes.make_room(self.model, lambda: self._free_pages(counts, limits) >= 0)
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
        ends = []
        for computed, count, limit in zip(self._num_computed.values(), counts, limits, strict=True):
            end = computed + count
            if limit:
                end += 1 + limit  # the newest token, and drafts
            ends.append(end)
        return self._cache.free_pages(ends)

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
                cache, self._num_computed[row] = self._prefixes.start_cache(
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


drafter = ModelDrafter
