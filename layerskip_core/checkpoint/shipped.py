"""Reads exit blocks and drafters beside a model, and the drafters that it ships (MTP, Gemma 4's
assistant).

MTP is found by the names of its tensors (MTP_LAYOUTS) in any of the model's safetensors files.
mtp.safetensors, with a copied or further trained MTP block, takes precedence. Its header has the
fingerprint of the model that it was made for; it drafts for other weights too, with a note to the
user.

An assistant is in the folder `assistant` in the model's own, where `import --drafter` puts it, or
in the folder NAME-assistant beside NAME.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, TypeAlias

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from ..errors import CheckpointError, require
from ..files import read_json
from ..model.architectures import is_complete
from ..model.assistant import INPUT, ORDER, Assistant
from ..model.configuration import LayerSizes
from ..model.exit_blocks import (
    MTP,
    MTP_LAYOUTS,
    NO_STORED_DRAFTERS,
    MtpLayout,
    StoredDrafters,
    blocks_named,
)
from ..model.spec import AnySpec, ModelSpec
from . import sidecars
from .folder import (
    CONFIG_FILE,
    EXIT_BLOCKS_FILE,
    FLOATS,
    MTP_FILE,
    JoinedWeights,
    WeightFile,
    files_by_name,
    quiet_transformers,
    read_settings,
)
from .gguf_read import GgufFile
from .loaded import Trainable
from .locate import ModelRef, adapters_of

_INPUT = f"{MTP.prefix}input.weight"
# Copies of the model's embedding and head
_COPIED = r"^layers\.\d+\.(embed_tokens|shared_head\.head)\."
OTHERS = "other weights"  # of a drafter made for these, in place of its fingerprint
STALE = "its drafter (mtp) was made for other weights; `layerskip train-drafter --start-from shipped` trains it for these"
STALE_ASSISTANT = "its assistant (mtp) was made for other weights: fewer of its drafts may be right"
ASSISTANT_FILES = f"assistant/{CONFIG_FILE}", "assistant/model.safetensors"
_Size = Annotated[int, Meta(ge=1, le=1 << 20)]
_Drafter: TypeAlias = StoredDrafters | Assistant


class _Values(msgspec.Struct):
    text_config: dict[str, Any]
    backbone_hidden_size: _Size = 1536
    use_ordered_embeddings: bool = False
    num_centroids: _Size = 2048
    centroid_intermediate_top_k: _Size = 32


def read_stored_drafters(
    folder: str | Path, spec: AnySpec, model_fingerprint: Callable[[], str]
) -> StoredDrafters:
    """A folder's exit blocks, read when taken, and its drafters. Raises CheckpointError if blocks
    are not this model's.
    """
    path = Path(folder) / EXIT_BLOCKS_FILE
    blocks = NO_STORED_DRAFTERS
    if path.is_file():
        with sidecars.naming(path):
            file = sidecars.open_formed(path, sidecars.BLOCKS)
            found = blocks_named(file.entries, spec.layers)
            blocks = StoredDrafters(found, file.read)
            sidecars.check_fingerprint(file, model_fingerprint())
            sidecars.check_entries(file.entries, blocks.shapes(spec), FLOATS)
    return with_drafters(blocks, folder, spec, model_fingerprint)


def with_drafters(
    blocks: StoredDrafters,
    folder: str | Path,
    spec: AnySpec,
    model_fingerprint: Callable[[], str] | None = None,
) -> StoredDrafters:
    """Adds the drafters of a folder to `blocks`. `model_fingerprint`: None if the model is
    packed.
    """

    def is_other(made_for: str | None) -> bool:
        if made_for is None or model_fingerprint is None:
            return False
        return made_for != model_fingerprint()

    eagle3 = sidecars.eagle3_sidecar(folder, spec)
    shipped = _shipped_beside(folder, spec, is_other)
    if shipped is NO_STORED_DRAFTERS and eagle3 is None:
        return blocks
    return replace(
        blocks,
        eagle3=eagle3,
        mtp=shipped.mtp,
        assistant=shipped.assistant,
        notes=shipped.notes,
    )


def _shipped_beside(
    folder: str | Path, spec: AnySpec, is_other: Callable[[str | None], bool]
) -> StoredDrafters:
    """The drafters that a folder's model ships, and notes on those that do not fit. `is_other`:
    whether a fingerprint (None: the file has none) is of other weights.
    """
    notes = list[str]()

    def checked(read: Callable[[str | Path, AnySpec], _Drafter | None], stale: str) -> Any:
        """A drafter; None, with a note, if it cannot be used."""
        try:
            drafter = read(folder, spec)
        except CheckpointError as error:
            notes.append(str(error))
            return None
        if drafter is None:
            return None
        made_for = drafter.model_fingerprint
        if made_for != OTHERS and not is_other(made_for):
            return drafter
        notes.append(stale)
        return replace(drafter, model_fingerprint=OTHERS)

    mtp = checked(read_mtp, STALE)
    assistant = checked(_assistant_beside, STALE_ASSISTANT)
    if mtp is None and assistant is None and not notes:
        return NO_STORED_DRAFTERS
    return replace(NO_STORED_DRAFTERS, mtp=mtp, assistant=assistant, notes=tuple(notes))


def read_mtp(folder: str | Path, spec: AnySpec) -> StoredDrafters | None:
    """The MTP block that a folder's checkpoint ships, read when taken; None if there is none.
    Raises CheckpointError for an unknown layout.
    """
    files = files_by_name(folder)
    if (own := Path(folder) / MTP_FILE).is_file():
        file = WeightFile(own)
        files |= dict.fromkeys(file.entries, file)
    for layout in MTP_LAYOUTS:
        found = _names(layout, spec.layers, files)
        if layout.stored(_INPUT, spec.layers) in found:
            break
    else:
        layout = MTP_LAYOUTS[0]
        found = _names(layout, spec.layers, files)
    if not found:
        return None

    def stored(name: str) -> str:
        return layout.stored(name, spec.layers)

    shapes = {stored(name): shape for name, shape in MTP.shapes(spec).items()}
    parts_of = {}
    for name, shape in shapes.items():
        parts_of[name] = _parts(name, shape, found)
    weights = JoinedWeights(files, parts_of, shapes)
    unknown = {
        name: files[full].entries[full]
        for name, full in found.items()
        if full not in weights.joined
    }
    try:
        sidecars.check_entries(unknown | weights.entries, shapes, FLOATS)
    except ValueError as error:
        raise CheckpointError(
            f"its drafter (mtp) is not used, because its layout is unknown: {error}"
        ) from None

    def take(name: str) -> Tensor:
        return _turned(name, weights.read(stored(name)), layout)

    made_for = files[found[stored(_INPUT)]].metadata.get(sidecars.FINGERPRINT)
    return StoredDrafters((MTP,), take, layout=layout, model_fingerprint=made_for)


def _names(layout: MtpLayout, layers: int, names: Iterable[str]) -> dict[str, str]:
    """A drafter's names among `names`, by their part from the layout's root on; later names replace
    earlier ones.
    """
    pattern = re.compile(rf"(?:^|\.)({re.escape(layout.root.format(layers))}.*)")
    found = {}
    for name in names:
        match = pattern.search(name)
        if match is not None and not re.search(_COPIED, match[1]):
            found[match[1]] = name
    return found


def _parts(name: str, shape: tuple[int, ...], found: Mapping[str, str]) -> list[list[str]]:
    """The tensors of a weight in a checkpoint, by their full names: one, or one or two for each
    expert.
    """
    prefix, experts, kind = name.partition(".experts.")
    if name in found or not experts:
        return [[found.get(name, name)]]
    projections = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    parts = []
    for expert in range(shape[0]):
        own = [f"{prefix}.experts.{expert}.{projection}.weight" for projection in projections]
        parts.append([found.get(part, part) for part in own])
    return parts


def _turned(name: str, weight: Tensor, layout: MtpLayout) -> Tensor:
    """Swaps the two inputs of MTP's input matrix where the layout's order is not ours; returns
    other weights unchanged.
    """
    if layout.state_first and name == _INPUT:
        return weight.roll(weight.shape[-1] // 2, -1)
    return weight


def mtp_content(spec: AnySpec, mtp: StoredDrafters, model_fingerprint: Callable[[], str]) -> bytes:
    """The bytes of mtp.safetensors, by the checkpoint's names. `model_fingerprint`: used if `mtp`
    has none.
    """
    weights = mtp.weights(spec)
    layout = mtp.layout
    content = {}
    for name in weights.shapes:
        stored = layout.prefix + layout.stored(name, spec.layers)
        content[stored] = _turned(name, weights.of(name), layout)
    made_for = mtp.model_fingerprint or model_fingerprint()
    return sidecars.content_of(content, made_for, {"format": "pt"})


def files_of_shipped(
    blocks: StoredDrafters, spec: AnySpec, model_fingerprint: Callable[[], str]
) -> dict[str, bytes]:
    """The files of the drafters that a model ships, to be saved with its weights."""
    files = {}
    if blocks.mtp is not None:
        files[MTP_FILE] = mtp_content(spec, blocks.mtp, model_fingerprint)
    if blocks.assistant is not None:
        made_for = blocks.assistant.model_fingerprint or model_fingerprint()
        files |= assistant_content(blocks.assistant, made_for)
    return files


def shipped_by(name: str, spec: AnySpec) -> StoredDrafters:
    """The drafters that a checkpoint ships; of an adapter those of its base, marked as made for
    other weights.
    """
    adapters, base = adapters_of(name)
    model = ModelRef.of(base).fetched()
    if model.folder is not None:
        return _shipped_beside(model.folder, spec, lambda made_for: bool(adapters))
    mtp = GgufFile(model.gguf).drafter if model.gguf is not None else None
    if mtp is None:
        return NO_STORED_DRAFTERS
    if adapters:
        stale = replace(mtp, model_fingerprint=OTHERS)
        return replace(NO_STORED_DRAFTERS, mtp=stale, notes=(STALE,))
    return replace(NO_STORED_DRAFTERS, mtp=mtp)


def is_assistant(folder: str | Path) -> bool:
    return read_settings(folder, CONFIG_FILE).get("model_type") == "gemma4_assistant"


def _assistant_beside(folder: str | Path, spec: AnySpec) -> Assistant | None:
    """The assistant of a model's folder. Raises CheckpointError if it cannot be used."""
    for path in (Path(folder) / "assistant", Path(f"{Path(folder)}-assistant")):
        if isinstance(spec, ModelSpec) and is_assistant(path):
            return read_assistant(path, spec)
    return None


