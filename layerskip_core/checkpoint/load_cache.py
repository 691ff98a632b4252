"""The cache of loads: what a load made of a model's files, kept so that the next one only reads it.

The first load of a model packs its weights, dequantises those that kernels do not read as stored,
and asks transformers for the tokenizer and the configuration. These parts are written, unless
LAYERSKIP_CACHE says otherwise, to ~/.cache/layerskip/DIGEST.packed.safetensors: matrices as in
packed.safetensors (packed_file.py; blocks of a GGUF file as `stored.MATRIX.TYPE.PART`), weights
that stay unpacked as `plain.NAME`, tokenizer.json as bytes, the rest in the header. A load that
misses a part makes it from the model's files, so the cache changes no result, and nothing depends
on it: a folder that is read-only or full keeps nothing.

DIGEST names the model's files by path, size, time of change, and their first and last bytes: to
read all of a file would take as long as the load that it saves. The bytes tell apart models of one
shape whose times were copied with them. It also names what the parts were made for: precision, low
bits, and the versions of this package and of transformers.

A file is written aside, flushed and renamed, so two processes can write at once. It is our own: the
reader checks its format and the types and shapes of its tensors. All files of the folder share one
limit (sidecars.CACHED).
"""

import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.model import PackingConfig
from ..errors import CheckpointError
from ..model import ModelSpec
from ..model.native.compiled import kernels
from ..model.native.matrix import LAYOUT, HugePages, MatrixForm, NativeMatrix, PackMatrix
from ..model.vocabulary import ORDER_FILE
from ..model.weights import Affine, Take
from ..prompting import Tokenizer
from . import sidecars
from .folder import INT4_FILE, WeightFile, spec_of_settings
from .info import INFO_FILE
from .loaded import end_ids
from .locate import EMBEDDED, Location
from .packed_file import ENTRY, NAMES, TensorWriter, unpacked_names
from .save import model_files

# A change of what the parts hold needs another format
_FORM = {"format": "layerskip cache 1", "layout": str(LAYOUT)}
_LEAST = 32 << 20  # bytes: a smaller model loads as fast from its own files
_SHARE = 4  # a file takes at most this part of the cache, and of the free space
_ENDS = 1 << 16  # bytes of a file's beginning and end that name it
_ABANDONED = 3600  # seconds after which a file that another process was writing is removed
_TOKENIZER = "tokenizer.json"
# Methods of transformers' tokenizers
_ENCODING = ("__call__", "_encode_plus", "decode", "_decode", "convert_ids_to_tokens")
# A kept tokenizer must encode it alike.
_PROBE = "Hello, world!  It's 10 o'clock,\n\t\u0434\u0430 \u4f60\u597d \U0001f600 <s></s>"

_writing: list[threading.Thread] = []


