"""`Backend` over a transformers model of any type, cut at its layers; and its forward over whole
texts, for training.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config.model import PackingConfig, Quantization
from ..errors import CheckpointError
from .architectures import SUPPORTED, known_architecture
from .backend import Backend, DraftHead, DraftSide
from .cache import Places
from .cut import CutModel, Form
from .eagle3 import UNSUITED, Eagle3Weights
from .exit_blocks import (
    INPUT_NORMS,
    MTP,
    NO_STORED_DRAFTERS,
    ExitBlock,
    PlacedBlock,
    PlacedMtp,
    StoredDrafters,
)
from .position_cache import Forward, hidden_of, replaced, with_hidden
from .probe import cut_at_layers
from .row_cache import Entry, MixedCache
from .spec import ModelSpec, TransformersSpec
from .torch_eagle3 import PlacedEagle3

_TEXTS = 3, 4  # lengths of the two packed texts of the trial


def attention_for(config: Any) -> str | None:
    """`attn_implementation` for a model; None: transformers' choice. `sdpa` has neither score caps
    nor sinks.
    """
    if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None:
        return "eager"
    known = known_architecture(config)
    if known is None:
        return None
    return "eager" if known.sinks else "sdpa"


class TransformersBackend(Backend):
    """A transformers causal language model as three operations, so that any span of its layers can
    run alone.

    `unembed(run_layers(embed(ids), 0, L, places))` equals `model(ids).logits`; stopping at E < L is
    an early exit.
    """

    implementation = "generic"

    def __init__(
        self,
        model: Any,
        stored_drafters: StoredDrafters = NO_STORED_DRAFTERS,
        spec: ModelSpec | None = None,
    ) -> None:
        """Probes the model at once if our kernels do not run its type, else at first use.

        Raises CheckpointError for a model that cannot be cut at its layers, or an invalid
        configuration.

        `stored_drafters`: frozen, for decoding. `spec`: the model's, if already read.
        """
        self.model = model
        self.config = model.config
        self.layers: Any
        if spec is not None or known_architecture(self.config):
            self.spec = spec = spec or ModelSpec.of(self.config)
            self.layers = self.model.get_submodule(spec.names.layers)
            self.num_layers = spec.layers
        else:
            self.layers = self._cut.form.layers
            self.num_layers = len(self.layers)
            self.spec = TransformersSpec.of(self.model, self.num_layers, self.block_originals())
        self._blocks: list[tuple[nn.Module, int]] = []
        self.exit_blocks = {}
        for block in stored_drafters.blocks:
            self.exit_blocks[block.exit_layer] = self._placed(block, stored_drafters)
        self.drafters = {}
        if stored_drafters.mtp is not None:
            self.drafters["mtp"] = self._placed(stored_drafters.mtp.blocks[0], stored_drafters.mtp)
        self._entries = dict[Entry, tuple[int, int]]()
        if (drafter := stored_drafters.eagle3) is not None:
            place = self._cut.place_of_block(len(self._blocks))
            self._entries = {
                (place, kind): (drafter.form.kv_heads, drafter.form.head_dim)
                for kind in ("keys", "values")
            }
            self.drafters["eagle3"] = self.placed_eagle3(drafter, place, PackingConfig())

    def placed_eagle3(
        self, stored: Eagle3Weights, place: int, packing: PackingConfig
    ) -> PlacedEagle3:
        self.require_states()
        like = self.model.get_input_embeddings().weight
        return PlacedEagle3(
            stored,
            place,
            self.spec.vocab,
            like,
            lambda matrix: partial(F.linear, weight=matrix.to(like)),
        )

    def require_states(self) -> None:
        """Raises CheckpointError for a model whose later layers read token ids besides hidden
        states.
        """
        if self._cut.form.reads_ids:
            raise CheckpointError(UNSUITED.format(self.spec.model_type))

    @property
    def own_spec(self) -> ModelSpec:
        """The ModelSpec. Raises CheckpointError for a model type that our kernels do not run."""
        if isinstance(self.spec, ModelSpec):
            return self.spec
        needed = f"GGUF and low-bit weights need a model_type among {', '.join(SUPPORTED)}"
        raise CheckpointError(f"{needed}, got {self.spec.model_type}")

    @cached_property
    def _cut(self) -> CutModel:
        return cut_at_layers(self.model)

    @cached_property
    def texts(self) -> "WholeTexts":
        """The training forward. The first access probes the model and must come before FSDP shards
        it.
        """
        return WholeTexts(self.model, self._cut.form)

    @property
    def device(self) -> torch.device:
        # Training may replace it, as FSDP does
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    @property
    def row_cost(self) -> float:
        # PyTorch's CPU kernels are tuned for one row or many, not a few
        return 0.5 if self.device.type == "cpu" else 0.11

    @property
    def draft_sides(self) -> Mapping[Quantization | None, DraftSide]:
        """The model itself."""
        head = DraftHead(self.unembed)
        return {None: DraftSide(self, self.num_layers, head, head, self.exit_blocks)}

    def _new_cache(self, batch_size: int, max_positions: int) -> MixedCache:
        return self._cut.new_cache(batch_size, max_positions, len(self._blocks), self._entries)

    def embed(self, ids: Tensor) -> Tensor:
        return self._cut.embed(ids)

    def run_layers(self, hidden: Tensor, start: int, end: int, places: Places) -> Tensor:
        if start == end:
            return hidden
        return self._run(hidden, start, end, places)

    def write_kv(self, hidden: Tensor, start: int, end: int, places: Places) -> None:
        """As `Backend.write_kv`. Each layer ends once its attention has written its last cache
        entry.
        """
        self._run(hidden, start, end, places, only_writes=True)

    def run_texts(self, hidden: Tensor, start: int, end: int) -> Tensor:
        """Layers start..end-1 over the states (B, T, D) of whole texts, without a cache; gradients
        flow through them.
        """
        return self._cut.run_span(
            hidden, start, end, torch.arange(hidden.shape[1]).expand(len(hidden), -1)
        )

    def _run(
        self, hidden: Tensor, start: int, end: int, places: Places, only_writes: bool = False
    ) -> Tensor:
        """Runs a span of the model's own layers, or the exit block that is layer `start` of the
        chain.
        """
        block = None if start < self.num_layers else self._blocks[start - self.num_layers]
        return self._cut.run(hidden, start, end, places, only_writes=only_writes, block=block)

    def unembed(self, hidden: Tensor) -> Tensor:
        return self._cut.unembed(hidden)

    def normed(self, hidden: Tensor) -> Tensor:
        """The input (..., D) of the head."""
        return self._cut.normed(hidden)

    def head(self, normed: Tensor) -> Tensor:
        """Normed states (..., D) in any precision to logits (..., V)."""
        return self._cut.unembed(normed.to(self.dtype), norm=lambda hidden: hidden)

    @property
    def norm_weight(self) -> Tensor | None:
        """The weight (D,) of the final norm; None if it has no weight of that shape."""
        weight = getattr(self._cut.form.norm, "weight", None)
        if isinstance(weight, Tensor) and weight.shape == (self.spec.hidden,):
            return weight
        return None

    def block_parts(self, block: ExitBlock) -> tuple[nn.Module, nn.Module]:
        """The layer and the norm of a new block: copies of the model's last layer with keys and
        values, and of its final norm.

        Raises CheckpointError for a model that can have no exit blocks.
        """
        if not (parts := self.block_originals()):
            why = "no layer with keys and values, or more before its head than hidden states and a norm"
            raise CheckpointError(
                f"exits of model_type {self.spec.model_type} can have no blocks: it has {why}"
            )
        layer, norm = map(deepcopy, parts.values())
        return layer, norm

    def run_block(self, layer: nn.Module, hidden: Tensor, ids: Tensor) -> Tensor:
        """Runs the layer of an exit block over hidden states (B, T, D) of whole texts with token
        ids (B, T).
        """
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        form = self._cut.form
        assert form.attending is not None
        given = form.state(hidden[..., : form.width], ids)  # states of `texts` carry ids already
        state = self._cut.run_span(
            given, form.attending, form.attending + 1, positions, block=(layer, 0)
        )
        return state[..., : form.width]

    def block_originals(self) -> dict[str, Any]:
        """The modules that exit blocks copy, by their names in a block; empty if the model can have
        no blocks.
        """
        form = self._cut.form
        width = self.config.get_text_config(decoder=True).hidden_size
        if form.attending is None or form.norm is None or form.width != width:
            return {}
        return {"layer": form.layers[form.attending], "norm": form.norm}

    def _placed(self, block: ExitBlock, blocks: StoredDrafters) -> PlacedBlock:
        weights = blocks.weights(self.spec)
        like = self.model.get_input_embeddings().weight
        layer, norm = self.block_parts(block)
        parts = {
            "layer": layer,
            "norm": norm,
            **{name: deepcopy(norm) for name in INPUT_NORMS if block == MTP},
        }
        for part, module in parts.items():
            # copy_ keeps the module's precision: fp32 for some weights
            own = module.requires_grad_(False).state_dict(prefix=f"{block.prefix}{part}.")
            for name in own.keys() & weights.shapes.keys():
                own[name].copy_(weights.of(name))
        place = self.num_layers + len(self._blocks)
        head = partial(self._cut.unembed, norm=norm)
        self._blocks.append((layer.eval(), self._cut.shift_of_block(len(self._blocks))))
        if block != MTP:
            return PlacedBlock(block, place, head)
        join = partial(F.linear, weight=weights.of(f"{block.prefix}input.weight").to(like))
        return PlacedMtp(
            block,
            place,
            head,
            norm=norm,
            join=join,
            input_norms=[parts[name] for name in INPUT_NORMS],
        )


class WholeTexts:
    """The decoder's own forward over whole texts, without cache and head; returns the hidden states
    at exits.

    A layer may run on a subset of the rows. Two forwards of a few tokens show which of its
    arguments (masks, rotary embeddings, ALiBi and others) have a batch dimension: their first
    dimension grows with the batch.
    """

    def __init__(self, model: Any, form: Form) -> None:
        self._form = form
        self._takes_positions = "position_ids" in inspect.signature(form.owner.forward).parameters
        # By argument: by how much its first dimension grows per row
        self._rows_of: dict[int | str, int] = {}
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
                ids = (
                    torch.arange(3 * sum(_TEXTS), device=model.device).view(3, -1)
                    % model.config.get_text_config().vocab_size
                )
                seen = [self._first_dimensions(ids[:rows]) for rows in (2, 3)]
                self._rows_of = {
                    name: seen[1][name] - rows for name, rows in seen[0].items() if name in seen[1]
                }
                self.packs = self._keeps_texts_apart(ids)
        finally:
            model.train(was_training)

    def states(
        self,
        ids: Tensor,
        exits: Collection[int],
        documents: Tensor | None = None,
        kept: Callable[[int], Sequence[int]] | None = None,
        recompute: bool = False,
    ) -> dict[int, Tensor]:
        """The hidden states (B, T, D) at each of the `exits`, for right-padded texts (B, T).

        `documents` (B, T) numbers the documents packed into a row, -1 in the padding: attention
        stays within a document, and the positions of each start at 0. If the model cannot keep them
        apart (`packs`), each becomes a row of its own. `kept(layer)` gives the rows that a layer
        (from 0) runs on; the other rows skip it unchanged. `recompute`: activation checkpointing,
        the backward pass runs each layer again.
        """
        if documents is not None and not self.packs:
            rows = DocumentRows(documents)
            own = None if kept is None else lambda layer: rows.of(kept(layer))
            found = self.states(rows.apart(ids), exits, None, own, recompute)
            return {end: rows.together(state) for end, state in found.items()}
        states: dict[int, Tensor] = {}

        def run(layer: int, forward: Forward, /, *args: Any, **keywords: Any) -> Any:
            hidden = args[0] if args else keywords["hidden_states"]
            rows = None if kept is None else kept(layer)
            call = partial(self._on_rows, layer, forward, rows, args, keywords)
            output = checkpoint(call, hidden, use_reentrant=False) if recompute else call(hidden)
            if layer + 1 in exits:
                states[layer + 1] = self._form.state(hidden_of(output), ids)
            return output

        self._run(ids, run, None if documents is None else places_in_documents(documents))
        return states

    def _run(self, ids: Tensor, run: Forward, positions: Tensor | None) -> None:
        """Runs the decoder's forward with each layer replaced by `run(layer, forward, *args,
        **keywords)`.
        """
        keywords = (
            {}
            if positions is None
            else {"position_ids": positions.to(ids.device, non_blocking=True)}
        )
        with replaced(
            [
                (layer, partial(run, index, layer.forward))
                for index, layer in enumerate(self._form.layers)
            ]
        ):
            self._form.owner(input_ids=ids, use_cache=False, **keywords)

    def _on_rows(
        self,
        layer: int,
        forward: Forward,
        rows: Sequence[int] | None,
        args: tuple[Any, ...],
        keywords: dict[str, Any],
        hidden: Tensor,
    ) -> Any:
        """Runs a layer on the kept rows of a batch and scatters them back; the other rows skip it
        unchanged.

        If no row is kept, the layer runs on one row times zero: its parameters need a gradient in
        every process (DDP, FSDP2).
        """
        dimension = int(self._form.leading)
        batch = hidden.shape[dimension]
        if rows is None or len(rows) == batch:
            return forward(*args, **keywords)
        index = torch.tensor(rows or [0], device=hidden.device)
        before = hidden.index_select(dimension, index)
        if layer in self._form.shares:  # later layers read its keys and values for all rows
            output = hidden_of(forward(*args, **keywords)).index_select(dimension, index)
        else:
            keywords = {
                name: self._select(name, value, index, batch) for name, value in keywords.items()
            }
            args = tuple(self._select(name, value, index, batch) for name, value in enumerate(args))
            args, keywords = with_hidden(before, args, keywords)
            output = hidden_of(forward(*args, **keywords))
        if not rows:
            output = before + 0.0 * output
        return self._form.returned(hidden.index_copy(dimension, index, output.to(hidden.dtype)))

    def _select(self, name: int | str, value: Any, index: Tensor, batch: int) -> Any:
        """An argument for `batch` rows, reduced to the rows at `index` (kept,)."""
        if isinstance(value, Tensor):
            each = self._rows_of.get(name, 1)
            if not each or not value.dim() or value.shape[0] != each * batch:
                return value
            return value.view(batch, each, *value.shape[1:]).index_select(0, index).flatten(0, 1)
        if isinstance(value, Mapping):
            return {key: self._select(name, part, index, batch) for key, part in value.items()}
        return (
            tuple(self._select(name, part, index, batch) for part in value)
            if isinstance(value, tuple)
            else value
        )

    def _first_dimensions(self, ids: Tensor) -> dict[int | str, int]:
        """By argument: the first dimension of the first tensor that a layer gets there."""
        found: dict[int | str, int] = {}

        def note(_: int, forward: Forward, /, *args: Any, **keywords: Any) -> Any:
            names: Any = (*range(len(args)), *keywords)
            for name, value in zip(names, (*args, *keywords.values()), strict=True):
                for part in _tensors(value):
                    found.setdefault(name, part.shape[0])
            return forward(*args, **keywords)

        positions = torch.arange(ids.shape[1]).expand_as(ids)
        self._run(ids, note, positions if self._takes_positions else None)
        return found

    def _keeps_texts_apart(self, ids: Tensor) -> bool:
        """Whether two texts packed into a row get the same states as each alone."""
        if not self._takes_positions:
            return False
        first = _TEXTS[0]
        last = len(self._form.layers)
        documents = (torch.arange(ids.shape[1]) >= first).long().expand_as(ids)
        self.packs = True
        together = self.states(ids, (last,), documents)[last]
        alone = torch.cat(
            [self.states(part, (last,))[last] for part in (ids[:, :first], ids[:, first:])], dim=1
        )
        return float((together - alone).norm()) <= (
            1e-2 if alone.dtype.itemsize < 4 else 1e-4
        ) * float(alone.norm())


class DocumentRows:
    """Unpacks the documents of rows (B, T) into right-padded rows of their own (N, S), and packs
    them again.

    `documents` (B, T) numbers the documents of each row; padding counts as a document.
    """

    def __init__(self, documents: Tensor) -> None:
        places = places_in_documents(documents)
        self._shape = documents.shape
        first = (places == 0).flatten()
        lengths = first.nonzero().flatten().diff(append=torch.tensor([first.numel()]))
        self._rows = (first.nonzero().flatten() // documents.shape[1]).tolist()
        # (B T,): the index of each token in (N S,)
        self._where = (first.cumsum(0) - 1) * int(lengths.max()) + places.flatten()
        self._apart = torch.zeros(len(lengths) * int(lengths.max()), dtype=torch.long)
        self._apart[self._where] = torch.arange(first.numel())

    def apart(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) as (N, S), or states (B, T, D) as (N, S, D)."""
        return ids.flatten(0, 1)[self._apart.to(ids.device)].view(
            len(self._rows), -1, *ids.shape[2:]
        )

    def together(self, states: Tensor) -> Tensor:
        """States (N, S, D) as (B, T, D)."""
        return states.flatten(0, 1)[self._where.to(states.device)].view(*self._shape, -1)

    def of(self, rows: Collection[int]) -> list[int]:
        """The indices of the documents in `rows`."""
        return [number for number, row in enumerate(self._rows) if row in rows]


def places_in_documents(documents: Tensor) -> Tensor:
    """(B, T) on the host: the position of each token in its document, from 0."""
    columns = torch.arange(documents.shape[1]).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool, device="cpu")
    starts[:, 1:] = (documents[:, 1:] != documents[:, :-1]).cpu()
    return columns - torch.where(starts, columns, 0).cummax(1).values


def _tensors(value: Any) -> list[Tensor]:
    """The tensors with dimensions in a layer's argument, which may be nested."""
    if isinstance(value, Tensor):
        return [value] if value.dim() else []
    parts = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else ()
    )
    return [tensor for part in parts for tensor in _tensors(part)]
