"""Blocks at the exits of a model that stays as it is: their training forward, and the model's states that they are trained on.

The states are computed once and kept on disk: for every token the state after each exit, before a norm, and the last layer's
after the final norm, in bf16. The file is written from its start to its end, so its size tells how much of it is there.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..checkpoint.beside import exit_blocks_content
from ..checkpoint.folder import EXIT_BLOCKS_FILE
from ..config.decoding import require_exit_layer
from ..config.training import BlockLoss, DrafterConfig
from ..errors import CheckpointError
from ..files import synchronise
from ..losses import IGNORED, Teacher, summed_losses
from ..model import Backend, TransformersBackend
from ..model.exit_blocks import NO_BLOCKS, ExitBlock, ExitBlocks, features_of
from .answers import batches_of
from .recipe import SMALL_MODEL, RunStep
from .worth import ACCEPTED, Worth, worth_of_exit

MUON_LR = 0.02  # of a block's or drafter's matrices, which Muon trains (Jordan et al., 2024)
_LR, _SMALL_LR = 1.5e-3, 2e-3  # of AdamW
_TOKENS = 2048  # of a pass
_BYTES = torch.bfloat16.itemsize
_FILE = "blocks.safetensors"  # of a run's checkpoint
_STATES = "states.bf16"


class Block(nn.Module):
    """A decoder layer and a norm, and with the feature `final` the map of its two inputs; see model/exit_blocks.py.

    The parameters have the names of `ExitBlock.shapes`, without the prefix. They start as the model's own, and as [I, 0] for
    the map, in fp32.
    """

    def __init__(self, backend: TransformersBackend, block: ExitBlock) -> None:
        super().__init__()
        width = backend.spec.hidden
        self.layer, self.norm = backend.block_parts()
        self.input = nn.Linear(2 * width, width, bias=False) if block.feature == "final" else None
        if self.input is not None:
            nn.init.eye_(self.input.weight)
        self._run = backend.run_block
        self.to(backend.device, torch.float32).requires_grad_(True)

    def forward(self, states: Tensor, before: Tensor, ids: Tensor) -> Tensor:
        """The input (B, T, D) of the head, for the states after the exit of the tokens (B, T), and the final states of those
        before.
        """
        hidden = states if self.input is None else self.input(torch.cat((states, before), dim=-1))
        normed: Tensor = self.norm(self._run(self.layer, hidden, ids))
        return normed


class DrafterModule(nn.Module):
    """What drafts for a model that stays as it is, in training.

    A kind of it also has `resolved`, the config with its learning rate and exits or layers, and those after which states are
    read, ascending; `replaced`, what a model already has of these, in words; and `of`, a new one.

    Attributes:
        backend: the model's.
        names: by measured exit, of what is trained, as layerskip.json has it.
        phases: the learning rate rises and falls once in each, over the states after these exits.
        first_target: the index of the first token of a row that is predicted.
        details: of how all of it was trained.
    """

    accepts_loss_kwargs = True  # makes Trainer count the target tokens of the whole optimizer step
    first_target = 1
    config: Any
    backend: TransformersBackend
    names: dict[int, str]
    phases: tuple[tuple[int, ...], ...]
    details: dict[str, Any]

    @property
    def measured_exits(self) -> tuple[int, ...]:
        return tuple(self.names)

    def muon(self, lr: float) -> Iterator[tuple[list[nn.Parameter], float, str]]:
        """Matrices that Muon trains, with their learning rate and its adjustment to a matrix's shape, as torch names it."""
        raise NotImplementedError

    def worth(self, backend: Backend, exit_layer: int, shares: Sequence[float] = ACCEPTED) -> Worth:
        """What drafts of this exit would gain, with the backend that decodes."""
        raise NotImplementedError

    def begin(self, texts: Sequence[Mapping[str, Any]]) -> None:
        """Before the training on some encoded rows."""

    def files(self, dtype: torch.dtype, kept: ExitBlocks, made_for: str, verifier: str) -> dict[str, bytes]:
        """The files beside the model by their names, with the weights in this precision.

        `kept`: what the model has already. `made_for`: its fingerprint. `verifier`: its folder or hub id.
        """
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Writes the weights of a run's checkpoint."""
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        """Reads them. Raises CheckpointError if they do not fit."""
        raise NotImplementedError


