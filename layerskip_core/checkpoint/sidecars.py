"""Sidecar files of a model: calibrated int4 weights, exit blocks, and a drafter in the EAGLE-3
layout.

The headers of the first two name their format and a fingerprint of the model's weights: other
weights are refused.

int4.safetensors, by `layerskip calibrate`, holds rows of bytes (see model/weights.py) for each
projection of the layers and for the head, by the weight's name. If the model's folder is read-only,
the file is in a cache instead, named by the fingerprint.

exit_blocks.safetensors, by `layerskip train-drafter` and `finetune`, holds the weights of blocks
(see model/exit_blocks.py). `exit_blocks` in layerskip.json describes their training by exit;
`agreement` is the share of right first drafts on held-out rows.

eagle3/ is a drafter that vLLM, SGLang and llama.cpp read, too. Its config.json has the values
twice: as the library `speculators` writes them (for vLLM), and at the top (for SGLang and EAGLE's
own checkpoints). Weights have EAGLE's names (`midlayer.*`); those of `speculators` (`layers.0.*`)
are read, too. `d2t`: for each output of the head, its token id minus its index.
`eagle_aux_hidden_state_layer_ids` counts layers at the top; in `eagle_config` (SGLang, SpecForge) a
list that begins with 1 has indices: [1, 14, 26] means after 2, 15 and 27 layers.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from ..errors import CheckpointError, first_line, require
from ..files import read_json, write_file
from ..model.eagle3 import LAYER, ROPES, TOKENS, Eagle3Form, Eagle3Weights
from ..model.exit_blocks import NO_STORED_DRAFTERS, StoredDrafters, blocks_named
from ..model.spec import AnySpec, ModelSpec, Shapes
from ..model.weights import GROUP_SIZE, Take, int4_bytes_shape
from .folder import CONFIG_FILE, INT4_FILE, METADATA, WeightFile
from .info import INFO_FILE

EAGLE3_FOLDER = "eagle3"
EAGLE3_FILES = f"{EAGLE3_FOLDER}/{CONFIG_FILE}", f"{EAGLE3_FOLDER}/model.safetensors"
PROPOSED = 4  # drafts per round by default in other engines

# Environment variable: the folder for int4 weights of read-only folders, and for packed models
CACHE = "LAYERSKIP_CACHE"
CACHED = 10 << 30  # its limit in bytes: the files that were not used for longest are removed
_CACHE_FILES = "*.safetensors"

_INT4 = {"format": "1", "group_size": str(GROUP_SIZE)}
BLOCKS = {"format": "1"}
FINGERPRINT = "fingerprint"
_AGREEMENT = "agreement"
_OF_EAGLE = "midlayer."  # prefix of the layer's weights in EAGLE's checkpoints
_UNUSED = ("t2d", "embed_tokens.weight")  # the inverse of `d2t`; the target's embedding
_NORMS = "norm_before_fc", "fc_norm", "norm_output"  # of EAGLE-3.1
_Share = Annotated[float, Meta(ge=0, le=1)] | None
_Size = Annotated[int, Meta(ge=1, le=1 << 20)]
_Ids = Annotated[list[Annotated[int, Meta(ge=1, le=1024)]], Meta(min_length=1, max_length=16)]


def matrix_names(spec: ModelSpec) -> list[str]:
    """The weights that may be low-bit: the projections, in the order of the layers, and the
    head.
    """
    mixer = spec.architecture.mixer
    steps = [f".{step}." for step in mixer.steps] if mixer is not None else []
    names = []
    for name, shape in spec.shapes.items():
        is_step = any(step in name for step in steps)
        if name.startswith(f"{spec.names.layers}.") and len(shape) == 2 and not is_step:
            names.append(name)
    return [*names, spec.head_name]


def fingerprint(spec: AnySpec, weight_of: Callable[[str], Tensor]) -> str:
    """A digest of three rows of each matrix in bf16: training changes it, a change of precision
    does not.
    """
    digest = hashlib.sha256()
    if isinstance(spec, ModelSpec):
        names = matrix_names(spec)
    else:
        names = [name for name, shape in spec.shapes.items() if len(shape) > 1]
    for name in names:
        # Experts share one tensor of three dimensions
        weight = weight_of(name).detach().flatten(0, -2)
        rows = weight[[0, len(weight) // 2, -1]].to("cpu", torch.bfloat16).contiguous()
        digest.update(rows.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def open_formed(path: Path, form: Mapping[str, str]) -> WeightFile:
    """Opens a file. Raises ValueError if its header lacks the entries of `form`."""
    file = WeightFile(path)
    for name, needed in form.items():
        if file.metadata.get(name) != needed:
            raise ValueError(f"its {name} must be {needed}, found {file.metadata.get(name)}")
    return file


def cache_folder() -> Path:
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "layerskip")


def cached_int4(model_fingerprint: str) -> Path:
    return cache_folder() / f"{model_fingerprint[:32]}.{INT4_FILE}"


def keep_in_cache(model_fingerprint: str, content: bytes) -> None:
    """Writes int4 weights into the cache, whose lock the caller holds. Raises CheckpointError."""
    write_file(cached_int4(model_fingerprint), content, CheckpointError)
    drop_unused(cached_int4(model_fingerprint))


def touch(path: Path) -> None:
    """Marks a file of the cache as used now; the time of its content stays."""
    with suppress(OSError):  # of a read-only cache
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def drop_unused(new: Path) -> None:
    """Removes the files of the cache that were not used for longest beyond CACHED, but not
    `new`.
    """
    used: list[tuple[int, int, Path]] = []
    for path in cache_folder().glob(_CACHE_FILES):
        with suppress(OSError):  # another process may remove it
            state = path.stat()
            used.append((state.st_atime_ns, state.st_size, path))
    free = CACHED
    for _, size, path in sorted(used, reverse=True):
        free -= size
        if free < 0 and path != new:
            with suppress(OSError):
                path.unlink()


def clear_cache() -> int:
    """Removes all files of the cache, whose lock the caller holds; returns their number."""
    paths = [*cache_folder().glob(_CACHE_FILES), *cache_folder().glob(f"*.{INFO_FILE}")]
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)


class StoredInt4(NamedTuple):
    """Calibrated weights as rows of bytes, read when taken. `agreement`: share of the unquantised
    model's argmax tokens.
    """

    take: Take
    agreement: float | None


def read_int4(
    folder: str | Path | None, spec: ModelSpec, model_fingerprint: Callable[[], str]
) -> StoredInt4 | None:
    """A model's calibrated weights, from its folder or the cache. Raises CheckpointError if they
    belong to other weights.
    """
    path = Path(folder or "") / INT4_FILE
    if folder is None or not path.is_file():
        if not cache_folder().is_dir():
            return None
        path = cached_int4(model_fingerprint())
        if not path.is_file():
            return None
        touch(path)
    shapes = {name: int4_bytes_shape(*spec.shapes[name]) for name in matrix_names(spec)}
    with naming(path):
        file = open_formed(path, _INT4)
        check_fingerprint(file, model_fingerprint())
        check_entries(file.entries, shapes, ("U8",))
        agreement = msgspec.convert(file.metadata.get(_AGREEMENT), _Share, strict=False)
    return StoredInt4(lambda name: file.read(name) if name in shapes else None, agreement)


def int4_content(
    rows: Mapping[str, Tensor], model_fingerprint: str, details: Mapping[str, str]
) -> bytes:
    """The bytes of int4.safetensors with rows by name; `details` go into the header."""
    return content_of(rows, model_fingerprint, {**details, **_INT4})


def exit_blocks_content(
    spec: AnySpec,
    weights: Mapping[str, Tensor],
    model_fingerprint: str,
    present: StoredDrafters = NO_STORED_DRAFTERS,
) -> bytes:
    """The bytes of exit_blocks.safetensors: `weights` by the names of `ExitBlock.shapes`, and the
    `present` blocks at other exits.
    """
    content = dict(weights)
    trained = {block.exit_layer for block in blocks_named(weights, spec.layers)}
    present_weights = present.weights(spec)
    for block in present.blocks:
        if block.exit_layer not in trained:
            content |= {name: present_weights.of(name) for name in block.shapes(spec)}
    return content_of(content, model_fingerprint, BLOCKS)


def check_fingerprint(file: WeightFile, model_fingerprint: str) -> None:
    if file.metadata.get(FINGERPRINT) != model_fingerprint:
        raise ValueError("it was made from other weights than this model's")


def check_entries(
    entries: Mapping[str, tuple[str, tuple[int, ...]]], shapes: Shapes, kinds: Collection[str]
) -> None:
    """Raises ValueError for a weight that is missing, unknown, or of another shape or type."""
    for name in sorted({*shapes, *entries}):
        kind, shape = entries.get(name, ("nothing", ()))
        if kind not in kinds or shape != shapes.get(name):
            needed = "left out"
            if name in shapes:
                needed = f"{' or '.join(kinds)} {list(shapes[name])}"
            raise ValueError(f"{name} must be {needed}, found {kind} {list(shape)}")


@contextmanager
def naming(what: object, advice: str = "remove it, or make it again") -> Iterator[None]:
    """Turns any error into a CheckpointError that names a file or folder."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{what} cannot be used: {first_line(error)}; {advice}") from error


