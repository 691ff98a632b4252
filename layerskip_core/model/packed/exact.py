"""How many rows a kernel of torch or oneDNN may take so that each row has the bits that it has alone."""

from collections.abc import Callable

import torch

_MOST_ROWS = 8


class ExactRows:
    """The row count is measured on this machine, once for each number of threads."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}

    def at_once(self, same_alone: Callable[[int], bool]) -> int:
        """`same_alone(n)`: whether n rows together give what each of them gives alone."""
        threads = torch.get_num_threads()
        if threads not in self._known:
            self._known[threads] = next((rows for rows in range(1, _MOST_ROWS) if not same_alone(rows + 1)), _MOST_ROWS)
        return self._known[threads]