class FrozenExits(DrafterModule):
    """The blocks of a model. Nothing of the model itself is trained, and of it only the head runs.

    Their matrices are trained by Muon, and their norms and biases stay as they start: on `embedded-base` 300 such steps gave
    94.2% agreement, 600 of AdamW on all weights 94.7%. Muon takes no weights of three dimensions; blocks that have them
    (experts) are trained by AdamW as a whole.
    """

    def __init__(self, backend: TransformersBackend, blocks: Sequence[ExitBlock], loss: BlockLoss = "kl") -> None:
        super().__init__()
        model: Any = backend.model
        self.config = model.requires_grad_(False).config
        self.exits = nn.ModuleDict({str(block.exit_layer): Block(backend, block) for block in blocks})
        self.names = {block.exit_layer: str(block.exit_layer) for block in blocks}
        self.phases = tuple((exit_layer,) for exit_layer in self.names)
        self.backend, self.details = backend, {"feature": blocks[0].feature if blocks else "none"}
        self._total_variation = loss == "tv"
        self._by_muon = _suits_muon(backend)
        for weight in self.parameters():
            weight.requires_grad_(not self._by_muon or weight.dim() == 2)

    def muon(self, lr: float) -> Iterator[tuple[list[nn.Parameter], float, str]]:
        if self._by_muon:
            yield [weight for weight in self.parameters() if weight.requires_grad], lr, "original"

    @classmethod
    def resolved(cls, config: DrafterConfig, backend: TransformersBackend) -> tuple[DrafterConfig, tuple[int, ...]]:
        spec = backend.spec
        exits = tuple(sorted(config.exits or (max(1, spec.layers // 3),)))
        for exit_layer in exits:
            require_exit_layer(exit_layer, spec.layers, field="exits")
        usual = MUON_LR if _suits_muon(backend) else _SMALL_LR if spec.parameters < SMALL_MODEL else _LR
        return replace(config, lr=config.lr or usual, exits=exits), exits

    @staticmethod
    def replaced(kept: ExitBlocks, exits: Sequence[int]) -> str:
        there = [block.exit_layer for block in kept.blocks if block.exit_layer in exits]
        return f"a block at exit {there[0]}" if there else ""

    @classmethod
    def of(cls, backend: TransformersBackend, config: DrafterConfig, exits: Sequence[int]) -> "FrozenExits":
        return cls(backend, [ExitBlock(exit_layer, config.feature) for exit_layer in exits], config.loss)

    def worth(self, backend: Backend, exit_layer: int, shares: Sequence[float] = ACCEPTED) -> Worth:
        return worth_of_exit(backend, exit_layer, True, shares)

    def files(self, dtype: torch.dtype, kept: ExitBlocks, made_for: str, verifier: str) -> dict[str, bytes]:
        weights = {name: weight.to(dtype) for name, weight in self.weights().items()}
        return {EXIT_BLOCKS_FILE: exit_blocks_content(self.backend.spec, weights, made_for, kept)}

    def forward(
        self, input_ids: Tensor, labels: Tensor, states: Tensor, finals: Tensor, exits: Tensor, step: RunStep | None = None
    ) -> dict[str, Tensor | tuple[int, ...]]:
        """A batch of rows with states, see `collate`. Sums are over the targets, the tokens with labels.

        With the feature `final` a block runs twice: on the true final states of the tokens before, as in the first draft of a
        round, and on its own, as in later drafts (as HASS, Zhang et al., 2025, with two steps); the loss is the mean of both.

        Returns `loss`, `per_exit` (exits,), the divergence of the first run, `agreeing` (exits,), without gradients the number
        of targets where its best token is full depth's, and `exit_layers`.
        """
        is_target = labels[:, 1:] != IGNORED
        finals = finals.float()
        head, vocab, exit_layers = self.backend.head, self.backend.spec.vocab, tuple(exits.tolist())
        teacher = Teacher(finals[:, :-1][is_target], head)
        results = []
        for exit_layer, state in zip(exit_layers, states.float(), strict=True):
            block = self.exits[str(exit_layer)]
            runs = [block(state, features_of(finals), input_ids)]
            if block.input is not None:
                runs.append(block(state, features_of(runs[0]), input_ids))
            runs = [run[:, :-1][is_target] for run in runs]
            mean, how = [(0.0, 1 / len(runs))] * len(runs), {"teaches_all": True, "total_variation": self._total_variation}
            results.append(summed_losses(head, runs, None, vocab, mean, teacher, **how))
        return {
            "loss": torch.stack([loss for loss, _ in results]).sum(),
            "per_exit": torch.stack([sums[0, 1] for _, sums in results]),
            "agreeing": torch.stack([sums[0, 2] for _, sums in results]),
            "exit_layers": exit_layers,
        }

    def weights(self) -> dict[str, Tensor]:
        return named_weights(self.exits)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.weights(), folder / _FILE)

    def load(self, folder: Path) -> None:
        load_blocks(self.exits, folder / _FILE)


def new_readers(backend: TransformersBackend, exits: Sequence[int], kept: ExitBlocks = NO_BLOCKS) -> nn.ModuleDict:
    """Blocks that read exits of a model in training, by exit: the model's own where `kept` has them, else new ones.

    As in a drafter's training their norms stay as they start. So do weights of three dimensions (experts), which Muon does not
    take.
    """
    readers = nn.ModuleDict({str(exit_layer): Block(backend, ExitBlock(exit_layer)) for exit_layer in exits})
    known = kept.weights(backend.spec)
    for block in kept.blocks:
        if block.feature == "none" and block.exit_layer in exits:
            weights = {name.removeprefix(block.prefix): known.of(name) for name in block.shapes(backend.spec)}
            readers[str(block.exit_layer)].load_state_dict(weights)
    for weight in readers.parameters():
        weight.requires_grad_(weight.dim() == 2)
    return readers


def named_weights(blocks: nn.ModuleDict) -> dict[str, Tensor]:
    """All weights of blocks, which are by exit, by the names of `ExitBlock.shapes`."""
    return {f"exits.{name}": weight.detach().cpu().contiguous() for name, weight in blocks.named_parameters()}


def load_blocks(blocks: nn.ModuleDict, file: Path) -> None:
    """Loads what `named_weights` gave. Raises CheckpointError if it does not fit."""
    try:
        blocks.load_state_dict({name.removeprefix("exits."): weight for name, weight in load_file(file).items()})
    except RuntimeError as error:
        raise CheckpointError(f"{file} does not fit the exits: {error}") from error


def _suits_muon(backend: TransformersBackend) -> bool:
    """Whether all weights of a new block are matrices, or vectors."""
    return all(weight.dim() <= 2 for part in backend.block_originals().values() for weight in part.parameters())


def states_bytes(tokens: int, width: int, exits: int) -> int:
    """The disk that the states of so many tokens need."""
    return tokens * (exits + 1) * width * _BYTES


@torch.inference_mode()
def write_states(
    backend: Backend,
    model: TransformersBackend,
    texts: Sequence[Mapping[str, Any]],
    exits: Sequence[int],
    folder: Path,
    report: Callable[[int], None],
) -> None:
    """Writes the states of all texts (encoded rows), in the order of `_batches`, after the states already there.

    `model` is the same model, with the final norm. `exits` ascend. `report` gets the number of texts that are done, and may
    raise to end it.
    """
    batches, path = _batches(texts), folder / _STATES
    tokens = accumulate((sum(len(texts[row]["input_ids"]) for row in batch) for batch in batches), initial=0)
    ends = [states_bytes(count, backend.spec.hidden, len(exits)) for count in tokens]
    written = path.stat().st_size if path.is_file() else 0
    done = sum(end <= written for end in ends) - 1
    rows = sum(map(len, batches[:done]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, ends[done])
        for batch in batches[done:]:
            report(rows)
            states = _states(backend, model, [texts[row]["input_ids"] for row in batch], exits)
            with path.open("ab") as file:
                file.write(states.cpu().view(torch.int16).numpy().tobytes())
            rows += len(batch)
        synchronise(path)
    except OSError as error:
        raise CheckpointError(f"cannot write the states to {folder}: {error.strerror}") from error
    report(rows)


def _states(backend: Backend, model: TransformersBackend, texts: list[list[int]], exits: Sequence[int]) -> Tensor:
    """The states (N, X + 1, D) of all N tokens of some texts, one after the other, after each of X exits and the final norm."""
    longest = max(map(len, texts))
    ids = torch.tensor([text + [text[-1]] * (longest - len(text)) for text in texts], device=backend.device)
    real = torch.tensor([[place < len(text) for place in range(longest)] for text in texts], device=backend.device)
    positions = torch.arange(longest)[None].expand(len(texts), -1)
    hidden, cache, found = backend.embed(ids), backend.new_cache(len(texts), longest), []
    for start, stop in pairwise((0, *exits, backend.num_layers)):
        hidden = backend.run_layers(hidden, start, stop, positions, cache)
        state = model.normed(hidden.to(model.dtype)) if stop == backend.num_layers else hidden
        found.append(state[real][:, : backend.spec.hidden].bfloat16())
    return torch.stack(found, dim=1)


def _batches(texts: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    return batches_of([len(text["input_ids"]) for text in texts], lambda count, longest: count * longest <= _TOKENS)


class States(Dataset[dict[str, Any]]):
    """The texts (encoded rows) of `write_states`, with the states of the `chosen` exits, read from disk as they are needed."""

    def __init__(
        self, texts: Sequence[Mapping[str, Any]], folder: Path, width: int, exits: Sequence[int], chosen: Sequence[int]
    ) -> None:
        self._texts, self._chosen, self._places = texts, chosen, [exits.index(exit_layer) for exit_layer in chosen]
        order = [row for batch in _batches(texts) for row in batch]
        ends = list(accumulate(len(texts[row]["input_ids"]) for row in order))
        self._ends, shape = dict(zip(order, ends, strict=True)), (ends[-1], len(exits) + 1, width)
        self._states = torch.from_file(str(folder / _STATES), size=math.prod(shape), dtype=torch.bfloat16).view(shape)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """A text with the `exits` (X,), its `states` (X, T, D) after them and its `finals` (T, D)."""
        text, end = self._texts[row], self._ends[row]
        states = self._states[end - len(text["input_ids"]) : end]
        return {**text, "exits": self._chosen, "states": states[:, self._places].transpose(0, 1), "finals": states[:, -1]}
