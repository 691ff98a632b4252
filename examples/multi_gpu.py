"""Predicts memory per GPU and time per step of `finetune --fsdp` for Llama shapes, as the tables of multi_gpu.md.

Nothing is measured: the counts are those of `finetune --dry-run`, on models without weights. A step takes its floating-point
operations over the peak of all GPUs times a utilisation that is assumed.

    python examples/multi_gpu.py
"""

import os
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from layerskip_core.config.training import FinetuneConfig
from layerskip_core.model import GenericBackend
from layerskip_core.training.plan import TrainingPlan, make_plan
from layerskip_core.training.rows.encoded_data import EncodedData

LENGTH = 4096  # tokens of a packed row
PEAK = 989e12  # bf16 without sparsity, of an H100 SXM (NVIDIA's data sheet)
UTILISATION = 0.4  # assumed
GPU_GIB = 80
STEPS = 50_000  # of the paper's continual pretraining

SHAPES = {  # as Llama 3.2 1B, Llama 3 8B and 70B
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
COMMON = {"num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": LENGTH}


def trainable(shape: str) -> SimpleNamespace:
    config = LlamaConfig(**SHAPES[shape], **COMMON, tie_word_embeddings=shape == "1B")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return SimpleNamespace(model=model, backend=GenericBackend(model))


def plan(shape: str, gpus: int, **changes: object) -> TrainingPlan:
    """Of continual pretraining in bf16 with recomputed layers, on rows of LENGTH tokens that are all targets."""
    os.environ["WORLD_SIZE"] = str(gpus)
    settings = {"batch_size": 4, "gradient_checkpointing": True, "fsdp": gpus > 1, **changes}
    config = FinetuneConfig(model=shape, regime="continual", steps=STEPS, **settings)
    rows = EncodedData(rows=(), tokens=LENGTH, target_tokens=LENGTH, truncated=0, longest=LENGTH, count=1)
    return make_plan(config, trainable(shape), rows, SimpleNamespace(max_length=LENGTH, pack=True), "cuda", autocast=True)


def row(shape: str, gpus: int, batch_size: int, trained: str = "all weights", **changes: object) -> str:
    found = plan(shape, gpus, batch_size=batch_size, **changes)
    gib, seconds = found.memory_mb / 1024, found.flops / (gpus * PEAK * UTILISATION)
    memory = f"{gib:.0f} GiB" if gib < 0.9 * GPU_GIB else f"**{gib:.0f} GiB**: does not fit"
    rows = f"{batch_size} x {gpus}"
    return f"| {shape}, {trained} | {rows} | {memory} | {found.flops:.1e} | {seconds:.1f} s | {STEPS * seconds / 86400:.1f} |"


def main() -> None:
    print("| model | rows x GPUs | memory per GPU | FLOP per step | time per step | days for 50,000 steps |")
    print("|---|---|---|---|---|---|")
    for shape, batch_size in (("1B", 4), ("8B", 4), ("70B", 1)):
        for gpus in (8, 16, 64):
            print(row(shape, gpus, batch_size))
    for gpus in (8, 16):
        print(row("70B", gpus, 1, "LoRA of rank 16", lora_rank=16))


if __name__ == "__main__":
    main()
