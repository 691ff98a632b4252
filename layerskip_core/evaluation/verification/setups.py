"""Kernels and precisions to verify, and the model on each of them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ...checkpoint.beside import read_exit_blocks
from ...checkpoint.loaded import Decoder, decoder_of
from ...checkpoint.locate import own_folder
from ...checkpoint.open import for_decoding, for_training
from ...config.checks import require_choice
from ...config.packing import PackingConfig, Quantization
from ...config.verification import VerifyConfig
from ...errors import ConfigError, LayerSkipError
from ...model import GenericBackend
from ...model.native.compiled import VARIANTS, requesting

TORCH, EXACT, GENERIC, TRANSFORMERS = "torch", "exact", "generic", "transformers"
KERNELS = (*VARIANTS, TORCH, EXACT, GENERIC, TRANSFORMERS)
_LOW_BIT: dict[str, Quantization] = {"int8": "int8", "int4": "int4"}
_COPIES: tuple[Quantization, ...] = ("int8", "int4")


class Unavailable(LayerSkipError):
    """This machine or this model has no such setup."""


@dataclass(frozen=True)
class Setup:
    """Kernels for a precision: a variant of our own, `torch` (repacked weights), `exact` (the same with split calls),
    `generic` (transformers' layers) or `transformers` (the same, by its own `generate`).
    """

    kernels: str
    precision: str

    def open(self, model: str, device: str, draft_vocab: int = 0) -> Decoder:
        """The model on these kernels, with copies to draft with where there are kernels for them.

        `draft_vocab`: as in PackingConfig. Raises Unavailable if the model runs on other kernels, and as `for_decoding` does.
        """
        if self.kernels in (GENERIC, TRANSFORMERS):
            return self._generic(model, device)
        quantize = _LOW_BIT.get(self.precision)
        dtype = "auto" if quantize else self.precision
        packing = PackingConfig(quantize, draft_vocab=draft_vocab, exact=self.kernels == EXACT)
        with requesting(self.kernels if self.kernels in VARIANTS else TORCH):
            loaded = None
            if quantize is None and self.kernels != EXACT:
                try:
                    loaded = for_decoding(model, device, dtype, replace(packing, draft_weights=_COPIES))
                except ConfigError:  # no kernel for low-bit weights of these widths
                    loaded = None
            loaded = loaded or for_decoding(model, device, dtype, packing)
        runs = loaded.backend.implementation
        if self.kernels in VARIANTS and not runs.startswith(f"native ({self.kernels}"):
            raise Unavailable("this model, this CPU or this installation does not suit these kernels")
        if self.kernels not in VARIANTS and isinstance(loaded.backend, GenericBackend):
            raise Unavailable("the weights of this model cannot be repacked")
        return loaded

    def _generic(self, model: str, device: str) -> Decoder:
        if self.precision in _LOW_BIT:
            raise Unavailable("transformers' layers have no low-bit weights")
        trainable = for_training(model, device, self.precision)
        generic, folder = decoder_of(trainable), own_folder(model)
        if folder is None:
            return generic
        blocks = read_exit_blocks(folder, generic.backend.spec, trainable.model.get_parameter)
        return replace(generic, backend=GenericBackend(trainable.model, blocks))


def setups_of(config: VerifyConfig) -> list[Setup]:
    """What was asked for, precision by precision. Raises ConfigError for unknown kernels."""
    for name in config.kernels:
        require_choice(name, "kernels", KERNELS)
    return [Setup(kernels, precision) for precision in config.precisions for kernels in config.kernels or KERNELS]


@dataclass(frozen=True)
class Opened:
    """A setup with its model, and the same model with drafts among few tokens, if it can draft so."""

    setup: Setup
    loaded: Decoder
    trimmed: Decoder | None


def opened(setup: Setup, config: VerifyConfig) -> Opened:
    """Raises Unavailable, or the error of a model that cannot be read."""
    loaded = setup.open(config.model, config.machine.device)
    trimmed = None
    if setup.kernels in (*VARIANTS, TORCH):
        trimmed = setup.open(config.model, config.machine.device, draft_vocab=max(1, loaded.backend.vocab_size // 4))
    return Opened(setup, loaded, trimmed)


def near_tie_precision(setup: Setup, loaded: Decoder) -> torch.dtype:
    """Whose rounding decides between almost equally likely tokens: torch's low-bit kernels take their inputs in bf16."""
    return torch.bfloat16 if setup.precision in _LOW_BIT else loaded.backend.dtype


def reasons(skipped: dict[Setup, LayerSkipError]) -> Iterator[str]:
    """Why setups were left out, one line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for setup, error in skipped.items():
        by_reason.setdefault(str(error), []).append(f"{setup.kernels} {setup.precision}")
    yield from (f"not verified: {', '.join(names)}: {reason}" for reason, names in by_reason.items())