def read_assistant(folder: str | Path, target: ModelSpec) -> Assistant:
    """The assistant in a folder, read when taken. Raises CheckpointError if it is not one for this
    model.
    """
    with sidecars.naming(f"the assistant {folder}", "give that of this model"):
        settings = read_json(Path(folder) / CONFIG_FILE, CheckpointError)
        values = msgspec.convert(settings, _Values)
        text = values.text_config
        if not is_complete(text):
            from transformers import AutoConfig

            with quiet_transformers():
                text = AutoConfig.for_model(**text).to_dict()
        files = files_by_name(folder)
        spec = replace(_beside(text, target), tied="lm_head.weight" not in files)
        hidden = values.backbone_hidden_size
        require(hidden == target.hidden, "backbone_hidden_size", str(target.hidden), hidden)
        clusters = values.num_centroids if values.use_ordered_embeddings else 0
        chosen = values.centroid_intermediate_top_k
        settings = settings | {"text_config": text}
        made = Assistant(
            spec, hidden, clusters, chosen, settings, lambda name: files[name].read(name)
        )
        entries = {name: files[name].entries[name] for name in made.shapes if name in files}
        sidecars.check_entries(entries, made.shapes, FLOATS)
        if clusters:
            fits = spec.vocab % clusters == 0 and chosen <= clusters
            require(fits, "num_centroids", "a divisor of vocab_size", clusters)
            ids = made.take(ORDER).long().sort().values
            is_order = torch.equal(ids, torch.arange(spec.vocab))
            require(is_order, ORDER, f"ids below {spec.vocab}", "others")
        return replace(made, model_fingerprint=files[INPUT].metadata.get(sidecars.FINGERPRINT))


