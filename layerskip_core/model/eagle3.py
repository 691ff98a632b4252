"""A drafter in the EAGLE-3 layout (Li et al., NeurIPS 2025), which other engines read too; the
target stays unchanged.

It is one decoder layer and a head over part of the vocabulary. From the embedding e of the token at
position t and the feature g of the token before, it predicts the token at t+1:

    x = [norm(e_t); norm(g_{t-1})], h = layer(x) with the residual g_{t-1}, logits = head(norm(h))

For tokens that the target has run, the feature projects its hidden states after some of its layers,
`fc [s_2; s_15; s_27]`; for later tokens it is the drafter's h. The KV entry is at position t-1.
EAGLE-3.1 norms the states before `fc`, and uses norm(h) in place of h.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rope import llama3_factors

Product = Callable[[Tensor], Tensor]
ROPES = "default", "llama3"
ROPE_VALUES = (
    "rope_type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)

NO_DRAFTER = "this model has no {0} drafter; `layerskip train-drafter --layout {0}` makes one"
UNSUITED = "no drafter in the EAGLE-3 layout suits model_type {}: its layers read tokens"
FC = "fc.weight"
HEAD = "lm_head.weight"
NORM = "norm.weight"
TOKENS = "d2t"
LAYER = "layers.0."
_QUERY = f"{LAYER}self_attn.q_proj.weight"
_KEY = f"{LAYER}self_attn.k_proj.weight"
_VALUE = f"{LAYER}self_attn.v_proj.weight"
_OUT = f"{LAYER}self_attn.o_proj.weight"
_GATE = f"{LAYER}mlp.gate_proj.weight"
_UP = f"{LAYER}mlp.up_proj.weight"
_DOWN = f"{LAYER}mlp.down_proj.weight"
MATRICES = (FC, _QUERY, _KEY, _VALUE, _OUT, _GATE, _UP, _DOWN)  # all but the head
_INPUT_NORM = f"{LAYER}input_layernorm.weight"
HIDDEN_NORM = f"{LAYER}hidden_norm.weight"
_MLP_NORM = f"{LAYER}post_attention_layernorm.weight"
_STATES_NORM = "input_norm.weight"


@dataclass(frozen=True)
class Eagle3Form:
    """The sizes of a drafter.

    Attributes:
        layers: of the target, ascending; `fc` reads the hidden states after each.
        hidden: D, of the target and of the drafter.
        inner: width of the MLP, whose activation is SiLU.
        vocab: N tokens that its head scores.
        rope: `rope_parameters` in transformers' names.
        norm_before_residual: whether the residual is the normed feature.
        fc_norm, norm_before_fc: whether the states are normed before `fc`, each alone or all
            concatenated.
        norm_output: whether the next draft reads norm(h) as the feature, not h.
    """

    layers: tuple[int, ...]
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    eps: float
    rope: Mapping[str, float | str]
    norm_before_residual: bool = False
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all weights, as in a checkpoint, but for `TOKENS`, which maps head
        outputs to token ids.
        """
        queries = self.heads * self.head_dim
        keys = self.kv_heads * self.head_dim
        hidden = self.hidden
        shapes: dict[str, tuple[int, ...]] = {
            FC: (hidden, len(self.layers) * hidden),
            _QUERY: (queries, 2 * hidden),
            _KEY: (keys, 2 * hidden),
            _VALUE: (keys, 2 * hidden),
            _OUT: (hidden, queries),
            _GATE: (self.inner, hidden),
            _UP: (self.inner, hidden),
            _DOWN: (hidden, self.inner),
        }
        for norm in (_INPUT_NORM, HIDDEN_NORM, _MLP_NORM, NORM, *self._state_norms):
            shapes[norm] = (hidden,)
        if self.norm_before_fc:
            shapes[_STATES_NORM] = (len(self.layers) * hidden,)
        shapes[HEAD] = (self.vocab, hidden)
        return shapes

    @property
    def _state_norms(self) -> list[str]:
        if not self.fc_norm:
            return []
        return [f"fc_norm.{place}.weight" for place in range(len(self.layers))]

    def fc_input(self, states: Sequence[Tensor], normed: Callable[[str, Tensor], Tensor]) -> Tensor:
        """The input (..., X D) of `fc`, from the target's states (..., D) after X layers. `normed`
        applies a norm by name.
        """
        if self.fc_norm:
            states = list(map(normed, self._state_norms, states))
        concatenated = torch.cat(tuple(states), dim=-1)
        if self.norm_before_fc:
            return normed(_STATES_NORM, concatenated)
        return concatenated


