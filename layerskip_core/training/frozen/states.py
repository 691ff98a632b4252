"""The states of a frozen model over the texts of a run, computed once and kept on disk.

For every token the state after each exit, before a norm, and the last layer's after the final norm, in bf16. Each file is
written from its start to its end, so its size tells how much of it is there.
"""

import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import CheckpointError
from ...files import synchronise
from ...losses import IGNORED
from ...model import Backend
from ..rows.answers import Text

_TOKENS = 2048  # of a pass
_BYTES = torch.bfloat16.itemsize


def states_bytes(tokens: int, width: int, exits: int) -> int:
    """The disk that the states of so many tokens need."""
    return tokens * width * _BYTES * (exits + 1)


@torch.inference_mode()
def write_states(
    backend: Backend,
    final_norm: Callable[[Tensor], Tensor],
    texts: Sequence[Text],
    exits: Sequence[int],
    folder: Path,
    report: Callable[[int], None],
) -> None:
    """Writes the states of all texts, in the order of `_batches`, after those that are there.

    `exits` ascend. `report` gets the number of texts that are done, and may raise to end it.
    """
    batches = _batches(texts)
    ends = [0, *accumulate(sum(len(texts[row].ids) for row in batch) for batch in batches)]  # in tokens
    paths = [folder / name for name in _names(exits)]
    size = backend.hidden_size * _BYTES  # of a token's state
    written = min(path.stat().st_size // size if path.is_file() else 0 for path in paths)
    done = sum(end <= written for end in ends) - 1
    rows = sum(map(len, batches[:done]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            path.touch()
            os.truncate(path, ends[done] * size)
        for batch in batches[done:]:
            report(rows)
            states = _states(backend, final_norm, [texts[row].ids for row in batch], exits)
            for path, state in zip(paths, states, strict=True):
                with path.open("ab") as file:
                    file.write(state.cpu().view(torch.int16).numpy().tobytes())
            rows += len(batch)
        for path in paths:
            synchronise(path)
    except OSError as error:
        raise CheckpointError(f"cannot write the states to {folder}: {error.strerror}") from error
    report(rows)


def _states(
    backend: Backend, final_norm: Callable[[Tensor], Tensor], texts: list[list[int]], exits: Sequence[int]
) -> list[Tensor]:
    """The states (N, D) of all N tokens of some texts, one after the other, after each exit and after the final norm.

    Texts are padded at their ends: no token sees what stands after it.
    """
    longest = max(map(len, texts))
    ids = torch.tensor([text + [text[-1]] * (longest - len(text)) for text in texts], device=backend.device)
    real = torch.tensor([[place < len(text) for place in range(longest)] for text in texts], device=backend.device)
    positions = torch.arange(longest)[None].expand(len(texts), -1)
    hidden, start, found = backend.embed(ids), 0, []
    for stop in (*exits, backend.num_layers):
        hidden, start = backend.run_layers(hidden, start, stop, positions), stop
        kept = final_norm(hidden) if stop == backend.num_layers else hidden
        found.append(kept[real].bfloat16())
    return found


def _batches(texts: Sequence[Text]) -> list[list[int]]:
    """Texts of similar length, by their indices, about _TOKENS tokens each; the same in every run."""
    batches: list[list[int]] = []
    for row in sorted(range(len(texts)), key=lambda row: (-len(texts[row].ids), row)):
        if batches and (len(batches[-1]) + 1) * len(texts[batches[-1][0]].ids) <= _TOKENS:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _names(exits: Sequence[int]) -> list[str]:
    """Of the files: one of each exit, and of the last layer."""
    return [*(f"exit-{exit_layer}.bf16" for exit_layer in exits), "final.bf16"]


class States:
    """The states of all texts, read from disk as they are needed."""

    def __init__(self, texts: Sequence[Text], exits: Sequence[int], width: int, folder: Path) -> None:
        """Raises CheckpointError for files that `write_states` has not finished."""
        self.texts = texts
        self.exits = tuple(exits)
        self._folder = folder
        order = [row for batch in _batches(texts) for row in batch]
        ends = list(accumulate(len(texts[row].ids) for row in order))
        self._starts = {row: end - len(texts[row].ids) for row, end in zip(order, ends, strict=True)}
        *states, self._finals = (_mapped(folder / name, ends[-1], width) for name in _names(self.exits))
        self._states = dict(zip(self.exits, states, strict=True))

    def row(self, row: int, exits: Sequence[int]) -> dict[str, Any]:
        """`input_ids` and `labels` of a text, `states` (X, T, D) after the `exits` and the `finals` (T, D).

        Raises CheckpointError for states that are not finite, which `write_states` does not write.
        """
        text, start = self.texts[row], self._starts[row]
        span = slice(start, start + len(text.ids))
        states, finals = torch.stack([self._states[exit_layer][span] for exit_layer in exits]), self._finals[span]
        if not bool(states.isfinite().all() and finals.isfinite().all()):
            raise CheckpointError(f"{self._folder} holds states that are not finite; remove it to compute the states again")
        return {"input_ids": text.ids, "labels": text.labels, "exits": exits, "states": states, "finals": finals}


def _mapped(path: Path, tokens: int, width: int) -> Tensor:
    if not path.is_file() or path.stat().st_size != tokens * width * _BYTES:
        raise CheckpointError(f"{path} is not complete; remove its folder to compute the states again")
    return torch.from_file(str(path), size=tokens * width, dtype=torch.bfloat16).view(tokens, width)


class StateRows(Dataset[Any]):
    """Texts in an order, with the states of all exits; or all of them with those of the first exit, then of the next."""

    def __init__(self, states: States, order: Sequence[int], one_by_one: bool) -> None:
        self._states, self._order = states, order
        self._exits = [(exit_layer,) for exit_layer in states.exits] if one_by_one else [states.exits]

    def __len__(self) -> int:
        return len(self._order) * len(self._exits)

    def __getitem__(self, position: int) -> dict[str, Any]:
        phase, place = divmod(position, len(self._order))
        return self._states.row(self._order[place], self._exits[phase])


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of `States.row`, padded at the right.

    It has ids and labels (B, T), states (X, B, T, D), finals (B, T, D), exits (X,) and lengths (B,).
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(tokens: list[int], filler: int) -> list[int]:
        return tokens + [filler] * (longest - len(tokens))

    def filled(states: Tensor) -> Tensor:
        return torch.nn.functional.pad(states, (0, 0, 0, longest - states.shape[-2]))

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], 0) for row in rows]),
        "labels": torch.tensor([padded([IGNORED, *row["labels"][1:]], IGNORED) for row in rows]),
        "states": torch.stack([filled(row["states"]) for row in rows], dim=1),
        "finals": torch.stack([filled(row["finals"]) for row in rows]),
        "exits": torch.tensor(rows[0]["exits"]),
        "lengths": torch.tensor([len(row["input_ids"]) for row in rows]),
    }
