"""Exit blocks: layers that are trained at exits of a model whose own weights stay as they are.

At exit E a block is a decoder layer of the model's own class and a norm, followed by the model's own head. The layer reads the
state after E layers. With the feature `final` it reads W [state; s] instead, where s is the output of the final norm for the
token before (as EAGLE, Li et al., 2024): the target's own for the first draft of a round, the block's own for later drafts, and
0 for the first token of a text.

At exit 0 such a block is the drafter that checkpoints ship for multi-token prediction (MTP: DeepSeek-V3, 2024; here Qwen3.5's):
W [norm(e); norm(s)] of a token's embedding e. Its entry stands where the token before stands, so the first token of a text has
none. The norms are in front of W because s is already an output of the final norm: the state before it is drafted from badly.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from ..config.training import Feature
from ..errors import CheckpointError, ConfigError
from .cache import Places
from .eagle3 import Eagle3Weights, PlacedEagle3
from .spec import AnySpec, ModelSpec, Shapes
from .vocabulary import DraftVocabulary
from .weights import Take, Weights, checked

if TYPE_CHECKING:
    from .backend import Backend, DraftKernel, Layers
    from .native.eagle3 import NativeEagle3
    from .repacked import RepackedLayers


@dataclass(frozen=True)
class ExitBlock:
    """The block of an exit after `exit_layer` layers, 1..L-1. Names of its weights begin with `prefix`."""

    exit_layer: int
    feature: Feature = "none"

    @property
    def prefix(self) -> str:
        return f"exits.{self.exit_layer}."

    def shapes(self, spec: AnySpec) -> dict[str, tuple[int, ...]]:
        """Names and shapes of its weights: `exits.E.layer.*` as in a layer, `exits.E.norm.*`, a map `exits.E.input.weight`."""
        shapes = {f"{self.prefix}{name}": shape for name, shape in spec.block_shapes.items()}
        shapes |= {f"{self.prefix}input.weight": (spec.hidden, 2 * spec.hidden)} if self.feature == "final" else {}
        norm = {name: shape for name, shape in spec.block_shapes.items() if name.startswith("norm.")}
        return shapes | {f"{self.prefix}{of}_{name}": shape for of in self.normed for name, shape in norm.items()}

    @property
    def normed(self) -> tuple[str, ...]:
        """The inputs that have a norm of their own, `exits.0.embedding_norm.*` and `exits.0.feature_norm.*`."""
        return ("embedding", "feature") if self.exit_layer == 0 else ()


MTP = ExitBlock(0, "final")


@dataclass(frozen=True)
class ExitBlocks:
    """The blocks of a model, by ascending exits, and their weights; and its drafters.

    Attributes:
        take: weights by the names of `ExitBlock.shapes`.
        eagle3: its drafter in the EAGLE-3 layout. `mtp`: the one that its checkpoint ships, which has the block MTP alone.
        made_for: fingerprint of the model that they were made for, if their file has one.
        notes: for the user.
    """

    blocks: tuple[ExitBlock, ...]
    take: Take
    eagle3: Eagle3Weights | None = None
    mtp: "ExitBlocks | None" = None
    made_for: str | None = None
    notes: tuple[str, ...] = ()

    def shapes(self, spec: AnySpec) -> Shapes:
        return {name: shape for block in self.blocks for name, shape in block.shapes(spec).items()}

    def weights(self, spec: AnySpec, like: Tensor | None = None) -> Weights:
        """In the precision and on the device of `like`; as they are stored without it."""

        def take(name: str) -> Tensor | None:
            weight = self.take(name)
            return weight if weight is None or like is None else weight.to(like)

        return Weights(checked(take, shapes := self.shapes(spec)), shapes)


NO_BLOCKS = ExitBlocks((), lambda name: None)


@dataclass(frozen=True)
class PlacedBlock:
    """Layer `layer` of a backend's chain of layers, which drafts. Hidden states are (..., D), of a pass's tokens.

    Attributes:
        head: the block's norm and the head, to logits (..., N).
        norm: the block's norm alone.
        join: the map W from (..., 2D); None without a feature.
        taps: after which layers it reads states of the target, ascending; 0: the embedding. Its drafts start at the last.
        is_fed: whether it reads a feature of the token before, too: then it can only draft, after passes of the whole model.
        starts_later: whether the first token of a text, which has none before it, has no entry.
        vocabulary: the tokens that its head scores; None for all.
        input_norms: of the state and of the feature, before they are joined; those of MTP.
        layers: the chain that has its layer, if that is not its draft side's.
        kernel: makes a whole greedy draft in one call, where its drafts start at the embedding; None: its draft side's does.
    """

    block: ExitBlock
    layer: int
    head: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor], Tensor]
    join: Callable[[Tensor], Tensor] | None
    vocabulary: DraftVocabulary | None = None
    input_norms: "tuple[Callable[[Tensor], Tensor], ...]" = ()
    layers: "RepackedLayers | None" = None
    kernel: "DraftKernel | None" = None

    @property
    def starts_later(self) -> bool:
        return self.block == MTP

    def entries(self, places: Places) -> Places:
        """Where the entries of tokens at `places` stand."""
        return places.moved(-1) if self.starts_later else places

    @property
    def taps(self) -> tuple[int, ...]:
        return (self.block.exit_layer,)

    @property
    def is_fed(self) -> bool:
        return self.join is not None

    def run(self, layers: "Layers", states: Tensor, before: Tensor | None, places: Places) -> Tensor:
        """What its head reads, for tokens with these states where drafts start, and features of the tokens before them."""
        chain = self.layers or layers
        return chain.run_layers(self.enter(states, before), self.layer, self.layer + 1, self.entries(places))

    def write(self, model: "Backend", states: Mapping[int, Tensor], before: Tensor | None, places: Places) -> None:
        """Writes its KV entries, of the target's states by `taps`."""
        entered = self.enter(states[self.block.exit_layer], before)
        (self.layers or model).write_kv(entered, self.layer, self.layer + 1, self.entries(places))

    def features(self, model: "Backend", states: Mapping[int, Tensor], finals: Tensor) -> Tensor | None:
        """The features (..., D) of tokens, of the target's states by `taps` and after the last layer."""
        return None if self.join is None else model.normed(finals)

    def own_feature(self, hidden: Tensor) -> Tensor | None:
        """The feature of a drafted token, from what `run` gave for the token."""
        return None if self.join is None else self.norm(hidden)

    def enter(self, states: Tensor, features: Tensor | None) -> Tensor:
        """The layer's input: from the states of tokens at the exit, and the features (normed final states) before them."""
        if self.join is None:
            return states
        assert features is not None
        if self.input_norms:
            of_state, of_feature = self.input_norms
            states, features = of_state(states), of_feature(features)
        return self.join(torch.cat((states, features.to(states.dtype)), dim=-1))


