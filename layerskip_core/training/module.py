"""The training forward of a whole model under the recipe, with losses of exits, and LoRA adapters.

Layers and loss run inside the module's own `forward`, because DDP and FSDP2 act there.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..checkpoint.folder import EXIT_BLOCKS_FILE, open_weights, quiet_transformers
from ..checkpoint.model_weights import block_weights
from ..checkpoint.save import write_model
from ..checkpoint.sidecars import exit_blocks_content, fingerprint
from ..config.training import FinetuneConfig
from ..errors import ConfigError, first_line
from ..losses import summed_losses, target_rows
from ..model import Backend, TransformersBackend
from ..model.transformers_backend import DocumentRows
from .exit_blocks import MUON_LR, head_in_training, named_weights
from .progress import require_same_names, restore
from .recipe import (
    Recipe,
    RunStep,
    dropout_rates,
    exit_weights,
    exits_on,
    kept_rows,
    mixed_seed,
    time_scale,
)
from .speedup import SpeedEstimate, exit_speedup

_FP32_ATTENTION = "sdpa_fp32"
_SHORT = 192  # tokens; longer rows are faster in bf16


class RecipeModule(nn.Module):
    """A causal language model under the LayerSkip recipe."""

    accepts_loss_kwargs = True  # makes Trainer count the target tokens of the whole optimizer step

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        seed: int = 0,
        recompute: bool = False,
        exit_blocks: nn.ModuleDict | None = None,
        tokenizer: Any = None,
        frequent: Sequence[int] = (),
    ) -> None:
        """`model`: of transformers or peft. `recompute`: gradient checkpointing. `exit_blocks`: see
        `new_exit_blocks`. `tokenizer`: saved with the model. `frequent`: the tokens of
        `exit_vocab`.
        """
        super().__init__()
        self.model = model
        self.config = model.config  # for Trainer and its trackers
        self.recipe = recipe
        self.seed = seed
        self.recompute = recompute
        self.tokenizer = tokenizer
        self.backend = TransformersBackend(
            model.get_base_model() if hasattr(model, "get_base_model") else model
        )
        # Made now: it tries the model, before a row is dropped or FSDP shards the model
        self.texts = self.backend.texts
        layers = self.backend.num_layers
        early: Iterable[int] = ()
        if recipe.curriculum != "none":
            early = recipe.exits or range(1, layers)
        # The early exits that are measured, with their names in layerskip.json
        self.names = {layer: str(layer) for layer in early}
        self.exit_blocks = exit_blocks or nn.ModuleDict()
        self._frequent = torch.tensor(frequent, dtype=torch.long)

    def muon(self, lr: float) -> tuple[list[nn.Parameter], float]:
        """As `DrafterModule.muon`: the matrices of exit blocks, whatever their losses weigh."""
        blocks = self.exit_blocks.parameters()
        return [weight for weight in blocks if weight.requires_grad], MUON_LR

    def forward(
        self, input_ids: Tensor, labels: Tensor, step: RunStep, documents: Tensor | None = None
    ) -> dict[str, Tensor | tuple[int, ...]]:
        """Ids and labels (B, T), padded at the right, labels IGNORED without a target; `documents`
        (B, T): see `WholeTexts`.

        Returns `loss`, the weighted sum over target tokens in nats, `per_exit` (exits,), the summed
        cross-entropy of each of `exit_layers`, and in evaluation `agreeing` (exits - 1,), the number
        of targets where an early exit's argmax is the last layer's.
        """
        layers = self.backend.num_layers
        recipe = self.recipe
        exits = (*self.names, layers)
        if self.training:
            exits = exits_on(recipe, step.done, step.total, layers)
        states = self._states(input_ids, exits, documents, step)

        _, targets = target_rows(input_ids[..., None], labels)
        head_of_blocks: Callable[[Tensor], Tensor] = self.backend.head
        if self.training:
            seed = mixed_seed(self.seed, step.done, step.first_row)
            head_of_blocks = head_in_training(self.backend, self._frequent, targets, seed)
        inputs = []  # of the head, by exit: the states that predict a target
        heads: list[Callable[[Tensor], Tensor]] = []
        for exit_layer in exits:
            hidden = states[exit_layer]
            if exit_layer < layers:
                hidden = with_gradient(hidden, recipe.exit_gradient)
            if str(exit_layer) in self.exit_blocks:
                hidden = self._through_block(exit_layer, hidden, input_ids, documents)
                heads.append(head_of_blocks)
            else:
                heads.append(self.backend.unembed)
            predicting, _ = target_rows(hidden, labels)
            inputs.append(predicting)

        # In evaluation any weight makes agreement counted
        distilled = recipe.distill if self.training else 1.0
        *early, last = exit_weights(exits, layers, recipe.e_scale, recipe.exit_weights)
        weights = [((1 - distilled) * weight, distilled * weight) for weight in early]
        weights.append((last, 0.0))
        loss, sums = summed_losses(heads, inputs, targets, self.backend.spec.vocab, weights)
        output: dict[str, Tensor | tuple[int, ...]] = {
            "loss": loss,
            "per_exit": sums[:, 0],
            "exit_layers": exits,
        }
        if not self.training:
            output["agreeing"] = sums[:-1, 2]
        return output

    def _states(
        self,
        input_ids: Tensor,
        exits: tuple[int, ...],
        documents: Tensor | None,
        step: RunStep,
    ) -> dict[int, Tensor]:
        """The states (B, T, D) after each of the exits; in training under layer dropout."""
        layers = self.backend.num_layers
        recipe = self.recipe
        rates = [0.0] * layers
        if self.training and recipe.p_max:
            scale = time_scale(step.done, step.total, recipe.dropout_schedule)
            rates = dropout_rates(recipe.p_max, layers, scale, recipe.dropout_profile)

        def kept(layer: int) -> list[int]:
            rows = len(input_ids)
            return kept_rows(rates[layer], rows, self.seed, step.done, step.first_row, layer)

        recompute = self.recompute and self.training
        return self.texts.states(input_ids, exits, documents, kept, recompute)

    def _through_block(
        self, exit_layer: int, states: Tensor, ids: Tensor, documents: Tensor | None
    ) -> Tensor:
        """Runs an exit's block on states (B, T, D). Packed documents do not see each other."""
        block = self.exit_blocks[str(exit_layer)]
        result: Tensor
        if documents is None:
            result = block(states, ids)
        else:
            rows = DocumentRows(documents)
            result = rows.together(block(rows.apart(states), rows.apart(ids)))
        return result

    def estimated_speedup(self, backend: Backend, exit_layer: int) -> SpeedEstimate:
        """As `DrafterModule.estimated_speedup`."""
        return exit_speedup(backend, exit_layer, str(exit_layer) in self.exit_blocks)

    def blocks_content(self, model: Any, dtype: torch.dtype) -> bytes:
        """The content of exit_blocks.safetensors for `model`; without the model's fingerprint for
        an adapter.
        """
        weights = block_weights(self.backend.model, named_weights(self.exit_blocks), dtype)
        spec = self.backend.spec
        made_for = ""
        if not hasattr(model, "get_base_model"):
            made_for = fingerprint(spec, model.get_parameter)
        return exit_blocks_content(spec, weights, made_for)

    def save(self, folder: Path) -> None:
        """Writes an ordinary transformers or peft checkpoint, with the tokenizer and exit
        blocks.
        """
        write_model(self.model, folder, as_it_is=True)
        if self.exit_blocks:
            content = self.blocks_content(self.model, torch.float32)
            (folder / EXIT_BLOCKS_FILE).write_bytes(content)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Reads the weights that `save` wrote. Raises ValueError unless it finds these and no
        others.
        """
        stored = {name: file.mapped(name) for name, file in open_weights(folder).items()}
        if hasattr(self.model, "get_base_model"):
            from peft import get_peft_model_state_dict, set_peft_model_state_dict

            needed = get_peft_model_state_dict(self.model, save_embedding_layers=False)
            require_same_names(stored, needed)
            set_peft_model_state_dict(self.model, stored)
        else:
            restore(_written_weights(self.model, stored), stored)
        if self.exit_blocks:
            restore(named_weights(self.exit_blocks), load_file(folder / EXIT_BLOCKS_FILE))


def _written_weights(model: Any, stored: Collection[str]) -> dict[str, Tensor]:
    """The weights that a checkpoint of a transformers model has: of tied ones those in `stored`."""
    weights = model.state_dict(keep_vars=True)
    for name in model._keys_to_ignore_on_save or ():  # transformers does not write these
        weights.pop(name, None)
    found = {id(weights[name]) for name in stored if name in weights}
    return {
        name: weight
        for name, weight in weights.items()
        if name in stored or id(weight) not in found
    }


def with_gradient(states: Tensor, share: float) -> Tensor:
    """The same values, bit by bit. Only `share` of their gradient goes on to what computed them."""
    if share == 1:
        return states
    fixed = states.detach()
    if share == 0:
        return fixed
    return fixed + share * (states - fixed)


@quiet_transformers()
def with_lora(model: Any, config: FinetuneConfig) -> Any:
    """A peft model with adapters on the linear layers that `lora_targets` names; `all-linear` is
    all but the head.
    """
    from peft import LoraConfig, get_peft_model

    targets = [name.strip() for name in config.lora_targets.split(",")]
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.model,
    )
    torch.manual_seed(config.seed)
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise ConfigError(f"`lora_targets` {config.lora_targets}: {first_line(error)}") from error


def use_fp32_attention(model: Any) -> None:
    """Makes a transformers model with `sdpa` attention run it in fp32 on short rows.

    There torch's flash kernel is slow in bf16 on a CPU: 15 ms for a layer of 32 rows of 56 tokens,
    7 ms in fp32 (torch 2.13).
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if model.config._attn_implementation != "sdpa":
        return
    ALL_ATTENTION_FUNCTIONS.register(_FP32_ATTENTION, _fp32_sdpa)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_FP32_ATTENTION, sdpa_mask)
    model.set_attn_implementation(_FP32_ATTENTION)


def _fp32_sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> Any:
    """(B, heads, T, head dim) each; the result is (B, T, heads, head dim)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.shape[-2] >= _SHORT:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    with torch.autocast(query.device.type, enabled=False):
        output, weights = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), mask, **options
        )
    return output.to(query.dtype), weights  # FSDP computes in bf16 without autocast
