"""The training forward: layers with dropout, the states after every exit that is on, and the weighted loss.

Layers and loss run inside this module's own `forward`, because DDP and FSDP2 act there: layers called from outside would let
the processes drift apart.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...checkpoint.save import write_model
from ...losses import Teacher, summed_losses, target_rows
from ...model import GenericBackend
from ..loop.checkpoints import load_weights
from ..rows.packing import span_inputs
from .anchor import Anchor
from .curriculum import exits_on
from .dropout import dropout_rates, kept_rows, run_layer_on, time_scale
from .exit_loss import exit_weights
from .resolved import Recipe


@dataclass(frozen=True)
class Moment:
    """Where in the run a forward stands: everything random or scheduled in the recipe is a function of it."""

    step: int  # optimizer steps done
    total_steps: int
    first_row: int = 0  # index of the batch's first row among all rows of the step


class RecipeModule(nn.Module):
    """A causal language model under the LayerSkip recipe."""

    accepts_loss_kwargs = True  # makes Trainer count the target tokens of the whole optimizer step

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        seed: int = 0,
        from_scratch: bool = False,
        recompute: bool = False,
        tokenizer: Any = None,
    ) -> None:
        """`model`: a transformers causal LM, or a peft model around one. `from_scratch` turns on the schedule S(t).

        `recompute` keeps no activations inside the layers: the backward pass runs them again, with the same rows dropped.
        `tokenizer`: of transformers, saved with the model. The attribute `anchor` adds the divergence from the original.
        """
        super().__init__()
        self.model = model
        self.config = model.config
        self.recipe = recipe
        self.seed = seed
        self.from_scratch = from_scratch
        self.recompute = recompute
        self.anchor: Anchor | None = None
        self._tokenizer = tokenizer
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.backend = GenericBackend(base)

    def forward(
        self, input_ids: Tensor, labels: Tensor, moment: Moment, documents: Tensor | None = None
    ) -> dict[str, Tensor | tuple[int, ...]]:
        """Ids and labels (B, T), padded at the right; labels are IGNORED where there is no target.

        `documents` (B, T) numbers the documents packed into a row: attention stays within a document, and each starts at
        position 0. Returns
        `loss`, the weighted sum over the target tokens in nats (divide it by the tokens of the whole optimizer step),
        `per_exit`, the summed cross-entropy of each exit, detached (exits,), and `exit_layers`, the exit layers that `per_exit`
        belongs to. With an anchor also `divergence`, the summed divergence from the original, detached.
        """
        layers = self.backend.num_layers
        exits = exits_on(self.recipe, moment.step, moment.total_steps, layers)
        if not self.training:
            exits = self.measured_exits
        taps = self._taps(input_ids, exits, moment, documents)
        rows = {exit_layer: target_rows(hidden, labels) for exit_layer, hidden in taps.items()}
        share = self.recipe.distill if self.training else 0.0
        anchor = self.anchor if self.training else None
        last_layer = Teacher(rows[layers][0], self.backend.unembed) if share else None
        original = None if anchor is None else anchor.teacher(input_ids, labels, documents)
        total = rows[layers][0].new_zeros((), dtype=torch.float32)
        per_exit = []
        for weight, exit_layer in zip(self._weights(exits), exits, strict=True):
            teacher = last_layer if exit_layer < layers else original
            with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):  # the paper's first exit weighs nothing
                cross_entropy, divergence = summed_losses(
                    self.backend.unembed, *rows[exit_layer], self.backend.vocab_size, teacher
                )
            mixed = (1 - share) * cross_entropy + share * divergence if exit_layer < layers else cross_entropy
            total = total + weight * mixed
            per_exit.append(cross_entropy.detach())
        output: dict[str, Tensor | tuple[int, ...]] = {"per_exit": torch.stack(per_exit), "exit_layers": exits}
        if anchor is not None:  # the last exit of the loop was the last layer, which is always on
            total = total + anchor.weight * divergence
            output["divergence"] = divergence.detach()
        return output | {"loss": total}

    @property
    def measured_exits(self) -> tuple[int, ...]:
        return tuple(range(1, self.backend.num_layers + 1))

    @property
    def vocab_size(self) -> int:
        return self.backend.vocab_size

    def save(self, folder: Path) -> None:
        """Writes the model inside, as an ordinary transformers or peft checkpoint with its tokenizer."""
        write_model(self.model, folder)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Loads the model inside. Raises CheckpointError as `load_weights` does."""
        load_weights(self.model, folder)

    def _taps(self, input_ids: Tensor, exits: tuple[int, ...], moment: Moment, documents: Tensor | None) -> dict[int, Tensor]:
        """The hidden states (B, T, D) after each exit layer that is on."""
        hidden = self.backend.embed(input_ids)
        inputs = span_inputs(self.backend, hidden, documents)
        taps = {}
        for layer, rate in enumerate(self._rates(moment)):
            kept = kept_rows(rate, hidden.shape[0], self.seed, moment.step, moment.first_row, layer)
            if self.recompute and self.training:
                hidden = checkpoint(run_layer_on, self.backend, layer, hidden, inputs, kept, use_reentrant=False)
            else:
                hidden = run_layer_on(self.backend, layer, hidden, inputs, kept)
            if layer + 1 in exits:
                taps[layer + 1] = hidden
        return taps

    def _weights(self, exits: tuple[int, ...]) -> list[float]:
        return exit_weights(exits, self.backend.num_layers, self.recipe.e_scale, self.recipe.exit_weights)

    def _rates(self, moment: Moment) -> list[float]:
        layers = self.backend.num_layers
        if not self.training or self.recipe.p_max == 0:
            return [0.0] * layers
        scale = time_scale(moment.step, moment.total_steps, self.from_scratch)
        return dropout_rates(self.recipe.p_max, layers, scale, self.recipe.dropout_profile)