class Eagle3Layer:
    """The drafter's arithmetic, for training and for decoding. B rows of T tokens."""

    def __init__(
        self,
        form: Eagle3Form,
        norm_of: Callable[[str], Tensor],
        product_of: Callable[[Sequence[str]], Product],
    ) -> None:
        """`norm_of` gives a norm's weight by name; `product_of` the product with one matrix, or
        with several concatenated.
        """
        self.form = form
        self._norm_of = norm_of
        self._fc = product_of((FC,))
        self._head = product_of((HEAD,))
        self._qkv = product_of((_QUERY, _KEY, _VALUE))
        self._out = product_of((_OUT,))
        self._gate_up = product_of((_GATE, _UP))
        self._down = product_of((_DOWN,))
        self._frequencies = frequencies(form)

    def feature(self, states: Sequence[Tensor]) -> Tensor:
        """The feature (B, T, D) of tokens, from the target's states (B, T, D) after each of
        `form.layers`.
        """
        return self._fc(self.form.fc_input(states, self._normed))

    def own_feature(self, hidden: Tensor) -> Tensor:
        """The feature (..., D) of tokens for the next draft, from their outputs h (..., D)."""
        return self._normed(NORM, hidden) if self.form.norm_output else hidden

    def begin(
        self, embedded: Tensor, feature: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The residual (B, T, D), queries (B, H, T, head dim), and keys and values (B, kv heads, T,
        head dim) of entries.

        `embedded` (B, T, D): of the tokens. `feature`: of the tokens before. `places` (B or 1, T):
        positions of the entries.
        """
        form = self.form
        normed = self._normed(HIDDEN_NORM, feature)
        both = self._qkv(torch.cat((self._normed(_INPUT_NORM, embedded), normed), dim=-1))
        sizes = [form.heads, form.kv_heads, form.kv_heads]
        heads = both.view(*both.shape[:2], sum(sizes), form.head_dim).transpose(1, 2)
        queries, keys, values = torch.split(heads, sizes, dim=1)
        frequencies = self._frequencies.to(both.device, non_blocking=True)
        angles = places.to(both.device, non_blocking=True)[:, None, :, None] * frequencies
        cos = angles.cos().to(both.dtype)
        sin = angles.sin().to(both.dtype)
        residual = normed if form.norm_before_residual else feature
        return residual, _rotated(queries, cos, sin), _rotated(keys, cos, sin), values

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The output h (B, T, D) of the layer, from attention's output (B, H, T, head dim)."""
        hidden = residual + self._out(attended.transpose(1, 2).flatten(2))
        gate, up = self._gate_up(self._normed(_MLP_NORM, hidden)).chunk(2, dim=-1)
        return hidden + self._down(F.silu(gate) * up)

    def logits(self, hidden: Tensor) -> Tensor:
        """Outputs h (..., D) to logits (..., N) over the drafter's own vocabulary."""
        return self._head(self._normed(NORM, hidden))

    def _normed(self, name: str, hidden: Tensor) -> Tensor:
        """Norms in the weight's precision, which stays fp32 under autocast."""
        weight = self._norm_of(name)
        return F.rms_norm(hidden.to(weight.dtype), weight.shape, weight, self.form.eps).to(
            hidden.dtype
        )


class Eagle3(nn.Module):
    """The weights of a drafter, by their names in a checkpoint. `layer` computes with them."""

    def __init__(self, form: Eagle3Form, tokens: Tensor, seed: int = 0) -> None:
        """`tokens` (N,): the target's token ids that the head scores. Matrices are random, from
        `seed`; norms are 1.
        """
        super().__init__()
        self.form = form
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterDict()
        for name, shape in form.shapes.items():
            parameter = nn.Parameter(torch.ones(shape))
            if len(shape) == 2:
                nn.init.normal_(parameter, std=0.02, generator=generator)
            # Keys of a ParameterDict may have no dots
            self.weights[name.replace(".", "/")] = parameter
        self.tokens = nn.Buffer(tokens)
        self.layer = Eagle3Layer(form, self.weight, self._product)

    def weight(self, name: str) -> Tensor:
        weight: Tensor = self.weights[name.replace(".", "/")]
        return weight

    def _product(self, names: Sequence[str]) -> Product:
        return lambda rows: F.linear(rows, torch.cat([self.weight(name) for name in names]))


def _rotated(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates (B, heads, T, head dim); each dimension of the first half is paired with one of the
    second.
    """
    first, second = vectors.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def frequencies(form: Eagle3Form) -> Tensor:
    """Rotary frequencies (head dim / 2,) in radians per position."""
    rope = form.rope
    size = form.head_dim
    found = float(rope["rope_theta"]) ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    if rope.get("rope_type", "default") == "llama3":
        found = found / llama3_factors(rope, size)
    return found.float()


@dataclass(frozen=True)
class Eagle3Weights:
    """A stored drafter: its sizes, the target's tokens (N,) that its head scores, and its weights
    by name.
    """

    form: Eagle3Form
    tokens: Tensor
    weights: Mapping[str, Tensor]
