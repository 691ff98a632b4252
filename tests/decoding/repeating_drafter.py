"""A drafter by prompt lookup, as one module: it drafts what followed the last earlier occurrence of
the newest token.
"""

from torch import tensor

from layerskip_core.decoding.drafters import Draft, DrafterSetup, DraftInput
from layerskip_core.decoding.row import Row


class RepeatingDrafter:
    """Without exit states: the target starts at layer 0."""

    def __init__(self) -> None:
        # By row: how many tokens were drafted, and accepted
        self.verdicts: dict[Row, list[tuple[int, int]]] = {}

    def draft(self, given: DraftInput, limits: list[int]) -> Draft:
        drafts = [repetition(ids)[:limit] for ids, limit in zip(given.ids, limits, strict=True)]
        tokens = [
            token for ids, row in zip(given.ids, drafts, strict=True) for token in (ids[-1], *row)
        ]
        return Draft(tensor(tokens, device=given.newest.device), tuple(map(len, drafts)))

    def observe(self, row: Row, drafted: int, verified: list[int]) -> None:
        self.verdicts.setdefault(row, []).append((drafted, len(verified) - 1))


def repetition(ids: list[int]) -> list[int]:
    """What follows the last earlier occurrence of the last id, the last id not included; nothing if
    it is new.
    """
    earlier = [place for place in range(len(ids) - 1) if ids[place] == ids[-1]]
    return ids[earlier[-1] + 1 :] if earlier else []


def drafter(setup: DrafterSetup) -> RepeatingDrafter:
    return RepeatingDrafter()
