"""Predicts memory per GPU and time per step of `finetune --fsdp` for Llama shapes, as the tables of multi_gpu.md.

Nothing is measured: weights and operations are counted, on models without weights. A step takes its floating-point operations
over the peak of all GPUs times a utilisation that is assumed.

    python examples/multi_gpu.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from layerskip_core.config.training import RecipeSettings
from layerskip_core.losses import CHUNK_LOGITS
from layerskip_core.model import TransformersBackend
from layerskip_core.training.recipe import dropout_rates, resolve_recipe, steps_on

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


def backend_of(shape: str) -> TransformersBackend:
    config = LlamaConfig(**SHAPES[shape], **COMMON, tie_word_embeddings=shape == "1B")
    with torch.device("meta"):
        return TransformersBackend(LlamaForCausalLM(config))


def flops(backend: TransformersBackend, batch_size: int, gpus: int, lora: bool) -> float:
    """Floating-point operations of a step, over all GPUs.

    Per token two for each weight in the forward pass and four in the backward pass, of which LoRA needs half, and two more for
    each weight that is used again there, of layers with gradient checkpointing.
    Causal attention adds 6 T D per layer. Layer dropout saves layers, and each exit adds a head.
    """
    recipe = resolve_recipe(RecipeSettings("continual"), backend.spec, STEPS)
    exits = sum(steps_on(recipe, STEPS, backend.num_layers).values()) / STEPS
    kept = 1 - sum(dropout_rates(recipe.p_max, backend.num_layers)) / backend.num_layers
    layers, head = layer_weights(backend) * kept, backend.spec.hidden * backend.spec.vocab * exits
    attention = 6 * LENGTH * backend.spec.heads * backend.spec.head_dim * backend.num_layers * kept
    per_token = (4 if lora else 6) * (layers + head) + attention + 2 * layers + attention / 3
    return batch_size * gpus * LENGTH * per_token


def memory(backend: TransformersBackend, batch_size: int, gpus: int, lora: bool) -> float:
    """Bytes in each process: its share of weights, gradients and two moments in fp32 (of LoRA only the weights count), whole
    weights and gradients in bf16 of what lies outside the layers and of two layers, the input of each layer and the activations
    of one, and logits.
    """
    parameters = sum(weight.numel() for weight in backend.model.parameters())
    whole = parameters - layer_weights(backend) * (1 - 2 / backend.num_layers)
    state = parameters * (4 if lora else 16) / gpus + 2 * whole * (1 if lora else 2)
    activations = backend.num_layers * backend.spec.hidden + 14 * backend.spec.hidden + 4 * backend.spec.inner
    return state + 2 * batch_size * LENGTH * activations + 4 * 3 * CHUNK_LOGITS


def layer_weights(backend: TransformersBackend) -> int:
    return sum(weight.numel() for weight in backend.layers.parameters())


def row(shape: str, gpus: int, batch_size: int, lora: bool = False) -> str:
    backend = backend_of(shape)
    gib, operations = memory(backend, batch_size, gpus, lora) / 2**30, flops(backend, batch_size, gpus, lora)
    seconds = operations / (gpus * PEAK * UTILISATION)
    fits = f"{gib:.0f} GiB" if gib < 0.9 * GPU_GIB else f"**{gib:.0f} GiB**: does not fit"
    trained = "LoRA of rank 16" if lora else "all weights"
    days = STEPS * seconds / 86400
    return f"| {shape}, {trained} | {batch_size} x {gpus} | {fits} | {operations:.1e} | {seconds:.1f} s | {days:.1f} |"


def main() -> None:
    print("| model | rows x GPUs | memory per GPU | FLOP per step | time per step | days for 50,000 steps |")
    print("|---|---|---|---|---|---|")
    for shape, batch_size in (("1B", 4), ("8B", 4), ("70B", 1)):
        for gpus in (8, 16, 64):
            print(row(shape, gpus, batch_size))
    for gpus in (8, 16):
        print(row("70B", gpus, 1, lora=True))


if __name__ == "__main__":
    main()
