"""What is trained beside a frozen model: blocks at its exits, by the divergence of their predictions from full depth's."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...config.training import BlockLoss
from ...errors import CheckpointError
from ...losses import IGNORED, summed_divergences
from ...model import GenericBackend, SpanInputs
from ...model.exit_blocks import ExitBlock, features_of
from ..recipe.module import Moment

_FILE = "blocks.safetensors"  # of a run's checkpoint


class Block(nn.Module):
    """A decoder layer and a norm, and with the feature `final` the map of its two inputs; see model/exit_blocks.py.

    The parameters have the names of `ExitBlock.shapes`, without the prefix. They start as `ExitBlock.initial` says, in fp32.
    """

    def __init__(self, backend: GenericBackend, block: ExitBlock) -> None:
        super().__init__()
        model: Any = backend.model
        width = backend.hidden_size
        self.layer: nn.Module = deepcopy(backend.layers[-1])
        self.norm: nn.Module = deepcopy(model.model.norm)
        self.input = nn.Linear(2 * width, width, bias=False) if block.feature == "final" else None
        initial = block.initial(backend.spec, model.get_parameter)
        self.load_state_dict({name.removeprefix(block.prefix): weight for name, weight in initial.items()})
        self.to(backend.device, torch.float32).requires_grad_(True)

    def forward(self, states: Tensor, before: Tensor, inputs: SpanInputs, kind: str) -> Tensor:
        """The input (B, T, D) of the head, for the states after the exit and the final states of the tokens before."""
        hidden = states if self.input is None else self.input(torch.cat((states, before), dim=-1))
        output = self.layer(
            hidden,
            attention_mask=inputs.mask[kind],
            position_ids=inputs.positions,
            position_embeddings=inputs.rope[kind],
            use_cache=False,
        )
        normed: Tensor = self.norm(output[0] if isinstance(output, tuple) else output)
        return normed


class FrozenExits(nn.Module):
    """The blocks of a model. Nothing of the model itself is trained, and of it only the head runs."""

    accepts_loss_kwargs = True  # makes Trainer count the target tokens of the whole optimizer step

    def __init__(self, backend: GenericBackend, blocks: Sequence[ExitBlock], loss: BlockLoss = "kl") -> None:
        super().__init__()
        model: Any = backend.model
        self.config = model.config
        self.exits = nn.ModuleDict({str(block.exit_layer): Block(backend, block) for block in blocks})
        self.measured_exits = tuple(block.exit_layer for block in blocks)
        self.vocab_size = backend.vocab_size
        self._backend = backend
        self._head = (model.get_output_embeddings().requires_grad_(False),)  # in a tuple it is no part of this module
        self._total_variation = loss == "tv"

    def forward(
        self, input_ids: Tensor, labels: Tensor, states: Tensor, finals: Tensor, exits: Tensor, moment: Moment | None = None
    ) -> dict[str, Tensor | tuple[int, ...]]:
        """A batch of `states.collate`. Sums are over the targets, the tokens with labels.

        With the feature `final` a block runs twice: on the true final states of the tokens before, as in the first draft of a
        round, and on its own, as in later drafts (as HASS, Zhang et al., 2025, with two steps); the loss is the mean of both.

        Returns `loss`, `per_exit` (exits,), the divergence of the first run, `agreeing` (exits,), the number of targets
        where its best token is full depth's, and `exit_layers`.
        """
        is_target = labels[:, 1:] != IGNORED
        finals = finals.float()
        teacher = finals[:, :-1][is_target]
        exit_layers = tuple(exits.tolist())
        inputs = self._backend.prepare(finals, torch.arange(finals.shape[1])[None])
        results = []
        for exit_layer, state in zip(exit_layers, states.float(), strict=True):
            runs = [run[:, :-1][is_target] for run in self._runs(exit_layer, state, finals, inputs)]
            results.append(summed_divergences(self._logits, runs, teacher, self.vocab_size, self._total_variation))
        return {
            "loss": torch.stack([torch.stack(losses).mean() for losses, _ in results]).sum(),
            "per_exit": torch.stack([losses[0].detach() for losses, _ in results]),
            "agreeing": torch.stack([agreeing for _, agreeing in results]),
            "exit_layers": exit_layers,
        }

    def weights(self) -> dict[str, Tensor]:
        """All weights by the names of `ExitBlock.shapes`."""
        return {name: weight.detach().cpu().contiguous() for name, weight in self.named_parameters()}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.weights(), folder / _FILE)

    def load(self, folder: Path) -> None:
        try:
            self.load_state_dict(load_file(folder / _FILE), strict=True)
        except RuntimeError as error:
            raise CheckpointError(f"{folder} does not fit the exits: {error}") from error

    def _runs(self, exit_layer: int, states: Tensor, finals: Tensor, inputs: SpanInputs) -> list[Tensor]:
        block, kind = self.exits[str(exit_layer)], self._backend.spec.kinds[-1]
        first = block(states, features_of(finals), inputs, kind)
        return [first] if block.input is None else [first, block(states, features_of(first), inputs, kind)]

    def _logits(self, normed: Tensor) -> Tensor:
        head = self._head[0]
        logits: Tensor = head(normed.to(head.weight.dtype))
        return self._backend.spec.scaled_logits(logits)
