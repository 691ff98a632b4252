"""Drafts by a smaller model of the same vocabulary (Leviathan et al., ICML 2023), on a cache of its own."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf

import torch

from ...config.decoding import DecodingConfig
from ...model.backend import DraftEnds, Submodel
from ..target import FixedTarget, Prefixes
from . import Context, Draft, DrafterSetup
from .exit import NO_ENDS, ExitDrafter

DRAFT_MODEL = "draft model"  # in reports
_KEPT = 32  # tokens of a text that ran at once and are worth being kept for later prompts


class ModelDrafter:
    """Drafts with all layers of the draft model: its cache has the rows that drafted last, and new ones as they come.

    A row drafts as far as the draft model's context and memory reach.
    """

    def __init__(self, setup: DrafterSetup) -> None:
        assert setup.model.draft_model is not None
        self.model, self._prefixes = setup.model.draft_model, setup.prefixes or Prefixes(0)
        self._target = FixedTarget(self.model, DecodingConfig("autoregressive"))  # whose KV entries are the prefixes'
        own = replace(setup, model=self.model, reuse_exit_states=False, recorder=None)
        self._drafter = ExitDrafter(own, None, Submodel(self.model.num_layers), DRAFT_MODEL)
        self._cache = self.model.new_cache(0)
        self._cache.steps_back = setup.config.num_draft_tokens
        self._filled = dict[int, int]()  # by prompt, in the order of the cache's rows: how many tokens have KV entries
        self._ran = dict[int, int]()  # by prompt: how many tokens after these had entries in the last draft

    def draft(self, context: Context, limits: Sequence[int], ends: DraftEnds = NO_ENDS) -> Draft:
        limits = self.follow(context, limits)
        if not any(limits):
            return Draft(context.newest, (0,) * len(limits), source=DRAFT_MODEL)
        draft = self._drafter.draft(self._own(context), limits, ends)
        self._ran = dict(zip(context.rows, draft.ran, strict=True))
        return draft

    def follow(self, context: Context, limits: Sequence[int]) -> list[int]:
        """Runs all but the newest token of each row that may draft. Returns the limits; 0 for a row that cannot draft yet."""
        self._take_rows(context)
        counts, allowed, room = list[int](), list[int](), context.piece if len(limits) > 1 else inf
        for ids, filled, limit in zip(context.ids, self._filled.values(), limits, strict=True):
            limit = max(0, min(limit, self.model.room - len(ids)))
            lacking = len(ids) - 1 - filled if limit else 0
            counts.append(int(min(lacking, room)))
            room -= counts[-1]
            allowed.append(limit if counts[-1] == lacking else 0)
        while self._spare(counts, allowed) < 0 and self._prefixes.drop():
            pass
        for index in reversed(range(len(counts))):
            if self._spare(counts, allowed) < 0:  # then the oldest rows draft
                counts[index] = allowed[index] = 0
        if any(counts):
            self._run(context, counts)
            for index, (ids, count) in enumerate(zip(context.ids, counts, strict=True)):
                if count >= _KEPT and self._spare([0] * len(counts), allowed) >= 1:
                    ids = list(ids[: self._filled[context.rows[index]]])
                    self._prefixes.keep(self.model, self._target, ids, self._cache, index)
        return allowed

    def _run(self, context: Context, counts: Sequence[int]) -> None:
        """A pass over the next tokens of each row, so many."""
        own, tokens = self._own(context), list[int]()
        for row, ids, start, count in zip(context.rows, context.ids, own.filled, counts, strict=True):
            tokens += ids[start : start + count]
            self._filled[row] += count
        hidden = self.model.embed(torch.tensor(tokens).to(self.model.device, non_blocking=True))
        self.model.run_layers(hidden, 0, self.model.num_layers, own.places(counts, [0] * len(counts)))

    def _spare(self, counts: Sequence[int], limits: Sequence[int]) -> float:
        """How many pages there may be besides those that rows need for so many tokens and drafts."""
        sizes = zip(self._filled.values(), counts, limits, strict=True)
        stops = [filled + count + limit + (limit > 0) for filled, count, limit in sizes]
        return self._cache.free_pages - self._cache.lacking(stops)

    def _own(self, context: Context) -> Context:
        filled = list(self._filled.values())
        return replace(context, cache=self._cache, indices=range(len(filled)), filled=filled, features={})

    def _take_rows(self, context: Context) -> None:
        """The cache gets the rows of the context, in their order."""
        for row, ids in zip(context.rows, context.ids, strict=True):
            if row not in self._filled:
                cache, self._filled[row] = self._prefixes.begin(self.model, self._target, ids, self.model.room)
                self._cache.join(cache)
        rows = list(self._filled)
        order = [rows.index(row) for row in context.rows]
        if order != list(range(len(rows))):
            self._cache.keep_rows(order)
            self._filled = {row: self._filled[row] for row in context.rows}

    def observe(self, row: int, drafted: int, verified: Sequence[int]) -> None:
        self._filled[row] += min(self._ran.pop(row, 0), len(verified))  # which are one more than drafts that were accepted


def drafter(setup: DrafterSetup) -> ModelDrafter:
    return ModelDrafter(setup)
