"""Training of exit blocks and MTP on the hidden states of a frozen model, as decoding computes
them.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..checkpoint.folder import EXIT_BLOCKS_FILE, MTP_FILE
from ..checkpoint.locate import ModelRef
from ..checkpoint.model_weights import block_weights, copy_into
from ..checkpoint.open import token_order
from ..checkpoint.shipped import mtp_content, read_mtp
from ..checkpoint.sidecars import exit_blocks_content
from ..config.resolution import require_exit_layer
from ..config.training import DrafterConfig
from ..errors import refused
from ..losses import IGNORED, CandidateHead, summed_losses
from ..model import Backend, TransformersBackend
from ..model.backend import states_at
from ..model.cache import Places
from ..model.exit_blocks import INPUT_NORMS, MTP, NO_STORED_DRAFTERS, ExitBlock, StoredDrafters
from ..model.vocabulary import ORDER_FILE, DraftVocabulary, exit_vocabulary, order_content
from ..processor import available_memory
from .data import by_frequency
from .encoding import EncodedRow
from .progress import restore
from .recipe import RunStep, can_score_a_part, mixed_seed
from .speedup import SpeedEstimate, exit_speedup

MUON_LR = 0.02  # of Muon (Jordan et al., 2024), for the matrices of blocks and drafters
_SAMPLED = 1024  # tokens that stand for those which the exits' losses leave out
_FILE = "drafter.safetensors"  # in a run's checkpoints


class Block(nn.Module):
    """A decoder layer and a norm in fp32, copied from the model. MTP adds input norms and a map W
    that starts as [I, 0].

    The parameters have the names of `ExitBlock.shapes`, without the prefix.
    """

    def __init__(self, backend: TransformersBackend, block: ExitBlock) -> None:
        super().__init__()
        self.layer, self.norm = backend.block_parts(block)
        self.names = block.shapes(backend.spec).keys()
        self.input = None
        self._run = backend.run_block
        if block == MTP:
            width = backend.spec.hidden
            self.input = nn.Linear(2 * width, width, bias=False)
            nn.init.eye_(self.input.weight)
            for name in INPUT_NORMS:
                self.add_module(name, deepcopy(self.norm))
        self.to(backend.device, torch.float32).requires_grad_(True)

    def forward(self, states: Tensor, ids: Tensor, finals: Tensor | None = None) -> Tensor:
        """The head's input (B, T, D), from the states (B, T, D) after the exit of tokens (B, T).

        `finals` (B, T, D), for MTP: outputs of the final norm for the same tokens. A row's first
        token has no entry and gets 0.
        """
        if self.input is None or finals is None:
            return self._after(states, ids)
        state_norm, final_norm = map(self.get_submodule, INPUT_NORMS)
        joined = torch.cat((state_norm(states[:, 1:]), final_norm(finals[:, :-1])), dim=-1)
        return F.pad(self._after(self.input(joined), ids[:, 1:]), (0, 0, 1, 0))

    def _after(self, hidden: Tensor, ids: Tensor) -> Tensor:
        normed: Tensor = self.norm(self._run(self.layer, hidden, ids))
        return normed


class DrafterModule(nn.Module):
    """A frozen model's drafter in training. Subclasses define `of`, its construction by a config.

    `forward` is like that of `RecipeModule`, with KL divergences from full depth as losses.
    """

    accepts_loss_kwargs = True  # makes Trainer count the target tokens of the whole optimizer step
    first_target = 1  # index of a row's first predicted token
    layers: tuple[int, ...]  # the states after these are read, ascending
    names: dict[int, str]  # in layerskip.json, by measured exit; 0: MTP or EAGLE-3

    def __init__(self, backend: TransformersBackend) -> None:
        super().__init__()
        model: Any = backend.model
        self.backend = backend
        self.config = model.requires_grad_(False).config
        self.decoder: Backend = backend  # computes the states; a run sets the backend that decodes
        self.details: dict[str, Any] = {}  # added to the record in layerskip.json
        self._cached: dict[bytes, Tensor] = {}  # states (X + 1, T, D) by the ids of a text
        self._free_bytes = available_memory() / 4  # of the cache

    def states(self, ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """The states (B, T, D) after each of the `layers`, and after the final norm, in fp32, of
        ids (B, T).

        States of texts seen before come from a cache, in a quarter of the free memory.
        """
        # The key is the text without its padding by id 0, which no token sees. A text that ends
        # with an id 0 of its own may get the states of one without it: 0 for its last token, whose
        # states predict nothing.
        texts = [row.numpy().tobytes().rstrip(b"\0") for row in ids.cpu()]
        fresh = [row for row, text in enumerate(texts) if text not in self._cached]
        computed = {}
        if fresh:
            computed = dict(zip(fresh, self._computed(ids[fresh]), strict=True))
        for row, states in computed.items():
            if self._free_bytes > states.nbytes:
                self._cached[texts[row]] = states
                self._free_bytes -= states.nbytes
        states = torch.zeros(
            len(self.layers) + 1, *ids.shape, self.backend.spec.hidden, device=ids.device
        )
        for row, text in enumerate(texts):
            own = computed[row] if row in computed else self._cached[text]
            states[:, row, : own.shape[1]] = own[:, : ids.shape[1]]
        *read, final = states
        return read, final

    def _computed(self, ids: Tensor) -> Iterator[Tensor]:
        """Yields the states (X + 1, T, D) of each text: after the X layers, and after the final
        norm.
        """
        backend = self.decoder
        rows, tokens = ids.shape
        places = Places(
            backend.new_cache(rows, tokens), [0] * rows, [tokens] * rows, no_rollback=True
        )
        last = backend.num_layers
        with torch.inference_mode(), torch.autocast(ids.device.type, enabled=False):
            states = states_at(backend, backend.embed(ids.flatten()), (*self.layers, last), places)
            states[last] = self.backend.normed(states[last].to(self.backend.dtype))
            width = backend.spec.hidden
            wide = [state[:, :width].to("cpu", torch.float32) for state in states.values()]
            by_row = torch.stack(wide).view(len(wide), rows, tokens, -1)
        for row in range(rows):
            yield by_row[:, row].clone()

    def muon(self, lr: float) -> tuple[list[nn.Parameter], float]:
        """The matrices that Muon trains, and their learning rate in a run with `lr`."""
        return [weight for weight in self.parameters() if weight.requires_grad], lr

    def estimated_speedup(self, backend: Backend, exit_layer: int) -> SpeedEstimate:
        """Estimates the speedup by drafts of an exit, on the backend that decodes."""
        return exit_speedup(backend, exit_layer, True)

    def begin(self, rows: Sequence[EncodedRow]) -> None:
        """Called before the training, with its encoded rows."""

    def weights(self) -> dict[str, Tensor]:
        """All that is stored, by name."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Writes the weights to a run's checkpoint."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: weight.detach().cpu().contiguous() for name, weight in self.weights().items()},
            folder / _FILE,
        )

    def load(self, folder: Path) -> None:
        """Reads the weights that `save` wrote."""
        restore(self.weights(), load_file(folder / _FILE))