def content_of(
    weights: Mapping[str, Tensor], model_fingerprint: str, form: Mapping[str, str]
) -> bytes:
    """The bytes of a safetensors file, with a sorted header: the library's order is random."""
    from safetensors.torch import save

    # Experts of gpt-oss from GGUF are views
    whole = {name: weight.contiguous() for name, weight in weights.items()}
    written: bytes = save(whole, metadata={**form, FINGERPRINT: model_fingerprint})
    end = 8 + int.from_bytes(written[:8], "little")  # of the header and its padding
    header = json.loads(written[8:end])
    header[METADATA] = dict(sorted(header[METADATA].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return b"".join((written[:8], text.ljust(end - 8), memoryview(written)[end:]))


class _Rope(msgspec.Struct):
    rope_theta: Annotated[float, Meta(ge=1, le=1e15)] = 10_000.0
    rope_type: str = "default"
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


class _Layer(msgspec.Struct):
    """Values read from `transformer_layer_config`, else from the top of config.json."""

    hidden_size: _Size
    intermediate_size: _Size
    num_attention_heads: _Size
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    num_hidden_layers: int = 1
    hidden_act: str = "silu"
    attention_bias: bool = False
    rms_norm_eps: Annotated[float, Meta(ge=1e-30, le=1)] = 1e-6
    rope_parameters: _Rope | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float | None = None


class _Eagle(msgspec.Struct):
    eagle_aux_hidden_state_layer_ids: _Ids = msgspec.field(default_factory=list)


class _Values(msgspec.Struct):
    draft_vocab_size: _Size
    eagle_aux_hidden_state_layer_ids: _Ids | None = None
    norm_before_residual: bool | None = None
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    target_hidden_size: int | None = None
    eagle_config: _Eagle | None = None
    transformer_layer_config: _Layer | None = None


def default_layers(num_layers: int) -> tuple[int, ...]:
    """The layers that engines tap if config.json names none: 2, L/2 and L-3, within 1..L-1."""
    usual = (2, num_layers // 2, num_layers - 3)
    return tuple(sorted({min(max(layer, 1), num_layers - 1) for layer in usual}))


def eagle3_content(stored: Eagle3Weights, spec: AnySpec, verifier: str) -> dict[str, bytes]:
    """The files of a drafter's folder. `spec`: the target's. `verifier`: the target's folder or hub
    id, for engines.
    """
    from safetensors.torch import save

    document = _eagle3_config(stored, spec, verifier)
    weights = {}
    for name, weight in stored.weights.items():
        weights[name.replace(LAYER, _OF_EAGLE)] = weight.contiguous()
    if stored.form.vocab < spec.vocab:  # for a whole vocabulary vLLM refuses the tensor
        weights[TOKENS] = stored.tokens.long() - torch.arange(stored.form.vocab)
    config, tensors = EAGLE3_FILES
    return {
        config: (json.dumps(document, indent=2) + "\n").encode(),
        tensors: save(weights, {"format": "pt"}),
    }


def _eagle3_config(stored: Eagle3Weights, spec: AnySpec, verifier: str) -> dict[str, Any]:
    """The values of config.json, at the top and as `speculators` writes them."""
    form = stored.form
    layer: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": form.hidden,
        "intermediate_size": form.inner,
        "num_hidden_layers": 1,
        "num_attention_heads": form.heads,
        "num_key_value_heads": form.kv_heads,
        "head_dim": form.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": form.eps,
        "rope_parameters": dict(form.rope),
        "rope_theta": form.rope["rope_theta"],
        "max_position_embeddings": spec.context,
        "vocab_size": spec.vocab,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
    method = {
        "proposal_type": "greedy",
        "speculative_tokens": PROPOSED,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    # SGLang adds 1 to each number of a list that begins with 1
    first = 1 if form.layers[0] == 2 else 0
    sglang_layers = [tapped - first for tapped in form.layers]
    dtype = next(iter(stored.weights.values())).dtype
    return {
        **layer,
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": form.vocab,
        "norm_before_residual": form.norm_before_residual,
        **{name: getattr(form, name) for name in _NORMS},
        "eagle_aux_hidden_state_layer_ids": list(form.layers),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": sglang_layers,
            "use_aux_hidden_state": True,
        },
        "dtype": str(dtype).removeprefix("torch."),
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {
                "name_or_path": verifier,
                "architectures": getattr(spec.config, "architectures", None),
            },
        },
        "transformer_layer_config": layer,
    }


def eagle3_sidecar(folder: str | Path, spec: AnySpec) -> Eagle3Weights | None:
    """The drafter of a model's folder; None without its config.json, which is written last. Raises
    as `read_eagle3`.
    """
    drafter = Path(folder) / EAGLE3_FOLDER
    return read_eagle3(drafter, spec) if (drafter / CONFIG_FILE).is_file() else None


def read_eagle3(folder: str | Path, spec: AnySpec) -> Eagle3Weights:
    """The drafter in a folder, for a model. Raises CheckpointError for the first unsuitable value
    or missing weight.
    """
    path = Path(folder)
    with naming(f"the drafter {folder}"):
        document = read_json(path / CONFIG_FILE, CheckpointError)
        values = msgspec.convert(document, _Values)
        layer = values.transformer_layer_config or msgspec.convert(document, _Layer)
        form = _form(values, layer, spec)
        file = WeightFile(path / "model.safetensors")
        stored = {}
        for name in file.entries:
            if name not in _UNUSED:
                stored[name.replace(_OF_EAGLE, LAYER)] = name
        tokens = torch.arange(form.vocab)
        if stored.pop(TOKENS, None):
            check_entries({TOKENS: file.entries[TOKENS]}, {TOKENS: (form.vocab,)}, ("I64", "I32"))
            tokens += file.read(TOKENS).long()
        entries = {name: file.entries[full] for name, full in stored.items()}
        check_entries(entries, form.shapes, ("F32", "BF16", "F16"))
        weights = {name: file.read(stored[name]) for name in form.shapes}
        are_known = bool(((tokens >= 0) & (tokens < spec.vocab)).all())
        require(are_known, TOKENS, f"tokens below {spec.vocab}", "others")
        are_different = len(set(tokens.tolist())) == len(tokens)
        require(are_different, TOKENS, "different tokens", "some of them twice")
    return Eagle3Weights(form, tokens, weights)


def _form(values: _Values, layer: _Layer, spec: AnySpec) -> Eagle3Form:
    """The drafter's sizes. Raises ConfigError for an unsupported value."""
    layers = _tapped_layers(values, spec.layers)
    heads = layer.num_attention_heads
    kv_heads = layer.num_key_value_heads or heads
    head_dim = layer.head_dim or layer.hidden_size // heads
    theta = {} if layer.rope_theta is None else {"rope_theta": layer.rope_theta}
    rope = layer.rope_parameters or msgspec.convert(theta | (layer.rope_scaling or {}), _Rope)
    below = f"layers below {spec.layers}"
    require(max(layers) < spec.layers, "eagle_aux_hidden_state_layer_ids", below, layers)
    width = f"{spec.hidden}, as the model's"
    require(layer.hidden_size == spec.hidden, "hidden_size", width, layer.hidden_size)
    target = values.target_hidden_size
    require(target in (None, spec.hidden), "target_hidden_size", "hidden_size", target)
    require(layer.num_hidden_layers == 1, "num_hidden_layers", "1", layer.num_hidden_layers)
    require(layer.hidden_act == "silu", "hidden_act", "silu", layer.hidden_act)
    multiple = f"a multiple of num_key_value_heads, {kv_heads}"
    require(heads % kv_heads == 0, "num_attention_heads", multiple, heads)
    if isinstance(spec, ModelSpec):  # the cache of our kernels has entries of one shape
        needed = f"{spec.kv_heads} and {spec.head_dim}, as the model's"
        fits = kv_heads == spec.kv_heads and head_dim == spec.head_dim
        require(fits, "num_key_value_heads and head_dim", needed, f"{kv_heads} and {head_dim}")
    require(not layer.attention_bias, "attention_bias", "false", "true")
    require(rope.rope_type in ROPES, "rope_type", " or ".join(ROPES), rope.rope_type)
    rope_values = {}
    for name, value in msgspec.structs.asdict(rope).items():
        if value is not None:
            rope_values[name] = value
    before = values.norm_before_residual
    # The default of `speculators` is true, that of EAGLE's own checkpoints false
    if before is None:
        before = values.transformer_layer_config is not None
    norms = {name: getattr(values, name) for name in _NORMS}
    return Eagle3Form(
        tuple(sorted(layers)),
        layer.hidden_size,
        heads,
        kv_heads,
        head_dim,
        layer.intermediate_size,
        values.draft_vocab_size,
        layer.rms_norm_eps,
        rope_values,
        before,
        **norms,
    )


def _tapped_layers(values: _Values, num_layers: int) -> Sequence[int]:
    """The layers after which the drafter reads states, as counts."""
    if values.eagle_aux_hidden_state_layer_ids:
        return values.eagle_aux_hidden_state_layer_ids
    if values.eagle_config is None or not values.eagle_config.eagle_aux_hidden_state_layer_ids:
        return default_layers(num_layers)
    listed = values.eagle_config.eagle_aux_hidden_state_layer_ids
    return [index + 1 for index in listed] if listed[0] == 1 else listed
