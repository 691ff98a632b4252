"""Models on disk: a folder, a GGUF file, a hub id or an embedded default <-> model, tokenizer and layerskip.json."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import nn

from ..config.decoding import Strategy
from ..config.packing import PackingConfig
from ..errors import CheckpointError, ConfigError
from ..model import GenericBackend, ModelSpec, NativeBackend, PackedBackend, can_pack, can_run_native, suits_kernels
from ..model.config_values import tokens_of
from ..model.draft_vocabulary import token_order
from ..model.native.compiled import kernels_asked_for, missing_kernels
from ..model.weights import check_model
from ..prompting.encoding import CHAT, encode_prompt
from .fast_read import FileWeights, generation_config, lean_config, lean_tokenizer
from .gguf_header import read_gguf_header
from .info import ADAPTER_FILE, CheckpointInfo, holds_model, read_info
from .stored import TOKENIZER_FILE, adapters_of, check_config, check_stored_weights, open_weights, read_config, read_settings
from .swap import read_whole, settle

EMBEDDED = {"embedded": "commands-layerskip", "embedded-base": "commands-base"}
_NO_FOREIGN_CODE = {"trust_remote_code": False}  # said, because a library that is not told asks on standard input
_PANIC = "PanicException"  # of a library in Rust, which is no Exception
_LARGE_MODEL = 50_000_000  # parameters; from here on bf16 is faster on a CPU that has it

# (exit layer, draft tokens) of the published checkpoints: LayerSkip tables 3-5; Llama 3 as in their model cards.
PUBLISHED = {
    "facebook/layerskip-llama2-7B": (8, 12),
    "facebook/layerskip-llama2-13B": (15, 12),
    "facebook/layerskip-llama2-70B": (10, 12),
    "facebook/layerskip-llama3-8B": (8, 6),
    "facebook/layerskip-llama3.2-1B": (4, 6),
    "facebook/layerskip-codellama-7B": (6, 12),
    "facebook/layerskip-codellama-34B": (8, 12),
}


@dataclass
class Decoder:
    """A checkpoint in memory, ready to run any span of its layers."""

    name: str
    model: Any  # a transformers causal language model; only its configurations when loaded for decoding
    tokenizer: Any
    info: CheckpointInfo
    backend: Any  # a GenericBackend; a PackedBackend when loaded for decoding and the architecture allows it
    notes: tuple[str, ...] = ()  # what whoever waits for this model should know of how it runs

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends an answer: the generation config's, the config's and the tokenizer's."""
        found: set[int] = set()
        for source in (getattr(self.model, "generation_config", None), self.model.config, self.tokenizer):
            found.update(tokens_of(getattr(source, "eos_token_id", None)))
        return frozenset(found)

    @property
    def prompt_template(self) -> str | None:
        """layerskip.json's template, else the tokenizer's chat template, else none."""
        if self.info.prompt_template is not None:
            return self.info.prompt_template
        return CHAT if getattr(self.tokenizer, "chat_template", None) else None

    def encode_prompt(self, prompt: str, raw: bool = False) -> list[int]:
        """Token ids of a prompt in this checkpoint's template (`raw`: as it stands). Raises ConfigError for one that the
        model has no embedding of.
        """
        ids = encode_prompt(self.tokenizer, None if raw else self.prompt_template, prompt)
        last, known = max(ids, default=0), self.backend.vocab_size
        if last >= known:
            token = self.tokenizer.decode([last])
            raise ConfigError(f"the prompt must have tokens of the model, of which there are {known}, got {token!r}, id {last}")
        return ids

    def detokenize(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def recommended(self) -> tuple[int, int]:
        """(exit layer, draft tokens): of layerskip.json, of the published checkpoint, or a quarter of the layers and 6."""
        exit_layer, drafts = PUBLISHED.get(self.name, (max(1, self.backend.num_layers // 4), 6))
        return self.info.exit_layer or exit_layer, self.info.num_draft_tokens or drafts

    @property
    def strategy(self) -> Strategy | None:
        """How this checkpoint is best decoded, by a sweep or because its exits were trained; None: nobody knows."""
        known = self.info.exit_layer is not None or self.info.trained_exits or self.name in PUBLISHED
        return self.info.strategy or ("self-speculative" if known else None)


Trainable = Decoder


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises ConfigError for a device that is not here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"--device must be auto, cpu, cuda, cuda:N or mps, got {device}") from None
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(chosen.type, False):
        raise ConfigError(f"--device {device} was asked for, but this machine or this build of torch has none")
    return chosen


def pick_dtype(dtype: str, device: torch.device, parameters: int) -> torch.dtype:
    """`auto`: bf16 on CUDA, and on a CPU with AVX-512 for models of 50M parameters and more; else fp32."""
    if dtype != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    fast = device.type == "cuda" or "AVX512" in torch.backends.cpu.get_cpu_capability()
    return torch.bfloat16 if fast and (device.type == "cuda" or parameters >= _LARGE_MODEL) else torch.float32


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps progress bars, log lines and warnings of transformers and peft off stderr, in a block or a decorated function."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
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


@contextmanager
def _no_gguf_bar() -> Iterator[None]:
    """Keeps the bar over a GGUF file's tensors off stderr, which no switch of transformers reaches."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = reader.tqdm
    reader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar


def load_checkpoint(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    implementation: Literal["auto", "generic"] = "generic",
    packing: PackingConfig | None = None,
) -> Decoder:
    """Loads a model by embedded name, folder, GGUF file or hub id, in evaluation mode.

    `implementation="auto"` is for decoding alone: where the architecture allows it the weights are repacked, and `model`
    keeps its configuration but no weights. `packing` says how.

    Raises:
        CheckpointError: it is not there, is incomplete or damaged, or cannot be split by depth.
        ConfigError: the device is not here, or the packing is not to be had for this architecture, device or machine.
    """
    target = pick_device(device)
    if implementation == "auto":
        kernels_asked_for()
    return read_whole(name, lambda: _load(name, device, target, dtype, implementation, packing))


def _load(
    name: str,
    device: str,
    target: torch.device,
    dtype: str,
    implementation: Literal["auto", "generic"],
    packing: PackingConfig | None,
) -> Decoder:
    if (Path(name) / ADAPTER_FILE).is_file():
        return _load_adapted(name, device, dtype, implementation, packing)
    path, keywords = _locate(name)
    if implementation == "auto" and Path(path).is_dir() and not keywords:
        info = read_info(path)
        lean: Decoder | None = _reading(name, lambda: _load_lean(name, path, info, target, dtype, packing))
        if lean is not None:
            return lean
    return _load_with_transformers(name, target, dtype, implementation, packing)


def _load_lean(
    name: str, path: str, info: CheckpointInfo, device: torch.device, dtype: str, packing: PackingConfig | None
) -> Decoder | None:
    """Weights straight from the files, transformers not imported; None where it has to be."""
    config = lean_config(path)
    if config is None:
        return None
    spec = ModelSpec.of(config)
    weights = FileWeights(path, spec, device)
    tokenizer = lean_tokenizer(path)
    if tokenizer is None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path, **_NO_FOREIGN_CODE)
    check_tokenizer(tokenizer, spec.vocab)
    precision = pick_dtype(dtype, device, spec.parameters)
    decoder, notes = _decoder(config, precision, device, packing)
    backend = decoder(config, weights.reader(precision), packing, _token_order(path, config, packing))
    model = SimpleNamespace(config=config, generation_config=generation_config(path))
    return Decoder(name, model, tokenizer, info, backend, notes)


@quiet_transformers()
def _load_with_transformers(
    name: str,
    target: torch.device,
    dtype: str,
    implementation: Literal["auto", "generic"],
    packing: PackingConfig | None,
) -> Decoder:
    path, keywords = _locate(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, spec = _reading(name, lambda: _read_architecture(path, keywords))
    _reading(name, lambda: _check_folder_weights(path, spec))
    tokenizer = _reading(name, lambda: AutoTokenizer.from_pretrained(path, **keywords, **_NO_FOREIGN_CODE))
    _reading(name, lambda: check_tokenizer(tokenizer, spec.vocab))
    extra = dict(keywords)
    if "gguf_file" in keywords:
        from transformers import GgufConfig

        extra["quantization_config"] = GgufConfig(dequantize=True)
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    with _no_gguf_bar() if "gguf_file" in keywords else nullcontext():
        model, report = _reading(
            name,
            lambda: AutoModelForCausalLM.from_pretrained(
                path, dtype="auto", attn_implementation=attention, output_loading_info=True, **extra, **_NO_FOREIGN_CODE
            ),
        )
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", []))
    if missing:
        raise CheckpointError(f"model {name} is incomplete: {len(missing)} weights are missing, {missing[0]} the first")
    if "gguf_file" in keywords:
        model = _without_quantization(model)
    _reading(name, lambda: check_model(model, spec))
    model = _converted(model.to(target), pick_dtype(dtype, target, spec.parameters)).eval()
    backend, notes = _reading(name, lambda: _depth_of(model, implementation, packing, path))
    return Decoder(name, model, tokenizer, read_info(path), backend, notes)


def _read_architecture(path: str, keywords: dict[str, Any]) -> tuple[Any, ModelSpec]:
    """A model's configuration by transformers, after what it is made of was checked: nothing is built of what cannot be."""
    from transformers import AutoConfig, PreTrainedConfig

    folder = Path(path)
    if "gguf_file" in keywords:
        header = read_gguf_header(folder / keywords["gguf_file"])
    elif folder.is_dir():
        read_config(folder)
        read_settings(folder, TOKENIZER_FILE)
    else:
        check_config(PreTrainedConfig.get_config_dict(path, **_NO_FOREIGN_CODE)[0])
    config = AutoConfig.from_pretrained(path, **keywords, **_NO_FOREIGN_CODE)
    spec = ModelSpec.of(config)
    if "gguf_file" in keywords and spec.parameters > header.parameters:
        raise CheckpointError(f"needed {spec.parameters} weights, by its sizes; found {header.parameters}")
    return config, spec


def _check_folder_weights(path: str, spec: ModelSpec) -> None:
    files = open_weights(path) if Path(path).is_dir() else {}
    if spec.shapes.keys() & files.keys():  # else they have older names, which transformers knows
        check_stored_weights(files, spec)


@quiet_transformers()
def _load_adapted(
    name: str,
    device: str,
    dtype: str,
    implementation: Literal["auto", "generic"],
    packing: PackingConfig | None,
) -> Decoder:
    """An adapter merged into its base, which its config names as `--model` would; that may be another adapter."""
    from transformers import AutoTokenizer

    adapters, base = adapters_of(name)
    loaded = load_checkpoint(base, device, dtype)
    model, spec = loaded.model, loaded.backend.spec
    for adapter in reversed(adapters):
        model = _reading(adapter, partial(_merged, model, adapter))
    model.requires_grad_(True)  # peft froze the base
    _reading(name, lambda: read_settings(name, TOKENIZER_FILE))
    tokenizer = _reading(name, lambda: AutoTokenizer.from_pretrained(name, **_NO_FOREIGN_CODE))
    _reading(name, lambda: check_tokenizer(tokenizer, spec.vocab))
    _reading(name, lambda: check_model(model, spec))
    backend, notes = _reading(name, lambda: _depth_of(model, implementation, packing, name))
    return Decoder(name, model, tokenizer, read_info(name), backend, notes)


def _merged(model: nn.Module, adapter: str) -> Any:
    """A model with an adapter's weights added to its own. Raises CheckpointError for one that its files lack."""
    from peft import PeftModel, get_peft_model_state_dict

    adapted = PeftModel.from_pretrained(model, adapter)
    stored = open_weights(adapter)
    missing = sorted(get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() - stored.keys()) if stored else []
    if missing:  # peft leaves them as they are made
        raise CheckpointError(f"the adapter is incomplete: {len(missing)} weights are missing, {missing[0]} the first")
    return adapted.merge_and_unload().eval()


def _depth_of(
    model: Any, implementation: Literal["auto", "generic"], packing: PackingConfig | None, path: str
) -> tuple[GenericBackend | PackedBackend, tuple[str, ...]]:
    """What runs a model's layers, and notes on it."""
    if implementation == "auto" and can_pack(model.config):
        weight = model.get_input_embeddings().weight
        decoder, notes = _decoder(model.config, weight.dtype, weight.device, packing)
        return decoder.of(model, packing, _token_order(path, model.config, packing)), notes
    if packing is not None and not packing.is_plain:
        raise ConfigError(f"low-bit, draft and exact weights need a model that can be repacked, got {model.config.model_type}")
    return GenericBackend(model), ()


def _decoder(
    config: Any, dtype: torch.dtype, device: torch.device, packing: PackingConfig | None
) -> tuple[type[PackedBackend], tuple[str, ...]]:
    """The best implementation for repacked weights here, and a note where there could be a better one."""
    if can_run_native(config, dtype, device, packing):
        return NativeBackend, ()
    missing = missing_kernels() if suits_kernels(config, dtype, device, packing) else None
    return PackedBackend, () if missing is None else (missing,)


def _token_order(path: str, config: Any, packing: PackingConfig | None) -> list[int] | None:
    return token_order(path, config.vocab_size) if packing is not None and packing.draft_vocab else None


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Raises CheckpointError for a tokenizer without a vocabulary, or with words that the model has no embedding of.

    Special tokens may lie beyond, as Gemma 3's for images do: a text model never meets them.
    """
    if tokenizer is None:
        return
    if tokenizer.vocab_size == 0:
        raise CheckpointError("the tokenizer has no vocabulary")
    if len(tokenizer) <= vocab_size:
        return
    special = set(getattr(tokenizer, "all_special_ids", ()))
    special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    beyond = {token: word for word, token in tokenizer.get_vocab().items() if token >= vocab_size and token not in special}
    if beyond:
        first = min(beyond)
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeddings of {vocab_size} (vocab_size): "
            f"{beyond[first]!r} is token {first}"
        )


@quiet_transformers()
def load_blank(name: str, seed: int, tokenizer: Any = None) -> Decoder:
    """The architecture of a checkpoint with fresh random weights, in fp32 on the CPU.

    With a `tokenizer` the vocabulary takes its size; without one the checkpoint's own is used. The folder needs no weights.
    """
    path, keywords = _locate(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, spec = _reading(name, lambda: _read_architecture(path, keywords))
    if tokenizer is None:
        tokenizer = _reading(name, lambda: AutoTokenizer.from_pretrained(path, **keywords, **_NO_FOREIGN_CODE))
        _reading(name, lambda: check_tokenizer(tokenizer, spec.vocab))
    else:
        config.vocab_size = len(tokenizer)
        for special in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config, special, getattr(tokenizer, special))
    _reading(name, lambda: _require_memory(ModelSpec.of(config)))
    torch.manual_seed(seed)
    model = _reading(name, lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa"))
    return Decoder(name, model, tokenizer, read_info(path), GenericBackend(model))


def stored_dtype(name: str) -> torch.dtype:
    """The precision a checkpoint's weights are stored in, by its config; a converted model is saved in the same."""
    path, keywords = _locate(adapters_of(name)[1])
    dtype = getattr(_reading(name, lambda: _read_architecture(path, keywords))[0], "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """What from_pretrained takes for a model name: a path or hub id, and keywords."""
    if name in EMBEDDED:
        folder = resources.files("layerskip_core.embedded") / EMBEDDED[name]
        return str(folder), {}
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        settle(path)
        if not holds_model(path):
            raise CheckpointError(f"folder {name} holds no model: there is no config.json in it")
        return name, {}
    if name.count("/") == 1 and not path.is_absolute() and not name.startswith("."):
        return name, {}
    names = ", ".join(EMBEDDED)
    raise CheckpointError(f"no model {name!r}: needed {names}, a folder, a .gguf file or a hub id such as owner/name")


def _reading(name: str, read: Any) -> Any:
    """Runs a from_pretrained call; whatever it raises becomes one line that names the model."""
    try:
        return read()
    except ConfigError:  # of the weights asked for, not of the model
        raise
    except BaseException as error:  # OSError, ValueError, RuntimeError, SafetensorError, JSON errors: all mean "cannot be read"
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        known = isinstance(error, CheckpointError) or Path(name).exists() or name in EMBEDDED
        absent = "" if known else "there is no such folder, and as a hub id: "
        raise CheckpointError(f"cannot load model {name}: {absent}{reason}") from error


def _require_memory(spec: ModelSpec) -> None:
    """Raises CheckpointError for a model whose fresh weights this machine has no memory for."""
    needed, there = 4 * spec.parameters, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise CheckpointError(f"its {spec.parameters} weights need {needed >> 20} MB in fp32, this machine has {there >> 20}")


def _converted(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The parameters in `dtype`. Not `model.to(dtype)`, which would round the rotary frequencies, a buffer in fp32, too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _without_quantization(model: nn.Module) -> nn.Module:
    """The same weights in a model that transformers agrees to save: rebuilt from its config without the GGUF part."""
    from transformers import AutoModelForCausalLM

    original: Any = model
    config = original.config.__class__.from_dict(
        {key: value for key, value in original.config.to_dict().items() if key != "quantization_config"}
    )
    rebuilt = AutoModelForCausalLM.from_config(config, dtype=next(model.parameters()).dtype, attn_implementation="sdpa")
    rebuilt.load_state_dict(model.state_dict())
    rebuilt.generation_config = original.generation_config
    return rebuilt  # type: ignore[no-any-return]
