"""The training forward of a whole model under the recipe, with losses of exits, and LoRA adapters.

Layers and loss run inside the module's own `forward`, because DDP and FSDP2 act there.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..checkpoint.folder import EXIT_BLOCKS_FILE, open_weights, quiet_transformers
from ..checkpoint.save import write_model
from ..checkpoint.sidecars import exit_blocks_content, fingerprint
from ..config.training import FinetuneConfig
from ..errors import ConfigError, first_line
from ..losses import summed_losses, target_rows
from ..model import Backend, TransformersBackend
from ..model.transformers_backend import DocumentRows
from ..model.weights import block_weights
from .exit_blocks import MUON_LR, named_weights
from .progress import require_same_names, restore
from .recipe import Recipe, RunStep, dropout_rates, exit_weights, exits_on, kept_rows, time_scale
from .verdict import SpeedEstimate, exit_speedup

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
        readers: nn.ModuleDict | None = None,
    ) -> None:
        """`model`: of transformers or peft. `recompute`: gradient checkpointing. `readers`: see
        `new_readers`.
        """
        super().__init__()
        self.model = model
        self.config = model.config
        self.recipe = recipe
        self.seed = seed
        self.recompute = recompute
        self.by_muon = False  # Muon trains the matrices of the layers
        self.tokenizer: Any = None  # saved with the model
        self.backend = TransformersBackend(
            model.get_base_model() if hasattr(model, "get_base_model") else model
        )
        # Tried now, before a row is dropped or FSDP shards the model
        self.texts = self.backend.texts
        layers = self.backend.num_layers
        early = recipe.exits or range(1, layers) if recipe.curriculum != "none" else ()
        self.names = {layer: str(layer) for layer in early}
        self.readers = readers or nn.ModuleDict()

    def muon(self, lr: float) -> Iterator[tuple[list[nn.Parameter], float, str]]:
        """As `DrafterModule.muon`: the readers' matrices, whatever their losses weigh, and with
        `by_muon` the layers'.
        """
        if weights := [weight for weight in self.readers.parameters() if weight.requires_grad]:
            yield weights, MUON_LR, "original"
        if self.by_muon:
            own = self.backend.layers.parameters()
            yield (
                [weight for weight in own if weight.requires_grad and weight.dim() == 2],
                lr,
                "match_rms_adamw",
            )

    def forward(
        self, input_ids: Tensor, labels: Tensor, step: RunStep, documents: Tensor | None = None
    ) -> dict[str, Tensor | tuple[int, ...]]:
        """Ids and labels (B, T), padded at the right, labels IGNORED without a target; `documents`
        (B, T): see `WholeTexts`.

        Returns `loss`, the weighted sum over target tokens in nats, `per_exit` (exits,), the summed
        cross-entropy of each of `exit_layers`, and in evaluation `agreeing` (exits,), the number of
        targets where an exit's argmax is the last layer's.
        """
        layers = self.backend.num_layers
        recipe = self.recipe
        exits = (
            exits_on(recipe, step.done, step.total, layers)
            if self.training
            else (*self.names, layers)
        )
        rates = [0.0] * layers
        if self.training and recipe.p_max:
            scale = time_scale(step.done, step.total, recipe.dropout_schedule)
            rates = dropout_rates(recipe.p_max, layers, scale, recipe.dropout_profile)

        def kept(layer: int) -> list[int]:
            return kept_rows(
                rates[layer], len(input_ids), self.seed, step.done, step.first_row, layer
            )

        states = self.texts.states(
            input_ids, exits, documents, kept, self.recompute and self.training
        )
        for exit_layer in exits[:-1]:
            states[exit_layer] = with_gradient(states[exit_layer], recipe.exit_gradient)
        rows = [
            self._read(exit_layer, states[exit_layer], input_ids, labels, documents)
            for exit_layer in exits
        ]
        # In evaluation any weight makes agreement counted
        share = recipe.distill if self.training else 1.0
        # 0 for the paper's first exit
        scales = exit_weights(exits, layers, recipe.e_scale, recipe.exit_weights)
        weights = [((1 - share) * scale, share * scale) for scale in scales[:-1]]
        heads = [
            self.backend.head if str(layer) in self.readers else self.backend.unembed
            for layer in exits
        ]
        read = [hidden for hidden, _ in rows]
        weights = [*weights, (scales[-1], 0.0)]
        vocab = self.backend.spec.vocab
        loss, sums = summed_losses(heads, read, rows[-1][1], vocab, weights)
        output: dict[str, Tensor | tuple[int, ...]] = {
            "loss": loss,
            "per_exit": sums[:, 0],
            "exit_layers": exits,
        }
        return output if self.training else output | {"agreeing": sums[:, 2]}

    def _read(
        self, exit_layer: int, states: Tensor, ids: Tensor, labels: Tensor, documents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Runs an exit's reader, if any, on states (B, T, D). Returns (states (N, D) that predict a
        target, targets (N,)).
        """
        if str(exit_layer) not in self.readers:
            return target_rows(states, labels)
        reader = self.readers[str(exit_layer)]
        if documents is None:
            return target_rows(reader(states, ids), labels)
        rows = DocumentRows(documents)
        return target_rows(rows.together(reader(rows.apart(states), rows.apart(ids))), labels)

    def estimated_speedup(self, backend: Backend, exit_layer: int) -> SpeedEstimate:
        """As `DrafterModule.estimated_speedup`."""
        return exit_speedup(backend, exit_layer, str(exit_layer) in self.readers)

    def readers_content(self, model: Any, dtype: torch.dtype) -> bytes:
        """The content of exit_blocks.safetensors for `model`; without the model's fingerprint for
        an adapter.
        """
        weights = block_weights(self.backend.model, named_weights(self.readers), dtype)
        spec = self.backend.spec
        is_whole = not hasattr(model, "get_base_model")
        return exit_blocks_content(
            spec, weights, fingerprint(spec, model.get_parameter) if is_whole else ""
        )

    def save(self, folder: Path) -> None:
        """Writes an ordinary transformers or peft checkpoint, with the tokenizer and readers."""
        write_model(self.model, folder, as_it_is=True)
        if self.readers:
            (folder / EXIT_BLOCKS_FILE).write_bytes(self.readers_content(self.model, torch.float32))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Reads the weights that `save` wrote. Raises ValueError unless it finds these and no
        others.
        """
        stored = {name: file.mapped(name) for name, file in open_weights(folder).items()}
        if hasattr(self.model, "get_base_model"):
            from peft import get_peft_model_state_dict, set_peft_model_state_dict

            require_same_names(
                stored, get_peft_model_state_dict(self.model, save_embedding_layers=False)
            )
            set_peft_model_state_dict(self.model, stored)
        else:
            restore(_written_weights(self.model, stored), stored)
        if self.readers:
            restore(named_weights(self.readers), load_file(folder / EXIT_BLOCKS_FILE))


def _written_weights(model: Any, stored: Collection[str]) -> dict[str, Tensor]:
    """The weights that a checkpoint of a transformers model has: of tied ones those in `stored`."""
    weights = {
        name: weight
        for name, weight in model.state_dict(keep_vars=True).items()
        if name not in _unwritten(model)
    }
    found = {id(weights[name]) for name in stored if name in weights}
    return {
        name: weight
        for name, weight in weights.items()
        if name in stored or id(weight) not in found
    }


def _unwritten(model: Any) -> Collection[str]:
    """The names of weights that transformers does not write."""
    return model._keys_to_ignore_on_save or ()


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
