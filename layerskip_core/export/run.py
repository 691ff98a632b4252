"""`layerskip export`: an exit as a model of its own (first layers, exit block, norm, head), and how
engines draft with it.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import torch
from torch import Tensor

from ..checkpoint.folder import (
    EXIT_BLOCKS_FILE,
    GENERATION_FILE,
    INT4_FILE,
    PACKED_FILE,
    quiet_transformers,
)
from ..checkpoint.info import CheckpointInfo
from ..checkpoint.loaded import Trainable, decoder_of
from ..checkpoint.locate import EMBEDDED, ModelRef, reading
from ..checkpoint.open import for_training, plan_packing
from ..checkpoint.packed_file import Content, PackedWriter, unpacked_names
from ..checkpoint.plan import LoadPlan
from ..checkpoint.save import refuse_overwrite, save_checkpoint, save_files
from ..checkpoint.shipped import files_of_shipped, read_stored_drafters
from ..checkpoint.sidecars import EAGLE3_FILES, EAGLE3_FOLDER, PROPOSED
from ..checkpoint.transformers_read import open_model, written_dtype
from ..config.model import Engine, ExportConfig, PackingConfig, Quantization
from ..config.resolution import require_exit_layer
from ..errors import CheckpointError, ConfigError, first_line, plural, require
from ..files import new_staging, synchronise
from ..model import NativeBackend, TransformersBackend
from ..model.backend import states_at_exits
from ..model.eagle3 import Eagle3Weights
from ..model.exit_blocks import NO_STORED_DRAFTERS, StoredDrafters
from ..model.native import codes_weights
from ..model.native.compiled import kernels, why_no_kernels
from ..model.spec import ModelSpec
from ..model.transformers_backend import attention_for
from ..model.vocabulary import ORDER_FILE
from ..model.weights import Weights, named_int4
from .gguf import DRAFT, TARGET, refuse_gguf, write_eagle3, write_gguf

README = "README.md"
# Config.json's lists that are never by layer
_NOT_BY_LAYER = ("token_id", "architectures", "mlp_only_layers")
# Tokens of each of two texts, on which the written model's logits are compared with the exit's
_PROBE = 8
_TOLERANCE = 1e-3  # of the difference in fp32, relative to the logits' spread


@dataclass(frozen=True)
class Exported:
    """The written model."""

    exit_layer: int | None  # None: a drafter in the EAGLE-3 layout
    layers: int
    trained: bool
    readme: str | None  # if an engine was named
    lost: bool  # whether the checkpoint ships a drafter (mtp), which GGUF files leave out


def export(config: ExportConfig) -> Exported:
    """Writes an exit of a model to `output`, whose lock the caller holds: a transformers
    checkpoint, or GGUF with the model.

    In GGUF a drafter in the EAGLE-3 layout replaces the exit, if none is named. Raises
    CheckpointError if the model cannot be read or the folder written; ConfigError for a folder with
    another model or README.md, and for an invalid exit.
    """
    _refuse_own_folder(config)
    if config.as_gguf:
        refuse_gguf(config.output, config.overwrite, README)
    else:
        refuse_overwrite(config.output, config.overwrite, (README,) if config.engine else ())
    loaded = for_training(config.model, "cpu", "fp32")
    blocks = _stored_drafters(config, loaded)
    decoder = decoder_of(replace(loaded, backend=TransformersBackend(loaded.model, blocks)))
    recommended = decoder.recommended()
    layers = loaded.backend.num_layers
    exit_layer = recommended.exit_layer if config.exit_layer is None else config.exit_layer
    require_exit_layer(exit_layer, layers, may_be_last=config.engine is None)
    drafter = blocks.eagle3 if config.as_gguf and config.exit_layer is None else None
    lost = config.as_gguf and blocks.mtp is not None
    files = dict[str, bytes]()
    if exit_layer == layers and not config.as_gguf:
        files |= files_of_shipped(blocks, loaded.backend.spec, loaded.fingerprint)
    readme = None
    if config.engine is not None:
        if drafter is None:
            why = "recommended with the model, or the usual number"
            readme = _readme(config, exit_layer, layers, recommended.num_draft_tokens, why)
        else:
            why = "the number that the drafter's folder tells vLLM"
            readme = _readme(config, None, layers, PROPOSED, why)
        files[README] = readme.encode()
    if config.as_gguf:
        _write_pair(loaded, exit_layer, blocks, drafter, config, files)
    else:
        _write_checkpoint(loaded, exit_layer, blocks, config, files)
    if drafter is not None:
        return Exported(None, 1, True, readme, lost)
    has_block = any(block.exit_layer == exit_layer for block in blocks.blocks)
    is_trained = exit_layer == layers or exit_layer in recommended.exits
    return Exported(exit_layer, exit_layer + has_block, is_trained, readme, lost)


def _stored_drafters(config: ExportConfig, loaded: Trainable) -> StoredDrafters:
    """The model's exit blocks and drafters. Raises ConfigError if vLLM reads its drafter as it is,
    unless an exit is named.
    """
    folder = ModelRef.of(loaded.name).fetched().sidecar_folder
    if folder is None:
        return NO_STORED_DRAFTERS
    with reading(loaded.name):
        blocks = read_stored_drafters(folder, loaded.backend.spec, loaded.fingerprint)
    # The exits of such a model are seldom trained
    if config.engine == "vllm" and blocks.eagle3 is not None:
        way = f"`vllm serve {quote(f'{folder}/{EAGLE3_FOLDER}')}`"
        needed = f"given: this model has a drafter that vLLM reads as it is, by {way}"
        require(config.exit_layer is not None, "exit_layer", needed, "none")
    return blocks


def _write_checkpoint(
    loaded: Trainable,
    exit_layer: int,
    blocks: StoredDrafters,
    config: ExportConfig,
    files: Mapping[str, bytes],
) -> None:
    """Writes the exit, to which `loaded` is cut, and `files` as a transformers checkpoint."""
    info = CheckpointInfo(
        loaded.info.prompt_template,
        details={"exported_from": config.model, "exported_exit": exit_layer},
        system=loaded.info.system,
    )
    dtype = written_dtype(loaded, config.dtype)
    draft = cut_to_exit(loaded, exit_layer, blocks)
    save_checkpoint(draft, loaded.tokenizer, info, config.output, dtype, files)


def export_packed(config: ExportConfig) -> tuple[str, int]:
    """As `export`, for all layers, packed for the compiled kernels. Returns the precisions in
    words, and the file's bytes.
    """
    _refuse_own_folder(config)
    folder = ModelRef.of(config.model).whole_folder()
    refuse_overwrite(config.output, config.overwrite)
    asked = PackingConfig(quantize=config.quantize, adaptive=True)
    if kernels() is None:
        raise ConfigError(
            f"`format` packed needs the compiled kernels: {why_no_kernels()}", "format"
        )
    plan = plan_packing(folder, config.dtype, asked)
    if plan.backend != "native":
        raise CheckpointError(
            f"{config.model} cannot be packed: the compiled kernels do not run its architecture or its widths"
        )
    info = replace(plan.info, details={**plan.info.details, "packed_from": config.model})
    written: list[str] = []

    @quiet_transformers()
    def write(staging: Path) -> None:
        files = open_model(ModelRef.of(folder))
        # As transformers writes it, so that loading needs no transformers
        files.config.save_pretrained(staging)
        files.tokenizer().save_pretrained(staging)
        for name in (GENERATION_FILE, ORDER_FILE, *EAGLE3_FILES):
            if Path(folder, name).is_file():
                (staging / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(Path(folder, name), staging / name)
        written.append(_write_weights(plan, staging / PACKED_FILE))

    source = plan.source
    shipped = files_of_shipped(plan.stored_drafters, source.spec, source.fingerprint)
    save_files(write, info, config.output, shipped)
    return written[0], (Path(config.output) / PACKED_FILE).stat().st_size


def _refuse_own_folder(config: ExportConfig) -> None:
    """Raises ConfigError if the output would take the place of the model's own weights."""
    own = Path(config.output).resolve() == Path(config.model).resolve()
    require(not own, "output", "another folder than the model's", config.output)