def _beside(text: dict[str, Any], target: ModelSpec) -> ModelSpec:
    """The spec of an assistant, on KV entries of `target`. Raises ConfigError for a value that does
    not fit.
    """
    # An assistant's L and 0 would be refused
    unread = {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": None}
    spec = ModelSpec.of(SimpleNamespace(**text | unread))
    # Each kind of layer reads the KV entries of the target's last layer of that kind
    sources = {target.kinds[layer]: layer for layer in target.attending}
    known = {*spec.kinds} <= sources.keys()
    require(known, "layer_types", f"among {', '.join(sources)}", spec.kinds)
    sizes = []
    for size, kind in zip(spec.sizes, spec.kinds, strict=True):
        needed = target.of_layer(sources[kind]).head_dim
        require(size.head_dim == needed, "head_dim", f"{needed}, as the model's", size.head_dim)
        sizes.append(LayerSizes(size.head_dim, spec.inner, sources[kind]))
    heads = target.kv_heads
    needed_heads = f"a multiple of the model's key heads, {heads}"
    require(spec.heads % heads == 0, "num_attention_heads", needed_heads, spec.heads)
    require(spec.vocab == target.vocab, "vocab_size", str(target.vocab), spec.vocab)
    return replace(spec, kv_heads=heads, sizes=tuple(sizes))


def drafter_files(folder: str, loaded: Trainable, verifier: str) -> dict[str, bytes]:
    """A model's files for the drafter in a folder, in the EAGLE-3 layout or an assistant. Raises
    CheckpointError.

    `verifier`: the model's folder.
    """
    spec = loaded.backend.spec
    if is_assistant(folder):
        made_for = sidecars.fingerprint(spec, loaded.model.get_parameter)
        return assistant_content(read_assistant(folder, loaded.backend.own_spec), made_for)
    return sidecars.eagle3_content(sidecars.read_eagle3(folder, spec), spec, verifier)


def assistant_content(assistant: Assistant, model_fingerprint: str) -> dict[str, bytes]:
    """An assistant's files by their paths in a model's folder. `model_fingerprint`: of the model
    that it was made for.
    """
    config, weights = ASSISTANT_FILES
    names = list(assistant.shapes)
    if assistant.clusters:
        names.append(ORDER)
    tensors = {name: assistant.take(name) for name in names}
    return {
        config: (json.dumps(assistant.settings, indent=2) + "\n").encode(),
        weights: sidecars.content_of(tensors, model_fingerprint, {"format": "pt"}),
    }
