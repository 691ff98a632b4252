"""The assistant of a Gemma 4 model: a small decoder trained to draft for its model
(google/gemma-4-E2B-it-assistant). `native.drafters` runs it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .spec import ModelSpec

INPUT = "pre_projection.weight"
OUTPUT = "post_projection.weight"
CENTROIDS = "masked_embedding.centroids.weight"
ORDER = "masked_embedding.token_ordering"  # token ids, cluster by cluster


@dataclass(frozen=True)
class Assistant:
    """A stored assistant."""

    spec: ModelSpec  # its own, but `kv_heads` and each layer's `source` are the model's
    hidden: int  # D of the model
    clusters: int  # of the head; 0 for none
    chosen: int  # clusters that are scored
    settings: Mapping[str, Any]  # config.json
    take: Callable[[str], Tensor]  # weights by the names of `shapes`, and the ids of ORDER
    model_fingerprint: str | None = None  # of the model that it was trained for; None: unknown

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        spec = self.spec
        shapes = dict(spec.shapes)
        if not spec.tied:  # it reads the model's embedding
            del shapes[spec.embedding_name]
        shapes[INPUT] = (spec.hidden, 2 * self.hidden)
        shapes[OUTPUT] = (self.hidden, spec.hidden)
        if self.clusters:
            shapes[CENTROIDS] = (self.clusters, spec.hidden)
        return shapes