def _write_weights(plan: LoadPlan, path: Path) -> str:
    """Packs the weights of a plan. Heads are packed whole: `draft_vocab` selects rows at load.
    Returns the precisions in words.
    """
    packing = replace(plan.packing, draft_vocab=0)
    copies = packing.draft_weights
    spec = plan.source.own_spec
    calibrated = plan.int4 is not None
    # The drafters' files are copied as they are
    blocks = replace(plan.stored_drafters, eagle3=None, mtp=None, assistant=None)
    block_shapes = blocks.shapes(spec)
    head: Quantization | None = (packing.draft_head or "int8") if copies else None
    dtype: Literal["bf16", "fp32"] = "bf16" if plan.source.dtype == torch.bfloat16 else "fp32"
    compiled = kernels()
    assert compiled is not None
    most = 3 * (1 + len(copies)) * (len(spec.shapes) + len(block_shapes) + 1)
    with path.open("wb") as file, torch.inference_mode():
        writer = PackedWriter(file, compiled, most, codes_weights(compiled, spec))
        take = plan.source.take()
        weights = Weights(take, spec.shapes)
        embedding = weights.of(spec.embedding_name)
        writer.add(spec.embedding_name, embedding)
        # A backend that asks the writer for its matrices writes each of them
        NativeBackend(spec, take, packing, None, plan.int4, blocks, embedding, pack=writer.matrix)
        for name in unpacked_names(spec, spec.shapes):
            writer.add(name, weights.of(name))
        block_weights = blocks.weights(spec, torch.empty(0, dtype=plan.source.dtype))
        for name in unpacked_names(spec, block_shapes):
            writer.add(name, block_weights.of(name))
        writer.finish(Content(dtype, packing.quantize, copies, head, calibrated))
    described: str = packing.quantize or dtype
    if copies:
        described += f" with {' and '.join(copies)} for drafts"
    return named_int4(described, calibrated)