class KeptParts:
    """The parts of one model: those that the cache has are read, the others made and kept by
    `save`.
    """

    def __init__(self, name: Callable[[], Path] | None = None) -> None:
        """`name`: the path of the cache's file, by the state of the model's files now; None: no
        cache.
        """
        self._name = name
        self._path = None if name is None else name()
        self._file = None if self._path is None else _opened(self._path)
        self._memory = HugePages()
        self._parts: dict[str, Tensor] = {}  # by their names in the file: what this load uses
        # Of matrices in `stored`: type and number of successive panels
        self._types: dict[str, list[tuple[str, int]]] = {}
        self._texts: dict[str, str] = {}
        self._without_rows: set[str] = set()  # weights that are not rows of blocks
        self._lacks_parts = self._file is None

    @cached_property
    def spec(self) -> ModelSpec | None:
        """The model's spec, if the model's files give it to transformers only."""
        text = self._text("config")
        return None if text is None else spec_of_settings(json.loads(text))

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if the model's files give it to transformers only."""
        text = self._text("tokenizer")
        if text is None or self._file is None:
            return None
        content = self._file.read(_TOKENIZER)
        self._parts[_TOKENIZER] = content
        settings = json.loads(text)
        return _tokenizer(content, settings["special_tokens_map"], settings["chat_template"])

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user by the load that made the parts."""
        return tuple(json.loads(self._text("notes") or "[]"))

    def through(self, pack: PackMatrix) -> PackMatrix:
        """A function that reads the matrices that the cache has, and makes the others by `pack`."""

        def get(name: str, form: MatrixForm, read: Callable[[], Iterable[Affine]]) -> NativeMatrix:
            matrix = self._matrix(name, form)
            if matrix is None:
                matrix = pack(name, form, read)
                self._lacks_parts = True
            if self._path is not None:
                form = matrix.form
                self._parts |= {
                    f"{form.kind}.{name}.{part}": tensor for part, tensor in matrix.parts.items()
                }
                if form.types:
                    self._types[name] = [
                        (kind, len(list(panels))) for kind, panels in groupby(form.types)
                    ]
            return matrix

        return get

    def unpacked(self, take: Take, spec: ModelSpec, dtype: torch.dtype) -> Take:
        """`take`, which reads the weights that stay unpacked from the cache. They stay in its
        file.
        """
        kept = {*unpacked_names(spec, spec.shapes), spec.embedding_name}

        def get(name: str) -> Tensor | None:
            if name not in kept or self._path is None:
                return take(name)
            place = f"plain.{name}"
            if self._file is not None and self._file.entries.get(place) == (
                NAMES[dtype],
                spec.shapes[name],
            ):
                self._parts[place] = self._file.mapped(place)
                return self._parts[place]
            weight = take(name)
            if weight is not None:
                self._parts[place] = weight
                self._lacks_parts = True
            return weight

        return get

    def stored(self, rows: Take) -> Take:
        """`rows`, which gives a weight's rows of blocks; it is not asked again for weights that
        have none.
        """
        self._without_rows = set(json.loads(self._text("without_rows") or "[]"))

        def get(name: str) -> Tensor | None:
            if name in self._without_rows:
                return None
            found = rows(name)
            if found is None:
                self._without_rows.add(name)
                self._lacks_parts = True
            return found

        return get

    def save(
        self, spec: ModelSpec | None = None, tokenizer: Any = None, notes: Iterable[str] = ()
    ) -> None:
        """Writes the parts in a thread, if the cache lacked some.

        `spec` and `tokenizer`: by transformers, if only it can read them.
        """
        path = self._path
        parts = self._parts
        types = self._types
        # Nothing is kept in memory once it is written
        self._path = None
        self._parts = {}
        if path is None or self._name is None or not self._lacks_parts:
            return
        if spec is not None and (text := _config_text(spec)) is not None:
            self._texts["config"] = text
        if (
            tokenizer is not None
            and _TOKENIZER not in parts
            and (stored := _tokenizer_parts(tokenizer)) is not None
        ):
            self._texts["tokenizer"], parts[_TOKENIZER] = stored
        self._texts |= {"notes": json.dumps(list(notes)), "types": json.dumps(types)}
        self._texts["without_rows"] = json.dumps(sorted(self._without_rows))
        size = sum(part.nbytes for part in parts.values())
        if not _LEAST <= size <= sidecars.CACHED // _SHARE:
            return
        try:
            is_same = self._name() == path
        except OSError:
            is_same = False
        if not is_same:  # the model's files have changed since
            return
        thread = threading.Thread(
            target=_write, args=(path, parts, {**_FORM, **self._texts}), name="layerskip cache"
        )
        _writing.append(thread)
        thread.start()

    def _text(self, name: str) -> str | None:
        if self._file is None or name not in self._file.metadata:
            return None
        self._texts[name] = self._file.metadata[name]
        return self._texts[name]

    def _matrix(self, name: str, form: MatrixForm) -> NativeMatrix | None:
        """A matrix of the cache, in huge pages as a packed one; None if it lacks one of its
        parts.
        """
        if self._file is None:
            return None
        forms = [form]
        if form.kind == "fp32":
            forms.append(replace(form, kind="widened"))
        if form.kind in ("fp32", "bf16") and name in self._stored_types:
            types = (kind for kind, panels in self._stored_types[name] for _ in range(panels))
            forms.append(replace(form, kind="stored", types=tuple(types)))
        for found in forms:
            needed = {part: (NAMES[dtype], shape) for part, (dtype, shape) in found.parts.items()}
            if all(
                self._file.entries.get(f"{found.kind}.{name}.{part}") == entry
                for part, entry in needed.items()
            ):
                return NativeMatrix(
                    found,
                    {
                        part: self._read(f"{found.kind}.{name}.{part}", *found.parts[part])
                        for part in needed
                    },
                )
        return None

    def _read(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        assert self._file is not None
        return self._file.read_into(name, self._memory.empty(shape, dtype))

    @cached_property
    def _stored_types(self) -> dict[str, list[tuple[str, int]]]:
        types: dict[str, list[tuple[str, int]]] = json.loads(self._text("types") or "{}")
        return types


def kept_parts(name: str, location: Location, dtype: str, packing: PackingConfig) -> KeptParts:
    """The parts of a model that is in files here, for a load in this precision and packing."""
    if (
        name in EMBEDDED
        or kernels() is None
        or (location.gguf_file is None and location.folder is None)
    ):
        return KeptParts()
    try:
        return KeptParts(lambda: _path(location, dtype, packing))
    except (OSError, CheckpointError):
        return KeptParts()


def finish_writing() -> None:
    """Waits until all files of the cache are written: it would disturb measurements."""
    while _writing:
        _writing.pop().join()


def _path(location: Location, dtype: str, packing: PackingConfig) -> Path:
    """The file of the cache for a model in its current state. Raises OSError."""
    compiled = kernels()
    digest = hashlib.sha256()
    made_for = [
        dtype,
        packing.quantize,
        packing.draft_weights,
        packing.draft_head,
        compiled is not None and compiled.widens_bf16,
    ]
    digest.update(
        json.dumps([_FORM, *map(_version, ("layerskip", "transformers")), *made_for]).encode()
    )
    folder = Path(os.path.realpath(location.path))
    settings = {INFO_FILE, ORDER_FILE}  # which a load reads anyway
    files = model_files(folder) - settings if location.gguf_file is None else {location.gguf_file}
    calibrated = sidecars.cache_folder().glob(f"*.{INT4_FILE}")
    for path in (*(folder / file for file in sorted(files)), *sorted(calibrated)):
        state = path.stat()
        digest.update(f"{path} {state.st_size} {state.st_mtime_ns}\n".encode())
        if path.suffix in (".gguf", ".safetensors"):
            with path.open("rb") as file:
                digest.update(file.read(_ENDS))
                file.seek(max(0, state.st_size - _ENDS))
                digest.update(file.read(_ENDS))
    return sidecars.cache_folder() / f"{digest.hexdigest()[:32]}.packed.safetensors"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _opened(path: Path) -> WeightFile | None:
    try:
        file = sidecars.open_formed(path, _FORM)
    # There is none, or a disk lost a part of it: safetensors has an error type of its own
    except Exception:
        return None
    sidecars.touch(path)
    return file


def _write(path: Path, parts: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file of the cache, if its folder can be written and its disk has room, and removes
    the least used ones.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    size = sum(part.nbytes for part in parts.values())
    text = sum(len(json.dumps(each)) for each in metadata.values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < _SHARE * size:
            return
        for other in path.parent.glob("*.part"):
            if other.stat().st_mtime < time.time() - _ABANDONED:
                other.unlink()
        with temporary.open("xb") as file:
            writer = TensorWriter(file, text + (len(parts) + 16) * ENTRY)
            for name, part in parts.items():
                writer.add(name, part)
            writer.end(metadata)
            file.flush()
            os.fsync(file.fileno())  # after a power cut the renamed file must be whole
        os.replace(temporary, path)
        sidecars.drop_unused(path)
    except OSError:
        pass  # the next load makes the parts again
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _config_text(spec: ModelSpec) -> str | None:
    """The config.json of a spec that transformers made; None if it gives another spec without
    transformers.
    """
    config = spec.config
    settings = config.to_json_string(use_diff=True) if hasattr(config, "to_json_string") else None
    if settings is None:
        return None
    known = spec_of_settings(json.loads(settings))
    return (
        settings
        if known == spec and known is not None and end_ids(known.config) == end_ids(config)
        else None
    )


def _tokenizer(
    content: Tensor, special_tokens_map: Mapping[str, str], chat_template: Any
) -> Tokenizer:
    import tokenizers

    backend = tokenizers.Tokenizer.from_buffer(content.numpy().tobytes())
    return Tokenizer(backend, special_tokens_map, chat_template)


def _tokenizer_parts(tokenizer: Any) -> tuple[str, Tensor] | None:
    """A tokenizer of transformers as settings and the bytes of tokenizer.json; None if these do not
    give the same tokenizer.
    """
    from transformers import PreTrainedTokenizerFast as Base

    if not isinstance(tokenizer, Base) or getattr(tokenizer, "split_special_tokens", False):
        return None
    if any(
        getattr(type(tokenizer), name, None) is not getattr(Base, name, None) for name in _ENCODING
    ):
        return None
    try:
        text = tokenizer.backend_tokenizer.to_str()
    except Exception:  # of tokenizers, for parts written in Python
        return None
    content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    special = {
        name: str(token)
        for name, token in tokenizer.special_tokens_map.items()
        if not isinstance(token, list)
    }
    known = _tokenizer(content, special, tokenizer.chat_template)
    ids = tokenizer(_PROBE)["input_ids"]
    same = [
        (known(_PROBE)["input_ids"], ids),
        (known.decode(ids), tokenizer.decode(ids, clean_up_tokenization_spaces=False)),
        (
            known.decode(ids, True),
            tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        ),
        (
            (known.eos_token_id, known.pad_token_id),
            (tokenizer.eos_token_id, tokenizer.pad_token_id),
        ),
        (len(known), len(tokenizer)),
    ]
    if any(ours != theirs for ours, theirs in same):
        return None
    return json.dumps(
        {"special_tokens_map": special, "chat_template": tokenizer.chat_template}
    ), content
