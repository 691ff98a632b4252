"""What the files of a checkpoint say, read and checked before anything is built of it: the same for every way of loading."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import CheckpointError
from ..model.config_values import check_token_ids, check_values, whole
from ..model.spec import ModelSpec, architecture_of
from ..prompting.tokenizer import Tokenizer
from ..storage.json_reading import read_json_object
from .info import ADAPTER_FILE

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer_config.json"
COMPLETE = {  # of a configuration that leaves no size to a default, as transformers 5 writes it
    "model_type",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "vocab_size",
}
_MOST_ADAPTERS = 8  # that stand on each other
_FLOATS = ("F64", "F32", "F16", "BF16")  # of safetensors


def read_settings(folder: str | Path, name: str) -> dict[str, Any]:
    """A JSON object of a folder; empty where there is no such file. Raises CheckpointError for anything else in it."""
    path = Path(folder) / name
    return read_json_object(path, CheckpointError) if path.is_file() else {}


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json, its values checked, and those of generation_config.json too.

    Raises CheckpointError for another model type than those supported and for a value that is not of its type or range.
    """
    config = read_settings(folder, CONFIG_FILE)
    check_config(config)
    generation = read_settings(folder, GENERATION_FILE)
    try:
        check_token_ids(generation, config.get("vocab_size"))
    except CheckpointError as error:
        raise CheckpointError(f"{GENERATION_FILE}: {error}") from None
    return config


def check_config(config: Mapping[str, Any]) -> None:
    """The same of a document that was read otherwise."""
    if "model_type" in config:
        architecture_of(config["model_type"])
    check_values(config)
    check_token_ids(config, config.get("vocab_size"))
    if config.keys() >= COMPLETE:
        ModelSpec.of(SimpleNamespace(**config))


def open_weights(folder: str | Path) -> dict[str, Any]:
    """The open safetensors file of each weight in a folder, by the weight's name."""
    from safetensors import safe_open

    files: dict[str, Any] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        file: Any = safe_open(path, "pt", device="cpu")
        files.update(dict.fromkeys(file.keys(), file))
    return files


def check_stored_weights(files: Mapping[str, Any], spec: ModelSpec) -> int:
    """How many parameters the files hold; no weight is read.

    Raises CheckpointError for a weight that is missing, has another shape than `spec` says, or is no floating point one.
    """
    slices = {name: files[name].get_slice(name) for name in spec.shapes if name in files}
    spec.check_weights({name: tuple(found.get_shape()) for name, found in slices.items()})
    _check_kinds(slices)
    return spec.parameters


def _check_kinds(slices: Mapping[str, Any]) -> None:
    for name, found in slices.items():
        if found.get_dtype() not in _FLOATS:
            raise CheckpointError(f"the weight {name} must be one of {', '.join(_FLOATS)}, found {found.get_dtype()}")


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises CheckpointError for a tokenizer without a vocabulary, or with words that the model has no embedding for.

    Special tokens may lie beyond the embeddings, as those of Gemma 3 for images do: no text contains them.
    """
    if tokenizer.vocab_size == 0:
        raise CheckpointError("the tokenizer has no vocabulary")
    if len(tokenizer) <= vocab_size:
        return
    special = set(tokenizer.all_special_ids)
    special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    beyond = {token: word for word, token in tokenizer.get_vocab().items() if token >= vocab_size and token not in special}
    if beyond:
        first = min(beyond)
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeddings of {vocab_size} (vocab_size): "
            f"{beyond[first]!r} is token {first}"
        )


def adapters_of(name: str) -> tuple[list[str], str]:
    """The adapters' folders that a model's name stands for, the outermost first, and the model below them.

    Raises CheckpointError for a broken configuration, and for adapters that stand on each other in a circle.
    """
    adapters: list[str] = []
    seen: set[Path] = set()
    while (Path(name) / ADAPTER_FILE).is_file():
        folder = Path(name).resolve()
        if folder in seen:
            raise CheckpointError(f"{Path(name) / ADAPTER_FILE} names a base that stands on this adapter itself: {name}")
        if len(adapters) == _MOST_ADAPTERS:
            raise CheckpointError(f"{adapters[0]} stands on more than {_MOST_ADAPTERS} adapters, one on the other")
        seen.add(folder)
        adapters.append(name)
        name = _base_of(Path(name))
    return adapters, name


def _base_of(folder: Path) -> str:
    """The model that an adapter belongs to. Its ranks must be those of its weights, because memory is allocated by them."""
    file = folder / ADAPTER_FILE
    config = read_json_object(file, CheckpointError)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{file}: base_model_name_or_path must be the name of a model, got {base!r}")
    if config.get("megatron_config") is not None:  # peft would import the module that megatron_core names
        raise CheckpointError(f"{file}: megatron_config must be left out or null: an adapter's own modules are never imported")
    ranks = [config[name] for name in ("r",) if name in config]
    patterns = config.get("rank_pattern") or {}
    ranks += patterns.values() if isinstance(patterns, dict) else [patterns]
    slices = {name: file.get_slice(name) for name, file in open_weights(folder).items()}
    _check_kinds(slices)
    stored = {name: found.get_shape() for name, found in slices.items() if "lora_" in name}
    most = max((shape[0] for name, shape in stored.items() if "_A" in name and shape), default=None)
    if most is not None:
        for rank in ranks:
            if not whole(1, most).holds(rank):
                raise CheckpointError(f"{file}: the rank must be {whole(1, most).words}, as its weights have, got {rank}")
    return base