DraftBlock: TypeAlias = "PlacedBlock | PlacedEagle3 | NativeEagle3"


def target_block(blocks: Mapping[int, PlacedBlock], exit_layer: int) -> PlacedBlock | None:
    """The block that early exit at this layer runs; None if it has none. Raises ConfigError for one that can only draft."""
    block = blocks.get(exit_layer)
    if block is not None and block.is_fed:
        raise ConfigError(
            f"`exit_layer` {exit_layer} can only draft, as `strategy` self-speculative or adaptive does: its exit block reads "
            "the final states of the model (feature final), which early exit does not compute",
            "exit_layer",
        )
    return block


def features_of(finals: Tensor) -> Tensor:
    """The features of the tokens of whole texts, from the normed final states (..., T, D) of the same tokens."""
    return torch.cat((torch.zeros_like(finals[..., :1, :]), finals[..., :-1, :]), dim=-2)


def blocks_named(names: Iterable[str], num_layers: int) -> tuple[ExitBlock, ...]:
    """The blocks that weights of these names belong to. Raises CheckpointError for a name that is none of a block's."""
    features: dict[int, Feature] = {}
    for name in names:
        known = re.fullmatch(r"exits\.([1-9]\d{0,3})\.(input\.weight|(?:layer|norm)\..*)", name)
        if known is None or int(known[1]) >= num_layers:
            raise CheckpointError(f"{name!r:.100} is no weight of a block at an exit in 1..{num_layers - 1}")
        exit_layer = int(known[1])
        features[exit_layer] = "final" if known[2] == "input.weight" else features.get(exit_layer, "none")
    return tuple(ExitBlock(*block) for block in sorted(features.items()))


def with_blocks(spec: ModelSpec, blocks: ExitBlocks) -> ModelSpec:
    """The chain of layers in which the blocks' follow the model's own: block k is layer L+k, of the kind of the last that
    has keys and values.

    Drafters follow, MTP first: each has the keys and values of a further layer.
    """
    count = len(blocks.blocks) + (blocks.mtp is not None) + (blocks.eagle3 is not None)
    experts, last = spec.experts, max(spec.attending, default=0)
    return replace(
        spec,
        experts=experts and replace(experts, layers=experts.layers + experts.layers[last : last + 1] * count),
        layers=spec.layers + count,
        kinds=spec.kinds + spec.kinds[last : last + 1] * count,
        rope_of=spec.rope_of + spec.rope_of[last : last + 1] * count,
    )
