"""What a step costs: computation and memory, from the counts of weights and tokens. Estimates, not measurements."""

from ..config.training import FinetuneConfig
from ..losses import CHUNK_LOGITS
from ..model import GenericBackend
from .loop.checkpoints import KEPT
from .recipe.dropout import dropout_rates, time_scale
from .recipe.resolved import Recipe
from .rows.encoded_data import EncodedData
from .rows.step_rows import rows_per_step, world_size


def relative_cost(
    backend: GenericBackend, recipe: Recipe, steps: int, config: FinetuneConfig, exits: float, data: EncodedData
) -> float:
    """Multiply-adds of a step over those of a step without the recipe: dropout saves layers, every exit adds a head.

    Distillation computes the last layer's head once more per early exit, forward only, which is a third; so does the anchor
    with all of the original. Training from scratch is judged by the dropout in the middle of its schedule.
    """
    layers, head = _layers(backend), _head(backend, data)
    heads = exits + (exits - 1) / 3 * (recipe.distill > 0)
    kept = _kept(backend, recipe, steps, config)
    return (layers * kept + head * heads) / (layers + head) + (config.retention.anchor > 0) / 3


def step_flops(
    backend: GenericBackend, recipe: Recipe, steps: int, config: FinetuneConfig, exits: float, cost: float, data: EncodedData
) -> float:
    """Floating-point operations of a step, over all processes; `cost` is its `relative_cost`.

    Per token two for each weight in the forward pass and four in the backward pass, of which LoRA needs half. Two more for each
    weight that is used again in the backward pass: of layers with gradient checkpointing, of heads whose logits are taken in
    chunks. Causal attention adds 6 T D' per layer, with D' the width of all its heads.
    """
    layers, head, spec = _layers(backend), _head(backend, data), backend.spec
    tokens_per_row = data.tokens / data.count
    kept = _kept(backend, recipe, steps, config)
    per_weight = 4 if config.lora_rank else 6
    attention = 6 * tokens_per_row * spec.heads * spec.head_dim * backend.num_layers * kept
    recomputed = (2 * layers * kept + attention / 3) * config.gradient_checkpointing
    chunked = config.batch_size * tokens_per_row * backend.vocab_size * data.target_tokens / data.tokens > CHUNK_LOGITS
    recomputed += 2 * head * exits * chunked
    per_token = per_weight * (layers + head) * cost + attention + recomputed
    return float(rows_per_step(config) * tokens_per_row * per_token)


def memory_mb(backend: GenericBackend, config: FinetuneConfig, parameters: int, longest: int, autocast: bool) -> float:
    """Memory in each process: weights, gradients and two moments in fp32, and the activations of rows of `longest` tokens.

    With LoRA only the weights count, because the adapters are small; with gradient checkpointing one layer's activations and
    every layer's input. The anchor adds a copy of the original, and its logits twice; LoRA needs no copy.

    FSDP divides the former by the processes. It adds whole weights, and their gradients, of what lies outside the layers and of
    two layers: the one that runs, and the one that is fetched meanwhile. These and activations have the precision of compute.
    """
    anchored = config.retention.anchor > 0
    state = 4.0 * parameters if config.lora_rank else 16.0 * parameters
    width = 2 if config.fsdp and autocast else 4
    if config.fsdp:
        layers = _layers(backend)
        whole = parameters - layers + 2 * layers / backend.num_layers
        state = state / world_size() + width * whole * (1 if config.lora_rank else 2)
    if anchored and not config.lora_rank:
        embedding = backend.vocab_size * backend.hidden_size  # is bf16 in int8 copies too, with a head of their own
        state += parameters + 2 * embedding if config.retention.anchor_weights == "int8" else 2 * parameters
    layer = 14 * backend.hidden_size + 4 * backend.spec.inner
    kept = backend.num_layers * backend.hidden_size + layer if config.gradient_checkpointing else backend.num_layers * layer
    tokens = config.batch_size * longest
    logits = min(tokens * backend.vocab_size, CHUNK_LOGITS) * (5 if anchored else 3)
    return float((state + width * tokens * kept + 4 * logits) / 2**20)


def disk_bytes(config: FinetuneConfig, parameters: int, steps: int, itemsize: int) -> int:
    """Disk for the saved model, of weights of `itemsize` bytes, and for checkpoints: weights and two moments in fp32.

    With LoRA they are small. There is one more than are kept, while it is written.
    """
    checkpoints = min(KEPT + 1, steps // config.save_steps) if config.save_steps and not config.lora_rank else 0
    return parameters * (itemsize + 12 * checkpoints)


def _layers(backend: GenericBackend) -> float:
    """The weights of all layers."""
    return float(sum(parameter.numel() for parameter in backend.layers.parameters()))


def _head(backend: GenericBackend, data: EncodedData) -> float:
    """The head's weights, counted as often as a token is a target."""
    return float(backend.hidden_size * backend.vocab_size) * data.target_tokens / data.tokens


def _kept(backend: GenericBackend, recipe: Recipe, steps: int, config: FinetuneConfig) -> float:
    """The share of layers that layer dropout runs."""
    scale = time_scale(steps // 2, steps, config.regime == "scratch") if recipe.p_max else 1.0
    rates = dropout_rates(recipe.p_max, backend.num_layers, scale, recipe.dropout_profile)
    return 1 - sum(rates) / len(rates)
