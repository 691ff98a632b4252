"""Exit blocks: layers trained at exits of a model whose own weights stay unchanged.

At exit E a block is a decoder layer of the model's class, which reads the state after E layers, and
a norm, followed by the model's head.

The block at exit 0 is the drafter that checkpoints ship for multi-token prediction (MTP:
DeepSeek-V3, 2024). Its layer reads W [norm(e); norm(s)], where e is a token's embedding and s the
output of the final norm for the token before: the target's for the first draft of a round, then the
block's own. (The state before the final norm lowers acceptance, see examples/LOG.md.) The KV entry
is at the position of the token before; the first token of a text has none. Families store MTP under
different names (MTP_LAYOUTS).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import CheckpointError
from .assistant import Assistant
from .backend import Backend, ChainedBlock, DraftKernel, Layers
from .cache import Places
from .eagle3 import Eagle3Weights
from .spec import AnySpec, ModelSpec, Shapes
from .vocabulary import DraftVocabulary
from .weights import Take, Weights, checked

T = TypeVar("T")


@dataclass(frozen=True)
class ExitBlock:
    """The block of an exit after `exit_layer` layers, 1..L-1; MTP: 0. Names of its weights begin
    with `prefix`.
    """

    exit_layer: int

    @property
    def prefix(self) -> str:
        return f"exits.{self.exit_layer}."

    def shapes(self, spec: AnySpec) -> dict[str, tuple[int, ...]]:
        """Names and shapes of its weights: `exits.E.layer.*` as in a layer, `exits.E.norm.*`, and
        those of MTP's inputs.
        """
        names = dict(spec.block_shapes)
        width = spec.hidden
        if self.exit_layer == 0:
            norm = {
                name.removeprefix("norm"): shape
                for name, shape in names.items()
                if name.startswith("norm.")
            }
            names |= {f"{of}{name}": shape for of in INPUT_NORMS for name, shape in norm.items()}
            names["input.weight"] = width, 2 * width
        return {f"{self.prefix}{name}": shape for name, shape in names.items()}


INPUT_NORMS = "embedding_norm", "feature_norm"  # of MTP
MTP = ExitBlock(0)


class MtpLayout(NamedTuple):
    """How checkpoints name the parts of MTP, after `prefix`; {} stands for the model's number of
    layers.

    `root`: the beginning of all its names. `state_first`: W reads [norm(s); norm(e)].
    """

    root: str
    layer: str
    norm: str
    input: str
    embedding_norm: str
    feature_norm: str
    prefix: str = "model."
    state_first: bool = False

    def stored(self, name: str, layers: int) -> str:
        """The checkpoint's name for a weight of MTP, after `prefix`."""
        part, dot, rest = name.removeprefix(MTP.prefix).partition(".")
        return str(getattr(self, part)).format(layers) + dot + rest


# The layouts whose forward vLLM's classes compute as we do. (Not ERNIE 4.5's: vLLM has no norm
# before the head. Not Nemotron-H's, whose drafter has a pattern of layers.)
MTP_LAYOUTS = (
    MtpLayout(  # Qwen3.5, Qwen3-Next
        root="mtp.",
        layer="mtp.layers.0",
        norm="mtp.norm",
        input="mtp.fc",
        embedding_norm="mtp.pre_fc_norm_embedding",
        feature_norm="mtp.pre_fc_norm_hidden",
        prefix="",
    ),
    MtpLayout(  # DeepSeek V3, GLM-4.5
        root="layers.{}.",
        layer="layers.{}",
        norm="layers.{}.shared_head.norm",
        input="layers.{}.eh_proj",
        embedding_norm="layers.{}.enorm",
        feature_norm="layers.{}.hnorm",
    ),
    MtpLayout(  # MiMo
        root="mtp_layers.",
        layer="mtp_layers.0",
        norm="mtp_layers.0.final_layernorm",
        input="mtp_layers.0.input_proj",
        embedding_norm="mtp_layers.0.token_layernorm",
        feature_norm="mtp_layers.0.hidden_layernorm",
        state_first=True,
    ),
)


