"""Drafts by passes of layers, one after another: for any number of rows, and where no kernel makes a
whole draft in one call.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...model.backend import (
    MOST_GUESSES,
    DraftEnds,
    DraftHead,
    DraftSide,
    Submodel,
    beyond_exit,
    states_at,
)
from ...model.cache import Places, on_device
from ..row import Row
from ..sampling import ChoiceRun, choose, processed
from .lookup import RowLookup
from .protocol import Draft, DraftInput

_GUESSES = MOST_GUESSES  # per pass, of all rows together


@dataclass(frozen=True)
class DraftingPart:
    """The part of a model that drafts, and how."""

    side: DraftSide
    submodel: Submodel
    head: DraftHead
    source: str  # in reports
    reuses_states: bool  # the target continues from the hidden states
    reads_each_draft: bool  # on the CPU; on other devices that would wait
    guesses: RowLookup | None = None  # that passes verify


@dataclass(eq=False)
class _RowDraft:
    """The draft of one row so far."""

    row: Row
    index: int  # of the row in the input
    limit: int  # most drafts
    length: int = 0  # drafts so far
    ran: int = 0  # how many tokens ran: the newest of the row, then drafts
    ids: list[int] = field(default_factory=list)  # the drafts, if they are read
    probs: list[float] = field(default_factory=list)  # of them, if they are needed
    guesses: list[int] = field(default_factory=list)  # of the next drafts, for the next pass

    @property
    def num_unrun(self) -> int:
        """How many tokens did not run yet: the last, and those that a grammar forced."""
        return 1 + self.length - self.ran

    @property
    def text(self) -> list[int]:
        """The newest token of the row, then its drafts, if they are read."""
        return [self.row.ids[-1], *self.ids]

    def add(self, tokens: Sequence[int]) -> None:
        """Adds drafts that were read. One that ends the text ends the draft."""
        self.ids += tokens
        self.length += len(tokens)
        if not self.row.eos_ids.isdisjoint(tokens):
            self.limit = self.length


class StepwiseDraft:
    """One draft. A pass runs the last token of each unfinished row and chooses the next.

    Tokens that are expected to follow run in the same pass: those that a grammar forces, and
    guesses (ML-SpecQD: Georganas et al., 2025), which a whole copy verifies as the target verifies
    drafts. The drafts are those of single steps, in fewer passes.
    """

    def __init__(
        self, part: DraftingPart, given: DraftInput, limits: Sequence[int], ends: DraftEnds
    ) -> None:
        self._part = part
        self._given = given
        self._ends = ends
        self._reads_each_draft = part.reads_each_draft or any(
            row.processor is not None for row in given.rows
        )
        rows = zip(given.rows, limits, strict=True)
        self._rows = [_RowDraft(row, index, limit) for index, (row, limit) in enumerate(rows)]
        self._going = self._rows  # the G rows of the next pass
        self._last = given.newest  # (G,), their last tokens
        # (G, D): the features of the tokens before, if a block needs them
        self._feature = given.feature(part.submodel.exit_layer or part.source)
        # All drafts, if they are not read; hidden states of what ran, by number of layers
        self._tokens = ByRow()
        self._tokens.add(given.newest, range(len(self._rows)))
        self._states = defaultdict[int, ByRow](ByRow)

    def make(self) -> Draft:
        while self._drop_finished():
            if not self._add_expected():
                continue
            tokens, probs = self._choose(self._logits())
            if self._reads_each_draft:
                self._accept(tokens.tolist(), probs)
            else:
                self._add_unread(tokens)
        return self._finished()

    def _drop_finished(self) -> bool:
        """Drops rows that are complete. Returns whether others are left."""
        unfinished = [at for at, each in enumerate(self._going) if each.length < each.limit]
        if 0 < len(unfinished) < len(self._going):
            self._going = [self._going[at] for at in unfinished]
            index = on_device(unfinished, self._last)
            self._last = self._last[index]
            if self._feature is not None:
                self._feature = self._feature[index]
        return bool(unfinished)

    def _add_expected(self) -> bool:
        """Adds tokens that a grammar forces, if one row drafts, and guesses for the next pass.

        Returns False if a forced token ends the draft.
        """
        guesses = self._part.guesses
        first = self._going[0]
        if first.row.processor is not None:
            alone = len(self._rows) == 1 and self._part.reads_each_draft
            if alone and self._part.submodel.block is None:
                forced = first.row.processor.forced(first.ids)[: first.limit - first.length]
                first.add(forced)
                first.probs += [1.0] * len(forced)
        elif guesses is not None and not any(each.row.processor for each in self._going):
            most = _GUESSES // len(self._going)
            for each in self._going:
                # A pass adds one token more than it has guesses
                count = min(most, each.limit - each.length - 1)
                each.guesses = guesses.guessed(each.row, count, each.ids)
        return any(each.length < each.limit for each in self._going)

    def _logits(self) -> Tensor:
        """Runs a pass. The logits after the last token of each row and after each guess."""
        tokens = self._last
        if self._reads_each_draft:
            ids = list[int]()
            for each in self._going:
                ids += [*each.text[each.ran :], *each.guesses]
            tokens = on_device(ids, self._given.newest)
        counts = [each.num_unrun + len(each.guesses) for each in self._going]
        states, places = self._run(tokens, counts)
        part = self._part
        logits, self._feature = beyond_exit(part.side, part.submodel, states, places, self._feature)
        if len(self._rows) == 1 and self._going[0].num_unrun > 1:  # some tokens were forced
            return logits[-1:]
        return logits

    def _run(self, tokens: Tensor, counts: Sequence[int]) -> tuple[Tensor, Places]:
        """Runs the next `counts` tokens of the going rows and keeps their states; returns those at
        the exit, and the places.
        """
        of_rows = [0] * len(self._rows)
        indices = list[int]()
        for each, count in zip(self._going, counts, strict=True):
            of_rows[each.index] = count
            indices += [each.index] * count
        places = self._given.places(of_rows, [each.ran for each in self._rows])
        part = self._part
        layers = part.side.layers
        reached = states_at(layers, layers.embed(tokens), part.submodel.state_layers, places)
        if part.reuses_states:
            for end, states in reached.items():
                self._states[end].add(states, indices)
        return reached[part.submodel.exit_layer], places

    def _choose(self, logits: Tensor) -> tuple[Tensor, list[float]]:
        """The tokens (S,) chosen by logits (S, N), and their probabilities, if they are needed."""
        going = self._going
        runs = [ChoiceRun(each.row, 1 + len(each.guesses), each.length) for each in going]
        vocabulary = self._part.head.vocabulary
        ids = None if vocabulary is None else vocabulary.ids_on(logits.device)
        if any(each.row.processor is not None for each in going):
            ids = None
            if vocabulary is not None:
                logits = vocabulary.spread(logits)
            logits = processed(logits, runs, [each.ids for each in going])
            if vocabulary is not None:  # it may lack all permitted tokens
                for each, best in zip(going, logits.amax(-1).tolist(), strict=True):
                    if best == -torch.inf:
                        each.limit = each.length
        tokens, probs = choose(logits, runs, ids, self._ends.needs_probs)
        if probs is None:
            return tokens, []
        return tokens, probs.tolist()

    def _accept(self, chosen: list[int], probs: list[float]) -> None:
        """Adds the chosen tokens of each row, up to the first that was not guessed."""
        first = 0
        for each in self._going:
            count = 1 + len(each.guesses)
            each.ran += each.num_unrun
            for index, guess in enumerate([*each.guesses, None], start=first):
                if each.length >= each.limit:
                    break
                each.add(chosen[index : index + 1])
                if probs:
                    each.probs.append(probs[index])
                    each.limit = self._ends.length(each.probs, each.limit)
                if chosen[index] != guess or each.length >= each.limit:
                    break
                each.ran += 1
            each.guesses = []
            first += count
        self._last = on_device([each.text[-1] for each in self._going], self._given.newest)

    def _add_unread(self, chosen: Tensor) -> None:
        for each in self._going:
            each.ran += 1
            each.length += 1
        self._tokens.add(chosen, [each.index for each in self._going])
        self._last = chosen

    def _finished(self) -> Draft:
        counts = [1 + each.length for each in self._rows]
        if self._reads_each_draft:
            ids = list[int]()
            for each in self._rows:
                ids += each.text
            tokens = on_device(ids, self._given.newest)
        else:
            tokens = self._tokens.by_row(counts)
        exit_states = {}
        if self._states:
            self._run_rest(tokens)
            for end, states in self._states.items():
                exit_states[end] = states.by_row(counts)
        return Draft(
            tokens,
            tuple(each.length for each in self._rows),
            exit_states,
            self._part.source,
            self._rows[0].probs if len(self._rows) == 1 else (),
            [each.ran for each in self._rows],
        )

    def _run_rest(self, tokens: Tensor) -> None:
        """Runs the tokens that did not run yet, for their states: the last of each row."""
        self._going = [each for each in self._rows if each.num_unrun > 0]
        if not self._going:
            return
        own = torch.split(tokens, [1 + each.length for each in self._rows])
        rest = torch.cat([own[each.index][each.ran :] for each in self._going])
        counts = [each.num_unrun for each in self._going]
        self._run(rest, counts)
        for each, count in zip(self._going, counts, strict=True):
            each.ran += count


class ByRow:
    """Collects values pass by pass, and returns them row by row."""

    def __init__(self) -> None:
        self._parts = list[Tensor]()
        self._rows = list[int]()  # of each value

    def add(self, values: Tensor, rows: Sequence[int]) -> None:
        self._parts.append(values)
        self._rows += rows

    def by_row(self, counts: Sequence[int]) -> Tensor:
        """The first `counts[row]` values of each row, row by row."""
        is_grid = self._rows == [*range(len(counts))] * len(self._parts)
        if is_grid and {*counts} == {len(self._parts)}:
            return torch.stack(self._parts, 1).flatten(0, 1)
        values = self._parts[0]
        if len(self._parts) > 1:
            values = torch.cat(self._parts)
        indices = [list[int]() for _ in counts]
        for index, row in enumerate(self._rows):
            indices[row].append(index)
        order = list[int]()
        for own, count in zip(indices, counts, strict=True):
            order += own[:count]
        if order == list(range(len(values))):
            return values
        return values[on_device(order, values)]
