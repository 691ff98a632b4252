"""A checkpoint's weights by their names, each taken when it is packed: there is never a second copy of all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from ..errors import CheckpointError

Take = Callable[[str], Tensor | None]  # the weight of a name, or None where there is none


@dataclass(frozen=True)
class Weights:
    """Weights by name, below a prefix."""

    take: Take
    prefix: str = ""

    def below(self, prefix: str) -> "Weights":
        return Weights(self.take, self.prefix + prefix)

    def remembered(self, prefix: str) -> "Weights":
        """The same, for weights that are needed twice; they are held as long as it is."""
        return Weights(cache(self.take), self.prefix + prefix)

    def get(self, name: str) -> Tensor | None:
        return self.take(self.prefix + name)

    def of(self, name: str) -> Tensor:
        weight = self.get(name)
        if weight is None:
            raise CheckpointError(f"the weight {self.prefix}{name} is missing")
        return weight

    def together(self, parts: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor] | None]:
        """Weights of several projections, and their biases, which all or none of them have."""
        biases = [bias for part in parts if (bias := self.get(f"{part}.bias")) is not None]
        return [self.of(f"{part}.weight") for part in parts], biases or None


def weight_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that PackedModel cannot do without, as in a checkpoint."""
    size, inner = config.hidden_size, config.intermediate_size
    queries, keys = (heads * head_dim(config) for heads in (config.num_attention_heads, config.num_key_value_heads))
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (size,),
        "self_attn.q_proj": (queries, size),
        "self_attn.k_proj": (keys, size),
        "self_attn.v_proj": (keys, size),
        "self_attn.o_proj": (size, queries),
        "post_attention_layernorm": (size,),
        "mlp.gate_proj": (inner, size),
        "mlp.up_proj": (inner, size),
        "mlp.down_proj": (size, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, size),
        "model.norm.weight": (size,),
        **({} if config.tie_word_embeddings else {"lm_head.weight": (config.vocab_size, size)}),
    }
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
