"""What drafts gain on this machine, by how many of them are accepted, and what a training costs the model."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.info import Cost
from ..config.model import PackingConfig
from ..decoding.drafters.estimates import PassTimes, best_length
from ..losses import target_rows
from ..model.backend import Backend, DraftEnds, DraftHead, Submodel
from ..model.cache import Places
from ..model.eagle3 import Eagle3Weights

if TYPE_CHECKING:
    from .module import RecipeModule

Rows: TypeAlias = Sequence[Mapping[str, Any]]
ACCEPTED = (0.5, 0.6, 0.7, 0.8)
_LONGEST = 4  # tokens of the longest pass that is timed
_TIMES = 5
_MOST = 8  # drafts of a round at most


@dataclass(frozen=True)
class Worth:
    """`step`: seconds of a plain step. `draft`: what a draft takes of it. `speeds`: by the share of drafts that are accepted
    after accepted ones, the speed over plain decoding with the best number of drafts, and this number.
    """

    step: float
    draft: float
    speeds: Mapping[float, tuple[float, int]]


@torch.inference_mode()
def worth_of_exit(backend: Backend, exit_layer: int, has_block: bool, shares: Sequence[float] = ACCEPTED) -> Worth:
    """Of drafts through an exit, with or without a block, which takes as long as the last layer. The target goes on from the
    exit's states.
    """
    layers, run = backend.num_layers, _Passes(backend)
    head = backend.draft_sides[None].at_exits.unembed
    draft = run.seconds(0, exit_layer, head=None if has_block else head)
    if has_block:
        draft += run.seconds(layers - 1, layers, head=head)
    return _worth(run, draft, exit_layer / layers, shares)


@torch.inference_mode()
def worth_of_eagle3(backend: Backend, stored: Eagle3Weights, shares: Sequence[float] = ACCEPTED) -> Worth:
    """Of a drafter in the EAGLE-3 layout: the mean of a few drafts."""
    run, cache = _Passes(backend), backend.new_cache(1, _LONGEST + 2)
    drafter = backend.placed_eagle3(stored, backend.num_layers - 1, PackingConfig())
    newest, submodel, head = torch.zeros(1, dtype=torch.long), Submodel(0, block=drafter), DraftHead(drafter.head)

    def drafts(embedded: Tensor, _: Places) -> Tensor:
        feature = embedded[:1]
        if drafter.kernel is not None:
            return drafter.kernel(head, newest, submodel, cache.span(1, _LONGEST + 2), DraftEnds(), feature)[0]
        outputs = (drafter.run(backend, feature, feature, place) for place in cache.span(1, _LONGEST + 1).parts(1))
        return torch.cat([drafter.head(output).argmax(-1) for output in outputs])

    return _worth(run, run.timed(drafts, _LONGEST) / _LONGEST, 0.0, shares)


class _Passes:
    """Passes of a backend over a text of a few tokens."""

    def __init__(self, backend: Backend) -> None:
        ids = torch.zeros(_LONGEST, dtype=torch.long, device=backend.device)
        self.backend, self._cache, self.hidden = backend, backend.new_cache(1, _LONGEST), backend.embed(ids)

    def timed(self, run: Callable[[Tensor, Places], Tensor], tokens: int) -> float:
        """Seconds of a run over the first tokens' embeddings (T, D), at their places, after one that is not counted."""
        places, times = self._cache.span(0, tokens), []
        for _ in range(1 + _TIMES):
            started = time.perf_counter()
            float(run(self.hidden[:tokens], places).sum())  # waits for a device
            times.append(time.perf_counter() - started)
        return median(times[1:])

    def seconds(self, start: int, stop: int, tokens: int = 1, head: Callable[[Tensor], Tensor] | None = None) -> float:
        def run(hidden: Tensor, places: Places) -> Tensor:
            hidden = self.backend.run_layers(hidden, start, stop, places)
            return hidden if head is None else head(hidden)

        return self.timed(run, tokens)


def _worth(run: _Passes, draft: float, shared: float, shares: Sequence[float]) -> Worth:
    """Of drafts of so many seconds, where the target leaves out the `shared` share of its layers."""
    layers = run.backend.num_layers
    known = [run.seconds(0, layers, tokens, head=run.backend.unembed) for tokens in range(1, _LONGEST + 1)]
    passes, step, speeds = PassTimes(known[0], 0.0, known), known[0], dict[float, tuple[float, int]]()
    for share in shares:
        rate, drafts = best_length((share, share), draft, passes, _MOST, int(shared > 0), 1 - shared)
        speeds[share] = rate * step, drafts
    return Worth(step, draft / step, speeds)


class Original:
    """A model before its training: how it read texts of its own, and held-out rows. Both are read again at the end, in fp32."""

    def __init__(self, module: "RecipeModule", own: Rows, held_out: Rows) -> None:
        self._module, self._own, self._held_out = module, own, held_out
        (self._best, self._loss), (_, self._task) = self._read(own), self._read(held_out)

    def cost(self) -> Cost:
        (best, loss), (_, task) = self._read(self._own), self._read(self._held_out)
        same = float((best == self._best).float().mean())
        return Cost(len(best), same, exp(self._loss), exp(loss), (self._task, task) if self._held_out else None)

    @torch.no_grad()
    def _read(self, rows: Rows) -> tuple[Tensor, float]:
        """(the best tokens (N,) in the place of each that is predicted, the mean loss)."""
        module, backend, was_training = self._module, self._module.backend, self._module.training
        module.eval()
        best, loss = list[Tensor](), 0.0
        for row in rows:
            ids, labels = (torch.as_tensor(row[name]).to(backend.device).long()[None] for name in ("input_ids", "labels"))
            states = module.texts.states(ids, (backend.num_layers,))[backend.num_layers]
            hidden, targets = target_rows(states, labels)
            logits = backend.unembed(hidden).float()
            best.append(logits.argmax(-1).cpu())
            loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        module.train(was_training)
        return torch.cat(best) if best else torch.empty(0), loss / max(1, sum(map(len, best)))
