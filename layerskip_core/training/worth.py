"""What a drafter that is not trained yet would gain on this machine, by how many of its drafts are accepted."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from ..config.model import PackingConfig
from ..decoding.drafters.estimates import PassTimes, best_length
from ..model.backend import Backend, DraftEnds, Submodel
from ..model.eagle3 import Eagle3Weights

_ACCEPTED = (0.5, 0.6, 0.7, 0.8)
_LONGEST = 4  # tokens of the longest pass that is timed
_TIMES = 5
_MOST = 8  # drafts of a round at most


@dataclass(frozen=True)
class Worth:
    """`step`: seconds of a plain step. `draft`: what a draft takes of it. `speeds`: the speed over plain decoding with the best
    number of drafts, by the share of drafts that are accepted after accepted ones.
    """

    step: float
    draft: float
    speeds: Mapping[float, float]


@torch.inference_mode()
def worth_of_block(backend: Backend, exit_layer: int) -> Worth:
    """Of drafts through an exit and its block, a copy of the last layer. The target goes on from the exit's states."""
    layers, run = backend.num_layers, _Passes(backend)
    draft = run.seconds(0, exit_layer) + run.seconds(layers - 1, layers, head=True)
    return _worth(run, draft, exit_layer / layers)


@torch.inference_mode()
def worth_of_eagle3(backend: Backend, stored: Eagle3Weights) -> Worth:
    """Of a drafter in the EAGLE-3 layout: the mean of a few drafts."""
    run, cache = _Passes(backend), backend.new_cache(1, _LONGEST + 2)
    drafter = backend.placed_eagle3(stored, backend.num_layers - 1, PackingConfig())
    newest, submodel = torch.zeros(1, 1, dtype=torch.long), Submodel(0, block=drafter)

    def drafts(embedded: Tensor, positions: Tensor) -> Tensor:
        feature, positions = embedded[:, :1], positions + 1
        if drafter.kernel is not None:
            return drafter.kernel(newest, submodel, positions, cache, DraftEnds(), feature)[0]
        places = torch.split(positions, 1, dim=1)
        outputs = (drafter.run(backend, feature, feature, place, cache) for place in places)
        return torch.cat([drafter.head(output).argmax(-1) for output in outputs])

    return _worth(run, run.timed(drafts, _LONGEST) / _LONGEST, 0.0)


class _Passes:
    """Passes of a backend over a text of a few tokens."""

    def __init__(self, backend: Backend) -> None:
        ids = torch.zeros(1, _LONGEST, dtype=torch.long, device=backend.device)
        self.backend, self._cache, self.hidden = backend, backend.new_cache(1, _LONGEST), backend.embed(ids)

    def timed(self, run: Callable[[Tensor, Tensor], Tensor], tokens: int) -> float:
        """Seconds of a run over the first tokens' embeddings (1, T, D) and positions (1, T), after one that is not counted."""
        positions, times = torch.arange(tokens)[None], []
        for _ in range(1 + _TIMES):
            started = time.perf_counter()
            float(run(self.hidden[:, :tokens], positions).sum())  # waits for a device
            times.append(time.perf_counter() - started)
        return median(times[1:])

    def seconds(self, start: int, stop: int, tokens: int = 1, head: bool = False) -> float:
        def run(hidden: Tensor, positions: Tensor) -> Tensor:
            hidden = self.backend.run_layers(hidden, start, stop, positions, self._cache)
            return self.backend.unembed(hidden) if head else hidden

        return self.timed(run, tokens)


def _worth(run: _Passes, draft: float, shared: float) -> Worth:
    """Of drafts of so many seconds, where the target leaves out the `shared` share of its layers."""
    layers = run.backend.num_layers
    known = [run.seconds(0, layers, tokens, head=True) for tokens in range(1, _LONGEST + 1)]
    passes, step = PassTimes(known[0], 0.0, known), known[0]
    rates = {share: best_length((share, share), draft, passes, _MOST, int(shared > 0), 1 - shared)[0] for share in _ACCEPTED}
    return Worth(step, draft / step, {share: rate * step for share, rate in rates.items()})
