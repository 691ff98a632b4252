"""Loads a model: `for_decoding` on the fastest kernels here, `for_training` as transformers does;
`import_checkpoint`.
"""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from itertools import chain
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from ..config.decoding import DraftProfile
from ..config.model import PLAIN, PackingConfig, Quantization
from ..config.resolution import policy_packing
from ..errors import CheckpointError, ConfigError, refused
from ..model.architectures import MULTIMODAL
from ..model.backend import Backend
from ..model.cache import memory_budget
from ..model.exit_blocks import NO_BLOCKS, ExitBlocks
from ..model.native import NativeBackend, can_run_native, suits_kernels
from ..model.native.compiled import kernel_note, kernels, requested_variant, why_no_kernels
from ..model.spec import ModelSpec
from ..model.torch_backend import TorchBackend
from ..model.torch_layer import missing_feature
from ..model.transformers_backend import TransformersBackend
from ..model.vocabulary import ORDER_FILE, token_order
from ..model.weights import Take, named_int4, named_weights, taken_from
from .folder import (
    CONFIG_FILE,
    EXIT_BLOCKS_FILE,
    INT4_FILE,
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
from .info import EXIT_BLOCKS, CheckpointInfo
from .load_cache import KeptParts, kept_parts
from .loaded import Decoder, Trainable, decoder, decoder_of, pick_device, pick_dtype
from .locate import Location, adapters_of, fetched, is_adapter, present, reading
from .packed_file import PackedFile
from .save import read_whole, save_checkpoint
from .settings import info_of
from .shipped import (
    drafter_files,
    is_assistant,
    read_exit_blocks,
    shipped_by,
    shipped_files,
    with_drafters,
)
from .sidecars import EAGLE3_FOLDER, read_int4
from .transformers_read import (
    PretrainedModel,
    blank_on_meta,
    configured_spec,
    merge_adapters,
    open_model,
    read_model,
    read_tokenizer,
    tokenizer_in,
    tokenizer_of,
    written_dtype,
)

_CPU = torch.device("cpu")
# Usual values of a low-bit copy of all layers: acceptance rate (int4: calibrated), and time per
# draft in target passes.
_COPIES: dict[Quantization, tuple[float, float]] = {"int8": (0.97, 0.55), "int4": (0.93, 0.4)}
_VERIFICATION = 1.12  # time of a verification, in target passes of one token
_NO_KERNELS = "drafting without its assistant, which only the compiled kernels run"


@dataclass(frozen=True)
class Source:
    """A model to repack. `take()` gives its weights in `dtype`; before that, `weight_of` reads one
    in its own precision.
    """

    spec: ModelSpec
    dtype: torch.dtype
    device: torch.device
    weight_of: Callable[[str], Tensor]
    take: Callable[[], Take]
    packing: PackingConfig
    int4: Take | None = None
    exit_blocks: ExitBlocks = NO_BLOCKS
    stored: Take | None = None  # rows of blocks as in a GGUF file, which the compiled kernels read
    info: CheckpointInfo = field(default_factory=CheckpointInfo)
    notes: tuple[str, ...] = ()  # for the user
    kept: KeptParts = field(default_factory=KeptParts)


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
        name: an embedded model, a folder, a GGUF file or a hub id. device: auto, cpu, cuda, cuda:N
        or mps. dtype: auto, fp32 or bf16. packing: how weights are stored; policies add their
        low-bit copies, and their draft head if it sets no drafts. policies: saved policies whose
        low-bit copies are made too (on the CPU); None: all. memory: bytes for the weights and a
        copy for adaptive drafting; None: by `memory_budget`. cache: whether packed weights are read
        from and kept in the user's cache (load_cache.py). The output is the same.

    Raises:
        CheckpointError: the model is absent, damaged or unsupported. ConfigError: an absent device,
        an impossible packing, a draft model of another vocabulary, or unknown kernels.
    """
    target = pick_device(device)
    location = present(name)
    requested_variant()

    def parts(used: PackingConfig, on: torch.device) -> KeptParts:
        return kept_parts(name, location, dtype, used) if cache and on == _CPU else KeptParts()

    def read() -> Decoder:
        info = info_of(name, location)
        used = packing or PLAIN
        folder = location.folder
        most = memory_budget()[1] if memory is None else memory
        if folder is not None:
            mapped = is_packed(folder)
            on = _CPU if mapped and device == "auto" else target
            used = _with_policies(used, info, policies, on)
            if mapped:
                return _mapped(name, folder, info, on, dtype, used)
            kept = parts(used, on)
            if (source := _lean_source(folder, on, dtype, used, kept)) is not None:
                source = _with_sidecars(replace(source, info=info), folder, most)
                return _decoder(name, folder, source, *_backend(source, folder))
        low_bits = location.gguf_file is not None or (
            folder and "quantization_config" in read_settings(folder, CONFIG_FILE)
        )
        if (
            low_bits
            and (
                stored := _as_stored(name, location, target, dtype, used, most, parts(used, target))
            )
            is not None
        ):
            return stored
        return _repacked(_trainable(name, location, target, dtype), location, used, most)

    loaded = reading(name, lambda: read_whole(location.path, read))
    if packing is not None and packing.draft_model is not None:
        loaded.backend.draft_model = _draft_model(
            packing.draft_model, loaded, dtype, packing, cache
        )
    return loaded


def for_packing(folder: str, dtype: str, packing: PackingConfig) -> Source:
    """A folder's model as `for_decoding` repacks it on the CPU, with the copies of all policies.
    Raises the same errors.
    """

    def read() -> Source:
        info = info_of(folder, Location(folder))
        used = _with_policies(packing, info, None, _CPU)
        source = _lean_source(folder, _CPU, dtype, used)
        if source is None:
            trainable = _trainable(folder, Location(folder), _CPU, dtype)
            weights = named_weights(trainable.model)
            source = replace(_model_source(trainable, used), take=lambda: weights.get)
        # The writer keeps no weight in memory
        return _with_sidecars(replace(source, info=info), folder, inf)

    return reading(folder, read)


def for_training(name: str, device: str = "auto", dtype: str = "auto") -> Trainable:
    """Loads a model as transformers does, in evaluation mode; arguments and errors as for
    `for_decoding`.
    """
    target = pick_device(device)
    location = present(name)
    requested_variant()
    return reading(
        name, lambda: read_whole(location.path, lambda: _trainable(name, location, target, dtype))
    )


def outline(name: str) -> tuple[Trainable, Callable[[str], Tensor]] | None:
    """A model as `for_training` loads it, but with parameters on the meta device; and a reader of
    single weights.

    Takes as long as reading its configuration and tokenizer. None for models that only loading
    makes: adapters, GGUF files, and types that our kernels do not know.
    """
    location = present(name)
    folder = location.folder
    if folder is None or is_packed(folder) or adapters_of(name)[0]:
        return None
    source = reading(name, lambda: _lean_source(folder, _CPU, "fp32", PLAIN))
    if source is None or read_settings(folder, CONFIG_FILE).get("model_type") in MULTIMODAL:
        return None
    return reading(name, lambda: blank_on_meta(name, location)), source.weight_of


def import_checkpoint(
    name: str, output: str, dtype: str, drafter: str | None = None
) -> tuple[torch.dtype, list[str]]:
    """Writes any model that can be loaded to `output`, with its sidecars. GGUF is dequantised,
    adapters are merged.

    `drafter`: folder or hub id of a drafter (EAGLE-3 layout, or Gemma 4's assistant) that replaces
    the model's own. `dtype`: as for `written_dtype`. Returns the precision, and the reasons for
    left-out files.
    """
    loaded = for_training(name, "cpu", "fp32")
    precision = written_dtype(loaded, dtype)
    folder = present(adapters_of(name)[1]).folder
    spec = loaded.backend.spec
    weight_of = loaded.model.get_parameter
    sidecars: dict[str, bytes] = {}
    left_out = []
    for file, read in (
        (INT4_FILE, lambda: read_int4(str(folder), loaded.backend.own_spec, weight_of)),
        (EXIT_BLOCKS_FILE, lambda: read_exit_blocks(str(folder), spec, weight_of)),
    ):
        if folder is not None and (path := Path(folder) / file).is_file():
            try:
                read()
                sidecars[file] = path.read_bytes()
            except CheckpointError as error:
                left_out.append(str(error))
    sidecars |= shipped_files(name, loaded)
    given = drafter and fetched(drafter)
    # The model's own drafter in the EAGLE-3 layout
    replaces = given is not None and not is_assistant(given)
    own = None if folder is None or replaces else f"{folder}/{EAGLE3_FOLDER}"
    for source in filter(None, (own, given)):
        sidecars |= (
            drafter_files(source, loaded, str(Path(output).resolve()))
            if Path(source).is_dir()
            else {}
        )
    if (order := Path(present(name).path) / ORDER_FILE).is_file():
        sidecars[ORDER_FILE] = order.read_bytes()
    details = {**loaded.info.details, "imported_from": name}
    described = {
        trained: how
        for trained, how in details.pop(EXIT_BLOCKS, {}).items()
        if (not replaces if trained == EAGLE3_FOLDER else EXIT_BLOCKS_FILE in sidecars)
    }
    is_low_bit = present(adapters_of(name)[1]).gguf_file is not None
    info = loaded.info.dequantised() if is_low_bit else loaded.info
    info = replace(info, details=details | ({EXIT_BLOCKS: described} if described else {}))
    save_checkpoint(loaded.model, loaded.tokenizer, info, output, precision, sidecars)
    return precision, left_out


def _trainable(name: str, location: Location, device: torch.device, dtype: str) -> Trainable:
    adapters, base = adapters_of(name)
    if adapters:
        return merge_adapters(adapters, for_training(base, str(device), dtype))
    if location.folder is not None:
        refuse_packed(location.folder)
    return read_model(name, location, device, dtype)


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


def _with_policies(
    packing: PackingConfig,
    info: CheckpointInfo,
    names: Collection[str] | None,
    device: torch.device,
) -> PackingConfig:
    """`packing` with the low-bit copies (of all layers, on the CPU only) and the draft head of the
    named policies.
    """
    used = [policy for name, policy in info.policies.items() if names is None or name in names]
    used = [
        policy
        for policy in used
        if device.type == "cpu" or not policy_packing(policy).draft_weights
    ]
    if used and names is not None:  # the policy decides the strategy
        packing = replace(
            packing, adaptive=any(policy["strategy"] == "adaptive" for policy in used)
        )
    drafting = [stored for stored in map(policy_packing, used) if stored.drafts_apart]
    copies = tuple(
        dict.fromkeys(chain(packing.draft_weights, *(known.draft_weights for known in drafting)))
    )
    if drafting and not packing.drafts_apart:  # all are of one sweep, with one head
        packing = replace(
            packing,
            draft_weights=copies,
            draft_head=drafting[0].draft_head,
            draft_vocab=drafting[0].draft_vocab,
        )
    whole = any(known.draft_weights for known in drafting)
    return replace(packing, draft_weights=copies, draft_layers=0) if whole else packing


def _lean_source(
    folder: str,
    device: torch.device,
    dtype: str,
    packing: PackingConfig,
    kept: KeptParts | None = None,
) -> Source | None:
    """A folder whose weights can be read one by one; None if only transformers can read it."""
    kept = kept or KeptParts()
    if (spec := lean_spec(folder) or kept.spec or configured_spec(folder)) is None:
        return None
    precision = pick_dtype(dtype, device, spec.parameters)
    if missing_feature(spec) and not can_run_native(spec, precision, device, packing):
        return None
    files = open_weights(folder, spec)
    if not files.keys() >= spec.shapes.keys():  # legacy names, which transformers maps
        return None

    def take(name: str) -> Tensor | None:
        """Reads one weight; a `mapped` table stays in its file."""
        if name in spec.mapped and name in files:
            table = files[name].mapped(name)
            return table if table.dtype in (torch.float32, torch.bfloat16) else table.float()
        return files[name].read(name).to(device, precision) if name in files else None

    return Source(
        spec,
        precision,
        device,
        lambda name: files[name].mapped(name),
        lambda: take,
        packing,
        kept=kept,
    )


def _as_stored(
    name: str,
    location: Location,
    device: torch.device,
    dtype: str,
    packing: PackingConfig,
    memory: float,
    kept: KeptParts,
) -> Decoder | None:
    """A GGUF file or a low-bit folder on kernels that read the stored blocks; None if they cannot
    run it.
    """

    @functools.cache
    @quiet_transformers()
    def files() -> PretrainedModel | GgufFile:
        """Opened only for what the cache lacks, because this imports transformers."""
        opened = open_model(location)
        assert opened.spec is None or opened.config is not None
        return opened

    def weights() -> GgufFile | LowBitWeights:
        opened = files()
        found = opened if isinstance(opened, GgufFile) else opened.low_bits
        assert found is not None
        return found

    is_gguf = location.gguf_file is not None
    blocks = NO_BLOCKS
    spec = kept.spec
    if spec is None:
        opened = files()
        spec = opened.spec
        if spec is None or (isinstance(opened, PretrainedModel) and opened.low_bits is None):
            return None
        if isinstance(opened, GgufFile):
            blocks = replace(NO_BLOCKS, mtp=opened.drafter)
    precision = pick_dtype(dtype, device, spec.parameters)
    if not can_run_native(spec, precision, device, packing):
        return None

    tables = {*spec.mapped, spec.embedding_name}
    shapes = spec.shapes

    @quiet_transformers()
    def make(weight: str) -> Tensor | None:
        found = weights()
        if isinstance(found, GgufFile) and weight in tables:
            return found.table(weight, precision)
        return found.weight(weight).to(precision) if weight in shapes else None

    take = kept.unpacked(make, spec, precision)
    source = Source(
        *(spec, precision, device, lambda weight: weights().weight(weight), lambda: take, packing),
        stored=kept.stored(lambda weight: weights().rows(weight)),
        exit_blocks=blocks,
        kept=kept,
    )
    backend, notes = _backend(_with_sidecars(source, location.folder, memory), location.path)
    tokenizer = kept.tokenizer
    of_weights = kept.notes
    if tokenizer is None:
        opened = files()
        if isinstance(opened, GgufFile):
            opened.release()
        tokenizer = quiet_transformers()(tokenizer_of)(opened)
    else:
        checked_tokenizer(tokenizer, spec.vocab)
    if kept.spec is None:
        of_weights = tuple(weights().notes)
    # A drafter needs the open file
    kept.save(None if blocks.mtp is not None else spec, tokenizer, of_weights)
    generation = None if is_gguf else generation_config(location.path)
    return decoder(
        name,
        backend,
        tokenizer,
        info_of(name, location),
        spec.config,
        generation,
        *notes,
        *of_weights,
    )


def _model_source(trainable: Trainable, packing: PackingConfig) -> Source:
    """A model that transformers has read; `take()` moves its weights out of it."""
    model = trainable.model
    weight = trainable.model.get_input_embeddings().weight
    return Source(
        trainable.backend.own_spec,
        weight.dtype,
        weight.device,
        model.get_parameter,
        lambda: taken_from(model),
        packing,
    )


def _with_sidecars(source: Source, folder: str | None, memory: float) -> Source:
    """Adds the sidecars of `folder`, and a low-bit copy for adaptive drafting if kernels run it and
    `memory` bytes hold it.
    """
    spec = source.spec
    packing = source.packing
    info = source.info
    int4 = None
    copies = packing.adaptive and not (
        packing.draft_weights or packing.quantize or packing.exact or source.stored
    )
    if copies or _uses_int4(packing):
        int4 = read_int4(folder, spec, source.weight_of)
        info = info if int4 is None or int4.agreement is None else info.with_int4(int4.agreement)
    if copies:
        kind = "int8" if int4 is None else _faster_copy(info.draft_profile(spec.layers))
        copied = replace(packing, draft_weights=(kind,))
        if can_run_native(spec, source.dtype, source.device, copied):
            needed = (spec.parameters - spec.unread) * (source.dtype.itemsize + 1)
            if needed <= memory:
                packing = copied
            else:
                lacking = f"the model needs {needed / 1e6:,.0f} MB, and {memory / 1e6:,.0f} MB are free beside keys and values"
                source = replace(
                    source,
                    notes=(f"drafting without an {kind} copy of the weights: with it {lacking}",),
                )
    blocks = (
        source.exit_blocks if folder is None else read_exit_blocks(folder, spec, source.weight_of)
    )
    take = int4.take if int4 is not None and _uses_int4(packing) else None
    return replace(
        source,
        packing=packing,
        int4=take,
        exit_blocks=blocks,
        info=info,
        notes=source.notes + blocks.notes,
    )


def _uses_int4(packing: PackingConfig) -> bool:
    return "int4" in (packing.quantize, packing.draft_head, *packing.draft_weights)


def _faster_copy(profile: DraftProfile) -> Quantization:
    """The copy with the most tokens per second, by a sweep's measurements, else by _COPIES."""

    def rate(kind: Quantization) -> float:
        accepted = profile.acceptance.get(kind, _COPIES[kind][0])
        step = _COPIES[kind][1]
        if profile.passes and kind in profile.drafts:
            step = profile.drafts[kind] / profile.passes[0]
        return max(
            sum(accepted**place for place in range(n + 1)) / (n * step + _VERIFICATION)
            for n in range(1, 9)
        )

    return max(_COPIES, key=rate)


def _backend(source: Source, path: str) -> tuple[Backend, tuple[str, ...]]:
    """The fastest repacked backend on this machine, and notes for the user."""
    spec = source.spec
    how = (source.spec, source.dtype, source.device, source.packing)
    note = kernel_note() if suits_kernels(*how) else None
    given = (
        source.take(),
        source.packing,
        token_order(path, spec.vocab),
        source.int4,
        source.exit_blocks,
    )
    backend: Backend
    if can_run_native(*how):
        backend = NativeBackend(spec, *given, stored=source.stored, through=source.kept.through)
    else:
        backend = TorchBackend(spec, *given, stored=source.stored)
    return backend, source.notes if note is None else (note, *source.notes)


def _mapped(
    name: str,
    folder: str,
    info: CheckpointInfo,
    device: torch.device,
    dtype: str,
    packing: PackingConfig,
) -> Decoder:
    """Loads a model that `layerskip export --format packed` wrote, on the CPU."""
    if device.type != "cpu":
        raise ConfigError(
            f"`device` must be cpu for a model that was packed for the compiled kernels, got {device}"
        )
    file = PackedFile(folder)
    spec = lean_spec(folder) or ModelSpec.of(open_model(Location(folder)).config)
    packing = file.content.packing(packing, dtype)
    if not can_run_native(spec, file.dtype, device, packing):
        raise CheckpointError(
            f"it was packed for the compiled kernels, which cannot run it here: {why_no_kernels()}"
        )
    if file.is_widened and (compiled := kernels()) is not None and not compiled.widens_bf16:
        raise CheckpointError(
            f"it was packed in fp32 for kernels that widen bf16, which {compiled.variant} does not: export it again"
        )
    order = token_order(folder, spec.vocab)
    blocks = with_drafters(file.exit_blocks, folder, spec)
    backend = NativeBackend(
        spec, file.unpacked, packing, order, None, blocks, file.embedding(spec), pack=file.matrix
    )
    backend.implementation = named_int4(backend.implementation, file.content.calibrated)
    tokenizer = tokenizer_in(folder, spec.vocab)
    return decoder(
        name, backend, tokenizer, info, spec.config, generation_config(folder), *blocks.notes
    )


def _decoder(
    name: str, folder: str, source: Source, backend: Backend, notes: tuple[str, ...]
) -> Decoder:
    spec = source.spec
    kept = source.kept
    tokenizer = lean_tokenizer(folder)
    if tokenizer is not None:
        kept.save(None if lean_spec(folder) else spec)
    else:
        tokenizer = read_tokenizer(folder) if kept.tokenizer is None else kept.tokenizer
        kept.save(None if lean_spec(folder) else spec, tokenizer)
    checked_tokenizer(tokenizer, spec.vocab)
    return decoder(
        name, backend, tokenizer, source.info, spec.config, generation_config(folder), *notes
    )


def _repacked(
    trainable: Trainable, location: Location, packing: PackingConfig, memory: float
) -> Decoder:
    """The fastest decoder for a model that transformers has read. Repacking takes the weights out
    of `trainable`.
    """
    generic = decoder_of(trainable)
    spec = trainable.backend.spec
    folder = location.folder
    dtype = trainable.backend.dtype
    device = trainable.backend.device
    ships = is_adapter(location.path) or location.gguf_file is not None
    missing = missing_feature(spec)
    blocks = shipped_by(trainable.name, spec) if ships else NO_BLOCKS
    if missing is None or can_run_native(spec, dtype, device, packing):
        source = replace(_model_source(trainable, packing), info=generic.info, exit_blocks=blocks)
        source = _with_sidecars(source, folder, memory)
        backend, notes = _backend(source, location.path)
        return replace(generic, backend=backend, notes=notes, info=source.info)
    if packing.quantize or packing.draft_weights or packing.draft_vocab or packing.exact:
        raise ConfigError(
            f"low-bit, draft and exact weights need a model that can be repacked, got {spec.model_type} with {missing}"
        )
    if suits_kernels(spec, dtype, device, packing) and (note := kernel_note()):
        generic = replace(generic, notes=(note,))
    blocks = (
        blocks if folder is None else read_exit_blocks(folder, spec, trainable.model.get_parameter)
    )
    if blocks is NO_BLOCKS:
        return generic
    notes = (*generic.notes, *blocks.notes, *((_NO_KERNELS,) if blocks.assistant else ()))
    return replace(generic, backend=TransformersBackend(trainable.model, blocks), notes=notes)
