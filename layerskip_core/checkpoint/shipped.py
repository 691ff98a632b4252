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
from collections.abc import Callable, Container, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

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
    NO_BLOCKS,
    ExitBlock,
    ExitBlocks,
    MtpLayout,
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
from .locate import adapters_of, present

_INPUT = f"{MTP.prefix}input.weight"
# Copies of the model's embedding and head
_COPIED = r"^layers\.\d+\.(embed_tokens|shared_head\.head)\."
OTHERS = "other weights"  # of a drafter made for these, in place of its fingerprint
STALE = "its drafter (mtp) was made for other weights; `layerskip train-drafter --start-from shipped` trains it for these"
STALE_ASSISTANT = "its assistant (mtp) was made for other weights: fewer of its drafts may be right"
ASSISTANT_FILES = f"assistant/{CONFIG_FILE}", "assistant/model.safetensors"
_Size = Annotated[int, Meta(ge=1, le=1 << 20)]


class _Values(msgspec.Struct):
    text_config: dict[str, Any]
    backbone_hidden_size: _Size = 1536
    use_ordered_embeddings: bool = False
    num_centroids: _Size = 2048
    centroid_intermediate_top_k: _Size = 32


def read_exit_blocks(
    folder: str | Path, spec: AnySpec, weight_of: Callable[[str], Tensor]
) -> ExitBlocks:
    """A folder's exit blocks, read when taken, and its drafters. Raises CheckpointError if blocks
    are not this model's.
    """
    path = Path(folder) / EXIT_BLOCKS_FILE
    blocks = NO_BLOCKS
    if path.is_file():
        with sidecars.naming(path):
            file = sidecars.open_formed(path, sidecars.BLOCKS)
            found = blocks_named(file.entries, spec.layers)
            blocks = ExitBlocks(
                found, lambda name: file.read(name) if name in file.entries else None
            )
            sidecars.check_fingerprint(file, spec, weight_of)
            sidecars.check_entries(file.entries, blocks.shapes(spec), FLOATS)
    return with_drafters(blocks, folder, spec, weight_of)


def with_drafters(
    blocks: ExitBlocks,
    folder: str | Path,
    spec: AnySpec,
    weight_of: Callable[[str], Tensor] | None = None,
) -> ExitBlocks:
    """Adds the drafters of a folder to `blocks`. `weight_of`: for the model's fingerprint; None if
    it is packed.
    """

    def is_other(known: str | None) -> bool:
        return bool(known) and (
            known == OTHERS
            or (weight_of is not None and known != sidecars.fingerprint(spec, weight_of))
        )

    eagle3 = sidecars.eagle3_sidecar(folder, spec)
    found = _shipped_beside(folder, spec, is_other)
    if found is NO_BLOCKS and not eagle3:
        return blocks
    return replace(
        blocks, eagle3=eagle3, mtp=found.mtp, assistant=found.assistant, notes=found.notes
    )


def _shipped_beside(
    folder: str | Path, spec: AnySpec, is_other: Callable[[str | None], bool]
) -> ExitBlocks:
    """The drafters that a folder's model ships. `is_other`: whether a fingerprint is of other
    weights.
    """
    (mtp, notes), (assistant, why) = mtp_sidecar(folder, spec), assistant_beside(folder, spec)
    if mtp and is_other(mtp.model_fingerprint):
        mtp = replace(mtp, model_fingerprint=OTHERS)
        notes = (STALE,)
    if assistant and is_other(assistant.model_fingerprint):
        assistant = replace(assistant, model_fingerprint=OTHERS)
        why = (STALE_ASSISTANT,)
    notes = (*notes, *why)
    return (
        replace(NO_BLOCKS, mtp=mtp, assistant=assistant, notes=notes)
        if mtp or assistant or notes
        else NO_BLOCKS
    )


