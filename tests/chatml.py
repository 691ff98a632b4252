"""A small tokenizer like SmolLM2's: byte-level, with ChatML's special tokens and chat template."""

import json
from pathlib import Path

import torch
from conftest import tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.checkpoint.save import save_checkpoint

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatml_folder(folder: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["remind me to start a system for the user", "im_start im_end start end"] * 20, trainer
    )
    tokenizer.add_tokens([AddedToken("<note>", special=False)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "TokenizersBackend",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def full_tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(str(folder))


def talking_model(folder, context):
    """A random model with a chat template, which never ends an answer."""
    tokenizer = full_tokenizer(chatml_folder(folder / "tokenizer"))
    ids = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    model = tiny_model(
        "llama", torch.float32, vocab_size=len(tokenizer), max_position_embeddings=context, **ids
    )
    model.get_output_embeddings().weight.data[tokenizer.eos_token_id] = 0
    info = CheckpointInfo(exit_layer=3, num_draft_tokens=4)
    save_checkpoint(model, tokenizer, info, str(folder / "model"), torch.float32)
    return str(folder / "model")