def _write_pair(
    loaded: Trainable,
    exit_layer: int,
    blocks: StoredDrafters,
    drafter: Eagle3Weights | None,
    config: ExportConfig,
    files: Mapping[str, bytes],
) -> None:
    """Writes `files`, target.gguf, and draft.gguf: the `drafter`, else the exit, to which `loaded`
    is cut.
    """
    folder = Path(config.output)
    kind = "f16" if config.dtype == "auto" else config.dtype
    spec = loaded.backend.own_spec
    try:
        staging = new_staging(folder)
        try:
            write_gguf(loaded.model, loaded.tokenizer, spec, staging / TARGET, kind)
            if drafter is not None:
                write_eagle3(drafter, loaded.tokenizer, spec, staging / DRAFT, kind)
            elif exit_layer < loaded.backend.num_layers:
                draft = cut_to_exit(loaded, exit_layer, blocks)
                draft_spec = ModelSpec.of(draft.config)
                write_gguf(draft, loaded.tokenizer, draft_spec, staging / DRAFT, kind)
            for name, content in files.items():
                (staging / name).write_bytes(content)
            written = sorted(staging.iterdir(), key=lambda path: path.name == DRAFT)
            for path in written:
                synchronise(path)
            # So that a killed process leaves no draft beside another's target
            (folder / DRAFT).unlink(missing_ok=True)
            for path in written:
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write the model to {config.output}: {error}") from error


