"""The assistant beside a Gemma 4 model: the folder `assistant` in the model's own, where `import --drafter` puts
it, or the folder NAME-assistant beside NAME.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta

from ..errors import CheckpointError, require
from ..files import read_json
from ..model.architectures import is_complete
from ..model.assistant import INPUT, ORDER, Assistant
from ..model.configuration import LayerSizes
from ..model.spec import AnySpec, ModelSpec
from .folder import CONFIG_FILE, FLOATS, WeightFile, quiet_transformers, read_settings, weight_files
from .sidecars import FINGERPRINT, check_entries, content_of, naming

ASSISTANT_FILES = f"assistant/{CONFIG_FILE}", "assistant/model.safetensors"
_Size = Annotated[int, Meta(ge=1, le=1 << 20)]


class _Values(msgspec.Struct):
    text_config: dict[str, Any]
    backbone_hidden_size: _Size = 1536
    use_ordered_embeddings: bool = False
    num_centroids: _Size = 2048
    centroid_intermediate_top_k: _Size = 32


def is_assistant(folder: str | Path) -> bool:
    return read_settings(folder, CONFIG_FILE).get("model_type") == "gemma4_assistant"


def assistant_beside(folder: str | Path, spec: AnySpec) -> tuple[Assistant | None, tuple[str, ...]]:
    """That of a model's folder; a note if there is one that cannot be used."""
    try:
        for path in (Path(folder) / "assistant", Path(f"{Path(folder)}-assistant")):
            if isinstance(spec, ModelSpec) and is_assistant(path):
                return read_assistant(path, spec), ()
    except CheckpointError as error:
        return None, (str(error),)
    return None, ()


def read_assistant(folder: str | Path, target: ModelSpec) -> Assistant:
    """The assistant in a folder, read when taken. Raises CheckpointError if it is not one for this model."""
    with naming(f"the assistant {folder}", "give that of this model"):
        settings = read_json(Path(folder) / CONFIG_FILE, CheckpointError)
        values = msgspec.convert(settings, _Values)
        if not is_complete(text := values.text_config):
            from transformers import AutoConfig

            with quiet_transformers():
                text = AutoConfig.for_model(**text).to_dict()
        files = {name: file for file in map(WeightFile, weight_files(folder)) for name in file.entries}
        spec = replace(_beside(text, target), tied="lm_head.weight" not in files)
        hidden, clusters = values.backbone_hidden_size, values.num_centroids * values.use_ordered_embeddings
        require(hidden == target.hidden, "backbone_hidden_size", str(target.hidden), hidden)
        chosen, settings = values.centroid_intermediate_top_k, settings | {"text_config": text}
        made = Assistant(spec, hidden, clusters, chosen, settings, lambda name: files[name].read(name))
        check_entries({name: files[name].entries[name] for name in made.shapes if name in files}, made.shapes, FLOATS)
        if clusters:
            require(spec.vocab % clusters == 0 and chosen <= clusters, "num_centroids", "a divisor of vocab_size", clusters)
            ids = made.take(ORDER).long().sort().values if ORDER in files else None
            require(ids is not None and torch.equal(ids, torch.arange(spec.vocab)), ORDER, f"ids below {spec.vocab}", "others")
        return replace(made, model_fingerprint=files[INPUT].metadata.get(FINGERPRINT))


def _beside(text: dict[str, Any], target: ModelSpec) -> ModelSpec:
    """The spec of an assistant beside its model. Raises ConfigError for a value that does not fit."""
    unread = {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": None}  # of an assistant all of them, and 0
    spec = ModelSpec.of(SimpleNamespace(**text | unread))
    sources = {target.kinds[layer]: layer for layer in target.attending}
    require({*spec.kinds} <= sources.keys(), "layer_types", f"among {', '.join(sources)}", spec.kinds)
    sizes = [LayerSizes(size.head_dim, spec.inner, sources[kind]) for size, kind in zip(spec.sizes, spec.kinds, strict=True)]
    needed = [target.of_layer(sources[kind]).head_dim for kind in spec.kinds]
    require([size.head_dim for size in sizes] == needed, "head_dim", f"{needed}, as the model's", sizes)
    heads = target.kv_heads
    require(spec.heads % heads == 0, "num_attention_heads", f"a multiple of the model's key heads, {heads}", spec.heads)
    require(spec.vocab == target.vocab, "vocab_size", str(target.vocab), spec.vocab)
    return replace(spec, kv_heads=heads, sizes=tuple(sizes))


def assistant_content(assistant: Assistant, model_fingerprint: str) -> dict[str, bytes]:
    """The files of its folder in a model's. `model_fingerprint`: of the model that it was made for."""
    names, text = (*assistant.shapes, *([ORDER] if assistant.clusters else [])), json.dumps(assistant.settings, indent=2) + "\n"
    weights = content_of({name: assistant.take(name) for name in names}, model_fingerprint, {"format": "pt"})
    return dict(zip(ASSISTANT_FILES, (text.encode(), weights), strict=True))
