"""Exit blocks: layers that are trained at exits of a model whose own weights stay as they are.

At exit E a block is a decoder layer of the model's own class and a norm, followed by the model's own head. The layer reads the
state after E layers.

At exit 0 such a block is the drafter that checkpoints ship for multi-token prediction (MTP: DeepSeek-V3, 2024): its layer reads
W [norm(e); norm(s)] of a token's embedding e and the output s of the final norm for the token before: the target's own for the
first draft of a round, the block's own for later ones. Its entry stands where the token before stands, so the first token of a
text has none. The state before the final norm, in its place, costs acceptance (examples/drafters.md). Families store it under
different names (MTP_LAYOUTS).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..errors import CheckpointError
from .cache import Places
from .eagle3 import Eagle3Weights, PlacedEagle3
from .spec import AnySpec, ModelSpec, Shapes
from .vocabulary import DraftVocabulary
from .weights import Take, Weights, checked

if TYPE_CHECKING:
    from .backend import Backend, DraftKernel, Layers
    from .native.drafters import Assistant, NativeAssistant, NativeEagle3
    from .repacked import RepackedLayers


@dataclass(frozen=True)
class ExitBlock:
    """The block of an exit after `exit_layer` layers, 1..L-1; MTP: 0. Names of its weights begin with `prefix`.

    `kind`, on transformers' layers only: `dense`: its layer has the MLP of the model's first layer, where the last has experts;
    `pair`: it is two, one of attention and one of experts, as each of the model's is (Nemotron-H).
    """

    exit_layer: int
    kind: str = field(default="", compare=False)

    @property
    def prefix(self) -> str:
        return f"exits.{self.exit_layer}."

    def shapes(self, spec: AnySpec) -> dict[str, tuple[int, ...]]:
        """Names and shapes of its weights: `exits.E.layer.*` as in a layer, `exits.E.norm.*`, and those of MTP's inputs."""
        known, width, kind = spec.block_shapes, spec.hidden, f"{self.kind}."
        names = {name: shape for name, shape in known.items() if name.startswith(("layer.", "norm."))}
        if of_kind := {name.removeprefix(kind): shape for name, shape in known.items() if name.startswith(kind)}:
            if self.kind == "pair":
                names = {re.sub("^layer", "layer.0", name): shape for name, shape in names.items()}
            names = {name: shape for name, shape in names.items() if not name.startswith("layer.mlp.")} | of_kind
        if self.exit_layer == 0:
            norm = {name.removeprefix("norm"): shape for name, shape in names.items() if name.startswith("norm.")}
            names |= {f"{of}{name}": shape for of in INPUT_NORMS for name, shape in norm.items()}
            names["input.weight"] = width, 2 * width
        return {f"{self.prefix}{name}": shape for name, shape in names.items()}


INPUT_NORMS = "embedding_norm", "feature_norm"  # of MTP
MTP = ExitBlock(0)


class MtpLayout(NamedTuple):
    """How checkpoints store MTP: what the names of its parts begin with after `model.` or another prefix; {}: how many layers
    the model has.

    `root`: what all of them begin with. `state_first`: W reads [norm(s); norm(e)]. `shares_norm`: `norm` is the model's own.
    """

    root: str
    layer: str
    norm: str
    input: str
    embedding_norm: str
    feature_norm: str
    prefix: str = "model."
    state_first: bool = False
    shares_norm: bool = False
    kind: str = ""  # of ExitBlock

    def stored(self, name: str, layers: int) -> str:
        """The name there of a weight of MTP."""
        part, dot, rest = name.removeprefix(MTP.prefix).partition(".")
        return str(getattr(self, part)).format(layers) + dot + rest


