"""What the tests of decoding share: prompts, the ids of a decoding, and the tiny model on native kernels."""

import pytest
import torch

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding import decode
from layerskip_core.model import ModelSpec, NativeBackend, can_run_native

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # widths that the kernels run


def prompt_of(length, seed=0, vocabulary=67):
    return torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(length + seed)).tolist()


def ids_of(decoding):
    return [token.id for tokens in decoding for token in tokens]


def plainly(backend, prompt, limit=40, eos_ids=frozenset()):
    """The ids of autoregressive decoding."""
    return ids_of(decode(backend, prompt, DecodingConfig("autoregressive", max_new_tokens=limit), eos_ids))


def native_or_skip(model, packing=None, **options):
    if not can_run_native(ModelSpec.of(model.config), model.dtype, torch.device("cpu"), packing):
        pytest.skip("no kernels were built here, or the CPU lacks what they need")
    return NativeBackend.of(model, packing, **options)
