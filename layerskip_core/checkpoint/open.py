"""Loads a model: `for_decoding` on the fastest kernels here, `for_training` as transformers does.

A load has three steps: `open_source` chooses a reader (source.py), `resolve` plans (plan.py), and
`load` carries the plan out.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from ..config.model import PLAIN, PackingConfig
from ..errors import CheckpointError, refused
from ..files import read_json
from ..model.architectures import MULTIMODAL
from ..model.backend import Backend
from ..model.exit_blocks import NO_STORED_DRAFTERS
from ..model.native import NativeBackend
from ..model.native.compiled import requested_variant
from ..model.torch_backend import TorchBackend
from ..model.transformers_backend import TransformersBackend
from ..model.vocabulary import ORDER_FILE
from ..model.weights import named_int4, named_weights
from ..processor import memory_budget
from .folder import CONFIG_FILE, is_packed, read_settings
from .load_cache import NO_CACHE, LoadCache
from .loaded import Decoder, Trainable, decoder, pick_device
from .locate import ModelRef, reading
from .plan import LoadPlan, resolve, with_policies
from .save import read_whole
from .settings import info_of
from .source import Request, folder_source, open_source, read_trainable, transformers_source
from .transformers_read import blank_on_meta

_CPU = torch.device("cpu")


def for_decoding(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    packing: PackingConfig | None = None,
    policies: Collection[str] | None = (),
    memory: int | None = None,
    cache: bool = False,
) -> Decoder:
    """Loads a model to generate text with, repacked for the fastest kernels of this machine where
    its architecture allows.

    Args:
        name: an embedded model, a folder, a GGUF file or a hub id.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: auto, fp32 or bf16.
        packing: how weights are stored. Policies add their low-bit copies, and their draft head if
            it sets no drafts.
        policies: saved policies whose low-bit copies are made too (on the CPU); None: all.
        memory: bytes for the weights and a copy for adaptive drafting; None: by `memory_budget`.
        cache: whether packed weights are read from and written to the user's cache (load_cache.py).
            The output is the same.

    Raises:
        CheckpointError: the model is absent, damaged or unsupported.
        ConfigError: an absent device, an impossible packing, a draft model of another vocabulary,
            or unknown kernels.
    """
    target = pick_device(device)
    model = ModelRef.of(name).fetched()
    requested_variant()

    def read() -> Decoder:
        free = memory_budget()[1] if memory is None else memory
        info = info_of(model)
        used_device = target
        used_packing = packing or PLAIN
        if model.folder is not None:
            # A packed model is for the CPU, also beside a GPU
            if device == "auto" and is_packed(model.folder):
                used_device = _CPU
            used_packing = with_policies(used_packing, info, policies, used_device)
        parts = NO_CACHE
        if cache and used_device == _CPU:
            parts = LoadCache.of(model, dtype, used_packing)
        source = open_source(Request(model, used_device, dtype, used_packing, info, parts))
        return load(resolve(source, free))

    with reading(name):
        loaded = read_whole(model.path, read)
    if packing is not None and packing.draft_model is not None:
        loaded.backend.draft_model = _draft_model(
            packing.draft_model, loaded, dtype, packing, cache
        )
    return loaded


def load(plan: LoadPlan) -> Decoder:
    """Reads the weights and the tokenizer, and writes what the cache lacks."""
    source = plan.source
    backend = _backend(plan)
    tokenizer = source.tokenizer()
    # A drafter in a GGUF file needs the open file, so the configuration is read from it again
    spec = source.spec if source.stored_drafters.mtp is None else None
    source.cache.save(spec, tokenizer, source.notes())
    loaded = decoder(
        source.model.name,
        backend,
        tokenizer,
        plan.info,
        source.config,
        source.generation,
        *plan.notes,
        *source.notes(),
    )
    # Where weights take 16 bits or more, an int8 copy is nearly as fast as one in int4
    gains = plan.uncalibrated and isinstance(backend, NativeBackend) and backend.in_12_bits
    return replace(loaded, gains_by_calibration=gains)


def _backend(plan: LoadPlan) -> Backend:
    source = plan.source
    if plan.backend == "transformers":
        assert source.trainable is not None
        if plan.stored_drafters is NO_STORED_DRAFTERS:
            return source.trainable.backend
        return TransformersBackend(source.trainable.model, plan.stored_drafters)
    spec = source.own_spec
    order = token_order(source.model.path, spec.vocab)
    arguments = (spec, source.take(), plan.packing, order, plan.int4, plan.stored_drafters)
    if plan.backend == "torch":
        return TorchBackend(*arguments, stored=source.rows)
    if source.packed is None:
        return NativeBackend(*arguments, stored=source.rows, through=source.cache.through)
    file = source.packed
    backend = NativeBackend(*arguments, file.embedding(spec), pack=file.matrix)
    backend.implementation = named_int4(backend.implementation, file.content.calibrated)
    return backend


def token_order(folder: str | Path, vocab_size: int) -> list[int] | None:
    """A checkpoint's ORDER_FILE, if any: distinct token ids, the most frequent of its training data
    first.

    Raises CheckpointError for any other content.
    """
    path = Path(folder) / ORDER_FILE
    if not path.is_file():
        return None
    order: list[int] = read_json(path, CheckpointError, list[int])
    if len(set(order)) < len(order) or not all(0 <= token < vocab_size for token in order):
        raise CheckpointError(f"{path} must be a list of distinct token ids below {vocab_size}")
    return order


def plan_packing(folder: str, dtype: str, packing: PackingConfig) -> LoadPlan:
    """Plans a folder's model as `for_decoding` repacks it on the CPU, with the copies of all
    policies. Raises the same errors.
    """
    model = ModelRef.of(folder)
    with reading(folder):
        info = info_of(model)
        used = with_policies(packing, info, None, _CPU)
        request = Request(model, _CPU, dtype, used, info)
        source = folder_source(request, folder)
        if source is None:
            source = transformers_source(request)
            assert source.trainable is not None
            # The writer reads some weights twice, so they stay in the model
            weights = named_weights(source.trainable.model)
            source = replace(source, take=lambda: weights.get)
        # The writer has no packed weight in memory but the newest
        return resolve(source, inf)


def for_training(name: str, device: str = "auto", dtype: str = "auto") -> Trainable:
    """Loads a model as transformers does, in evaluation mode; arguments and errors as for
    `for_decoding`.
    """
    target = pick_device(device)
    model = ModelRef.of(name).fetched()
    requested_variant()
    with reading(name):
        return read_whole(model.path, lambda: read_trainable(model, target, dtype))


def outline(name: str) -> tuple[Trainable, Callable[[str], Tensor]] | None:
    """A model as `for_training` loads it, but with parameters on the meta device; and a reader of
    single weights.

    Takes as long as reading its configuration and tokenizer. None for models that only loading
    makes: adapters, GGUF files, and types that our kernels do not know.
    """
    model = ModelRef.of(name).fetched()
    folder = model.folder
    if folder is None or is_packed(folder):
        return None
    with reading(name):
        source = folder_source(Request(model, _CPU, "fp32"), folder)
        if source is None or read_settings(folder, CONFIG_FILE).get("model_type") in MULTIMODAL:
            return None
        return blank_on_meta(model), source.weight_of


def _draft_model(
    name: str, target: Decoder, dtype: str, packing: PackingConfig, cache: bool
) -> Backend:
    """Loads a draft model. Raises ConfigError unless it has the target's vocabulary."""
    packing = PackingConfig(packing.quantize, draft_vocab=packing.draft_vocab)
    draft = for_decoding(name, str(target.backend.device), dtype, packing, cache=cache)
    vocab = target.backend.spec.vocab
    size = draft.backend.spec.vocab
    differing = target.tokenizer.get_vocab().items() ^ draft.tokenizer.get_vocab().items()
    if vocab != size or differing:
        where = f", of which id {min(token for _, token in differing)} differs" if differing else ""
        needed = f"a model with the tokenizer of {target.name} and its {vocab} tokens"
        raise refused("draft_model", needed, f"{name} with {size} tokens{where}")
    return draft.backend