MTP_LAYOUTS = (  # as vLLM and SGLang read them, ERNIE 4.5's as FastDeploy does
    MtpLayout("mtp.", "mtp.layers.0", "mtp.norm", "mtp.fc", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", ""),  # Qwen
    MtpLayout(  # DeepSeek V3, GLM-4.5
        *("layers.{}.", "layers.{}", "layers.{}.shared_head.norm", "layers.{}.eh_proj", "layers.{}.enorm", "layers.{}.hnorm")
    ),
    MtpLayout(  # MiMo
        *("mtp_layers.", "mtp_layers.0", "mtp_layers.0.final_layernorm", "mtp_layers.0.input_proj"),
        *("mtp_layers.0.token_layernorm", "mtp_layers.0.hidden_layernorm"),
        state_first=True,
    ),
    MtpLayout(  # ERNIE 4.5
        *("mtp_", "mtp_block.0", "norm", "mtp_linear_proj.0", "mtp_emb_norm.0", "mtp_hidden_norm.0"),
        shares_norm=True,
        kind="dense",
    ),
    MtpLayout(  # Nemotron-H
        *("mtp.", "mtp.layers", "mtp.layers.1.final_layernorm", "mtp.layers.0.eh_proj", "mtp.layers.0.enorm"),
        *("mtp.layers.0.hnorm", ""),
        kind="pair",
    ),
)


@dataclass(frozen=True)
class ExitBlocks:
    """The blocks of a model, by ascending exits, and their weights; and its drafters.

    Attributes:
        take: weights by the names of `ExitBlock.shapes`.
        eagle3: its drafter in the EAGLE-3 layout. `mtp`: the one that its checkpoint ships, which has the block MTP alone.
        layout: of that, where it is stored.
        assistant: the one that was shipped beside it.
        model_fingerprint: of the model that they were made for, if their file has one.
        notes: for the user.
    """

    blocks: tuple[ExitBlock, ...]
    take: Take
    eagle3: Eagle3Weights | None = None
    mtp: "ExitBlocks | None" = None
    layout: MtpLayout = MTP_LAYOUTS[0]
    assistant: "Assistant | None" = None
    model_fingerprint: str | None = None
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
        vocabulary: the tokens that its head scores; None for all.
        taps: after which layers it reads states of the target, ascending; 0: the embedding. Its drafts start at the last.
        needs_feature: whether it also reads a feature of the token before, so that a text's first token has no entry.
        kernel: makes a whole greedy draft in one call, where its drafts start at the embedding; None: its draft side's does.
    """

    block: ExitBlock
    layer: int
    head: Callable[[Tensor], Tensor]
    vocabulary: DraftVocabulary | None = None
    kernel: "DraftKernel | None" = None

    needs_feature = False

    @property
    def taps(self) -> tuple[int, ...]:
        return (self.block.exit_layer,)

    def run(self, layers: "Layers", states: Tensor, before: Tensor | None, places: Places) -> Tensor:
        """What its head reads, for tokens with these states where drafts start, and features of the tokens before them."""
        return layers.run_layers(states, self.layer, self.layer + 1, places)

    def write(self, model: "Backend", states: Mapping[int, Tensor], before: Tensor | None, places: Places) -> None:
        """Writes its KV entries, of the target's states by `taps`."""
        model.write_kv(states[self.block.exit_layer], self.layer, self.layer + 1, places)

    def features(self, model: "Backend", states: Mapping[int, Tensor], finals: Tensor) -> Tensor | None:
        """The features (..., D) of tokens, of the target's states by `taps` and after the last layer."""
        return None

    def own_feature(self, hidden: Tensor) -> Tensor | None:
        """The feature of a drafted token, from what `run` gave for the token."""
        return None


@dataclass(frozen=True, kw_only=True)
class PlacedMtp(PlacedBlock):
    """The block MTP, after the map W `join` from (..., 2D).

    `norm`: its own alone. `input_norms`: as INPUT_NORMS. `layers`: the chain that has its layer, if not its draft side's.
    """

    norm: Callable[[Tensor], Tensor]
    join: Callable[[Tensor], Tensor]
    input_norms: Sequence[Callable[[Tensor], Tensor]]
    layers: "RepackedLayers | None" = None

    needs_feature = True

    def run(self, layers: "Layers", states: Tensor, before: Tensor | None, places: Places) -> Tensor:
        entered, chain = self._entered(states, before), self.layers or layers
        return chain.run_layers(entered, self.layer, self.layer + 1, places.moved(-1))

    def write(self, model: "Backend", states: Mapping[int, Tensor], before: Tensor | None, places: Places) -> None:
        entered = self._entered(states[0], before)
        (self.layers or model).write_kv(entered, self.layer, self.layer + 1, places.moved(-1))

    def features(self, model: "Backend", states: Mapping[int, Tensor], finals: Tensor) -> Tensor | None:
        return model.normed(finals)

    def own_feature(self, hidden: Tensor) -> Tensor | None:
        return self.norm(hidden)

    def _entered(self, states: Tensor, before: Tensor | None) -> Tensor:
        assert before is not None
        parts = [norm(part).to(states.dtype) for norm, part in zip(self.input_norms, (states, before), strict=True)]
        return self.join(torch.cat(parts, dim=-1))


DraftBlock: TypeAlias = "PlacedBlock | PlacedEagle3 | NativeEagle3 | NativeAssistant"


def blocks_named(names: Iterable[str], num_layers: int) -> tuple[ExitBlock, ...]:
    """The blocks that weights of these names belong to. Raises CheckpointError for a name that is none of a block's."""
    exits: set[int] = set()
    for name in names:
        known = re.fullmatch(r"exits\.([1-9]\d{0,3})\.(layer|norm)\..*", name)
        if known is None or int(known[1]) >= num_layers:
            raise CheckpointError(f"{name!r:.100} is no weight of a block at an exit in 1..{num_layers - 1}")
        exits.add(int(known[1]))
    return tuple(map(ExitBlock, sorted(exits)))


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
        sizes=spec.sizes + spec.sizes[last : last + 1] * count,
    )
