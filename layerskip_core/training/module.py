"""The training forward: layers with dropout, a tap at every exit that is on, and the weighted loss.

Spans and loss run inside this module's own `forward`, because DDP and FSDP2 act there: layers called beside it would let
ranks drift.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import RecipeConfig
from ..model import DepthModel
from .curriculum import exits_on
from .dropout import dropout_rates, kept_rows, run_layer_on, time_scale
from .exit_loss import exit_weights, summed_cross_entropy, target_rows


@dataclass(frozen=True)
class Moment:
    """Where in the run a forward stands: everything random or scheduled in the recipe is a function of it."""

    step: int  # optimizer steps done
    total_steps: int
    micro_batch: int = 0


class RecipeModule(nn.Module):
    """A causal language model under the LayerSkip recipe."""

    def __init__(self, model: Any, recipe: RecipeConfig, seed: int = 0, from_scratch: bool = False) -> None:
        """`model`: a transformers causal LM, or a peft model around one. `from_scratch` turns on the schedule S(t)."""
        super().__init__()
        self.model = model
        self.config = model.config
        self.recipe = recipe
        self.seed = seed
        self.from_scratch = from_scratch
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.depth = DepthModel(base)

    def forward(
        self, input_ids: Tensor, labels: Tensor, moment: Moment, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor | tuple[int, ...]]:
        """Ids and labels (B, T), -100 where masked; `attention_mask` (B, T) only for rows that are not padded at the right.

        Returns `loss`, the weighted sum over tokens (divide it by the tokens of the whole optimizer step), `per_exit`, the
        summed cross-entropy of each exit, detached (exits,), and `exit_layers`, the counts that `per_exit` belongs to.
        """
        layers = self.depth.num_layers
        exits = exits_on(self.recipe, moment.step, moment.total_steps, layers, self.depth.vocab_size)
        if not self.training:
            exits = tuple(range(1, layers + 1))
        weights = dict(zip(exits, self._weights(exits), strict=True))
        positions = torch.arange(input_ids.shape[1])[None]
        if attention_mask is not None:
            positions = (attention_mask.cpu().cumsum(1) - 1).clamp(min=0)
        hidden = self.depth.embed(input_ids)
        inputs = self.depth.prepare(hidden, positions, key_mask=attention_mask)
        total = hidden.new_zeros((), dtype=torch.float32)
        per_exit = []
        for layer, rate in enumerate(self._rates(moment)):
            kept = kept_rows(rate, hidden.shape[0], self.seed, moment.step, moment.micro_batch, layer)
            hidden = run_layer_on(self.depth, layer, hidden, inputs, kept)
            if layer + 1 in weights:
                rows, targets = target_rows(hidden, labels)
                loss = summed_cross_entropy(self.depth.unembed, rows, targets, self.depth.vocab_size)
                total = total + weights[layer + 1] * loss
                per_exit.append(loss.detach())
        return {"loss": total, "per_exit": torch.stack(per_exit), "exit_layers": exits}

    def _weights(self, exits: tuple[int, ...]) -> list[float]:
        return exit_weights(exits, self.depth.num_layers, self.recipe.e_scale, self.recipe.exit_weights)

    def _rates(self, moment: Moment) -> list[float]:
        layers = self.depth.num_layers
        if not self.training or self.recipe.p_max == 0:
            return [0.0] * layers
        return dropout_rates(self.recipe.p_max, layers, time_scale(moment.step, moment.total_steps, self.from_scratch))