@torch.no_grad()
def cut_to_exit(loaded: Trainable, exit_layer: int, blocks: StoredDrafters) -> Any:
    """Cuts `loaded` to an exit and its block, in place. Raises CheckpointError if the logits are
    not those of the exit.
    """
    model: Any = loaded.model
    backend = loaded.backend
    block = next((block for block in blocks.blocks if block.exit_layer == exit_layer), None)
    if block is not None:
        backend = TransformersBackend(model, StoredDrafters((block,), blocks.take))
    ids = torch.arange(2 * _PROBE, device=backend.device).view(2, _PROBE) % backend.spec.vocab
    places = backend.new_cache(*ids.shape).span(0, ids.shape[1])
    [(_, states, head)] = states_at_exits(backend, ids, places, [exit_layer])
    expected = head(states)
    layers = backend.layers
    kept = list(range(exit_layer))
    if block is not None:
        # The block's weights take the place of those of the layer that it was copied from
        originals = backend.block_originals()
        weights = blocks.weights(backend.spec, model.get_input_embeddings().weight)
        for index, layer in enumerate(layers):
            if layer is originals["layer"]:
                kept.append(index)
        for part, module in originals.items():
            for name, parameter in module.named_parameters():
                parameter.data = weights.of(f"{block.prefix}{part}.{name}")
    chosen = [layers[layer] for layer in kept]
    count = len(layers)
    del layers[len(kept) :]
    for place, layer in enumerate(chosen):
        layers[place] = layer
    try:
        written = _with_weights(cut_config(model.config, kept), model.state_dict(), count, kept)
        logits = written(input_ids=ids, use_cache=False).logits
        spread = (expected - expected.mean(-1, keepdim=True)).norm()
        if not (logits - expected).norm() <= _TOLERANCE * spread:  # also for NaN
            raise ValueError(
                f"a {model.config.model_type} with {len(kept)} layers has other logits"
            )
    except Exception as error:  # which differs by model type
        raise CheckpointError(
            f"exit {exit_layer} of {loaded.name} is no model of its own: {first_line(error)}"
        ) from error
    written.generation_config = model.generation_config
    return written


def _with_weights(
    config: Any, weights: Mapping[str, Tensor], layers: int, kept: Sequence[int]
) -> Any:
    """A model that shares `weights`. From a weight with parts for all `layers` layers it takes the
    `kept` ones.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention_for(config))
    fitting = {}
    for name, needed in model.state_dict().items():
        weight = weights[name]
        for dimension, size in enumerate(needed.shape):
            if weight.shape[dimension] != size:
                by_layer = torch.unflatten(weight, dimension, (layers, -1))
                chosen = by_layer.index_select(dimension, torch.tensor(kept))
                weight = chosen.flatten(dimension, dimension + 1)
        fitting[name] = weight
    model.load_state_dict(fitting, assign=True)
    model.tie_weights()
    return model.eval()


def cut_config(config: Any, kept: Sequence[int]) -> Any:
    """A configuration with the layers `kept` (ascending, from 0); lists and dictionaries by layer
    keep theirs.
    """
    # Parts of DBRX load from the latter
    values = config.to_dict() | config.to_diff_dict()
    layers = config.num_hidden_layers
    for name in ("num_layers", config.attribute_map.get("num_hidden_layers", "num_hidden_layers")):
        # Nemotron-H only lists its layers; LongCat-Flash counts two attentions in each
        if name in values:
            layers = values[name]
            values[name] = len(kept)
            break
    for name, value in values.items():
        if isinstance(value, list) and len(value) == layers and not name.endswith(_NOT_BY_LAYER):
            values[name] = [value[layer] for layer in kept]
        if isinstance(value, dict) and value and all(str(key).isdecimal() for key in value):
            by_layer = {int(key): of_layer for key, of_layer in value.items()}
            if max(by_layer) < layers:
                own = {}
                for place, layer in enumerate(kept):
                    if layer in by_layer:
                        own[str(place)] = by_layer[layer]
                values[name] = own
    # The layers from this one on have a sliding window
    if values.get("max_window_layers") is not None:
        values["max_window_layers"] = sum(layer < values["max_window_layers"] for layer in kept)
    # Further dense layers: all but every `step`-th
    dense = values.get("mlp_only_layers")
    if dense is not None:
        step = values["decoder_sparse_step"]
        values["mlp_only_layers"] = [
            place for place, layer in enumerate(kept) if layer in dense or (layer + 1) % step
        ]
        values["decoder_sparse_step"] = 1
    attending = getattr(config, "attn_layer_indices", None)  # Bamba's
    if attending:
        places = [place for place, layer in enumerate(kept) if layer in attending]
        values["attn_layer_indices"] = places
    # The last `shared` layers read KV entries of earlier ones
    shared = values.get("num_kv_shared_layers")
    if shared:
        values["num_kv_shared_layers"] = sum(layer >= layers - shared for layer in kept)
    return config.__class__.from_dict(values)


def _readme(
    config: ExportConfig, exit_layer: int | None, layers: int, drafts: int, why: str
) -> str:
    """How to decode with the engine. If it cannot load the model as it is, first how to write the
    model.
    """
    assert config.engine is not None
    output = Path(config.output).resolve()
    engine = config.engine
    draft = "The drafter" if exit_layer is None else f"Exit {exit_layer}"
    parts = [
        f"# {draft} of {config.model} as a draft model, with {engine}",
        f"{plural(drafts, 'draft token')}: {why}.",
    ]
    if config.as_gguf:
        method = "eagle3" if exit_layer is None else "simple"
        files = str(output / TARGET), str(output / DRAFT)
        return "\n\n".join([*parts, instructions(engine, *files, drafts, method)])
    model = config.model
    if model not in EMBEDDED and Path(model).exists():
        model = str(Path(model).resolve())
    target = f"{output}-target"
    reference = ModelRef.of(config.model).fetched()
    sidecars = [Path(reference.path) / file for file in (INT4_FILE, EXIT_BLOCKS_FILE)]
    has_sidecars = any(file.exists() for file in sidecars)
    if config.model in EMBEDDED or reference.is_adapter or reference.gguf or has_sidecars:
        parts.append("First the model itself, in a form that the engine loads:")
        parts.append(
            f"```sh\nlayerskip export {quote(model)} --exit {layers} --output {quote(target)}\n```"
        )
    else:
        target = model
    return "\n\n".join([*parts, instructions(engine, target, str(output), drafts)])


_VLLM = """vllm serve {target} \\
    --speculative-config {speculative}
