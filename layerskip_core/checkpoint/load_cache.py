"""The cache of loads: what a load made of a model's files, so that the next one only reads it.

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
from ..model.spec import AnySpec
from ..model.vocabulary import ORDER_FILE
from ..model.weights import Affine, Take
from ..prompting import Tokenizer
from . import sidecars
from .folder import INT4_FILE, WeightFile, spec_of_settings
from .info import INFO_FILE
from .loaded import end_ids
from .locate import ModelRef
from .packed_file import ENTRY, NAMES, TensorWriter, form_in_file, unpacked_names

# A change of what the parts hold needs another format
_FORM = {"format": "layerskip cache 1", "layout": str(LAYOUT)}
_LEAST = 32 << 20  # bytes: a smaller model loads as fast from its own files
_SHARE = 4  # a file takes at most this part of the cache, and of the free space
_ENDS = 1 << 16  # bytes of a file's beginning and end that name it
_ABANDONED = 3600  # seconds after which a file that another process was writing is removed
_TOKENIZER = "tokenizer.json"
# Methods of transformers' tokenizers
_ENCODING = ("__call__", "_encode_plus", "decode", "_decode", "convert_ids_to_tokens")
# A tokenizer must encode it as transformers does, to be cached
_PROBE = "Hello, world!  It's 10 o'clock,\n\t\u0434\u0430 \u4f60\u597d \U0001f600 <s></s>"

_writing: list[threading.Thread] = []


class LoadCache:
    """The parts of one model that an earlier load made: those in the cache are read, the others
    made and collected, and `save` writes all of them.
    """

    def __init__(self, find: Callable[[], Path] | None = None) -> None:
        """`find`: the path of the cache's file, by the state of the model's files now; None: no
        cache.
        """
        self._find = find
        self._path = None if find is None else find()
        self._file = None if self._path is None else _opened(self._path)
        self._memory = HugePages()
        self._parts: dict[str, Tensor] = {}  # by their names in the file: what this load uses
        # Of matrices in `stored`: type and number of successive panels
        self._types: dict[str, list[tuple[str, int]]] = {}
        self._texts: dict[str, str] = {}
        self._without_rows = set(json.loads(self._text("without_rows") or "[]"))
        self._is_incomplete = self._file is None

    @classmethod
    def of(cls, model: ModelRef, dtype: str, packing: PackingConfig) -> "LoadCache":
        """The parts of a model that is in files here, for a load in this precision and packing."""
        is_local = model.gguf is not None or model.own_folder is not None
        if not is_local or kernels() is None:
            return NO_CACHE
        try:
            return cls(lambda: _path(model, dtype, packing))
        except (OSError, CheckpointError):
            return NO_CACHE

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
        import tokenizers

        content = self._file.read(_TOKENIZER)
        self._parts[_TOKENIZER] = content
        backend = tokenizers.Tokenizer.from_buffer(content.numpy().tobytes())
        return Tokenizer(backend, **json.loads(text))

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user by the load that made the parts."""
        return tuple(json.loads(self._text("notes") or "[]"))

    def fingerprint(self, make: Callable[[], str]) -> str:
        """The model's fingerprint (sidecars.py), which `make` computes."""
        if self._path is None:
            return make()
        found = self._text("fingerprint") or self._texts.get("fingerprint")
        if found is None:
            found = self._texts["fingerprint"] = make()
            self._is_incomplete = True
        return found

    def through(self, pack: PackMatrix) -> PackMatrix:
        """A function that reads the matrices that the cache has, and makes the others by `pack`."""
        if self._path is None:
            return pack

        def read_or_pack(
            name: str, form: MatrixForm, read: Callable[[], Iterable[Affine]]
        ) -> NativeMatrix:
            matrix = self._matrix(name, form)
            if matrix is None:
                matrix = pack(name, form, read)
                self._is_incomplete = True
            form = matrix.form
            for part, tensor in matrix.parts.items():
                self._parts[f"{form.kind}.{name}.{part}"] = tensor
            if form.types:
                successive = [(kind, len(list(panels))) for kind, panels in groupby(form.types)]
                self._types[name] = successive
            return matrix

        return read_or_pack

    def unpacked(self, take: Take, spec: ModelSpec, dtype: torch.dtype) -> Take:
        """`take`, which reads the weights that stay unpacked from the cache. They stay in its
        file.
        """
        if self._path is None:
            return take
        unpacked = {*unpacked_names(spec, spec.shapes), spec.embedding_name}

        def map_or_take(name: str) -> Tensor | None:
            if name not in unpacked:
                return take(name)
            place = f"plain.{name}"
            if self._has(place, dtype, spec.shapes[name]):
                assert self._file is not None
                self._parts[place] = self._file.mapped(place)
                return self._parts[place]
            weight = take(name)
            if weight is not None:
                self._parts[place] = weight
                self._is_incomplete = True
            return weight

        return map_or_take

    def rows(self, rows: Take) -> Take:
        """`rows`, which gives a weight's rows of blocks; it is not asked again for weights that
        have none.
        """
        if self._path is None:
            return rows

        def known_rows(name: str) -> Tensor | None:
            if name in self._without_rows:
                return None
            found = rows(name)
            if found is None:
                self._without_rows.add(name)
                self._is_incomplete = True
            return found

        return known_rows

    def save(self, spec: AnySpec | None, tokenizer: Any, notes: Iterable[str] = ()) -> None:
        """Writes the parts in a thread, if the cache lacked some. `spec`: None if the model's files
        must be opened for it anyway.
        """
        path = self._path
        parts = self._parts
        # Nothing stays in memory for the cache once it is written
        self._path = None
        self._parts = {}
        if path is None or self._find is None or not self._is_incomplete:
            return
        config = None if spec is None else _config_text(spec)
        if config is not None:
            self._texts["config"] = config
        described = _tokenizer_parts(tokenizer)
        if described is not None:
            self._texts["tokenizer"], parts[_TOKENIZER] = described
        self._texts["notes"] = json.dumps(list(notes))
        self._texts["types"] = json.dumps(self._types)
        self._texts["without_rows"] = json.dumps(sorted(self._without_rows))
        size = sum(part.nbytes for part in parts.values())
        if not _LEAST <= size <= sidecars.CACHED // _SHARE:
            return
        try:
            if self._find() != path:  # the model's files have changed since
                return
        except OSError:
            return
        arguments = (path, parts, {**_FORM, **self._texts})
        thread = threading.Thread(target=_write, args=arguments, name="layerskip cache")
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
        entries = {} if self._file is None else self._file.entries
        forms = [form_in_file(entries, name, form)]
        if form.kind in ("fp32", "bf16") and name in self._stored_types:
            types = list[str]()
            for kind, panels in self._stored_types[name]:
                types += [kind] * panels
            forms.append(replace(form, kind="stored", types=tuple(types)))
        for found in forms:
            prefix = f"{found.kind}.{name}."
            if all(self._has(prefix + part, *like) for part, like in found.parts.items()):
                parts = {
                    part: self._read(prefix + part, *like) for part, like in found.parts.items()
                }
                return NativeMatrix(found, parts)
        return None

    def _has(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        return self._file is not None and self._file.entries.get(name) == (NAMES[dtype], shape)

    def _read(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        assert self._file is not None
        return self._file.read_into(name, self._memory.empty(shape, dtype))

    @cached_property
    def _stored_types(self) -> dict[str, list[tuple[str, int]]]:
        types: dict[str, list[tuple[str, int]]] = json.loads(self._text("types") or "{}")
        return types


NO_CACHE = LoadCache()


def finish_writing() -> None:
    """Waits until all files of the cache are written: it would disturb measurements."""
    while _writing:
        _writing.pop().join()


def _path(model: ModelRef, dtype: str, packing: PackingConfig) -> Path:
    """The file of the cache for a model in its current state. Raises OSError."""
    compiled = kernels()
    made_for = [
        _FORM,
        _version("layerskip"),
        _version("transformers"),
        dtype,
        packing.quantize,
        packing.draft_weights,
        packing.draft_head,
        compiled is not None and compiled.widens_bf16,
    ]
    digest = hashlib.sha256(json.dumps(made_for).encode())
    folder = Path(os.path.realpath(model.path))
    calibrated = sorted(sidecars.cache_folder().glob(f"*.{INT4_FILE}"))
    for path in [*(folder / name for name in model.file_names), *calibrated]:
        if path.name in (INFO_FILE, ORDER_FILE):  # every load reads these from the folder
            continue
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


def _config_text(spec: AnySpec) -> str | None:
    """The config.json of a spec that transformers made; None for other specs, and if it gives
    another spec without transformers.
    """
    config = spec.config
    if not hasattr(config, "to_json_string"):
        return None
    text: str = config.to_json_string(use_diff=True)
    lean = spec_of_settings(json.loads(text))
    is_same = lean is not None and lean == spec and end_ids(lean.config) == end_ids(config)
    return text if is_same else None


def _tokenizer_parts(tokenizer: Any) -> tuple[str, Tensor] | None:
    """A tokenizer of transformers as settings and the bytes of tokenizer.json; None for our own,
    and if these do not give the same tokenizer.
    """
    if isinstance(tokenizer, Tokenizer):
        return None
    from transformers import PreTrainedTokenizerFast as Base

    if not isinstance(tokenizer, Base) or getattr(tokenizer, "split_special_tokens", False):
        return None
    for name in _ENCODING:
        if getattr(type(tokenizer), name, None) is not getattr(Base, name, None):
            return None
    special = {}
    for name, token in tokenizer.special_tokens_map.items():
        if not isinstance(token, list):
            special[name] = str(token)
    settings = {"special_tokens_map": special, "chat_template": tokenizer.chat_template}
    # Both use one backend: a second one would take 100 MB and half a second
    own = Tokenizer(tokenizer.backend_tokenizer, **settings)
    ids = tokenizer(_PROBE)["input_ids"]
    is_same = (
        own(_PROBE)["input_ids"] == ids
        and _decoded(own, ids) == _decoded(tokenizer, ids)
        and own.eos_token_id == tokenizer.eos_token_id
        and own.pad_token_id == tokenizer.pad_token_id
        and len(own) == len(tokenizer)
    )
    if not is_same:
        return None
    try:
        text = tokenizer.backend_tokenizer.to_str()
    except Exception:  # of tokenizers, for parts written in Python
        return None
    content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return json.dumps(settings), content


def _decoded(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of token ids, with and without special tokens."""
    texts = []
    for skip in (False, True):
        text = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        texts.append(text)
    return texts
