"""Folders of models with images are read as their text part, as published files and as transformers
writes them.
"""

import json

import pytest
import torch
from command_line import run
from conftest import edit_json, logits_of, require_near, tiny_model
from evaluating import tiny_loaded
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layerskip_core.checkpoint.folder import lean_spec
from layerskip_core.checkpoint.open import for_decoding, for_training
from layerskip_core.model.architectures import MULTIMODAL
from layerskip_core.model.native import NativeBackend
from layerskip_core.model.native.compiled import kernels
from layerskip_core.training import answers

TEXTS = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "lfm2_vl": "lfm2",
    "llava": "llama",
    "mistral3": "mistral",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
WIDE = {"hidden_size": 64, "intermediate_size": 96}
IDS = torch.arange(3, 20)[None]
SIZES = {  # of what reads images and sound
    **dict.fromkeys(("hidden_size", "intermediate_size", "out_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads"), 2),
    "head_dim": 16,
}


@pytest.fixture
def written(tmp_path):
    """Makes a folder of a random model, and gives it with the model's logits of IDS."""

    def write(model_type):
        tokenizer = tiny_loaded(torch.float32).tokenizer
        ends = {
            name: getattr(tokenizer, name)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
        tied = {"tie_word_embeddings": model_type != "llava"}
        text = tiny_model(
            TEXTS[model_type], torch.float32, vocab_size=len(tokenizer), **WIDE, **ends, **tied
        )
        kind = CONFIG_MAPPING[model_type]
        parts = {"text_config": text.config.to_dict()}
        for name, part in kind().to_dict().items():
            if name.endswith("_config") and name not in parts and part:
                parts[name] = {
                    "model_type": part["model_type"],
                    **{key: SIZES[key] for key in part if key in SIZES},
                }
        model = AutoModelForImageTextToText.from_config(
            kind(**parts, **tied), dtype=torch.float32
        ).eval()
        model.get_decoder().load_state_dict(text.model.state_dict())
        model.lm_head.load_state_dict(text.lm_head.state_dict())
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return tmp_path, model(input_ids=IDS).logits.detach()

    return write


def as_older(folder):
    """Without the values that are defaults, as files of the hub."""
    config = json.loads((folder / "config.json").read_text())
    text = (
        CONFIG_MAPPING[config["text_config"]["model_type"]]
        .from_dict(config["text_config"])
        .to_diff_dict()
    )
    if (sizes := text.pop("per_layer_config", None)) is not None:
        text["global_head_dim"] = next(iter(sizes.values()))["head_dim"]
    edit_json(folder / "config.json", text_config=text, transformers_version="4.57.0.dev0")


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_logits_are_those_of_the_whole_model(written, model_type):
    folder, expected = written(model_type)
    for is_complete in (True, False):
        if not is_complete:
            as_older(folder)
        assert (lean_spec(str(folder)) is not None) == is_complete
        loaded = for_decoding(str(folder), "cpu", "fp32")
        trainable = for_training(str(folder), "cpu", "fp32")
        assert isinstance(loaded.backend, NativeBackend) or not kernels()
        assert (
            loaded.backend.spec == trainable.backend.spec
            and loaded.backend.spec.model_type == TEXTS[model_type]
        )
        for backend in (loaded.backend, trainable.backend):
            logits = logits_of(backend, IDS).detach()
            require_near(logits, expected, 1e-3)


@pytest.mark.parametrize("model_type", ["gemma4", "qwen3_5"])
def test_what_is_trained_on_the_folder_suits_it(written, model_type, tmp_path, monkeypatch):
    """A drafter is attached to it, and the recipe makes a model of its text part."""
    monkeypatch.setattr(answers, "OWN_TEXTS", 4)
    monkeypatch.setattr(answers, "OWN_TOKENS", 4)
    folder, _ = written(model_type)
    as_older(folder)
    few = "--steps 1 --batch-size 1 --samples 2 --max-length 48 --threads 1"
    attached = str(tmp_path / "attached")
    trained = str(tmp_path / "trained")
    for command in (
        ("train-drafter --exits 2 --answer-tokens 4", few, f"--model {folder} --output {attached}"),
        ("finetune --pmax 0.2", few, f"--model {folder} --output {trained}"),
    ):
        done = run(*command)
        assert done.code == 0, done.err
    prompt = ("generate", "wake me up", "--template raw --max-new-tokens 8 --threads 1 --model")
    plain = run(*prompt, str(folder), "--strategy autoregressive")
    drafted = run(*prompt, attached, "--exit 2")
    assert drafted.code == 0 and drafted.out == plain.out
    assert for_decoding(trained, "cpu").backend.spec.model_type == TEXTS[model_type]
    assert run(*prompt, trained).code == 0