# Or without copies of weights and cache, where layerskip is installed beside vLLM (pip install --no-deps):
vllm serve {target} --load-format layerskip \\
    --speculative-config {speculative}"""
_LLAMA_CPP = """llama-server -m {target} \\
    --spec-type draft-{method} -md {draft} --spec-draft-n-max {drafts}"""
_TRANSFORMERS = """from transformers import AutoModelForCausalLM, AutoTokenizer

target, draft = {target}, {draft}
tokenizer = AutoTokenizer.from_pretrained(target)
model = AutoModelForCausalLM.from_pretrained(target)
assistant = AutoModelForCausalLM.from_pretrained(draft)
assistant.generation_config.num_assistant_tokens = {drafts}
assistant.generation_config.num_assistant_tokens_schedule = "constant"
assistant.generation_config.assistant_confidence_threshold = 0.0
inputs = tokenizer("PROMPT", return_tensors="pt")
output = model.generate(**inputs, assistant_model=assistant, do_sample=False, max_new_tokens=128)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
_RECIPES = {
    "vllm": ("sh", _VLLM),
    "llama.cpp": ("sh", _LLAMA_CPP),
    "transformers": ("python", _TRANSFORMERS),
}


def instructions(
    engine: Engine, target: str, draft: str, drafts: int, method: str = "simple"
) -> str:
    """Markdown: commands or a program to copy. `target` and `draft`: folders, hub ids or GGUF
    files; `method`: of llama.cpp.
    """
    language, recipe = _RECIPES[engine]
    speculative = json.dumps(
        {"method": "draft_model", "model": draft, "num_speculative_tokens": drafts}
    )
    quoted = repr if language == "python" else quote
    text = recipe.format(
        target=quoted(target),
        draft=quoted(draft),
        drafts=drafts,
        speculative=quote(speculative),
        method=method,
    )
    return f"```{language}\n{text}\n```\n"
