"""Reads a model's folder without importing transformers, which takes seconds: settings, weights and
tokenizer.

`lean_spec` and `lean_tokenizer` read folders of transformers 5, whose files hold every default;
they return None for others.
"""

import json
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import read_json
from ..model import ModelSpec, missing_feature
from ..model.architectures import MULTIMODAL, is_complete
from ..model.blocks import BlockRows, plain
from ..model.spec import Shapes, check_shape
from ..prompting import Tokenizer, special_ids
from .low_bit_layouts import Levels, levels_of, mxfp4_rows, scaled_blocks

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer_config.json"
INT4_FILE = "int4.safetensors"  # beside the weights, see sidecars.py
EXIT_BLOCKS_FILE = "exit_blocks.safetensors"  # beside the weights, see sidecars.py
MTP_FILE = "mtp.safetensors"  # beside the weights, see shipped.py
PACKED_FILE = "packed.safetensors"  # in place of the weights, see packed_file.py
FLOATS = ("F64", "F32", "F16", "BF16")  # in safetensors
METADATA = "__metadata__"  # key of a safetensors header's further entries
# The values of quantization_config that LowBitWeights reads; a missing key fits
_LOW_BITS: dict[str, tuple[Any, ...]] = {
    "quant_method": ("mxfp4", "gptq", "awq", "compressed-tensors", "fp8"),
    "format": ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    "bits": (4, 8),
    "version": ("gemm",),
}
_CHUNK = 4 << 20  # bytes that a thread reads at once
_TEXT_PART = "language_model."  # in names of a multimodal model's text part
_TOKENIZER_CLASS = "TokenizersBackend"  # of tokenizers without code of their own


def read_settings(folder: str | Path, name: str) -> dict[str, Any]:
    """The JSON object in a folder's file, empty if there is none. Raises CheckpointError."""
    path = Path(folder) / name
    return read_json(path, CheckpointError) if path.is_file() else {}


def lean_spec(folder: str) -> ModelSpec | None:
    """The spec of a folder's model, if our kernels run it and it needs no transformers. Raises
    CheckpointError.
    """
    if not weight_files(folder) and not is_packed(folder):
        return None
    return spec_of_settings(read_settings(folder, CONFIG_FILE))


def spec_of_settings(config: dict[str, Any]) -> ModelSpec | None:
    """The spec by a config.json, if our kernels run it and it needs no transformers. Raises
    CheckpointError.
    """
    major = str(config.get("transformers_version", "")).split(".")[0]
    is_recent = major.isdecimal() and int(major) >= 5
    is_special = "quantization_config" in config or "auto_map" in config
    if config.get("model_type") in MULTIMODAL and isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    if not is_recent or is_special or not is_complete(config):
        return None
    spec = ModelSpec.of(SimpleNamespace(**config))
    for rope in spec.ropes:  # transformers completes the parameters of other types
        if rope.type not in ("default", "proportional") or "rope_theta" not in rope.parameters:
            return None
    return spec if missing_feature(spec, native=True) is None else None


def generation_config(folder: str) -> SimpleNamespace:
    """generation_config.json as attributes."""
    return SimpleNamespace(**read_settings(folder, GENERATION_FILE))