def mtp_sidecar(folder: str | Path, spec: AnySpec) -> tuple[ExitBlocks | None, tuple[str, ...]]:
    """The MTP block that a folder's checkpoint ships, read when taken; a note instead if its layout
    is unknown.
    """
    files = files_by_name(folder)
    if (own := Path(folder) / MTP_FILE).is_file():
        files |= dict.fromkeys((file := WeightFile(own)).entries, file)
    held = {layout: _names(layout, spec.layers, files) for layout in MTP_LAYOUTS}
    layout = next(
        (each for each in MTP_LAYOUTS if each.stored(_INPUT, spec.layers) in held[each]),
        MTP_LAYOUTS[0],
    )
    if not (found := held[layout]):
        return None, ()
    block = ExitBlock(0, layout.kind)
    shapes = {layout.stored(name, spec.layers): shape for name, shape in block.shapes(spec).items()}
    stored = {
        name: [
            [found.get(part, part) for part in each] for each in _parts(name, shapes[name], found)
        ]
        for name in shapes
    }
    weights = JoinedWeights(files, stored, shapes)
    others = {
        name: files[full].entries[full]
        for name, full in found.items()
        if full not in weights.joined
    }
    try:
        sidecars.check_entries(others | weights.entries, shapes, FLOATS)
    except ValueError as error:
        return None, (f"its drafter (mtp) is not used, because its layout is unknown: {error}",)

    def take(name: str) -> Tensor:
        return _turned(name, weights.read(layout.stored(name, spec.layers)), layout)

    model_fingerprint = files[found[layout.stored(_INPUT, spec.layers)]].metadata.get(
        sidecars.FINGERPRINT
    )
    return ExitBlocks((block,), take, layout=layout, model_fingerprint=model_fingerprint), ()


def _names(layout: MtpLayout, layers: int, names: Iterable[str]) -> dict[str, str]:
    """A drafter's names among `names`, by their part from the layout's root on; later names replace
    earlier ones.
    """
    begins = "|".join(re.escape(part.format(layers)) for part in (layout.root, f"{layout.norm}."))
    pattern = re.compile(rf"(?:^|\.)((?:{begins}).*)")
    found = {match[1]: name for name in names if (match := pattern.search(name)) is not None}
    return {name: full for name, full in found.items() if not re.search(_COPIED, name)}


def _parts(name: str, shape: tuple[int, ...], found: Container[str]) -> list[list[str]]:
    """A weight's tensors in a checkpoint: one, or one or two for each expert."""
    prefix, experts, kind = name.partition(".experts.")
    if name in found or not experts:
        return [[name]]
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    return [
        [f"{prefix}.experts.{expert}.{part}.weight" for part in parts] for expert in range(shape[0])
    ]


