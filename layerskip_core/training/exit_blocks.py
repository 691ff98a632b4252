"""Training of exit blocks of a frozen model, over the hidden states that decoding has."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..checkpoint.folder import EXIT_BLOCKS_FILE, MTP_FILE
from ..checkpoint.locate import downloaded
from ..checkpoint.shipped import mtp_content, mtp_sidecar
from ..checkpoint.sidecars import exit_blocks_content
from ..config.resolution import require_exit_layer
from ..config.training import DrafterConfig
from ..errors import require
from ..losses import IGNORED, summed_losses
from ..model import Backend, TransformersBackend
from ..model.backend import states_at
from ..model.cache import Places, available_memory
from ..model.exit_blocks import INPUT_NORMS, MTP, NO_BLOCKS, ExitBlock, ExitBlocks
from .recipe import RunStep
from .verdict import SpeedEstimate, exit_speedup

MUON_LR = 0.02  # of a block's or drafter's matrices, which Muon trains (Jordan et al., 2024)
_FILE = "drafter.safetensors"  # of a run's checkpoint


class Block(nn.Module):
    """A decoder layer and a norm, which start as the model's own, in fp32; of MTP also norms and a map, which is [I, 0].

    The parameters have the names of `ExitBlock.shapes`, without the prefix.
    """

    def __init__(self, backend: TransformersBackend, block: ExitBlock) -> None:
        super().__init__()
        self.layer, self.norm = backend.block_parts(block)
        self.names = block.shapes(backend.spec).keys()
        self.input, self._run = None, backend.run_block
        if block == MTP:
            width = backend.spec.hidden
            self.input = nn.Linear(2 * width, width, bias=False)
            nn.init.eye_(self.input.weight)
            for name in INPUT_NORMS:
                self.add_module(name, deepcopy(self.norm))
        self.to(backend.device, torch.float32).requires_grad_(True)

    def forward(self, states: Tensor, ids: Tensor, finals: Tensor | None = None) -> Tensor:
        """The input (B, T, D) of the head, for the states after the exit of the tokens (B, T).

        `finals`: their own final states, for MTP, whose first token has no entry and gets 0.
        """
        if self.input is None or finals is None:
            return self._after(states, ids)
        norms = map(self.get_submodule, INPUT_NORMS)
        parts = [norm(part) for norm, part in zip(norms, (states[:, 1:], finals[:, :-1]), strict=True)]
        return F.pad(self._after(self.input(torch.cat(parts, dim=-1)), ids[:, 1:]), (0, 0, 1, 0))

    def _after(self, hidden: Tensor, ids: Tensor) -> Tensor:
        normed: Tensor = self.norm(self._run(self.layer, hidden, ids))
        return normed


class DrafterModule(nn.Module):
    """A drafter of a frozen model in training. Subclasses have `of`, which makes one by a config, and `files`, to be saved.

    The forward is as that of `RecipeModule`, with divergences from full depth as losses.
    """

    accepts_loss_kwargs = True  # makes Trainer count the target tokens of the whole optimizer step
    first_target = 1  # the index of the first token of a row that is predicted
    layers: tuple[int, ...]  # after which states are read, ascending
    names: dict[int, str]  # by measured exit, of what is trained, as layerskip.json has it

    def __init__(self, backend: TransformersBackend) -> None:
        super().__init__()
        model: Any = backend.model
        self.backend, self.config = backend, model.requires_grad_(False).config
        self.decoder: Backend = backend  # computes the states; in a run that of decoding
        self.details: dict[str, Any] = {}  # of how all of it was trained
        self._kept: dict[bytes, Tensor] = {}  # by the ids of a text, its states (X + 1, T, D)
        self._room = available_memory() / 4  # bytes

    def states(self, ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """The states (B, T, D) after each of the `layers`, and after the final norm, in fp32, of ids (B, T).

        A quarter of the free memory keeps those of texts seen before.
        """
        texts = [row.numpy().tobytes().rstrip(b"\0") for row in ids.cpu()]  # without padding, which no token sees
        fresh = [row for row, text in enumerate(texts) if text not in self._kept]
        computed = dict(zip(fresh, self._computed(ids[fresh]), strict=True)) if fresh else {}
        for row, states in computed.items():
            if self._room > states.nbytes:
                self._kept[texts[row]], self._room = states, self._room - states.nbytes
        states = torch.zeros(len(self.layers) + 1, *ids.shape, self.backend.spec.hidden, device=ids.device)
        for row, text in enumerate(texts):
            own = computed[row] if row in computed else self._kept[text]
            states[:, row, : own.shape[1]] = own[:, : ids.shape[1]]
        *read, final = states
        return read, final

    def _computed(self, ids: Tensor) -> Iterator[Tensor]:
        """The states (X + 1, T, D) of each text."""
        backend, (rows, tokens) = self.decoder, ids.shape
        places, last = Places(backend.new_cache(rows, tokens), [0] * rows, [tokens] * rows, settled=True), backend.num_layers
        with torch.inference_mode(), torch.autocast(ids.device.type, enabled=False):
            states = states_at(backend, backend.embed(ids.flatten()), (*self.layers, last), places)
            states[last] = self.backend.normed(states[last].to(self.backend.dtype))
            width = backend.spec.hidden
            of_all = torch.stack(
                [state[:, :width].to("cpu", torch.float32).view(rows, tokens, -1) for state in states.values()]
            )
        for row in range(rows):
            yield of_all[:, row].clone()

    def muon(self, lr: float) -> Iterator[tuple[list[nn.Parameter], float, str]]:
        """Matrices that Muon trains, with their learning rate and its adjustment to a matrix's shape, as torch names it."""
        yield [weight for weight in self.parameters() if weight.requires_grad], lr, "original"

    def estimated_speedup(self, backend: Backend, exit_layer: int) -> SpeedEstimate:
        """What drafts of this exit would gain, with the backend that decodes."""
        return exit_speedup(backend, exit_layer, True)

    def begin(self, texts: Sequence[Mapping[str, Any]]) -> None:
        """Before the training on some encoded rows."""

    def weights(self) -> dict[str, Tensor]:
        """All that is stored, by name."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Writes the weights of a run's checkpoint."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: weight.detach().cpu().contiguous() for name, weight in self.weights().items()}, folder / _FILE)

    def load(self, folder: Path) -> None:
        """Reads them."""
        copy_into(self.weights(), load_file(folder / _FILE))


class FrozenExits(DrafterModule):
    """The blocks of a model, or its MTP, whose matrices Muon trains; of the model only the head runs."""

    def __init__(self, backend: TransformersBackend, blocks: Sequence[ExitBlock], known: ExitBlocks = NO_BLOCKS) -> None:
        """Those that are `known` go on from there."""
        super().__init__(backend)
        self.exits, self.shipped = new_readers(backend, blocks, known), known
        self.layers = tuple(block.exit_layer for block in blocks)
        self.names = {exit_layer: str(exit_layer or "mtp") for exit_layer in self.layers}
        self.first_target = 1 + (MTP in blocks)

    @classmethod
    def of(cls, backend: TransformersBackend, config: DrafterConfig) -> "FrozenExits":
        """Raises ConfigError for a model that ships no drafter to start from."""
        if config.layout == "mtp":
            known = mtp_sidecar(downloaded(config.model), backend.spec)[0] if config.start_from else None
            needed = "left out: this model ships no drafter that is known here"
            require(known is not None or config.start_from is None, "start_from", needed, config.start_from)
            backend.require_states()
            return cls(backend, known.blocks if known else [MTP], known or NO_BLOCKS)
        exits = sorted(config.exits or (max(1, backend.num_layers // 3),))
        for exit_layer in exits:
            require_exit_layer(exit_layer, backend.num_layers, field="exits")
        return cls(backend, [ExitBlock(exit_layer) for exit_layer in exits])

    def weights(self) -> dict[str, Tensor]:
        return named_weights(self.exits)

    def files(self, dtype: torch.dtype, kept: ExitBlocks, model_fingerprint: str, verifier: str) -> dict[str, bytes]:
        """The files beside the model by name. `kept`: its blocks. `verifier`: its folder or hub id."""
        weights = {name: weight.to("cpu", dtype) for name, weight in self.weights().items()}
        spec = self.backend.spec
        if MTP.exit_layer in self.layers:
            known = self.shipped if self.shipped.blocks else replace(NO_BLOCKS, blocks=(MTP,))
            mtp = replace(known, take=weights.get, model_fingerprint=model_fingerprint)
            return {MTP_FILE: mtp_content(spec, mtp, weights.__getitem__)}
        return {EXIT_BLOCKS_FILE: exit_blocks_content(spec, weights, model_fingerprint, kept)}

    def forward(self, input_ids: Tensor, labels: Tensor, step: RunStep | None = None) -> dict[str, Tensor | tuple[int, ...]]:
        """MTP runs twice: on the final states, as in the first draft of a round, and on its own, as in later ones (HASS, Zhang
        et al., 2025); the loss is the mean, and `per_exit` of the first.
        """
        is_target, (states, finals) = labels[:, 1:] != IGNORED, self.states(input_ids)
        head, vocab, teacher = self.backend.head, self.backend.spec.vocab, finals[:, :-1][is_target]
        results = []
        for block, state in zip(self.exits.values(), states, strict=True):
            runs = [block(state, input_ids, finals)]
            if block.input is not None:
                runs.append(block(state, input_ids, runs[0]))
            hidden = [run[:, :-1][is_target] for run in runs]
            results.append(summed_losses(head, hidden, None, vocab, [(0.0, 1 / len(runs))] * len(runs), teacher))
        return {
            "loss": torch.stack([loss for loss, _ in results]).sum(),
            "per_exit": torch.stack([sums[0, 1] for _, sums in results]),
            "agreeing": torch.stack([sums[0, 2] for _, sums in results]),
            "exit_layers": self.layers,
        }


def new_readers(backend: TransformersBackend, blocks: Sequence[ExitBlock], kept: ExitBlocks = NO_BLOCKS) -> nn.ModuleDict:
    """Blocks in training, by exit: those of `kept`, else new ones. Only matrices are trained, which Muon takes."""
    readers = nn.ModuleDict({str(block.exit_layer): Block(backend, block) for block in blocks})
    stored, known = kept.weights(backend.spec), [block for block in kept.blocks if block in blocks]
    copy_into(named_weights(readers), {name: stored.of(name) for block in known for name in block.shapes(backend.spec)})
    for weight in readers.parameters():
        weight.requires_grad_(weight.dim() == 2)
    return readers


def named_weights(blocks: nn.ModuleDict) -> dict[str, Tensor]:
    """All weights of blocks, which are by exit, by the names of `ExitBlock.shapes`."""
    known = {name for block in blocks.values() for name in cast(Block, block).names}
    weights = blocks.state_dict(prefix="exits.")  # with what no optimizer trains
    return {name: weight for name, weight in weights.items() if name in known}


@torch.no_grad()
def copy_into(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Gives some of the weights other values."""
    for name, value in values.items():
        weights[name].copy_(value)