class WeightFile:
    """An open safetensors file. `entries`: the type (as in safetensors) and shape of each
    weight.
    """

    def __init__(self, path: str | Path, left_out: str = "") -> None:
        """`left_out`: a part to be left out of names. Raises the errors of safetensors for a
        damaged file.
        """
        from safetensors import safe_open

        self._bytes = open(path, "rb")  # noqa: SIM115
        weakref.finalize(self, self._bytes.close)
        self._file: Any = safe_open(path, "pt", device="cpu")  # checks the header
        length = int.from_bytes(self._bytes.read(8), "little")
        self._header = json.loads(self._bytes.read(length))
        self._start = 8 + length
        self.metadata: dict[str, str] = self._header.pop(METADATA, {})
        self._stored = {name.replace(left_out, "", 1): name for name in self._header}
        self.entries: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, stored in self._stored.items():
            entry = self._header[stored]
            self.entries[name] = str(entry["dtype"]), tuple(entry["shape"])

    def mapped(self, name: str) -> Tensor:
        """A weight as a view of the mapped file: only used pages are read."""
        tensor: Tensor = self._file.get_tensor(self._stored[name])
        return tensor

    def read(self, name: str) -> Tensor:
        """A weight in memory of its own. Raises OSError."""
        like = self.mapped(name)
        return self.read_into(name, torch.empty(like.shape, dtype=like.dtype))

    def read_into(self, name: str, tensor: Tensor) -> Tensor:
        """A weight in the memory of `tensor`, which has its size. Raises OSError."""
        start = self._start + self._header[self._stored[name]]["data_offsets"][0]
        content = tensor.view(-1).view(torch.uint8).numpy().data

        if len(content) <= _CHUNK or not hasattr(os, "preadv"):  # not on Windows
            self._bytes.seek(start)
            count = self._bytes.readinto(content)
        else:
            file = self._bytes.fileno()

            def read_chunk(at: int) -> int:
                return os.preadv(file, [content[at : at + _CHUNK]], start + at)

            with ThreadPoolExecutor(torch.get_num_threads()) as threads:
                count = sum(threads.map(read_chunk, range(0, len(content), _CHUNK)))
        if count < len(content):
            raise OSError("the file ends too early")
        return tensor


class JoinedWeights:
    """Weights stored under other names or in parts (see `ModelSpec.stored_parts`), with the methods
    of `WeightFile`.
    """

    def __init__(
        self,
        files: Mapping[str, WeightFile],
        parts_of: Mapping[str, list[list[str]]],
        shapes: Shapes,
    ) -> None:
        """`files` by the names of their weights. A weight is left out if one of its parts is
        missing.
        """
        self._files = files
        self._parts: dict[str, list[list[str]]] = {}
        self.entries: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.joined = set[str]()  # the parts
        for name, parts in parts_of.items():
            flat = {*chain(*parts)}
            if files.keys() >= flat:
                self._parts[name] = parts
                self.entries[name] = self._entry(parts, len(shapes[name]))
                self.joined |= flat

    def _entry(self, parts: list[list[str]], dimensions: int) -> tuple[str, tuple[int, ...]]:
        """Type and shape, as if all parts were like the first; `read` raises an error otherwise."""
        forms = [self._files[part].entries[part] for part in parts[0]]
        kind, (_, *inputs) = forms[0]
        shape = (sum(shape[0] for _, shape in forms), *inputs)
        if len(shape) < dimensions:  # of several experts
            shape = (len(parts), *shape)
        return kind, shape

    def mapped(self, name: str) -> Tensor:
        parts = self._parts[name]
        if len(parts) > 1 or len(parts[0]) > 1:
            return self.read(name)
        return self._files[parts[0][0]].mapped(parts[0][0])

    def read(self, name: str) -> Tensor:
        parts = self._parts[name]
        shape = self.entries[name][1]
        if len(parts) == len(parts[0]) == 1:
            return self._files[parts[0][0]].read(parts[0][0]).view(shape)
        first = parts[0][0]
        joined = torch.empty(shape, dtype=self._files[first].mapped(first).dtype)
        for expert, names in zip(joined, parts, strict=True):
            for rows, part in zip(expert.chunk(len(names)), names, strict=True):
                rows.copy_(self._files[part].read(part))
        return joined


def has_low_bits(quantization: Mapping[str, Any]) -> bool:
    """Whether LowBitWeights reads a folder with this quantization_config."""
    for name, values in _LOW_BITS.items():
        if name in quantization and quantization[name] not in values:
            return False
    return "quant_method" in quantization


