"""The assistant of a Gemma 4 model: a small decoder that was trained to draft for it (google/gemma-4-E2B-it-assistant).

Its layers have queries only: each reads the keys and values of the model's last layer of its kind that has some. With the
model's embedding e of a token and its state s, after the final norm, for the token before:

    x = W_in [e; s], h = norm(layers(x)), logits = head(h), and s of the next draft is W_out h

All drafts of a round stand at the position of the model's last token with KV entries, as in vLLM and mlx-vlm; transformers
rotates queries for the position after it.

A head with clusters scores only the tokens of the `chosen` ones whose centroids h scores highest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .spec import ModelSpec

INPUT, OUTPUT, CENTROIDS = "pre_projection.weight", "post_projection.weight", "masked_embedding.centroids.weight"
ORDER = "masked_embedding.token_ordering"  # token ids, cluster by cluster


@dataclass(frozen=True)
class Assistant:
    """A stored assistant.

    Attributes:
        spec: its own; the `source` of each of its layers is a layer of its model, and so are its key heads.
        hidden: D of its model.
        clusters: of its head; 0 for none. `chosen`: how many are scored.
        settings: its config.json.
        take: weights by the names of `shapes`, and the ids of ORDER.
        model_fingerprint: of the model that it was made for, if its file has one.
    """

    spec: ModelSpec
    hidden: int
    clusters: int
    chosen: int
    settings: Mapping[str, Any]
    take: Callable[[str], Tensor]
    model_fingerprint: str | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        spec, width = self.spec, self.spec.hidden
        own = {name: shape for name, shape in spec.shapes.items() if spec.tied or name != spec.embedding_name}
        own |= {INPUT: (width, 2 * self.hidden), OUTPUT: (self.hidden, width)}
        return own | ({CENTROIDS: (self.clusters, width)} if self.clusters else {})
