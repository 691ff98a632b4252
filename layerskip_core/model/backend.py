"""What decoding needs of a model: complete protocols, so that nothing about a backend is found out at run time."""

from typing import Protocol

import torch
from torch import Tensor

from .cache import KVCache
from .draft_vocabulary import DraftVocabulary
from .spec import ModelSpec


class Layers(Protocol):
    """An embedding and a span of layers. Hidden states are (B, T, D); `positions` (B, T) lives on the host."""

    @property
    def num_layers(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) to hidden states (B, T, D)."""

    def run_layers(self, hidden: Tensor, start: int, stop: int, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        """Layers start..stop-1 over the hidden states of the tokens at `positions`; returns pre-norm hidden states.

        With a cache, the keys and values of the span are written at the positions and earlier ones are read. Without one
        the tokens see each other only.
        """


class DraftSide(Layers, Protocol):
    """What drafts for a backend: its first `num_layers` layers or a low-bit copy of them, and a head of its own or shared."""

    @property
    def shares_states(self) -> bool:
        """Whether its hidden states are the target's, which can then go on from them."""

    @property
    def vocabulary(self) -> DraftVocabulary | None:
        """The tokens that its head knows; None for all of them."""

    def unembed(self, hidden: Tensor) -> Tensor:
        """Final norm and head: (..., D) to logits (..., N), in the order of `vocabulary`."""

    def draft_greedily(
        self, token: int, exit_layer: int, positions: Tensor, cache: KVCache, end_ids: frozenset[int]
    ) -> tuple[Tensor, Tensor]:
        """`token`, at the first of `positions` (1, d), and what is most probable after it, until an end or d drafts.

        Returns the tokens (1, K+1) and hidden states after `exit_layer` layers, of all K+1 tokens or of all but the last.
        """


class Backend(Layers, Protocol):
    """A causal language model as three operations: `unembed(run_layers(embed(ids), 0, L, positions))` are its logits."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def implementation(self) -> str:
        """Which kernels run, for people who measure."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int:
        """The context limit, in tokens."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def exact(self) -> bool:
        """Whether calls are split so that a token has the same bits alone and among others."""

    @property
    def draft_side(self) -> DraftSide: ...

    def new_cache(self, batch_size: int = 1, max_positions: int | None = None) -> KVCache:
        """An empty cache for all layers, up to the context limit unless `max_positions` is less."""

    def unembed(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head, shared by every exit: (..., D) to logits (..., V)."""
