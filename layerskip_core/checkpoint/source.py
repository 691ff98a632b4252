"""Opens a model for decoding: chooses one of four readers, before any weight is in memory.

- packed: packed.safetensors, whose matrices are mapped as the kernels read them
- folder: safetensors whose weights are read one by one
- blocks: a GGUF file, or a folder in low bits, whose blocks the kernels read as stored
- transformers: everything else, as a whole model: adapters, other architectures, legacy names
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..config.model import PLAIN, PackingConfig
from ..errors import CheckpointError, ConfigError
from ..model.exit_blocks import NO_STORED_DRAFTERS, StoredDrafters
from ..model.native import can_run_native
from ..model.native.compiled import kernels, why_no_kernels
from ..model.spec import AnySpec, ModelSpec
from ..model.torch_layer import missing_feature
from ..model.weights import Take, taken_from
from .folder import (
    CONFIG_FILE,
    LowBitWeights,
    checked_tokenizer,
    generation_config,
    is_packed,
    lean_spec,
    lean_tokenizer,
    open_weights,
    quiet_transformers,
    read_settings,
    refuse_packed,
)
from .gguf_read import GgufFile
from .info import CheckpointInfo
from .load_cache import NO_CACHE, LoadCache
from .loaded import Trainable, pick_dtype
from .locate import ModelRef, adapters_of, reading
from .packed_file import PackedFile
from .save import read_whole
from .shipped import shipped_by
from .sidecars import fingerprint
from .transformers_read import (
    PretrainedModel,
    configured_spec,
    merge_adapters,
    open_model,
    read_model,
    read_tokenizer,
    tokenizer_of,
)


@dataclass(frozen=True)
class Request:
    """What a load was asked for. `packing`: of the flags and of the saved policies in use."""

    model: ModelRef
    device: torch.device
    dtype: str = "auto"
    packing: PackingConfig = PLAIN
    info: CheckpointInfo = field(default_factory=CheckpointInfo)
    cache: LoadCache = NO_CACHE


@dataclass(frozen=True)
class Source:
    """An opened model, whose weights are read when taken. `take()` gives them in `dtype`; before
    that, `weight_of` reads one in its own precision.
    """

    model: ModelRef
    spec: AnySpec
    dtype: torch.dtype
    device: torch.device
    packing: PackingConfig
    info: CheckpointInfo
    weight_of: Callable[[str], Tensor]
    take: Callable[[], Take]
    tokenizer: Callable[[], Any]
    config: Any  # as transformers has it, or its attributes
    generation: object  # generation_config.json as attributes
    rows: Take | None = None  # a weight's rows of blocks, which the compiled kernels read
    stored_drafters: StoredDrafters = NO_STORED_DRAFTERS  # of a model without a folder
    packed: PackedFile | None = None
    trainable: Trainable | None = None
    cache: LoadCache = NO_CACHE
    # For the user, complete once the weights were taken
    notes: Callable[[], tuple[str, ...]] = tuple

    @property
    def own_spec(self) -> ModelSpec:
        """The spec of a model that is repacked."""
        assert isinstance(self.spec, ModelSpec)
        return self.spec

    def fingerprint(self) -> str:
        """As in sidecars.py. The cache has it, because blocks in low bits take seconds to
        dequantise.
        """
        return self.cache.fingerprint(lambda: fingerprint(self.spec, self.weight_of))


def open_source(request: Request) -> Source:
    """Opens a model with the first reader that can. Raises CheckpointError and ConfigError."""
    folder = request.model.folder
    if folder is not None and is_packed(folder):
        return _packed_source(request, folder)
    source = None
    if folder is not None:
        source = folder_source(request, folder)
    if source is None and _may_have_blocks(request.model):
        source = _blocks_source(request)
    return source or transformers_source(request)


def _may_have_blocks(model: ModelRef) -> bool:
    folder = model.folder
    if folder is None:
        return model.gguf is not None
    return "quantization_config" in read_settings(folder, CONFIG_FILE)


def _packed_source(request: Request, folder: str) -> Source:
    """A model that `layerskip export --format packed` wrote."""
    if request.device.type != "cpu":
        raise ConfigError(
            f"`device` must be cpu for a model that was packed for the compiled kernels, got {request.device}"
        )
    file = PackedFile(folder)
    spec = lean_spec(folder) or ModelSpec.of(open_model(request.model).config)
    packing = file.content.packing(request.packing, request.dtype)
    if not can_run_native(spec, file.dtype, request.device, packing):
        raise CheckpointError(
            f"it was packed for the compiled kernels, which cannot run it here: {why_no_kernels()}"
        )
    compiled = kernels()
    if file.is_widened and compiled is not None and not compiled.widens_bf16:
        raise CheckpointError(
            f"it was packed in fp32 for kernels that widen bf16, which {compiled.variant} does not: export it again"
        )

    def weight_of(name: str) -> Tensor:
        weight = file.unpacked(name)
        assert weight is not None
        return weight

    def tokenizer() -> Any:
        return checked_tokenizer(lean_tokenizer(folder) or read_tokenizer(folder), spec.vocab)

    return Source(
        request.model,
        spec,
        file.dtype,
        request.device,
        packing,
        request.info,
        weight_of,
        lambda: file.unpacked,
        tokenizer,
        spec.config,
        generation_config(folder),
        packed=file,
    )


def folder_source(request: Request, folder: str) -> Source | None:
    """A folder whose weights can be read one by one; None if only transformers can read it."""
    cache = request.cache
    spec = lean_spec(folder) or cache.spec or configured_spec(folder)
    if spec is None:
        return None
    dtype = pick_dtype(request.dtype, request.device, spec.parameters)
    is_native = can_run_native(spec, dtype, request.device, request.packing)
    if missing_feature(spec) and not is_native:
        return None
    files = open_weights(folder, spec)
    if not files.keys() >= spec.shapes.keys():  # legacy names, which transformers maps
        return None

    def take(name: str) -> Tensor | None:
        if name not in files:
            return None
        if name in spec.mapped:  # the table stays in its file: a token reads one row
            table = files[name].mapped(name)
            return table if table.dtype in (torch.float32, torch.bfloat16) else table.float()
        return files[name].read(name).to(request.device, dtype)

    def tokenizer() -> Any:
        own = lean_tokenizer(folder) or cache.tokenizer or read_tokenizer(folder)
        return checked_tokenizer(own, spec.vocab)

    return Source(
        request.model,
        spec,
        dtype,
        request.device,
        request.packing,
        request.info,
        lambda name: files[name].mapped(name),
        lambda: take,
        tokenizer,
        spec.config,
        generation_config(folder),
        cache=cache,
    )


def _blocks_source(request: Request) -> Source | None:
    """A GGUF file or a folder in low bits on kernels that read the stored blocks; None if they
    cannot run it.
    """
    model = request.model
    cache = request.cache

    # Opened only for what the cache lacks, because this imports transformers
    @functools.cache
    @quiet_transformers()
    def opened() -> PretrainedModel | GgufFile:
        files = open_model(model)
        _ = files.spec  # a GGUF file makes it now, while transformers is quiet
        return files

    def weights() -> GgufFile | LowBitWeights:
        files = opened()
        found = files if isinstance(files, GgufFile) else files.low_bits
        assert found is not None
        return found

    stored_drafters = NO_STORED_DRAFTERS
    spec = cache.spec
    if spec is None:
        files = opened()
        spec = files.spec
        if spec is None or (isinstance(files, PretrainedModel) and files.low_bits is None):
            return None
        if isinstance(files, GgufFile):
            stored_drafters = replace(NO_STORED_DRAFTERS, mtp=files.drafter)
    dtype = pick_dtype(request.dtype, request.device, spec.parameters)
    if not can_run_native(spec, dtype, request.device, request.packing):
        return None
    own_spec = spec
    tables = {*own_spec.mapped, own_spec.embedding_name}

    @quiet_transformers()
    def dense(name: str) -> Tensor | None:
        found = weights()
        if isinstance(found, GgufFile) and name in tables:
            return found.table(name, dtype)
        return found.weight(name).to(dtype) if name in own_spec.shapes else None

    def tokenizer() -> Any:
        if cache.tokenizer is not None:
            return checked_tokenizer(cache.tokenizer, own_spec.vocab)
        files = opened()
        if isinstance(files, GgufFile):
            files.release()  # the weights were taken
        with quiet_transformers():
            return tokenizer_of(files)

    def notes() -> tuple[str, ...]:
        return tuple(weights().notes) if cache.spec is None else cache.notes

    return Source(
        model,
        spec,
        dtype,
        request.device,
        request.packing,
        request.info,
        lambda name: weights().weight(name),
        lambda: cache.unpacked(dense, own_spec, dtype),
        tokenizer,
        spec.config,
        None if model.gguf is not None else generation_config(model.path),
        rows=cache.rows(lambda name: weights().rows(name)),
        stored_drafters=stored_drafters,
        cache=cache,
        notes=notes,
    )


def transformers_source(request: Request) -> Source:
    """A model that transformers reads as a whole; `take()` moves its weights out of it."""
    trainable = read_trainable(request.model, request.device, request.dtype)
    model = trainable.model
    backend = trainable.backend
    stored_drafters = NO_STORED_DRAFTERS
    if request.model.is_adapter or request.model.gguf is not None:
        stored_drafters = shipped_by(request.model.name, backend.spec)
    return Source(
        request.model,
        backend.spec,
        backend.dtype,
        backend.device,
        request.packing,
        trainable.info,
        model.get_parameter,
        lambda: taken_from(model),
        lambda: trainable.tokenizer,
        model.config,
        model.generation_config,
        stored_drafters=stored_drafters,
        trainable=trainable,
    )


def read_trainable(model: ModelRef, device: torch.device, dtype: str) -> Trainable:
    """Reads a model with transformers, adapters merged into their base. Raises CheckpointError."""
    adapters, base = adapters_of(model.name)
    if adapters:
        below = ModelRef.of(base).fetched()
        with reading(base):
            trainable = read_whole(below.path, lambda: read_trainable(below, device, dtype))
        return merge_adapters(adapters, trainable)
    if model.folder is not None:
        refuse_packed(model.folder)
    return read_model(model, device, dtype)
