"""Recurrent layers, between their projections: see recurrence.h."""

import ctypes

import torch

from ..configuration import RecurrenceSpec
from ..spec import ModelSpec
from ..weights import Weights, by_key_head, convolution
from .compiled import CRecurrence

CONVOLUTION, DECAY, DELTA = range(3)  # kinds in the numbering of the C code
# As in recurrence.h
MOST_TAPS = 8
LARGEST_KEY = 256


def memory_of(spec: ModelSpec) -> tuple[int, int, int]:
    """For all recurrent layers of a model: bytes of a text's state, bytes of a slot of its ring,
    and the slots needed.
    """
    if spec.recurrence is None:
        return 0, 0, 0
    state, entry = _layer_bytes(spec.recurrence)
    count = spec.kinds.count(spec.recurrence.mixer.kind)
    return count * state, count * entry, spec.recurrence.kernel_size


class NativeRecurrence:
    """A recurrent layer's weights between its projections, and the C structure with their
    addresses.
    """

    def __init__(self, weights: Weights, spec: ModelSpec, index: int) -> None:
        sizes = spec.recurrence
        assert sizes is not None
        mixer = sizes.mixer
        filters, bias = convolution(weights, spec)
        parts = {"filter": filters.T, "filter_bias": bias}
        steps = [weights.of(f"{name}.weight") for name in mixer.steps]
        if mixer.by_head:
            steps = by_key_head(steps[0], spec, *[sizes.heads // sizes.key_heads] * 2)
        if sizes.key_heads:
            log_rate, rate_bias, *skip = (weights.of(name) for name in mixer.rates)
            norm = weights.of(f"{mixer.norm}.weight")
            parts |= {
                "rate": -log_rate.float().exp(),
                "rate_bias": rate_bias,
                "norm": norm.repeat(sizes.outputs // len(norm)),
            }
            parts |= dict(zip(["skip"], skip, strict=False))
        self._parts = {
            name: part.float().contiguous() for name, part in parts.items() if part is not None
        }
        self._steps = torch.cat(steps).float() if steps else None
        earlier = spec.kinds[:index].count(mixer.kind)  # layers of this kind
        state, entry = _layer_bytes(sizes)
        keys = sizes.key_width
        outputs = sizes.outputs
        least = 0.0
        most = 1.0
        if not sizes.key_heads:
            kind = CONVOLUTION
            columns = {"gate": sizes.channels, "convolved": 2 * sizes.channels}
        elif sizes.limits is None:
            kind = DELTA
            columns = {"key": keys, "value": 2 * keys, "gate": sizes.channels, "factor": -1}
        else:
            kind = DECAY
            least, most = sizes.limits
            columns = {
                "convolved": outputs,
                "value": outputs,
                "factor": -1,
                "key": 2 * outputs,
                "query": 2 * outputs + keys,
                "steps": 2 * (outputs + keys),
            }
        self._structure = CRecurrence(
            kind=kind,
            taps=sizes.kernel_size,
            channels=sizes.channels,
            width=sum(sizes.widths),
            **columns,
            key_heads=sizes.key_heads,
            heads=sizes.heads,
            key_dim=sizes.key_dim,
            value_dim=sizes.value_dim,
            norm_size=outputs // sizes.key_heads if kind == DECAY else sizes.value_dim,
            gates_first=kind == DECAY,
            eps=spec.eps,
            least_step=least,
            most_step=most,
            state=earlier * state,
            entry=earlier * entry,
            **{name: part.data_ptr() for name, part in self._parts.items()},
        )

    @property
    def addresses(self) -> tuple[int, int | None]:
        """The addresses of the structure, and of the projections of its steps, if it has any."""
        steps = None if self._steps is None else self._steps.data_ptr()
        return ctypes.addressof(self._structure), steps


def _layer_bytes(sizes: RecurrenceSpec) -> tuple[int, int]:
    """Bytes of a layer in a text's state and in a slot of its ring, as in recurrence.h."""
    inputs = _in_vectors(sizes.channels)
    values = sizes.heads * _in_vectors(sizes.value_dim)
    if not sizes.key_heads:
        return 0, 4 * inputs
    update = inputs + _in_vectors(sizes.heads) + _in_vectors(sizes.key_width) + values
    return 64 + 4 * values * sizes.key_dim, 4 * update


def _in_vectors(floats: int) -> int:
    return -(-floats // 16) * 16