def _turned(name: str, weight: Tensor, layout: MtpLayout) -> Tensor:
    """Swaps the two inputs of MTP's input matrix where the layout's order is not ours; returns
    other weights unchanged.
    """
    return (
        weight.roll(weight.shape[-1] // 2, -1) if layout.state_first and name == _INPUT else weight
    )


def mtp_content(spec: AnySpec, mtp: ExitBlocks, weight_of: Callable[[str], Tensor]) -> bytes:
    """The bytes of mtp.safetensors, by the checkpoint's names. `weight_of`: for the fingerprint, if
    `mtp` has none.
    """
    weights = mtp.weights(spec)
    layout = mtp.layout
    known = mtp.model_fingerprint or sidecars.fingerprint(spec, weight_of)
    names = [
        name
        for name in weights.shapes
        if not (layout.shares_norm and name.startswith(f"{MTP.prefix}norm."))
    ]
    content = {
        layout.prefix + layout.stored(name, spec.layers): _turned(name, weights.of(name), layout)
        for name in names
    }
    return sidecars.content_of(content, known, {"format": "pt"})


def shipped_files(name: str, loaded: Trainable) -> dict[str, bytes]:
    """The files of the drafters that a model ships, to be saved with its weights, also after
    training.
    """
    spec = loaded.backend.spec
    return files_of_shipped(shipped_by(name, spec), spec, loaded.model.get_parameter)


def files_of_shipped(
    blocks: ExitBlocks, spec: AnySpec, weight_of: Callable[[str], Tensor]
) -> dict[str, bytes]:
    files = {} if blocks.mtp is None else {MTP_FILE: mtp_content(spec, blocks.mtp, weight_of)}
    if (assistant := blocks.assistant) is not None:
        files |= assistant_content(
            assistant, assistant.model_fingerprint or sidecars.fingerprint(spec, weight_of)
        )
    return files


def shipped_by(name: str, spec: AnySpec) -> ExitBlocks:
    """The drafters that a checkpoint ships; of an adapter those of its base, marked as made for
    other weights.
    """
    adapters, base = adapters_of(name)
    location = present(base)
    if location.folder is not None:
        return _shipped_beside(location.folder, spec, lambda known: bool(adapters))
    mtp = (
        None
        if location.gguf_file is None
        else GgufFile(Path(location.path) / location.gguf_file).drafter
    )
    if mtp is None:
        return NO_BLOCKS
    changed = replace(mtp, model_fingerprint=OTHERS) if adapters else mtp
    return replace(NO_BLOCKS, mtp=changed, notes=(STALE,) if adapters else ())


def is_assistant(folder: str | Path) -> bool:
    return read_settings(folder, CONFIG_FILE).get("model_type") == "gemma4_assistant"


def assistant_beside(folder: str | Path, spec: AnySpec) -> tuple[Assistant | None, tuple[str, ...]]:
    """The assistant of a model's folder; a note instead if it cannot be used."""
    try:
        for path in (Path(folder) / "assistant", Path(f"{Path(folder)}-assistant")):
            if isinstance(spec, ModelSpec) and is_assistant(path):
                return read_assistant(path, spec), ()
    except CheckpointError as error:
        return None, (str(error),)
    return None, ()


def read_assistant(folder: str | Path, target: ModelSpec) -> Assistant:
    """The assistant in a folder, read when taken. Raises CheckpointError if it is not one for this
    model.
    """
    with sidecars.naming(f"the assistant {folder}", "give that of this model"):
        settings = read_json(Path(folder) / CONFIG_FILE, CheckpointError)
        values = msgspec.convert(settings, _Values)
        if not is_complete(text := values.text_config):
            from transformers import AutoConfig

            with quiet_transformers():
                text = AutoConfig.for_model(**text).to_dict()
        files = files_by_name(folder)
        spec = replace(_beside(text, target), tied="lm_head.weight" not in files)
        hidden = values.backbone_hidden_size
        clusters = values.num_centroids * values.use_ordered_embeddings
        require(hidden == target.hidden, "backbone_hidden_size", str(target.hidden), hidden)
        chosen = values.centroid_intermediate_top_k
        settings = settings | {"text_config": text}
        made = Assistant(
            spec, hidden, clusters, chosen, settings, lambda name: files[name].read(name)
        )
        sidecars.check_entries(
            {name: files[name].entries[name] for name in made.shapes if name in files},
            made.shapes,
            FLOATS,
        )
        if clusters:
            require(
                spec.vocab % clusters == 0 and chosen <= clusters,
                "num_centroids",
                "a divisor of vocab_size",
                clusters,
            )
            ids = made.take(ORDER).long().sort().values if ORDER in files else None
            require(
                ids is not None and torch.equal(ids, torch.arange(spec.vocab)),
                ORDER,
                f"ids below {spec.vocab}",
                "others",
            )
        return replace(made, model_fingerprint=files[INPUT].metadata.get(sidecars.FINGERPRINT))


def _beside(text: dict[str, Any], target: ModelSpec) -> ModelSpec:
    """The spec of an assistant, on KV entries of `target`. Raises ConfigError for a value that does
    not fit.
    """
    # An assistant's L and 0 would be refused
    unread = {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": None}
    spec = ModelSpec.of(SimpleNamespace(**text | unread))
    sources = {target.kinds[layer]: layer for layer in target.attending}
    require(
        {*spec.kinds} <= sources.keys(), "layer_types", f"among {', '.join(sources)}", spec.kinds
    )
    sizes = [
        LayerSizes(size.head_dim, spec.inner, sources[kind])
        for size, kind in zip(spec.sizes, spec.kinds, strict=True)
    ]
    needed = [target.of_layer(sources[kind]).head_dim for kind in spec.kinds]
    require(
        [size.head_dim for size in sizes] == needed, "head_dim", f"{needed}, as the model's", sizes
    )
    heads = target.kv_heads
    require(
        spec.heads % heads == 0,
        "num_attention_heads",
        f"a multiple of the model's key heads, {heads}",
        spec.heads,
    )
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
    names = (*assistant.shapes, *([ORDER] if assistant.clusters else []))
    text = json.dumps(assistant.settings, indent=2) + "\n"
    weights = sidecars.content_of(
        {name: assistant.take(name) for name in names}, model_fingerprint, {"format": "pt"}
    )
    return dict(zip(ASSISTANT_FILES, (text.encode(), weights), strict=True))
