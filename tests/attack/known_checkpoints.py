"""Damaged models that once caused a fault, and how the commands must react to each."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors.numpy import load_file, save_file

from .damage import DEEP
from .model_files import Tensors, change_weights, cut, edit_gguf, edit_json, redirect_shards

MARKER = "executed"  # the file that code of the model would write
_FEW = "--max-new-tokens 6"
_GENERATE = f"generate --model MODEL {_FEW}"
_IMPORT = "import MODEL --output imported"
_BENCH = "bench --model MODEL --samples 2 --repeats 1 --max-new-tokens 4"
_SHORTLY = "--model MODEL --steps 1 --batch-size 2 --samples 4 --max-length 48 --output out"
_TRAIN = f"finetune {_SHORTLY}"
_FROZEN = f"finetune --frozen --exits 2 --answer-tokens 4 {_SHORTLY}"
COMMANDS = (
    *(_GENERATE, _BENCH, _IMPORT, _TRAIN, "inspect --model MODEL --max-new-tokens 2"),
    *(f"{_GENERATE} --lines --batch-size 2", f"{_GENERATE} --strategy autoregressive", f"{_GENERATE} --raw --exit 2"),
    *(f"{_GENERATE} --quantize int8", f"{_GENERATE} --draft-weights int4 --draft-vocab 50"),
    "sweep-exits --model MODEL --samples 2 --exits 2 --specs 2 --max-new-tokens 4 --save",
    *(f"{_GENERATE} {flags}" for flags in ("--quantize int4", "--policy fast", "--temperature 1", "--exit-confidence 0.5")),
    f"{_GENERATE} --strategy draft-and-verify",
    "calibrate --model MODEL --samples 2 --length 8 --steps 1 --output calibrated",
    *(f"{_GENERATE} {flags}" for flags in ("--exit 1 --spec 3", "--strategy early-exit --exit 1")),
    _FROZEN,
    "verify MODEL --samples 2 --max-new-tokens 3 --draws 0 --specs 2 --precisions fp32,int8 --kernels avx512,torch",
)


@dataclass(frozen=True)
class Known:
    """One kind of damage. `must_fail`: no right result is possible, so each of `commands` must end with an error."""

    name: str
    spoil: Callable[[Path], object]
    model: str = "llama"
    must_fail: bool = True
    commands: tuple[str, ...] = (_GENERATE, _IMPORT)


# --- settings ---------------------------------------------------------------------------------------------------------------


def _config(
    model: str = "llama", must_fail: bool = True, commands: tuple[str, ...] = (_GENERATE, _IMPORT), **settings: object
) -> Known:
    said = ", ".join(f"{key} = {str(value)[:50]}" for key, value in settings.items())
    return Known(f"config.json: {said}", lambda path: edit_json(path / "config.json", **settings), model, must_fail, commands)


def _each(key: str, *values: object, model: str = "llama", must_fail: bool = True) -> Iterator[Known]:
    """A setting of config.json, with each of the values."""
    return (_config(model, must_fail, **{key: value}) for value in values)


def _rope(**settings: object) -> dict[str, object]:
    return {"rope_type": "default", **settings}


_HEADS = ((4, 3), (3, 2), (0, 0), (4, 0), (4, -2), (2, 4))
_CONFIGS: tuple[Known, ...] = (
    *_each("num_hidden_layers", 10**7, 2**31, 0, -1, 5, True, 4.5, "4", None),
    *(_config(num_attention_heads=heads, num_key_value_heads=kv) for heads, kv in _HEADS),
    *_each("head_dim", -8, 7, 9, 2**31, 16),
    *_each("head_dim", 0, must_fail=False),
    *_each("rms_norm_eps", -1, "x", 1e308, None),
    *_each("rope_parameters", *(_rope(rope_theta=theta) for theta in (0, -1, "x", None)), _rope(rope_type="x"), [], "x"),
    *_each("rope_parameters", _rope(rope_type="yarn", rope_theta=1e4)),
    *_each("sliding_window", -5, 0, "x", 1.5, model="gemma3_text"),
    *_each("layer_types", ["full_attention"], ["x"] * 4, [], "x", 5, model="gemma3_text"),
    *_each("layer_types", ["full_attention"], ["x"] * 4, model="qwen2"),
    *_each("no_rope_layers", [1], "x", ["a"] * 4, model="smollm3"),
    *_each("max_position_embeddings", 0, -1, "x", [1]),
    *_each("max_position_embeddings", 2**70, None, must_fail=False),
    _config(max_position_embeddings=1, commands=(_GENERATE,)),
    *_each("eos_token_id", "x", [None], [[1]], -1, 2**70, True, 1.5, {"a": 1}, [2, "x"], must_fail=False),
    *_each("vocab_size", 0, 299, 301, 2**40, -1, "x"),
    *_each("hidden_size", 0, 31, 33, 2**31, "x"),
    *_each("transformers_version", 5, must_fail=False),
    *_each("hidden_act", "x"),
)

# --- weights ----------------------------------------------------------------------------------------------------------------


def _weights(name: str, change: Callable[[Tensors], object], must_fail: bool = True) -> Known:
    spoil = partial(change_weights, change=change)
    return Known(f"weights: {name}", spoil, must_fail=must_fail, commands=(_GENERATE, _IMPORT, _BENCH))


def _filled(name: str, value: float) -> Known:
    return _weights(f"{value} in {name}", lambda tensors: tensors[name].view(-1)[:3].fill_(value))


def _added(name: str, length: int) -> Known:
    """A tensor that the architecture does not have. It may be ignored or refused, but never read beyond its end."""

    def add(tensors: Tensors) -> None:
        import torch

        tensors[name] = torch.ones(length)

    return _weights(f"{length} numbers as {name}", add, must_fail=False)


def _integers(tensors: Tensors) -> None:
    import torch

    tensors.update({name: (tensor * 100).to(torch.int32) for name, tensor in tensors.items()})


_NAMES = ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight")
_ADDED = (
    "self_attn.o_proj.bias",
    "self_attn.q_proj.bias",
    "mlp.down_proj.bias",
    "self_attn.k_norm.bias",
    "self_attn.q_norm.weight",
)
_WEIGHTS: tuple[Known, ...] = (
    *(_filled(name, value) for value in (float("nan"), float("inf"), float("-inf")) for name in _NAMES),
    _weights("integers", _integers),
    *(_added(f"model.layers.0.{name}", length) for name in _ADDED for length in (1, 32, 4096)),
    _added("lm_head.bias", 3),
)

# --- code and templates -----------------------------------------------------------------------------------------------------


def _code(path: Path, **settings: dict[str, object]) -> None:
    """Adds settings that name a module of code, by file, and the module under every name that a loader may look for."""
    code = f"open({str(path.parent / MARKER)!r}, 'w')\nclass Evil:\n    from_pretrained = classmethod(lambda *a, **k: 1)\n"
    for name in ("evil", "tokenization_evil", "modeling_evil", "configuration_evil", "custom_generate/generate"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / f"{name}.py").write_text(code)
    for file, changes in settings.items():
        edit_json(path / f"{file}.json", **changes)


def _pickle(path: Path) -> None:
    """Weights as a pickle that runs code when loaded."""
    code = f"cbuiltins\nexec\n(Vopen({str(path.parent / MARKER)!r}, 'w')\ntR.".encode()
    (path / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "training_args.bin", "tokenizer.pkl"):
        (path / name).write_bytes(code)


def _template(what: str, text: str) -> Known:
    spoil = lambda path: (path / "chat_template.jinja").write_text(text)  # noqa: E731
    return Known(f"a template that {what}", spoil, "chat", False, (_GENERATE, _BENCH, _IMPORT))


_MAP = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
_EVIL_TOKENIZER = {"auto_map": _MAP, "tokenizer_class": "Evil"}
_ADAPTING = {"base_model_class": "Evil", "parent_library": "evil"}
_CODE: tuple[Known, ...] = (
    Known("auto_map of the tokenizer", partial(_code, tokenizer_config={"auto_map": _MAP}), "llama", False, COMMANDS),
    Known("auto_map of the config", partial(_code, config={"auto_map": _MAP}), "llama", False, COMMANDS),
    Known(
        "an unknown type with code", partial(_code, config={"auto_map": _MAP, "model_type": "evil"}), "llama", True, COMMANDS
    ),
    Known("a tokenizer class with code", partial(_code, tokenizer_config=_EVIL_TOKENIZER), "chat", False),
    Known("code that generates", partial(_code, generation_config={"custom_generate": "."}), "llama", False),
    Known("auto_mapping of an adapter", partial(_code, adapter_config={"auto_mapping": _ADAPTING}), "adapter", False),
    Known("a pickle for weights", _pickle),
    _template("raises", "{{ raise_exception('no') }}"),
    _template("runs a command", "{{ cycler.__init__.__globals__.os.system('touch " + MARKER + "') }}"),
    _template("looks for classes", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    _template("loops", "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3),
    _template("divides by zero", "{{ 1 // 0 }}"),
    _template("is none", "{% for %}"),
    _template("is empty", ""),
    _template("grows", "{% set x = 'a' * 10**10 %}{{ x }}"),
    _template("calls itself", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    _template("counts far", "{% for a in range(10**9) %}{{ a }}{% endfor %}"),
)

# --- the other files --------------------------------------------------------------------------------------------------------


def _write(name: str, text: str, must_fail: bool = True) -> Known:
    return Known(f"{name} = {text[:12]}...", lambda path: (path / name).write_text(text), must_fail=must_fail)


def _tokenizer(what: str, must_fail: bool = True, **settings: object) -> Known:
    spoil = lambda path: edit_json(path / "tokenizer.json", **settings)  # noqa: E731
    return Known(f"tokenizer.json: {what}", spoil, must_fail=must_fail, commands=(_GENERATE, _BENCH))


def _info(
    model: str = "llama", must_fail: bool = False, commands: tuple[str, ...] = (_GENERATE, _IMPORT), **settings: object
) -> Known:
    said = json.dumps(settings)[:60]
    return Known(
        f"layerskip.json: {said}", lambda path: edit_json(path / "layerskip.json", **settings), model, must_fail, commands
    )


def _exact(**policy: object) -> Known:
    """Nothing can be generated with this as the default."""
    return _info("measured", True, (_GENERATE,), policies={"exact": policy})


def _int4(what: str, change: Callable[[bytes], bytes], commands: tuple[str, ...] = (f"{_GENERATE} --quantize int4",)) -> Known:
    def spoil(path: Path) -> None:
        file = path / "int4.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return Known(f"int4.safetensors: {what}", spoil, "measured", commands=commands)


def _retrained(path: Path) -> None:
    """The weights are no longer those that the files beside them were made for."""
    change_weights(path, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].mul_(1.5))


_WITH_BLOCKS = (_GENERATE, _FROZEN)
_DRAFTING = ("--exit 1", "--exit 2", "--exit 2 --temperature 1", "--strategy early-exit --exit 1", "--lines --batch-size 2")


def _blocks(what: str, change: Callable[[Path], object], must_fail: bool = True) -> tuple[Known, ...]:
    """Damage to the file of blocks. Importing leaves it out."""
    name = f"exit_blocks.safetensors: {what}"
    spoil = lambda path: change(path / "exit_blocks.safetensors")  # noqa: E731
    used = () if must_fail else (*(f"{_GENERATE} {flags}" for flags in _DRAFTING), _BENCH)
    importing = Known(name, spoil, "blocks", False, (_IMPORT,))
    return Known(name, spoil, "blocks", must_fail, (*_WITH_BLOCKS, *used)), importing


def _block_bytes(what: str, change: Callable[[bytes], bytes], must_fail: bool = True) -> tuple[Known, ...]:
    return _blocks(what, lambda file: file.write_bytes(change(file.read_bytes())), must_fail)


def _block_weights(what: str, change: Callable[[Tensors], object], must_fail: bool = True) -> tuple[Known, ...]:
    return _blocks(what, lambda file: change_weights(file.parent, change, file.name), must_fail)


def _block_filled(name: str, value: float, must_fail: bool = True) -> tuple[Known, ...]:
    return _block_weights(f"{value} in {name}", lambda tensors: tensors[name].fill_(value), must_fail)


def _renamed(old: str, new: str) -> Callable[[Tensors], object]:
    return lambda tensors: [
        tensors.update({name.replace(old, new): tensors.pop(name)}) for name in list(tensors) if old in name
    ]


def _converted(dtype: str) -> Callable[[Tensors], object]:
    def convert(tensors: Tensors) -> None:
        import torch

        tensors.update({name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()})

    return convert


def _other_file(file: Path) -> None:
    file.write_bytes((file.parent / "model.safetensors").read_bytes())


def _folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


_DOWN, _NORM, _MAP_OF_2 = "exits.1.layer.mlp.down_proj.weight", "exits.1.norm.weight", "exits.2.input.weight"
_BLOCKS: tuple[Known, ...] = (
    *_block_bytes("cut", lambda data: data[:-9]),
    *_block_bytes("empty", lambda data: b""),
    *_block_bytes("its header alone", lambda data: data[:40]),
    *_block_bytes("zeros", lambda data: bytes(len(data))),
    *_block_bytes("not finite", lambda data: data[:-4000] + b"\xff" * 4000),
    *_block_bytes("another format", lambda data: data.replace(b'"format":"1"', b'"format":"2"')),
    *_block_bytes("no fingerprint", lambda data: data.replace(b'"fingerprint"', b'"fingerprinz"')),
    *_block_bytes("a header of 2**63 bytes", lambda data: b"\0" * 7 + b"\x80" + data[8:]),
    *_blocks("the model's own weights", _other_file),
    *_blocks("a folder", _folder_instead, must_fail=False),
    *(one for name in (_DOWN, _NORM, _MAP_OF_2) for one in _block_filled(name, float("nan"))),
    *_block_filled(_DOWN, float("inf")),
    *(one for value in (0.0, 1e38, -1e38) for one in _block_filled(_DOWN, value, must_fail=False)),
    *(one for dtype in ("int32", "uint8", "bool", "float8_e4m3fn") for one in _block_weights(dtype, _converted(dtype))),
    *(one for dtype in ("float64", "float16") for one in _block_weights(dtype, _converted(dtype), must_fail=False)),
    *_block_weights("a weight missing", lambda tensors: tensors.pop(_NORM)),
    *_block_weights("the map alone missing", lambda tensors: tensors.pop(_MAP_OF_2), must_fail=False),
    *_block_weights("nothing but the map", lambda tensors: [tensors.pop(name) for name in list(tensors) if name != _MAP_OF_2]),
    *_block_weights("no weights", lambda tensors: tensors.clear(), must_fail=False),
    *_block_weights("a bias too much", lambda tensors: tensors.update({f"{_DOWN[:-6]}bias": tensors[_NORM].clone()})),
    *_block_weights("a norm too short", lambda tensors: tensors.update({_NORM: tensors[_NORM][:3].clone()})),
    *_block_weights("a scalar", lambda tensors: tensors.update({_NORM: tensors[_NORM][0].clone()})),
    *_block_weights("a map of another width", lambda tensors: tensors.update({_MAP_OF_2: tensors[_MAP_OF_2][:, :64].clone()})),
    *_block_weights("a map transposed", lambda tensors: tensors.update({_MAP_OF_2: tensors[_MAP_OF_2].T.contiguous()})),
    *(
        one
        for exit_layer in ("0", "4", "01", "-1", "1.0", "9" * 5000, "\u0661", "")
        for one in _block_weights(f"exit {exit_layer[:9]!r}", _renamed("exits.1.", f"exits.{exit_layer}."))
    ),
    *_block_weights("the names of a model", _renamed("exits.1.layer.", "model.layers.0.")),
    *_block_weights("exit 3 instead of 1", _renamed("exits.1.", "exits.3."), must_fail=False),
    *(
        _info("blocks", False, (_GENERATE, f"{_GENERATE} --temperature 1", _FROZEN), exit_blocks=told)
        for told in ([], "x", 5, {"1": 3}, {"1": {"agreement": 1e308}}, {"x": {"agreement": 0.5}}, {"9": {"agreement": 1.0}})
    ),
)


def _packed(name: str, change: Callable[[bytes], bytes], must_fail: bool = True) -> Known:
    """Of packed.safetensors; without compiled kernels, where the model has none, it gets one that is damaged."""

    def spoil(path: Path) -> None:
        file = path / "packed.safetensors"
        file.write_bytes(change(file.read_bytes()) if file.is_file() else b"damaged")

    commands = (_GENERATE, f"{_GENERATE} --exit 2", f"{_GENERATE} --lines --batch-size 2")
    return Known(f"packed.safetensors {name}", spoil, "packed", must_fail, commands)


def _in_a_circle(path: Path) -> None:
    edit_json(path / "adapter_config.json", base_model_name_or_path=str(path))


def _without_a_weight(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(max(tensors))
    save_file(tensors, file, {"format": "pt"})


def _without_tokenizer(path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()


_TOKEN = {"content": "call", **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)}
_BROKEN_STEP = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "absent", "type_id": 0}}], "pair": []}
_COUNTS = (-1, 99, 2**70, True, "x", 0.5)
_FILES: tuple[Known, ...] = (
    _write("config.json", "[" * DEEP),
    _write("config.json", "\0" * 500),
    _write("layerskip.json", '{"a":' * DEEP, must_fail=False),
    _write("tokenizer_config.json", '{"a":' * DEEP),
    _write("generation_config.json", '{"a":' * DEEP, must_fail=False),
    Known("adapters that name each other", _in_a_circle, "adapter"),
    Known("an adapter without a weight", _without_a_weight, "adapter"),
    _tokenizer("larger than the embedding", added_tokens=[{"id": 5000, **_TOKEN}]),
    _tokenizer("a broken post-processor", post_processor=_BROKEN_STEP),
    _tokenizer("no post-processor", must_fail=False, post_processor=None),
    _tokenizer("of another form", model={"type": "Unigram", "vocab": []}),
    Known("no tokenizer", _without_tokenizer),
    *(_info(recommended={"exit_layer": count, "num_draft_tokens": count}) for count in _COUNTS),
    *(_info(policies={"exact": {"strategy": "early-exit", "exit_layer": count}}) for count in (*_COUNTS, None)),
    *(_info(policies=policies) for policies in ([], {"exact": 3}, {"exact": {"strategy": "magic"}}, {"": {}})),
    *(
        _info("measured", True, (_GENERATE, f"{_GENERATE} --temperature 1"), profile=profile)
        for profile in ([], {"passes": [1e-300, 1e8]}, {"acceptance": {"exit 2": 1.5}}, {"drafts": {"exit 2": 0}}, {"x": 1})
    ),
    _info("measured", False, (f"{_GENERATE} --temperature 1",), profile={"passes": [1e9, 1e-4], "acceptance": {"exit 2": 0}}),
    _info("measured", False, (f"{_GENERATE} --temperature 1",), profile={"passes": [1e-4, 1e9], "drafts": {"exit 2": 1e9}}),
    _exact(strategy="early-exit", exit_layer=2),
    _exact(strategy="self-speculative", exit_layer=77),
    _exact(strategy="draft-and-verify", skip=[9]),
    _exact(strategy="draft-and-verify", skip=[1, 2, 3, 4]),
    _exact(strategy="lookup", lookup=2.5),
    _exact(strategy="self-speculative", exit_layer=2, draft_weights="int2"),
    _exact(strategy="adaptive", measured={"task": 1}),
    _info(
        "measured",
        True,
        (f"{_GENERATE} --strategy draft-and-verify",),
        recommended={"skip": {"layers": [9], "num_draft_tokens": 1}},
    ),
    _info("measured", True, (_GENERATE,), recommended={"skip": {"layers": [], "num_draft_tokens": True}}),
    *(_info("measured", config={"recipe": {"curriculum": "all", "exits": exits}}) for exits in ([99], "x", [True, 2.5], [])),
    *(_info("measured", final_losses=losses) for losses in ([], {"4": "x"}, {"2": 1e308, "3": -1e308, "4": -1e308})),
    _int4("cut", lambda data: data[:-9]),
    _int4("empty", lambda data: b""),
    _int4("its header alone", lambda data: data[:40]),
    _int4("not finite", lambda data: data[:-4000] + b"\xff" * 4000),
    _int4("zeros", lambda data: bytes(len(data))),
    _int4("another format", lambda data: data.replace(b'"group_size":"32"', b'"group_size":"64"')),
    Known("int4.safetensors of other weights", _retrained, "measured", commands=(f"{_GENERATE} --quantize int4",)),
    Known("exit_blocks.safetensors of other weights", _retrained, "blocks", commands=_WITH_BLOCKS),
    *_BLOCKS,
    _packed("cut", lambda data: data[:-9]),
    _packed("empty", lambda data: b""),
    _packed("its header alone", lambda data: data[:4096]),
    _packed("longer", lambda data: data + bytes(64)),
    _packed("not finite at its end", lambda data: data[:-4000] + b"\xff" * 4000),
    _packed("of another version", lambda data: data.replace(b'"format":"', b'"format":"9', 1)),
    _packed("with another content", lambda data: data.replace(b"int4", b"int8")),
    *(_info("packed", False, (_GENERATE,), prompt_template=template) for template in ("{prompt}", "chat")),
    *(_info(prompt_template=template) for template in ("", "chat", "{prompt", "{prompt}" * 90, 5, [])),
    Known("GGUF: 10 million blocks", lambda file: edit_gguf(file, b"llama.block_count", 10**7), "tiny.gguf"),
    Known("GGUF: no heads", lambda file: edit_gguf(file, b"llama.attention.head_count", 0), "tiny.gguf"),
    Known("GGUF: cut", lambda file: file.write_bytes(file.read_bytes()[:3000]), "tiny.gguf"),
    Known("shards elsewhere", lambda path: redirect_shards(path, "../../../../etc/passwd"), "sharded", False),
    Known("absent shards", lambda path: redirect_shards(path, "absent.safetensors"), "sharded", False),
    Known("a shard cut", lambda path: cut(sorted(path.glob("*.safetensors"))[0]), "sharded"),
)

KNOWN = (*_CODE, *_WEIGHTS, *_CONFIGS, *_FILES)
