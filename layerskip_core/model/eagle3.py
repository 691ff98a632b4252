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
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import Places
from .rope import llama3_factors
from .row_cache import write_entries
from .vocabulary import DraftVocabulary

if TYPE_CHECKING:
    from .backend import Backend, Layers

Product = Callable[[Tensor], Tensor]
ROPES = "default", "llama3"
ROPE_VALUES = (
    *("rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
    "original_max_position_embeddings",
)

NO_DRAFTER = "this model has no {0} drafter; `layerskip train-drafter --layout {0}` makes one"
UNSUITED = "no drafter in the EAGLE-3 layout suits model_type {}: its layers read tokens"
FC = "fc.weight"
HEAD = "lm_head.weight"
NORM = "norm.weight"
TOKENS = "d2t"
LAYER = "layers.0."
_QKV = tuple(f"{LAYER}self_attn.{name}_proj.weight" for name in "qkv")
_OUT = f"{LAYER}self_attn.o_proj.weight"
_GATE_UP = tuple(f"{LAYER}mlp.{name}_proj.weight" for name in ("gate", "up"))
_DOWN = f"{LAYER}mlp.down_proj.weight"
MATRICES = (FC, *_QKV, _OUT, *_GATE_UP, _DOWN)  # all but the head
_INPUT_NORM, HIDDEN_NORM, _MLP_NORM = (
    f"{LAYER}{name}.weight"
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")
)
_STATES_NORM = "input_norm.weight"


@dataclass(frozen=True)
class Eagle3Form:
    """The sizes of a drafter.

    Attributes:
        layers: of the target, ascending; `fc` reads the hidden states after each. hidden: D, of the
        target and of the drafter. inner: width of the MLP, whose activation is SiLU. vocab: N
        tokens that its head scores. rope: `rope_parameters` in transformers' names.
        norm_before_residual: whether the residual is the normed feature. fc_norm, norm_before_fc:
        whether the states are normed before `fc`, each alone or all concatenated. norm_output:
        whether the next draft reads norm(h) as the feature, not h.
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
        return {
            FC: (hidden, len(self.layers) * hidden),
            **dict(
                zip(
                    _QKV,
                    ((queries, 2 * hidden), (keys, 2 * hidden), (keys, 2 * hidden)),
                    strict=True,
                )
            ),
            _OUT: (hidden, queries),
            **dict.fromkeys(_GATE_UP, (self.inner, hidden)),
            _DOWN: (hidden, self.inner),
            **dict.fromkeys((_INPUT_NORM, HIDDEN_NORM, _MLP_NORM, NORM), (hidden,)),
            **dict.fromkeys(self._state_norms, (hidden,)),
            **({_STATES_NORM: (len(self.layers) * hidden,)} if self.norm_before_fc else {}),
            HEAD: (self.vocab, hidden),
        }

    @property
    def _state_norms(self) -> list[str]:
        return [f"fc_norm.{place}.weight" for place in range(len(self.layers) * self.fc_norm)]

    def fc_input(self, states: Sequence[Tensor], normed: Callable[[str, Tensor], Tensor]) -> Tensor:
        """The input (..., X D) of `fc`, from the target's states (..., D) after X layers. `normed`
        applies a norm by name.
        """
        joined = torch.cat(
            tuple(map(normed, self._state_norms, states) if self.fc_norm else states), dim=-1
        )
        return normed(_STATES_NORM, joined) if self.norm_before_fc else joined


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
        self._qkv = product_of(_QKV)
        self._out = product_of((_OUT,))
        self._gate_up = product_of(_GATE_UP)
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
        heads = both.view(*both.shape[:2], form.heads + 2 * form.kv_heads, form.head_dim).transpose(
            1, 2
        )
        queries, keys, values = torch.split(
            heads, [form.heads, form.kv_heads, form.kv_heads], dim=1
        )
        places, frequencies = (
            part.to(both.device, non_blocking=True) for part in (places, self._frequencies)
        )
        angles = places[:, None, :, None] * frequencies
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


class PlacedEagle3:
    """A drafter of a backend, with the interface of PlacedBlock. Its KV entries are layer `place`
    of the target's cache.
    """

    needs_feature = True
    kernel = None

    def __init__(
        self,
        stored: Eagle3Weights,
        place: int,
        vocab: int,
        like: Tensor,
        product_of: Callable[[Tensor], Product],
    ) -> None:
        """`vocab`: the target's. Norms take the precision and device of `like`; `product_of` the
        product with a matrix.
        """
        norms = {
            name: weight.to(like) for name, weight in stored.weights.items() if weight.dim() == 1
        }
        self._layer = Eagle3Layer(
            stored.form,
            norms.__getitem__,
            lambda names: product_of(torch.cat([stored.weights[name] for name in names])),
        )
        self._place = place
        self.taps = (0, *stored.form.layers)
        self.vocabulary = DraftVocabulary(vocab, stored.form.vocab, stored.tokens.tolist())
        self.head = self._layer.logits
        self.own_feature = self._layer.own_feature

    def run(
        self, layers: "Layers", states: Tensor, before: Tensor | None, places: Places
    ) -> Tensor:
        assert before is not None
        places, (residual, queries, keys, values) = self._begun(states, before, places)
        keys, values = write_entries(self._place, keys[:, :, 0], values[:, :, 0], places)
        if places.rows.tolist() != list(range(len(keys))):
            keys, values = (
                part[places.rows.to(part.device, non_blocking=True)] for part in (keys, values)
            )
        mask = (torch.arange(keys.shape[2]) <= places.positions[:, None])[:, None, None].to(
            queries.device, non_blocking=True
        )
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, enable_gqa=True
        )
        return self._layer.finish(residual, attended)[:, 0]

    def write(
        self, model: "Backend", states: Mapping[int, Tensor], before: Tensor | None, places: Places
    ) -> None:
        assert before is not None
        places, (_, _, keys, values) = self._begun(states[0], before, places)
        write_entries(self._place, keys[:, :, 0], values[:, :, 0], places)

    def _begun(
        self, states: Tensor, before: Tensor, places: Places
    ) -> tuple[Places, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The places of the entries, one position before their tokens, and `Eagle3Layer.begin` of N
        texts of one token.
        """
        entries = places.moved(-1)
        return entries, self._layer.begin(
            states[:, None], before[:, None], entries.positions[:, None]
        )

    def features(
        self, model: "Backend", states: Mapping[int, Tensor], finals: Tensor
    ) -> Tensor | None:
        return self._layer.feature([states[tap] for tap in self.taps[1:]])
