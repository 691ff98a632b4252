"""The anchor: the divergence of the trained model from the original, which runs beside it on the same batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checkpoint.open import for_decoding
from ..config.packing import PackingConfig
from ..config.training import FinetuneConfig
from ..losses import Teacher, target_rows
from ..model import Backend, TransformersBackend
from .layers import span_inputs


class Original(Protocol):
    """A model as it was before the training. No gradient flows into it."""

    def states(self, input_ids: Tensor, documents: Tensor | None) -> Tensor:
        """The hidden states (B, T, D) after the last layer; arguments as for `RecipeModule.forward`."""

    def unembed(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head: (N, D) to logits (N, V)."""


@dataclass(frozen=True)
class Anchor:
    """`weight` times KL(original || trained model), both at full depth, is added to the loss."""

    weight: float
    original: Original

    def teacher(self, input_ids: Tensor, labels: Tensor, documents: Tensor | None) -> Teacher:
        """Of the target tokens of a batch."""
        states, _ = target_rows(self.original.states(input_ids, documents), labels)
        return Teacher(states, self.original.unembed)


class FrozenCopy:
    """The original with weights of its own, on the kernels of decoding."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def states(self, input_ids: Tensor, documents: Tensor | None) -> Tensor:
        with self._isolated():
            if documents is None:
                return self._run(input_ids)
            # Decoding's kernels have no masks between documents: each runs alone.
            hidden = torch.zeros_like(self._backend.embed(input_ids))
            for row, numbers in enumerate(documents):
                for number in range(int(numbers.max()) + 1):
                    own = numbers == number
                    hidden[row, own] = self._run(input_ids[row, own][None])[0]
            return hidden

    def unembed(self, hidden: Tensor) -> Tensor:
        with self._isolated():
            return self._backend.unembed(hidden)

    def _run(self, ids: Tensor) -> Tensor:
        """Padding stands at the right, where no token sees it."""
        positions = torch.arange(ids.shape[1])[None].expand(len(ids), -1)
        return self._backend.run_layers(self._backend.embed(ids), 0, self._backend.num_layers, positions)

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        """Without gradients, and in the precision of its own weights."""
        with torch.inference_mode(), torch.autocast(self._backend.device.type, enabled=False):
            yield


class WithoutAdapters:
    """The original of a model that trains LoRA adapters only: the same model with these off."""

    def __init__(self, model: Any, backend: TransformersBackend) -> None:
        """`model`: of peft; `backend`: over the model inside."""
        self._model = model
        self._backend = backend

    def states(self, input_ids: Tensor, documents: Tensor | None) -> Tensor:
        training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad(), self._model.disable_adapter():
                hidden = self._backend.embed(input_ids)
                inputs = span_inputs(self._backend, hidden, documents)
                for layer in range(self._backend.num_layers):
                    hidden = self._backend.run_layer(layer, hidden, inputs)
                return hidden
        finally:
            self._model.train(training)

    def unembed(self, hidden: Tensor) -> Tensor:
        with torch.no_grad(), self._model.disable_adapter():
            return self._backend.unembed(hidden)


def anchor_of(config: FinetuneConfig, model: Any, backend: TransformersBackend, device: str) -> Anchor | None:
    """The anchor that a config asks for; None if there is none. `model` is trained, on `device`.

    The copy is read from `config.model` again, because the training may have been resumed. Raises ConfigError where no kernel
    has int8 weights, and CheckpointError as `for_decoding` does.
    """
    asked = config.retention
    if not asked.anchor:
        return None
    if config.lora_rank:
        return Anchor(asked.anchor, WithoutAdapters(model, backend))
    packing = PackingConfig(quantize="int8") if asked.anchor_weights == "int8" else None
    return Anchor(asked.anchor, FrozenCopy(for_decoding(config.model, device, "bf16", packing).backend))
