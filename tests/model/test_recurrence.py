"""Short convolutions and linear recurrences on the C kernels: against formulas in fp64, against transformers' own layers, and
bit for bit however tokens are divided into calls."""

import ctypes
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from recurrences import CPassage, Recurrence, TextMemory
from transformers import (
    BambaConfig,
    FalconH1Config,
    GraniteMoeHybridConfig,
    Lfm2Config,
    NemotronHConfig,
    Qwen3_5TextConfig,
)
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet, torch_recurrent_gated_delta_rule

from layerskip_core.model.native.compiled import STRUCTURES, VARIANTS, kernels

RUNNABLE = [name for name in VARIANTS if (found := kernels(name)) is not None and found.variant == name]
pytestmark = pytest.mark.skipif(not RUNNABLE, reason="no kernels are built that this CPU can run")
SLOTS = 9
EPS = 1e-6
SHAPES = {  # kind, heads of keys and values, their dimensions, taps
    "qwen3.5": ("delta", (2, 2), (128, 128), 4),
    "qwen3.5 with groups": ("delta", (2, 6), (128, 128), 4),
    "small delta": ("delta", (1, 3), (24, 40), 3),
    "mamba2": ("mamba2", (1, 4), (128, 64), 4),
    "mamba2 with groups": ("mamba2", (2, 6), (256, 64), 4),
    "small mamba2": ("mamba2", (3, 3), (5, 7), 2),
    "lfm2": ("convolution", (0, 0), (0, 0), 3),
    "small convolution": ("convolution", (0, 0), (0, 0), 5),
}
RECURRENT = [name for name, (kind, *_) in SHAPES.items() if kind != "convolution"]


