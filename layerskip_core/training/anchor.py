"""The anchor: the divergence of the trained model from the original, which runs beside it on the same batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.open import for_decoding
from ..config.packing import PackingConfig
from ..config.training import FinetuneConfig
from ..losses import Teacher, target_rows
from ..model import Backend, TransformersBackend
from .layers import span_inputs


@dataclass(frozen=True)
class Anchor:
    """`weight` times KL(original || trained model), both at full depth, is added to the loss.

    The original is a copy with weights of its own, on the kernels of decoding. A model that trains LoRA adapters only needs no
    copy: there it is the same model with these off.
    """

    weight: float
    original: Backend
    adapted: Any = None  # of peft, around the backend's model

    def teacher(self, input_ids: Tensor, labels: Tensor, documents: Tensor | None) -> Teacher:
        """Of the target tokens of a batch; arguments as for `RecipeModule.forward`."""
        with self._isolated():
            states = self._states(input_ids, documents)
        return Teacher(target_rows(states, labels)[0], self._unembed)

    def _unembed(self, hidden: Tensor) -> Tensor:
        with self._isolated():
            return self.original.unembed(hidden)

    def _states(self, input_ids: Tensor, documents: Tensor | None) -> Tensor:
        """The hidden states (B, T, D) after the last layer. Padding stands at the right, where no token sees it."""
        backend = self.original
        hidden = backend.embed(input_ids)
        if isinstance(backend, TransformersBackend) and self.adapted is not None:
            inputs = span_inputs(backend, hidden, documents)
            for layer in range(backend.num_layers):
                hidden = backend.run_layer(layer, hidden, inputs)
            return hidden
        if documents is None:
            positions = torch.arange(input_ids.shape[1])[None].expand(len(input_ids), -1)
            return backend.run_layers(hidden, 0, backend.num_layers, positions)
        # Decoding's kernels have no masks between documents: each runs alone.
        states = torch.zeros_like(hidden)
        for row, numbers in enumerate(documents):
            for number in range(int(numbers.max()) + 1):
                own = numbers == number
                states[row, own] = self._states(input_ids[row, own][None], None)[0]
        return states

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        """Without gradients and adapters, and a copy in the precision of its own weights."""
        if self.adapted is None:
            with torch.inference_mode(), torch.autocast(self.original.device.type, enabled=False):
                yield
            return
        training = self.adapted.training
        self.adapted.eval()
        try:
            with torch.no_grad(), self.adapted.disable_adapter():
                yield
        finally:
            self.adapted.train(training)


def anchor_of(config: FinetuneConfig, model: Any, backend: TransformersBackend, device: str) -> Anchor | None:
    """The anchor that a config asks for; None if there is none. `model` is trained, on `device`.

    The copy is read from `config.model` again, because the training may have been resumed. Raises ConfigError where no kernel
    has int8 weights, and CheckpointError as `for_decoding` does.
    """
    asked = config.retention
    if not asked.anchor:
        return None
    if config.lora_rank:
        return Anchor(asked.anchor, backend, model)
    packing = PackingConfig(quantize="int8") if asked.anchor_weights == "int8" else None
    return Anchor(asked.anchor, for_decoding(config.model, device, "bf16", packing).backend)