@dataclass(frozen=True)
class StoredDrafters:
    """The exit blocks of a model with their weights, and its drafters."""

    blocks: tuple[ExitBlock, ...]  # by ascending exits
    take: Take  # weights by the names of `ExitBlock.shapes`
    eagle3: Eagle3Weights | None = None  # the drafter in the EAGLE-3 layout
    # The drafter that the checkpoint ships, with the block MTP alone
    mtp: "StoredDrafters | None" = None
    layout: MtpLayout = MTP_LAYOUTS[0]  # of the file of `mtp`
    assistant: Assistant | None = None  # the drafter that is shipped beside the model
    # Of the model that the blocks were trained for, if the file has one
    model_fingerprint: str | None = None
    notes: tuple[str, ...] = ()  # for the user

    def shapes(self, spec: AnySpec) -> Shapes:
        return {name: shape for block in self.blocks for name, shape in block.shapes(spec).items()}

    def weights(self, spec: AnySpec, like: Tensor | None = None) -> Weights:
        """The weights in the precision and on the device of `like`; without it as stored."""

        def take(name: str) -> Tensor | None:
            weight = self.take(name)
            return weight if weight is None or like is None else weight.to(like)

        shapes = self.shapes(spec)
        return Weights(checked(take, shapes), shapes)


NO_STORED_DRAFTERS = StoredDrafters((), lambda name: None)


@dataclass(eq=False)
class PlacedBlock(ChainedBlock):
    """An exit block of a backend."""

    block: ExitBlock
    layer: int
    head: Callable[[Tensor], Tensor]
    vocabulary: DraftVocabulary | None = None
    kernel: DraftKernel | None = None

    def __post_init__(self) -> None:
        self.taps = (self.block.exit_layer,)

    def run(self, layers: Layers, states: Tensor, before: Tensor | None, places: Places) -> Tensor:
        return layers.run_layers(states, self.layer, self.layer + 1, places)

    def write(
        self, model: Backend, states: Mapping[int, Tensor], before: Tensor | None, places: Places
    ) -> None:
        model.write_kv(states[self.block.exit_layer], self.layer, self.layer + 1, places)


@dataclass(eq=False, kw_only=True)
class PlacedMtp(PlacedBlock):
    """The block MTP."""

    norm: Callable[[Tensor], Tensor]  # without the head
    join: Callable[[Tensor], Tensor]  # the map W, (..., 2D) to (..., D)
    input_norms: Sequence[Callable[[Tensor], Tensor]]  # as INPUT_NORMS
    layers: Layers | None = None  # the chain with its layer; None: the draft side's

    needs_feature = True

    def run(self, layers: Layers, states: Tensor, before: Tensor | None, places: Places) -> Tensor:
        entered = self._entered(states, before)
        chain = self.layers or layers
        return chain.run_layers(entered, self.layer, self.layer + 1, places.moved(-1))

    def write(
        self, model: Backend, states: Mapping[int, Tensor], before: Tensor | None, places: Places
    ) -> None:
        entered = self._entered(states[0], before)
        (self.layers or model).write_kv(entered, self.layer, self.layer + 1, places.moved(-1))

    def features(
        self, model: Backend, states: Mapping[int, Tensor], finals: Tensor
    ) -> Tensor | None:
        return model.normed(finals)

    def own_feature(self, hidden: Tensor) -> Tensor | None:
        return self.norm(hidden)

    def _entered(self, states: Tensor, before: Tensor | None) -> Tensor:
        assert before is not None
        norm_embedding, norm_feature = self.input_norms
        parts = [norm_embedding(states), norm_feature(before)]
        return self.join(torch.cat([part.to(states.dtype) for part in parts], dim=-1))


def blocks_named(names: Iterable[str], num_layers: int) -> tuple[ExitBlock, ...]:
    """The blocks with weights of these names. Raises CheckpointError for a name that is not a
    block's.
    """
    exits: set[int] = set()
    for name in names:
        known = re.fullmatch(r"exits\.([1-9]\d{0,3})\.(layer|norm)\..*", name)
        if known is None or int(known[1]) >= num_layers:
            raise CheckpointError(
                f"{name!r:.100} is no weight of a block at an exit in 1..{num_layers - 1}"
            )
        exits.add(int(known[1]))
    return tuple(map(ExitBlock, sorted(exits)))


def with_drafter_layers(spec: ModelSpec, blocks: StoredDrafters) -> ModelSpec:
    """The model's spec with a further layer for each block (block k is layer L+k), then for each
    drafter, MTP first.

    The further layers are like the last layer with keys and values.
    """
    count = len(blocks.blocks)
    count += blocks.mtp is not None
    count += blocks.eagle3 is not None
    last = max(spec.attending, default=0)

    def extended(by_layer: tuple[T, ...]) -> tuple[T, ...]:
        return by_layer + by_layer[last : last + 1] * count

    return replace(
        spec,
        experts=spec.experts and replace(spec.experts, layers=extended(spec.experts.layers)),
        layers=spec.layers + count,
        kinds=extended(spec.kinds),
        rope_of=extended(spec.rope_of),
        sizes=extended(spec.sizes),
    )