class FrozenExits(DrafterModule):
    """Exit blocks of a model, or its MTP. Muon trains their matrices; of the model only the head
    runs here.
    """

    def __init__(
        self,
        backend: TransformersBackend,
        blocks: Sequence[ExitBlock],
        known: StoredDrafters = NO_STORED_DRAFTERS,
        order: list[int] | None = None,
        seed: int = 0,
    ) -> None:
        """Blocks in `known` start from the weights there, others from the model's. `order`: the
        model's tokens, the most frequent first; None: ascending. `seed`: of the candidates.
        """
        super().__init__(backend)
        vocab = backend.spec.vocab
        every = DraftVocabulary(vocab, vocab, order)
        self._order = every.tokens(torch.arange(vocab)).tolist()
        self._frequent = torch.empty(0, dtype=torch.long)
        self._seed = seed
        self.exits = new_exit_blocks(backend, blocks, known)
        self.shipped = known
        self.layers = tuple(block.exit_layer for block in blocks)
        self.names = {exit_layer: str(exit_layer or "mtp") for exit_layer in self.layers}
        self.first_target = 1 + (MTP in blocks)

    @classmethod
    def of(cls, backend: TransformersBackend, config: DrafterConfig) -> "FrozenExits":
        """Raises ConfigError for an exit out of range, and if the model ships no drafter to start
        from.
        """
        if config.layout == "mtp":
            backend.require_states()
            if config.start_from is None:
                return cls(backend, [MTP])
            shipped = read_mtp(ModelRef.of(config.model).whole_folder(), backend.spec)
            if shipped is None:
                needed = "left out: this model ships no drafter that is known here"
                raise refused("start_from", needed, config.start_from)
            return cls(backend, shipped.blocks, shipped)
        exits = sorted(config.exits or (max(1, backend.num_layers // 3),))
        for exit_layer in exits:
            require_exit_layer(exit_layer, backend.num_layers, field="exits")
        order = token_order(ModelRef.of(config.model).path, backend.spec.vocab)
        blocks = [ExitBlock(exit_layer) for exit_layer in exits]
        return cls(backend, blocks, order=order, seed=config.seed)

    def begin(self, rows: Sequence[EncodedRow]) -> None:
        """Puts the targets of the rows first in the order of tokens. The losses of exits score the
        first ones, which exits also draft from, and a sample.
        """
        self._order = by_frequency(rows, self._order)
        spec = self.backend.spec
        if MTP.exit_layer not in self.layers and can_score_a_part(spec):
            self._frequent = torch.tensor(self._order[: exit_vocabulary(spec.vocab)])

    def weights(self) -> dict[str, Tensor]:
        return named_weights(self.exits)

    def files(
        self, dtype: torch.dtype, existing: StoredDrafters, model_fingerprint: str
    ) -> dict[str, bytes]:
        """Files to save with the model, by name. `existing`: blocks that it has and that stay."""
        weights = block_weights(self.backend.model, self.weights(), dtype)
        spec = self.backend.spec
        if MTP.exit_layer in self.layers:
            known = self.shipped
            if not known.blocks:
                known = replace(NO_STORED_DRAFTERS, blocks=(MTP,))
            mtp = replace(known, take=weights.get, model_fingerprint=model_fingerprint)
            return {MTP_FILE: mtp_content(spec, mtp, lambda: model_fingerprint)}
        return {
            EXIT_BLOCKS_FILE: exit_blocks_content(spec, weights, model_fingerprint, existing),
            ORDER_FILE: order_content(self._order),
        }

    def forward(
        self, input_ids: Tensor, labels: Tensor, step: RunStep | None = None
    ) -> dict[str, Tensor | tuple[int, ...]]:
        """MTP runs twice: on the model's final states, as for a round's first draft, and on its own
        outputs, as for later ones (HASS, Zhang et al., 2025). Its loss is the mean of both runs,
        its `per_exit` the first run's.
        """
        is_target = labels[:, 1:] != IGNORED
        states, finals = self.states(input_ids)
        head: Callable[[Tensor], Tensor] = self.backend.head
        if step is not None and self.training:
            seed = mixed_seed(self._seed, step.done, step.first_row)
            targets = labels[:, 1:][is_target]
            head = head_in_training(self.backend, self._frequent, targets, seed)
        vocab = self.backend.spec.vocab
        teacher = finals[:, :-1][is_target]
        losses = []
        divergences = []
        agreeing = []
        for block, state in zip(self.exits.values(), states, strict=True):
            outputs = [block(state, input_ids, finals)]
            if block.input is not None:
                outputs.append(block(state, input_ids, outputs[0]))
            hidden = [output[:, :-1][is_target] for output in outputs]
            weights = [(0.0, 1 / len(outputs))] * len(outputs)
            loss, sums = summed_losses(head, hidden, None, vocab, weights, teacher)
            losses.append(loss)
            divergences.append(sums[0, 1])
            agreeing.append(sums[0, 2])
        return {
            "loss": torch.stack(losses).sum(),
            "per_exit": torch.stack(divergences),
            "agreeing": torch.stack(agreeing),
            "exit_layers": self.layers,
        }


def new_exit_blocks(
    backend: TransformersBackend,
    blocks: Sequence[ExitBlock],
    stored: StoredDrafters = NO_STORED_DRAFTERS,
) -> nn.ModuleDict:
    """Trainable exit blocks by exit, with the weights of `stored` where it has them. Only matrices
    are trained, by Muon.
    """
    modules = nn.ModuleDict({str(block.exit_layer): Block(backend, block) for block in blocks})
    weights = stored.weights(backend.spec)
    known = {}
    for block in stored.blocks:
        if block in blocks:
            for name in block.shapes(backend.spec):
                known[name] = weights.of(name)
    copy_into(named_weights(modules), known)
    for weight in modules.parameters():
        weight.requires_grad_(weight.dim() == 2)
    return modules


def head_in_training(
    backend: TransformersBackend, frequent: Tensor, targets: Tensor, seed: int
) -> Callable[[Tensor], Tensor]:
    """The head of exits with a block, which has a norm of its own: it scores the tokens `frequent`
    (F,), `targets` (N,) and a sample that `seed` decides; without frequent ones all tokens.
    """
    if not len(frequent):
        return backend.head
    weight = backend.model.get_output_embeddings().weight
    return CandidateHead(weight, frequent, targets, _SAMPLED, seed)


def named_weights(blocks: nn.ModuleDict) -> dict[str, Tensor]:
    """All weights of `blocks` (by exit), under the names of `ExitBlock.shapes`."""
    known = set[str]()
    for block in blocks.values():
        known.update(cast(Block, block).names)
    weights = blocks.state_dict(prefix="exits.")  # also weights that are not trained
    return {name: weight for name, weight in weights.items() if name in known}
