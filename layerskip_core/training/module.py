"""The training forward of a whole model under the recipe, and the LoRA adapters that can be trained in place of its weights.

Layers and loss run inside the module's own `forward`, because DDP and FSDP2 act there: layers called from outside would let the
processes drift apart.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checkpoint.folder import quiet_transformers
from ..checkpoint.save import write_model
from ..config.checks import require
from ..config.training import FinetuneConfig
from ..errors import ConfigError, first_line
from ..losses import Teacher, summed_losses, target_rows
from ..model import TransformersBackend
from .anchor import Anchor
from .checkpoints import load_weights
from .layers import run_layer_on, span_inputs
from .recipe import Recipe, RunStep, dropout_rates, exit_weights, exits_on, kept_rows, time_scale


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
        self.backend = TransformersBackend(base)
        self.vocab_size = self.backend.vocab_size
        self.measured_exits = tuple(range(1, self.backend.num_layers + 1))

    def forward(
        self, input_ids: Tensor, labels: Tensor, step: RunStep, documents: Tensor | None = None
    ) -> dict[str, Tensor | tuple[int, ...]]:
        """Ids and labels (B, T), padded at the right; labels are IGNORED where there is no target.

        `documents` (B, T): see span_inputs.

        Returns `loss`, the weighted sum over the target tokens in nats (divide it by the tokens of the whole optimizer step),
        `per_exit`, the summed cross-entropy of each exit, detached (exits,), and `exit_layers`, the exit layers that `per_exit`
        belongs to. With an anchor also `divergence`, the summed divergence from the original, detached.
        """
        layers, recipe = self.backend.num_layers, self.recipe
        exits = exits_on(recipe, step.done, step.total, layers) if self.training else self.measured_exits
        states = self._states(input_ids, exits, step, documents)
        rows = {exit_layer: target_rows(hidden, labels) for exit_layer, hidden in states.items()}
        share = recipe.distill if self.training else 0.0
        anchor = self.anchor if self.training else None
        last_layer = Teacher(rows[layers][0], self.backend.unembed) if share else None
        original = None if anchor is None else anchor.teacher(input_ids, labels, documents)
        total = rows[layers][0].new_zeros((), dtype=torch.float32)
        per_exit = []
        for weight, exit_layer in zip(exit_weights(exits, layers, recipe.e_scale, recipe.exit_weights), exits, strict=True):
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

    def save(self, folder: Path) -> None:
        """Writes the model inside, as an ordinary transformers or peft checkpoint with its tokenizer."""
        write_model(self.model, folder)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Loads the model inside. Raises CheckpointError as `load_weights` does."""
        load_weights(self.model, folder)

    def _states(self, input_ids: Tensor, exits: tuple[int, ...], step: RunStep, documents: Tensor | None) -> dict[int, Tensor]:
        """The hidden states (B, T, D) after each exit layer that is on."""
        recipe, layers = self.recipe, self.backend.num_layers
        rates = [0.0] * layers
        if self.training and recipe.p_max:
            rates = dropout_rates(
                recipe.p_max, layers, time_scale(step.done, step.total, self.from_scratch), recipe.dropout_profile
            )
        hidden = self.backend.embed(input_ids)
        inputs = span_inputs(self.backend, hidden, documents)
        states = {}
        for layer, rate in enumerate(rates):
            kept = kept_rows(rate, hidden.shape[0], self.seed, step.done, step.first_row, layer)
            if self.recompute and self.training:
                hidden = checkpoint(run_layer_on, self.backend, layer, hidden, inputs, kept, use_reentrant=False)
            else:
                hidden = run_layer_on(self.backend, layer, hidden, inputs, kept)
            if layer + 1 in exits:
                states[layer + 1] = hidden
        return states


def adapted_layers(config: FinetuneConfig, recipe: Recipe, num_layers: int) -> int | None:
    """How many of the first layers have adapters: those that the highest early exit runs; None for the whole model.

    Raises ConfigError where no early exit is trained.
    """
    if config.lora_layers == "all":
        return None
    require(recipe.curriculum != "none", "lora_layers", "all with `curriculum` none, which trains no exit", config.lora_layers)
    return max(recipe.exits, default=num_layers - 1)


@quiet_transformers()
def with_lora(model: Any, config: FinetuneConfig, layers: int | None = None) -> Any:
    """A peft model with adapters on the linear layers that `lora_targets` names; `all-linear` is all but the head.

    With `layers`, only those in so many of the first layers.
    """
    from peft import LoraConfig, get_peft_model

    targets = [name.strip() for name in config.lora_targets.split(",")]
    if layers is not None:
        modules = dict(model.named_modules())  # peft adapts what is named in full whatever its layer
        whole = [name for name in targets if name in modules]
        require(not whole, "lora_targets", "names within a layer with `lora_layers` below-exit", ", ".join(whole))
        if targets == ["all-linear"]:  # which peft does not take together with layers
            linear = (name for name, part in model.model.layers[0].named_modules() if isinstance(part, nn.Linear))
            targets = sorted({name.rpartition(".")[2] for name in linear})
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        layers_to_transform=None if layers is None else list(range(layers)),
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.model,
    )
    torch.manual_seed(config.seed)
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise ConfigError(f"`lora_targets` {config.lora_targets}: {first_line(error)}") from error
