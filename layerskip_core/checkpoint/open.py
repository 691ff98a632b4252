"""Loads a model: `for_decoding` for the fastest kernels here, `for_training` as a transformers model, `blank` untrained."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.decoding import policy_packing
from ..config.packing import PackingConfig
from ..errors import CheckpointError, ConfigError
from ..model import (
    Backend,
    ModelSpec,
    NativeBackend,
    TorchBackend,
    TransformersBackend,
    can_run_native,
    missing_feature,
    suits_kernels,
)
from ..model.drafting import token_order
from ..model.exit_blocks import NO_BLOCKS, ExitBlocks
from ..model.low_bit import named_int4
from ..model.native.compiled import kernel_note, requested_variant, why_no_kernels
from ..model.transformers_backend import attention_for
from ..model.weights import Take, taken_from
from ..prompting import Tokenizer, resolve_template
from .beside import read_exit_blocks, read_int4
from .folder import (
    INT4_FILE,
    FileWeights,
    check_tokenizer,
    generation_config,
    is_packed,
    lean_spec,
    lean_tokenizer,
    refuse_packed,
)
from .info import CheckpointInfo, read_info
from .loaded import Decoder, Trainable, decoder_of, end_ids, memory_size, pick_device, pick_dtype
from .locate import Location, adapters_of, is_adapter, locate, reading
from .packed_file import PackedFile
from .swap import read_whole
from .transformers_read import merge_adapters, open_model, quiet_transformers, read_model, read_tokenizer

_MEMORY_SHARE = 0.8  # of the machine's memory, that a model with a copy may take
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Source:
    """A model to repack. `take` gives its weights in `dtype`; `weight_of` in any precision, until `take` was called."""

    spec: ModelSpec
    dtype: torch.dtype
    device: torch.device
    weight_of: Callable[[str], Tensor]
    take: Callable[[], Take]


@dataclass(frozen=True)
class Unpacked:
    """What a backend for repacked weights is built from, with what lies beside the weights in their folder."""

    spec: ModelSpec
    dtype: torch.dtype
    take: Take
    packing: PackingConfig
    int4: Take | None
    exit_blocks: ExitBlocks


def for_decoding(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    packing: PackingConfig | None = None,
    policies: Collection[str] | None = (),
) -> Decoder:
    """Load a model to generate text with, repacked for the fastest kernels of this machine where its architecture allows.

    Args:
        name: an embedded model, a folder, a GGUF file or a hub id.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: auto, fp32 or bf16.
        packing: how the weights are stored. Drafts that it leaves open have the head and vocabulary of the policies.
        policies: the saved policies whose low-bit copies are made too, on the CPU; None: all of them.

    Returns:
        The model in memory.

    Raises:
        CheckpointError: the model is absent, incomplete or damaged, or of an unsupported architecture.
        ConfigError: the device is absent, `packing` asks for something that this architecture or device cannot do, or the
            environment variable that chooses kernels has an unknown value.
    """
    target = pick_device(device)
    mapped_to = _CPU if device == "auto" else target  # a packed file
    requested_variant()
    return read_whole(name, lambda: _decoder(name, target, dtype, packing or PackingConfig(), policies, mapped_to))


def for_packing(folder: str, dtype: str, packing: PackingConfig) -> Unpacked:
    """A folder's model as `for_decoding` would pack it on the CPU, with what all of its saved policies draft with.

    Each weight can be taken any number of times. Raises CheckpointError and ConfigError as `for_decoding` does.
    """
    packing = _with_policies(packing, read_info(folder), None, _CPU)
    source = reading(folder, lambda: _lean_source(folder, _CPU, dtype))
    if source is None:
        trainable = for_training(folder, "cpu", dtype)
        weights = {name: weight.detach() for name, weight in trainable.model.named_parameters()}
        source = replace(_model_source(trainable), take=lambda: weights.get)
    return reading(folder, lambda: _unpacked(source, folder, packing))


def for_training(name: str, device: str = "auto", dtype: str = "auto") -> Trainable:
    """Load a model as transformers does, in evaluation mode. Adapters are merged, GGUF weights dequantised.

    Args and errors are those of `for_decoding`.
    """
    target = pick_device(device)
    requested_variant()
    return read_whole(name, lambda: _trainable(name, target, dtype))


@quiet_transformers()
def blank(name: str, seed: int, tokenizer: Any = None) -> Trainable:
    """The architecture of a checkpoint with random weights, in fp32 on the CPU. The folder needs no weights.

    With a `tokenizer` the model's vocabulary takes the tokenizer's size; without one the checkpoint's own is used.
    """
    location = locate(name)
    from transformers import AutoModelForCausalLM

    files = reading(name, lambda: open_model(location))
    config, spec = files.config, files.spec
    if tokenizer is None:
        tokenizer = reading(name, files.tokenizer)
        reading(name, lambda: check_tokenizer(tokenizer, spec.vocab))
    else:
        config.vocab_size = len(tokenizer)
        spec = replace(spec, vocab=len(tokenizer))
        for special in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config, special, getattr(tokenizer, special))
    reading(name, lambda: _require_memory(spec))
    torch.manual_seed(seed)
    kernels = attention_for(spec)
    model = reading(name, lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=kernels))
    return Trainable(name, model, TransformersBackend(model), tokenizer, read_info(location.path))


def _trainable(name: str, device: torch.device, dtype: str) -> Trainable:
    if not is_adapter(name):
        if (location := locate(name)).is_folder:
            reading(name, lambda: refuse_packed(location.path))
        return read_model(name, device, dtype)
    adapters, base = adapters_of(name)
    return merge_adapters(adapters, for_training(base, str(device), dtype))


def _decoder(
    name: str,
    device: torch.device,
    dtype: str,
    packing: PackingConfig,
    policies: Collection[str] | None,
    mapped_to: torch.device,
) -> Decoder:
    location = Location(name) if is_adapter(name) else locate(name)
    path, folder = location.path, None
    if location.is_folder and not is_adapter(name):
        folder, info = path, read_info(path)
        if is_packed(path):
            used = _with_policies(packing, info, policies, mapped_to)
            return reading(name, lambda: _mapped_decoder(name, path, info, mapped_to, dtype, used))
        packing = _with_policies(packing, info, policies, device)
        lean = reading(name, lambda: _lean_decoder(name, path, info, device, dtype, packing))
        if lean is not None:
            return lean
    trainable = _trainable(name, device, dtype)
    return reading(name, lambda: _repacked(trainable, path, folder, packing))


def _with_policies(
    packing: PackingConfig, info: CheckpointInfo, names: Collection[str] | None, device: torch.device
) -> PackingConfig:
    """`packing` with what these of the saved policies draft with: whole low-bit copies, which need the CPU, and a head."""
    used = [policy for name, policy in info.policies.items() if names is None or name in names]
    used = [policy for policy in used if device.type == "cpu" or not policy_packing(policy).draft_weights]
    if used and names is not None:  # a policy says how to decode
        packing = replace(packing, adaptive=any(policy["strategy"] == "adaptive" for policy in used))
    drafting = [stored for stored in map(policy_packing, used) if stored.drafts_apart]
    copies = tuple(dict.fromkeys(chain(packing.draft_weights, *(known.draft_weights for known in drafting))))
    if drafting and not packing.drafts_apart:  # one sweep measured them, so that they agree
        packing = replace(packing, draft_weights=copies, draft_head=drafting[0].draft_head, draft_vocab=drafting[0].draft_vocab)
    whole = any(known.draft_weights for known in drafting)
    return replace(packing, draft_weights=copies, draft_layers=0) if whole else packing


def _lean_source(folder: str, device: torch.device, dtype: str) -> _Source | None:
    """A folder that is read without importing transformers; None where only transformers can read it."""
    spec = lean_spec(folder)
    if spec is None:
        return None
    weights = FileWeights(folder, spec, device)
    precision = pick_dtype(dtype, device, spec.parameters)
    return _Source(spec, precision, device, weights.stored, lambda: weights.reader(precision))


def _model_source(trainable: Trainable) -> _Source:
    """A model that transformers has read. It loses its weights to `take`."""
    model, weight = trainable.model, trainable.model.get_input_embeddings().weight
    take = lambda: taken_from(model)  # noqa: E731
    return _Source(trainable.backend.spec, weight.dtype, weight.device, model.get_parameter, take)


def _unpacked(source: _Source, folder: str | None, packing: PackingConfig) -> Unpacked:
    """`folder`: that of the weights, if the model is a folder of them."""
    spec, blocks, int4 = source.spec, NO_BLOCKS, None
    if folder is not None:
        blocks = read_exit_blocks(folder, spec, source.weight_of)
    packing = _with_adaptive_copy(packing, folder, source)
    if folder is not None and packing.has_int4:
        int4 = read_int4(folder, spec, source.weight_of)
    return Unpacked(spec, source.dtype, source.take(), packing, int4, blocks)


def _with_adaptive_copy(packing: PackingConfig, folder: str | None, source: _Source) -> PackingConfig:
    """With a low-bit copy for adaptive drafting, if it is fast here and fits the memory.

    int4 if it was calibrated, else int8: int4 weights that are only rounded are too often wrong.
    """
    if not packing.adaptive or packing.draft_weights or packing.quantize or packing.exact:
        return packing
    calibrated = folder is not None and (Path(folder) / INT4_FILE).is_file()
    copied = replace(packing, draft_weights=("int4" if calibrated else "int8",))
    fits = source.spec.parameters * (source.dtype.itemsize + 1) <= _MEMORY_SHARE * memory_size()
    return copied if fits and can_run_native(source.spec, source.dtype, source.device, copied) else packing


def _backend(unpacked: Unpacked, device: torch.device, path: str) -> tuple[Backend, tuple[str, ...]]:
    """The fastest backend for repacked weights on this machine, and a note if the compiled kernels would be faster."""
    spec, dtype, packing = unpacked.spec, unpacked.dtype, unpacked.packing
    note = kernel_note() if suits_kernels(spec, dtype, device, packing) else None
    kind = NativeBackend if can_run_native(spec, dtype, device, packing) else TorchBackend
    order = _token_order(path, spec, packing)
    backend = kind(spec, unpacked.take, packing, order, unpacked.int4, unpacked.exit_blocks)
    return backend, () if note is None else (note,)


def _lean_decoder(
    name: str, path: str, info: CheckpointInfo, device: torch.device, dtype: str, packing: PackingConfig
) -> Decoder | None:
    source = _lean_source(path, device, dtype)
    if source is None:
        return None
    tokenizer = _tokenizer(path, source.spec)
    backend, notes = _backend(_unpacked(source, path, packing), device, path)
    return _with_files(name, path, info, backend, tokenizer, notes)


def _mapped_decoder(
    name: str, path: str, info: CheckpointInfo, device: torch.device, dtype: str, packing: PackingConfig
) -> Decoder:
    """A model that `layerskip export --format packed` wrote, on the CPU."""
    if device.type != "cpu":
        raise ConfigError(f"`device` must be cpu for a model that was packed for the compiled kernels, got {device}")
    file = PackedFile(path)
    spec = lean_spec(path) or open_model(Location(path)).spec
    packing = file.content.packing(packing, dtype)
    if not can_run_native(spec, file.dtype, device, packing):
        raise CheckpointError(f"it was packed for the compiled kernels, which cannot run it here: {why_no_kernels()}")
    tokenizer, order = _tokenizer(path, spec), _token_order(path, spec, packing)
    backend = NativeBackend(spec, file.norm, packing, order, None, file.exit_blocks, file.matrix, file.embedding(spec))
    backend.implementation = named_int4(backend.implementation, file.content.calibrated)
    return _with_files(name, path, info, backend, tokenizer)


def _with_files(
    name: str,
    path: str,
    info: CheckpointInfo,
    backend: Backend,
    tokenizer: Tokenizer,
    notes: tuple[str, ...] = (),
) -> Decoder:
    """A decoder with what the files of its folder say of prompts and their ends."""
    eos_ids = end_ids(generation_config(path), backend.spec.config, tokenizer)
    return Decoder(name, backend, tokenizer, info, eos_ids, resolve_template(None, None, info.template, tokenizer), notes)


def _repacked(trainable: Trainable, path: str, folder: str | None, packing: PackingConfig) -> Decoder:
    """The fastest decoder for a model that transformers has read. Where it is repacked, `trainable` loses its weights.

    `folder`: that of the weights, if the model is a folder of them.
    """
    generic, source = decoder_of(trainable), _model_source(trainable)
    missing = missing_feature(source.spec)
    if missing is None:
        backend, notes = _backend(_unpacked(source, folder, packing), source.device, path)
        return replace(generic, backend=backend, notes=notes)
    if not packing.is_plain:
        got = f"{source.spec.model_type} with {missing}"
        raise ConfigError(f"low-bit, draft and exact weights need a model that can be repacked, got {got}")
    blocks = NO_BLOCKS if folder is None else read_exit_blocks(folder, source.spec, source.weight_of)
    return replace(generic, backend=TransformersBackend(trainable.model, blocks, source.spec)) if blocks.blocks else generic


def _tokenizer(path: str, spec: ModelSpec) -> Tokenizer:
    tokenizer = lean_tokenizer(path) or read_tokenizer(path)
    check_tokenizer(tokenizer, spec.vocab)
    return tokenizer


def _token_order(path: str, spec: ModelSpec, packing: PackingConfig) -> list[int] | None:
    return token_order(path, spec.vocab) if packing.draft_vocab else None


def _require_memory(spec: ModelSpec) -> None:
    """Raises CheckpointError for a model whose weights in fp32 do not fit into this machine's memory."""
    needed, there = 4 * spec.parameters, memory_size()
    if needed > there:
        raise CheckpointError(f"its {spec.parameters} weights need {needed >> 20} MB in fp32, this machine has {there >> 20}")
