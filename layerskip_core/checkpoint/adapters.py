"""peft adapters: the model that each one needs, and the checks before peft reads it."""

from pathlib import Path

from ..errors import CheckpointError
from ..model.config_values import whole
from ..storage.json_reading import read_json_object
from .info import ADAPTER_FILE
from .locate import reading
from .stored import check_kinds, open_weights

_MOST_ADAPTERS = 8  # in a chain of adapters


def is_adapter(folder: str) -> bool:
    return (Path(folder) / ADAPTER_FILE).is_file()


def adapters_of(name: str) -> tuple[list[str], str]:
    """A model's name as a chain: the folders of adapters, each of which needs the next, and the base model of the last.

    Raises CheckpointError for a damaged configuration, and for a chain that is a circle or too long.
    """
    adapters: list[str] = []
    seen: set[Path] = set()
    while is_adapter(name):
        folder = Path(name).resolve()
        if folder in seen:
            raise CheckpointError(f"{Path(name) / ADAPTER_FILE} names a base that needs this adapter itself: {name}")
        if len(adapters) == _MOST_ADAPTERS:
            raise CheckpointError(f"{adapters[0]} is a chain of more than {_MOST_ADAPTERS} adapters")
        seen.add(folder)
        adapters.append(name)
        name = _base_of(Path(name))
    return adapters, name


def _base_of(folder: Path) -> str:
    """The base model that an adapter names. Its ranks must fit its weights, because peft allocates memory by the ranks."""
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
    opened = reading(str(folder), lambda: open_weights(folder))
    slices = {name: weights.get_slice(name) for name, weights in opened.items()}
    check_kinds(slices)
    stored = {name: part.get_shape() for name, part in slices.items() if "lora_" in name}
    most = max((shape[0] for name, shape in stored.items() if "_A" in name and shape), default=None)
    if most is not None:
        for rank in ranks:
            if not whole(1, most).holds(rank):
                raise CheckpointError(f"{file}: the rank must be {whole(1, most).words}, as its weights have, got {rank}")
    return base
