"""Damaged and hostile checkpoints: every file of a model's folder damaged, and code and templates that try to run."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy
from safetensors.numpy import load_file

from .campaign import Case
from .command import Command, run
from .damage import ODD_VALUES, spoil_file
from .known_checkpoints import COMMANDS, KNOWN, MARKER
from .material import MODELS
from .model_files import edit_json, spoil_gguf, spoil_header
from .outcome import Miss, misses_of
from .snapshot import changes, snapshot

CASES = 2600
SHORT = (*range(6, 291, 24), *range(1000, 1008))  # some of the known cases, and some random ones


def attack(case: Case) -> Iterator[Miss]:
    """The first cases are known faults, with two commands each; the others are random."""
    if case.number < len(KNOWN):
        known = KNOWN[case.number]
        model = _copy(case, known.model)
        known.spoil(model)
        case.say(f"{known.model}: {known.name}")
        for command in known.commands:
            yield from _run(case, model, command, known.must_fail)
    else:
        model = _copy(case, case.random.choice(MODELS))
        for _ in range(case.random.choice((1, 1, 1, 2))):
            case.say(_spoil(model, case.random))
        yield from _run(case, model, case.random.choice(COMMANDS), must_fail=False)


def _copy(case: Case, name: str) -> Path:
    source, target = case.material.model(name), case.folder / name
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
    return target


def _run(case: Case, model: Path, command: str, must_fail: bool) -> Iterator[Miss]:
    """Runs one command on the model, answers `y` to every question, and checks that everything else is unchanged."""
    home = case.folder / "home"
    home.mkdir(exist_ok=True)
    before = snapshot(model) if model.is_dir() else {}
    wanted = Command(tuple(part.replace("MODEL", str(model)) for part in command.split()), stdin=b"y\ncall mom\n" * 3)
    case.say(wanted)
    outcome = run(wanted, home, case.logs)
    misses = misses_of(outcome, must_fail=must_fail)
    for miss in misses:
        yield Miss(miss.kind, f"[{command}] {miss.what}")
    if outcome.status == 0 and not misses and (fault := _unusable(model, command)):
        yield Miss("wrong", f"[{command}] success, though {fault}; {outcome.tail}")
    for place in (home, case.folder, model if model.is_dir() else model.parent):
        if (place / MARKER).exists():
            yield Miss("executed", f"[{command}] a model's code wrote {place / MARKER}")
            (place / MARKER).unlink()
    if model.is_dir() and (lost := changes(before, snapshot(model), ("layerskip.json",) if "--save" in command else ())):
        yield Miss("lost", f"[{command}] {lost}")
    shutil.rmtree(home)


def _unusable(model: Path, command: str) -> str | None:
    """Why these weights cannot give a right answer: NaN, infinity or integers. None if numpy cannot read them."""
    unread = {model / "int4.safetensors", model / "packed.safetensors"}
    if command.startswith(("import", "finetune --model")):  # which leave blocks out
        unread.add(model / "exit_blocks.safetensors")
    for file in sorted(set(model.glob("*.safetensors")) - unread if model.is_dir() else ()):
        try:
            tensors = load_file(file)
        except Exception:
            return None
        for name, tensor in tensors.items():
            if tensor.dtype.kind != "f":
                return f"{name} in {file.name} is of {tensor.dtype}"
            if not numpy.isfinite(tensor).all():
                return f"{name} in {file.name} is not finite"
    return None


# --- drawn --------------------------------------------------------------------------------------------------------------


def _spoil(model: Path, random: Random) -> str:
    if model.is_file():
        return spoil_gguf(model, random) if random.random() < 0.5 else spoil_file(model, random)
    files = sorted(file for file in model.iterdir() if file.is_file())
    file = random.choice(files)
    if random.random() < 0.45:  # the settings that matter most
        file = model / random.choice(("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"))
    if model.name == "blocks" and random.random() < 0.4:
        file = model / "exit_blocks.safetensors"
    if not file.exists():
        file = random.choice(files)
    way = random.random()
    if way < 0.05:
        file.unlink()
        return f"without {file.name}"
    if way < 0.08:
        file.unlink()
        file.mkdir()
        return f"{file.name} is a folder"
    if way < 0.11:
        file.unlink()
        file.symlink_to(random.choice((file.name, "/dev/null", "absent", "..")))
        return f"{file.name} is a link to {os.readlink(file)}"
    if file.suffix == ".safetensors" and way < 0.7:
        return spoil_header(file, random)
    if file.name == "config.json" and way < 0.6:
        key = random.choice(_CONFIG_KEYS)
        value = random.choice(ODD_VALUES)
        with suppress(ValueError, RecursionError):  # it is damaged already
            edit_json(file, **{key: value})
            return f"config.json: {key} = {str(value)[:60]!r}"
    return spoil_file(file, random)


_CONFIG_KEYS = (
    *("model_type", "hidden_act", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "rope_theta", "dtype"),
    *(
        "tie_word_embeddings",
        "sliding_window",
        "layer_types",
        "use_sliding_window",
        "attention_bias",
        "mlp_bias",
        "torch_dtype",
    ),
    *("eos_token_id", "bos_token_id", "pad_token_id", "no_rope_layers", "quantization_config", "architectures", "auto_map"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "transformers_version", "use_cache"),
    *(
        "rope_scaling",
        "max_window_layers",
        "no_rope_layer_interval",
        "pretraining_tp",
        "attention_dropout",
        "initializer_range",
    ),
)