class Layer:
    """Random weights of a shape, what the kernels compute with them, and the same in fp64 by the formulas."""

    def __init__(self, shape: str, variant: str | None = None) -> None:
        torch.manual_seed(1)
        self.kind, (self.groups, self.heads), (self.size, self.width), taps = SHAPES[shape]
        self.keys, self.values = self.groups * self.size, self.heads * self.width
        channels = 2 * self.keys + self.values if self.heads else (75 if "small" in shape else 64)
        self.filters, self.bias = torch.randn(channels, taps), torch.randn(channels)
        self.log_rate, self.rate_bias, self.skip = torch.randn(3, self.heads)
        own, heads, dims = variant or RUNNABLE[0], (self.groups, self.heads), (self.size, self.width)
        if self.kind == "delta":
            self.norm = 1 + 0.1 * torch.randn(self.width)
            rates = (self.log_rate, self.rate_bias, self.norm, EPS)
            self.kernel = Recurrence.delta_rule(own, heads, dims, self.filters, *rates, most_step=2.0)
        elif self.kind == "mamba2":
            self.norm = 1 + 0.1 * torch.randn(self.values)
            rates = (self.log_rate, self.rate_bias, self.skip, self.norm, EPS, (0.1, 2.0), self.groups)
            self.kernel = Recurrence.mamba2(own, heads, dims, self.filters, self.bias, *rates)
        else:
            self.kernel = Recurrence.short_convolution(own, self.filters, self.bias)

    def text(self, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed)
        return torch.randn(count, self.kernel.structure.width), torch.randn(count, 2, self.heads)

    def memory(self) -> TextMemory:
        return self.kernel.memory(SLOTS)

    def run(self, texts, memories, parts, settled, threads=1):
        """The outputs of `parts` (start, stop) of texts (rows, steps)."""
        rows, steps = (torch.cat([text[i][a:b] for text, (a, b) in zip(texts, parts, strict=True)]) for i in range(2))
        positions, counts = torch.cat([torch.arange(a, b) for a, b in parts]), [b - a for a, b in parts]
        starts = [sum(counts[:i]) for i in range(len(parts) + 1)]
        return list(self.kernel.run(rows, steps, positions, starts, memories, settled, threads).split(counts))

    def whole(self, text) -> torch.Tensor:
        """A text at once, all of it settled."""
        count = len(text[0])
        return self.run([text], [self.memory()], [(0, count)], [count])[0]

    def state(self, memory: TextMemory) -> torch.Tensor:
        """(heads, key dim, value dim)."""
        panels = memory.state[64:].view(torch.float32).view(self.heads, -1, self.size, 16)
        return panels.transpose(1, 2).flatten(2)[..., : self.width]

    def expected(self, text) -> torch.Tensor:
        """By the formulas, in fp64, one token after the other."""
        rows, steps = text[0].double(), text[1].double()
        filters, bias, keys, values = self.filters.double(), self.bias.double(), self.keys, self.values
        count, taps = len(rows), filters.shape[1]

        def convolved(inputs, added):
            padded = F.pad(inputs, (0, 0, taps - 1, 0))
            return sum(padded[tap : tap + count] * filters[:, tap] for tap in range(taps)) + added

        if self.kind == "convolution":
            before, after, x = rows.chunk(3, 1)
            return after * convolved(before * x, bias)
        rate, first = -self.log_rate.double().exp(), F.softplus(steps[:, 1] + self.rate_bias)
        if self.kind == "delta":
            mixed, gate = rows.split([2 * keys + values, values], 1)
            query, key, value = F.silu(convolved(mixed, 0)).split([keys, keys, values], 1)
            step, decay = 2 * steps[:, 0].sigmoid(), torch.exp(rate * first)
        else:
            gate, mixed = rows.split([values, 2 * keys + values], 1)
            value, key, query = F.silu(convolved(mixed, bias)).split([values, keys, keys], 1)
            step = first.clamp(0.1, 2)
            decay = torch.exp(rate * step)
        query, key = (part.view(count, self.groups, self.size) for part in (query, key))
        if self.kind == "delta":
            query, key = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (query, key))
            query = query / self.size**0.5
        query, key = (part.repeat_interleave(self.heads // self.groups, 1) for part in (query, key))
        value, outputs = value.view(count, self.heads, self.width), []
        state = torch.zeros(self.heads, self.size, self.width, dtype=torch.double)
        for t in range(count):
            state = state * decay[t, :, None, None]
            delta = value[t] - torch.einsum("hkv,hk->hv", state, key[t]) if self.kind == "delta" else value[t]
            state = state + torch.einsum("hk,hv->hkv", key[t], step[t, :, None] * delta)
            outputs.append(torch.einsum("hkv,hk->hv", state, query[t]))
        out = torch.stack(outputs)
        if self.kind == "delta":
            return (out / (out.square().mean(-1, keepdim=True) + EPS).sqrt() * self.norm).flatten(1) * F.silu(gate)
        groups = ((out + self.skip[:, None] * value).flatten(1) * F.silu(gate)).view(count, self.groups, -1)
        return (groups / (groups.square().mean(-1, keepdim=True) + EPS).sqrt()).flatten(1) * self.norm


@pytest.mark.parametrize("variant", RUNNABLE)
def test_structures_have_the_size_that_they_have_in_c(variant):
    library = Layer("lfm2", variant).kernel.loaded
    assert library.layerskip_size_of(len(STRUCTURES)) == ctypes.sizeof(CPassage)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("variant", RUNNABLE)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_compute_the_formulas(shape, variant):
    layer = Layer(shape, variant)
    text = layer.text(70, 1)
    assert distance(layer.whole(text), layer.expected(text)) < 2e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_threads_and_other_texts_change_no_bit(shape):
    layer = Layer(shape)
    texts = [layer.text(count, seed) for seed, count in enumerate((9, 1, 30, 4))]
    alone, parts = [layer.whole(text) for text in texts], [(0, len(text[0])) for text in texts]
    for threads in (1, 2, 3):
        together = layer.run(texts, [layer.memory() for _ in texts], parts, [stop for _, stop in parts], threads)
        assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settles", ["at once", "in the next call", "by itself", "late"])
def test_the_division_of_a_text_into_calls_changes_no_bit(shape, settles):
    layer = Layer(shape)
    text, memory, other = layer.text(40, 2), layer.memory(), layer.memory()
    whole = layer.run([text], [other], [(0, 40)], [40])[0]
    for start, stop in pairwise([0, 5, 6, 7, 9, 12, 13, 14, 16, 17, 19, 21, 24, 27, 28, 31, 34, 37, 40]):
        settled = {"at once": stop, "in the next call": start, "by itself": start, "late": start - start % 3}[settles]
        assert torch.equal(layer.run([text], [memory], [(start, stop)], [settled], 2)[0], whole[start:stop])
        if settles == "by itself":
            layer.kernel.settle([memory], [stop])
    layer.kernel.settle([memory], [40], 2)
    assert torch.equal(memory.state, other.state)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_token_of_a_long_call_may_stay_unsettled(shape):
    """Where its slot is that of a change which the state lacks, too; and the token runs again."""
    layer = Layer(shape)
    text, memory = layer.text(60, 2), layer.memory()
    whole = layer.whole(text)
    for start, stop in ((0, 5), (5, 5 + SLOTS), (14, 15), (14, 33), (33, 33 + SLOTS), (41, 60)):
        assert torch.equal(layer.run([text], [memory], [(start, stop)], [stop - 1], 2)[0], whole[start:stop])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_rejected_tokens_leave_no_trace(shape, threads):
    """Three texts draft, some drafts are rejected, which here are not even finite, and the texts go on."""
    layer = Layer(shape)
    texts, memories = [layer.text(60, 10 + i) for i in range(3)], [layer.memory() for _ in range(3)]
    alone, filled = [layer.whole(text) for text in texts], [0, 3, 20]
    layer.run(texts[1:], memories[1:], [(0, 3), (0, 20)], [3, 20])
    for turn, drafted in enumerate([3, 3, 4, 2, 0, 3, 4]):
        counts = [min(1 + (turn + i) % 3, 1 + drafted) for i in range(3)]  # of tokens that are accepted
        drafts = [
            tuple(torch.cat([part[: at + count], part[at + count :] * torch.nan]) for part in text)
            for text, at, count in zip(texts, filled, counts, strict=True)
        ]
        parts = [(at, at + 1 + drafted) for at in filled]
        if turn % 2:
            outs = layer.run(drafts, memories, parts, filled, threads)
        else:  # token by token, as exits draft
            steps = [[(at + step, at + step + 1) for at in filled] for step in range(1 + drafted)]
            outs = map(torch.cat, zip(*(layer.run(drafts, memories, step, filled, threads) for step in steps), strict=True))
        for out, own, memory, at, count in zip(outs, alone, memories, filled, counts, strict=True):
            assert torch.equal(out[:count], own[at : at + count])
            assert memory.base == (at if layer.heads else 0)
        filled = list(map(int.__add__, filled, counts))
    layer.kernel.settle(memories, filled, threads)
    for text, own, memory, at in zip(texts, alone, memories, filled, strict=True):
        layer.run([text], [plain := layer.memory()], [(0, at)], [at])
        assert torch.equal(memory.state, plain.state)
        assert torch.equal(layer.run([text], [memory], [(at, 60)], [60], threads)[0], own[at:])


@pytest.mark.parametrize("shape", RECURRENT)
def test_a_call_changes_the_state_only_by_what_is_settled(shape):
    layer = Layer(shape)
    text, memory, other = layer.text(20, 3), layer.memory(), layer.memory()
    layer.run([text], [memory], [(0, 9)], [9])
    before = memory.state.clone()
    layer.run([text], [memory], [(9, 13)], [9])
    assert torch.equal(memory.state, before) and memory.base == 9
    layer.run([text], [memory], [(13, 15)], [14])
    layer.run([text], [other], [(0, 14)], [14])
    assert torch.equal(memory.state, other.state) and memory.base == 14


def test_the_delta_rule_is_that_of_transformers():
    layer = Layer("qwen3.5 with groups")
    rows, steps = text = layer.text(12, 4)
    channels, taps = layer.filters.shape
    inputs = F.pad(rows[:, :channels].T, (taps - 1, 0))
    mixed = F.silu(F.conv1d(inputs, layer.filters[:, None], groups=channels)).T[None]
    query, key, value = mixed.split([layer.keys, layer.keys, layer.values], 2)
    query, key = (part.view(1, 12, layer.groups, layer.size) for part in (query, key))
    decays = -layer.log_rate.exp() * F.softplus(steps[None, :, 1] + layer.rate_bias)
    values = value.view(1, 12, layer.heads, layer.width), decays, 2 * steps[None, :, 0].sigmoid()
    out, state = torch_recurrent_gated_delta_rule(query, key, *values, output_final_state=True, use_qk_l2norm_in_kernel=True)
    memory = layer.memory()
    found = layer.run([text], [memory], [(0, 12)], [12])[0]
    out = out[0] / (out[0].square().mean(-1, keepdim=True) + EPS).sqrt() * layer.norm
    assert distance(found, out.flatten(1) * F.silu(rows[:, -layer.values :])) < 2e-6
    assert distance(layer.state(memory), state[0]) < 2e-6


def of_transformers(module) -> tuple[torch.Tensor, torch.Tensor]:
    """What the last projection of a layer of transformers reads for random hidden states, and these states."""
    torch.manual_seed(5)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    hidden, inputs = torch.randn(1, 50, 64), []
    module.out_proj.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    module(hidden)
    return inputs[0][0], hidden[0]


def compare(kernel: Recurrence, rows, steps, expected) -> None:
    found = kernel.run(rows.contiguous(), steps, torch.arange(50), [0, 50], [kernel.memory(SLOTS)], [50], 2)
    assert distance(found, expected) < 1e-5


@torch.no_grad()
def test_the_layer_of_qwen3_5():
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 48}
    module = Qwen3_5GatedDeltaNet(Qwen3_5TextConfig(hidden_size=64, num_hidden_layers=4, **sizes), 0)
    expected, hidden = of_transformers(module)
    weights = (module.conv1d.weight[:, 0], module.A_log, module.dt_bias, module.norm.weight)
    kernel = Recurrence.delta_rule(RUNNABLE[0], (2, 4), (32, 48), *weights, module.layer_norm_epsilon)
    rows = torch.cat([module.in_proj_qkv(hidden), module.in_proj_z(hidden)], 1)
    compare(kernel, rows, torch.stack([module.in_proj_b(hidden), module.in_proj_a(hidden)], 1), expected)


@torch.no_grad()
def test_the_layer_of_lfm2():
    module = Lfm2ShortConv(Lfm2Config(hidden_size=64, num_hidden_layers=2, conv_bias=True, layer_types=["conv"] * 2), 0)
    expected, hidden = of_transformers(module)
    kernel = Recurrence.short_convolution(RUNNABLE[0], module.conv.weight[:, 0], module.conv.bias)
    compare(kernel, module.in_proj(hidden), None, expected)


_SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
_MAMBA = {**_SIZES, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 48, "num_hidden_layers": 2}
_NEMOTRON = {**_SIZES, "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 48, "n_groups": 2}
_FALCON = {**_MAMBA, "mamba_d_ssm": 128, "mamba_n_groups": 2}
MAMBAS = {
    "granitemoehybrid": lambda: GraniteMoeHybridMambaLayer(
        GraniteMoeHybridConfig(**_MAMBA, time_step_limit=(0.2, 1.5), layer_types=["linear_attention"] * 2), 0
    ),
    "bamba": lambda: BambaMixer(BambaConfig(**_MAMBA, mamba_n_groups=2), 0),
    "nemotron_h": lambda: NemotronHMamba2Mixer(NemotronHConfig(**_NEMOTRON, layers_block_type=["linear_attention", "mlp"]), 0),
    "falcon_h1": lambda: FalconH1Mixer(FalconH1Config(**_FALCON), 0),
    "falcon_h1 with a norm": lambda: FalconH1Mixer(FalconH1Config(**_FALCON, mamba_rms_norm=True), 0),
}


@pytest.mark.parametrize("name", MAMBAS)
@torch.no_grad()
def test_the_mamba_layers(name):
    module = MAMBAS[name]()
    if name.startswith("falcon_h1"):
        module.mup_vector = torch.ones(1)
    expected, hidden = of_transformers(module)
    groups, norm, eps = module.n_groups, getattr(module.norm, "weight", None), getattr(module.norm, "variance_epsilon", EPS)
    weights = (module.conv1d.weight[:, 0], module.conv1d.bias, module.A_log, module.dt_bias, module.D, norm, eps)
    limits, gates_first = module.time_step_limit, not getattr(module.norm, "norm_before_gate", False)
    dims = (module.ssm_state_size, 32)
    kernel = Recurrence.mamba2(RUNNABLE[0], (groups, 4), dims, *weights, limits, groups, gates_first)
    rows, dt = module.in_proj(hidden).split([kernel.structure.width, 4], 1)
    compare(kernel, rows, torch.stack([dt, dt], 1), expected)