class LowBitWeights:
    """A folder's weights, some in low bits, by their names in transformers. Each is read on
    demand.
    """

    def __init__(
        self, folder: str | Path, spec: ModelSpec, quantization: Mapping[str, Any]
    ) -> None:
        """Raises CheckpointError for a missing weight."""
        self._files = files_by_name(folder, _TEXT_PART)
        self._spec = spec
        self._parts = spec.stored_parts
        self._method = str(quantization["quant_method"])
        self._least_zero = 0 if quantization.get("checkpoint_format") == "gptq_v2" else 1
        self._dequantised: set[str] = set()
        there = {}
        for name, shape in spec.shapes.items():
            if all(map(self._is_there, chain(*self._parts_of(name)))):
                there[name] = shape
        spec.check_weights(there)

    @property
    def notes(self) -> tuple[str, ...]:
        """For the user, complete once the weights were taken."""
        if not self._dequantised:
            return ()
        weights = f"{len(self._dequantised)} weights in {self._method}"
        return (f"{weights} were dequantised: the kernels have no form for them",)

    def weight(self, name: str) -> Tensor:
        """A weight, dequantised to fp32 if in low bits. Raises CheckpointError for a wrong
        shape.
        """
        weight = self._joined(name, self._float)
        assert weight is not None
        if self._is_turned(name):
            weight = weight.transpose(1, 2)
        check_shape(name, self._spec.shapes[name], tuple(weight.shape))
        return weight

    def rows(self, name: str) -> Tensor | None:
        """A low-bit weight as rows of blocks; None if blocks cannot hold it, or for other weights.
        Raises as `weight` does.
        """
        if name not in self._spec.shapes:  # of an exit block, which is in another file
            return None
        rows = self._joined(name, self._rows)
        if rows is None:
            return None
        *most, inputs = self._spec.shapes[name]
        if self._is_turned(name):
            most, inputs = [most[0], inputs], most[1]
        assert isinstance(rows, BlockRows)
        check_shape(name, (*most, inputs // rows.form.inputs * rows.form.bytes), tuple(rows.shape))
        return rows

    def _joined(self, name: str, read: Callable[[str], Tensor | None]) -> Tensor | None:
        """A weight's parts joined; None if one is None, or if they are of different types."""
        experts = list[Tensor]()
        types = set[type]()
        for parts in self._parts_of(name):
            found: list[Any] = list(map(read, parts))
            types |= {*map(type, found)}
            if len(types) > 1 or type(None) in types:
                return None
            experts.append(torch.cat(found))
        return torch.stack(experts) if len(experts) > 1 else experts[0]

    def _is_turned(self, name: str) -> bool:
        """Whether a weight is (inputs, outputs) in memory, but not in the file (gpt-oss)."""
        return f"{name}_blocks" in self._files

    def _parts_of(self, name: str) -> list[list[str]]:
        parts = self._parts.get(name, [[name]])
        return parts if all(map(self._is_there, chain(*parts))) else [[name]]

    def _is_there(self, part: str) -> bool:
        module = part.removesuffix(".weight")
        return not self._files.keys().isdisjoint(
            (part, f"{part}_blocks", f"{module}.qweight", f"{module}.weight_packed")
        )

    def _float(self, part: str) -> Tensor:
        found = self._read(part)
        if isinstance(found, Levels):
            return found.weight
        return plain(found)

    def _rows(self, part: str) -> Tensor | None:
        found = self._read(part)
        rows = found.rows if isinstance(found, Levels) else found
        if rows is None:
            self._dequantised.add(part)
        return rows if isinstance(rows, BlockRows) else None

    def _read(self, part: str) -> Tensor | Levels:
        """A part as stored: floats, rows of blocks, or levels."""
        module = part.removesuffix(".weight")

        def get(end: str, needed: bool = True) -> Any:
            name = module + end
            if name in self._files:
                return self._files[name].mapped(name)
            if needed:
                raise CheckpointError(f"{name} is missing, which {part} in {self._method} needs")
            return None

        blocks = get("_blocks", False)
        if blocks is not None:
            return mxfp4_rows(blocks, get("_scales"))
        levels = levels_of(get, self._least_zero)
        if levels is not None:
            return levels
        whole = self._files[part].mapped(part)
        scale = get(".weight_scale", False)
        if scale is None:
            scale = get(".weight_scale_inv", False)
        if scale is None:
            return whole
        self._dequantised.add(part)
        return scaled_blocks(whole, scale)


def weight_files(folder: str | Path) -> list[Path]:
    """A folder's safetensors files with the model's own weights."""
    others = {Path(folder) / name for name in (INT4_FILE, EXIT_BLOCKS_FILE, MTP_FILE, PACKED_FILE)}
    return sorted(set(Path(folder).glob("*.safetensors")) - others)


def files_by_name(folder: str | Path, left_out: str = "") -> dict[str, WeightFile]:
    """The open file of each weight of a folder. `left_out`: as for WeightFile."""
    files = (WeightFile(path, left_out) for path in weight_files(folder))
    return {name: file for file in files for name in file.entries}


def is_packed(folder: str | Path) -> bool:
    """Whether a folder holds weights packed for the compiled kernels, which only decode."""
    return (Path(folder) / PACKED_FILE).is_file() and not weight_files(folder)


def refuse_packed(folder: str | Path) -> None:
    """Raises CheckpointError for a folder with packed weights."""
    if is_packed(folder):
        found = f"found {PACKED_FILE}, which only decoding can use"
        raise CheckpointError(
            f"needed the weights of a model, {found}: give the model that it was packed from"
        )


def open_weights(
    folder: str | Path, spec: ModelSpec | None = None
) -> dict[str, WeightFile | JoinedWeights]:
    """Readers of the model's own weights in a folder, by stored names or by those of `spec`.

    Raises CheckpointError for a wrong or missing weight, but not if all names are unknown:
    transformers maps legacy names.
    """
    if spec is None:
        return dict(files_by_name(folder))
    files = files_by_name(folder, _TEXT_PART)
    joined = JoinedWeights(files, spec.stored_parts, spec.shapes)
    readers: dict[str, WeightFile | JoinedWeights] = {}
    for name, file in files.items():
        if name not in joined.joined:
            readers[name] = file
    readers |= dict.fromkeys(joined.entries, joined)
    shapes = {}
    for name in spec.shapes:
        if name not in readers:
            continue
        kind, shapes[name] = readers[name].entries[name]
        if kind not in FLOATS:
            raise CheckpointError(
                f"the weight {name} must be one of {', '.join(FLOATS)}, found {kind}"
            )
    if shapes:
        spec.check_weights(shapes)
    return readers


def lean_tokenizer(folder: str) -> Tokenizer | None:
    """A folder's tokenizer, if tokenizer.json describes it completely; None if it needs
    transformers.
    """
    settings = read_settings(folder, TOKENIZER_FILE)
    has_code = settings.get("tokenizer_class") != _TOKENIZER_CLASS
    if has_code or not (Path(folder) / "tokenizer.json").is_file():
        return None
    return Tokenizer.in_folder(folder, settings)


def checked_tokenizer(tokenizer: Any, vocab_size: int) -> Any:
    """The tokenizer. Raises CheckpointError for an empty vocabulary, or words beyond `vocab_size`
    that are not special.
    """
    if tokenizer.vocab_size == 0:
        raise CheckpointError("the tokenizer has no vocabulary")
    if len(tokenizer) <= vocab_size:
        return tokenizer
    special = set(special_ids(tokenizer).values())
    beyond = {}
    for word, token in tokenizer.get_vocab().items():
        if token >= vocab_size and token not in special:
            beyond[token] = word
    if beyond:
        first = min(beyond)
        word = beyond[first]
        sizes = f"the tokenizer has {len(tokenizer)} tokens, the model embeddings of {vocab_size} (vocab_size)"
        raise CheckpointError(f"{sizes}: {word!r} is token {first}")
    return tokenizer


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences progress bars, log lines and warnings, in a block or in a decorated function."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
