"""Training of a drafter in the EAGLE-3 layout, unrolled over its own outputs (training-time test:
Li et al., 2025).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.locate import fetched_folder
from ..checkpoint.model_weights import copy_into
from ..checkpoint.sidecars import default_layers, read_eagle3
from ..config.training import DrafterConfig
from ..errors import require
from ..losses import IGNORED
from ..model import Backend, TransformersBackend
from ..model.eagle3 import (
    MATRICES,
    ROPE_VALUES,
    ROPES,
    Eagle3,
    Eagle3Form,
    Eagle3Layer,
    Eagle3Weights,
)
from ..model.spec import ModelSpec
from .encoding import EncodedRow
from .exit_blocks import DrafterModule
from .recipe import RunStep
from .speedup import SpeedEstimate, eagle3_speedup

DRAFTS = 3  # unrolled in training
_ALIKE = 0.9  # a head with a greater mean cosine to the model's rows counts as the model's
_SCORED = 256  # tokens at a time through the model's whole head


class FrozenEagle3(DrafterModule):
    """A drafter of a frozen model. Only the model's embedding and head run here; `decoder` computes
    the states.

    Muon trains the drafter's matrices; its norms and head stay as they were initialised. On SmolLM2
    57 such steps gave more agreement than 122 of AdamW on all weights.
    """

    first_target = 2  # token t is predicted from the embedding of t-1 and the states of t-2
    names = {0: "eagle3"}  # noqa: RUF012

    def __init__(
        self,
        backend: TransformersBackend,
        config: DrafterConfig,
        known: Eagle3Weights | None = None,
    ) -> None:
        """Starts from `known`, or from the model's final norm and random matrices. `begin` sets the
        draft vocabulary and head.

        A head of `known` that differs from the model's stays, with its vocabulary. One like the
        model's, also as it was before a finetuning, is replaced: another task has other frequent
        tokens.

        Raises ConfigError if `known` is None and the model does not suit engines (`suits_engines`).
        """
        super().__init__(backend)
        self._has_own_head = False
        if known is None:
            form = _form(backend, config.draft_vocab)
            self.drafter = Eagle3(form, torch.arange(form.vocab), config.seed)
            if backend.norm_weight is not None:
                copy_into(self.weights(), {"norm.weight": backend.norm_weight})
        else:
            form = known.form
            self.drafter = Eagle3(form, known.tokens.clone(), config.seed)
            copy_into(self.weights(), known.weights)
            own = known.weights["lm_head.weight"].float()
            models = self._head[known.tokens].float().to(own.device)
            self._has_own_head = float(F.cosine_similarity(own, models).mean()) <= _ALIKE
        self.to(backend.device, torch.float32)
        for name, weight in self.weights().items():
            weight.requires_grad_(name in MATRICES)
        self.layers = form.layers
        self.details = {"layers": form.layers, "draft_vocab": form.vocab}

    @classmethod
    def of(cls, backend: TransformersBackend, config: DrafterConfig) -> "FrozenEagle3":
        """Raises CheckpointError if the drafter `start_from` cannot be read."""
        known = None
        if config.start_from is not None:
            known = read_eagle3(fetched_folder(config.start_from), backend.spec)
        return cls(backend, config, known)

    def weights(self) -> dict[str, Tensor]:
        return {name: self.drafter.weight(name) for name in self.drafter.form.shapes}

    def estimated_speedup(self, backend: Backend, exit_layer: int) -> SpeedEstimate:
        return eagle3_speedup(backend, self.stored(backend.dtype))

    @property
    def _head(self) -> Tensor:
        """The model's head, (V, D)."""
        weight: Tensor = self.backend.model.get_output_embeddings().weight.detach()
        return weight

    def begin(self, rows: Sequence[EncodedRow]) -> None:
        """Sets the draft vocabulary to the most frequent answer tokens of the rows, and the
        head to the model's for these.

        If they are too few, tokens of the present vocabulary fill it up. A drafter with a head of
        its own keeps both.
        """
        if self._has_own_head:
            return
        labels = torch.cat([torch.from_numpy(row["labels"]) for row in rows])
        answers = labels[labels != IGNORED]
        scores = answers.bincount(minlength=self.backend.spec.vocab).float()
        own = self.drafter.tokens.cpu()
        scores.index_add_(0, own, torch.full((len(own),), 0.5))
        tokens = scores.argsort(descending=True, stable=True)[: len(own)].sort().values
        self.drafter.tokens.copy_(tokens)
        copy_into(self.weights(), {"lm_head.weight": self._head[tokens]})

    def stored(self, dtype: torch.dtype) -> Eagle3Weights:
        """The drafter's weights on the CPU in `dtype`."""
        weights = {
            name: weight.detach().to("cpu", dtype) for name, weight in self.weights().items()
        }
        return Eagle3Weights(self.drafter.form, self.drafter.tokens.cpu(), weights)

    def forward(
        self, input_ids: Tensor, labels: Tensor, step: RunStep | None = None
    ) -> dict[str, Tensor | tuple[int, ...]]:
        """`loss` is KL(model || draft) over the draft vocabulary, averaged over the unrolled
        drafts; `per_exit` is the first draft's. Both are summed over targets: tokens with labels
        from the third of a row on.
        """
        layer = self.drafter.layer
        is_target = labels[:, 2:] != IGNORED
        states, finals = self.states(input_ids)
        before = int(is_target.any(0).int().argmax())  # leading entries without a target in any row
        start = max(0, before - DRAFTS + 1)
        taught = finals[:, 1:-1][is_target]
        with torch.no_grad():
            embedded = self.backend.embed(input_ids[:, 1:-1]).float()
            wanted = F.linear(taught, self._head[self.drafter.tokens].float()).log_softmax(-1)
        feature = layer.feature([state[:, :-2] for state in states])
        losses = []
        chosen = []  # by each draft
        for draft, hidden in enumerate(unrolled(layer, embedded, feature, DRAFTS, start)):
            whole = is_target.clone()
            whole[:, :draft] = False  # an entry reads outputs for `draft` entries before it
            logits = layer.logits(hidden[whole[:, start:]])
            found = logits.log_softmax(-1)
            aim = wanted[whole[is_target]]
            losses.append(F.kl_div(found, aim, reduction="sum", log_target=True))
            chosen.append(logits.argmax(-1))
        agreeing = torch.zeros((), device=taught.device)
        if not self.training:
            head = self._head.float()
            parts = torch.split(taught, _SCORED)
            best = torch.cat([F.linear(part, head).argmax(-1) for part in parts])
            agreeing = (self.drafter.tokens[chosen[0]] == best).sum()
        return {
            "loss": torch.stack(losses).mean(),
            "per_exit": losses[0].detach()[None],
            "agreeing": agreeing[None],
            "exit_layers": (0,),
        }


def suits_engines(backend: TransformersBackend) -> bool:
    """Whether a model has attention, and an embedding and logits without scale or cap: engines
    apply none to a drafter.
    """
    if not hasattr(backend.spec.config.get_text_config(decoder=True), "num_attention_heads"):
        return False
    model = backend.model
    ids = torch.arange(4)[None]
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        states = embedding[:4]
        own = backend.embed(ids.to(backend.device))[0]
        if own.dtype != states.dtype or own.shape != states.shape:
            return False
        logits = F.linear(states, head)
        return torch.allclose(own, states) and torch.allclose(
            backend.head(states), logits, rtol=1e-2, atol=1e-3
        )


def _form(backend: TransformersBackend, vocab: int) -> Eagle3Form:
    """The form of a new drafter: the model's widths, where its configuration has them under the
    usual names. The residual is the normed feature, because the model's states are much larger than
    the output of a new layer.

    Raises ConfigError for a model that does not suit engines (`suits_engines`).
    """
    spec = backend.spec
    needed = (
        "exit for a model without attention, or that scales or caps its embedding or its logits"
    )
    require(suits_engines(backend), "layout", needed, "eagle3")
    config = spec.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or spec.hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if isinstance(spec, ModelSpec):  # the drafter's KV entries share its cache
        heads = spec.heads
        kv_heads = spec.kv_heads
        size = spec.head_dim
    given = getattr(config, "rope_parameters", None) or {}
    names = ROPE_VALUES if given.get("rope_type", "default") in ROPES else ("rope_theta",)
    rope = {"rope_theta": 10_000.0}
    rope.update((name, value) for name, value in given.items() if name in names)
    return Eagle3Form(
        default_layers(backend.num_layers),
        spec.hidden,
        heads,
        kv_heads,
        size,
        getattr(config, "intermediate_size", None) or 4 * spec.hidden,
        min(vocab, spec.vocab),
        getattr(config, "rms_norm_eps", None) or 1e-5,
        rope,
        norm_before_residual=True,
    )


def unrolled(
    layer: Eagle3Layer, embedded: Tensor, feature: Tensor, drafts: int, start: int = 0
) -> list[Tensor]:
    """Outputs (B, N - start, D) of the entries start..N-1 in each draft k = 0, 1, ... of a round.

    In draft k > 0 the feature of entry i is the output of entry i-1 in draft k-1. Entry i attends
    to the KV entries up to i-k of draft 0, and to that at i-k+j of each draft j = 1..k. The first k
    outputs of draft k are meaningless.
    """
    count = embedded.shape[1]
    places = torch.arange(count)[None]
    order = torch.arange(count, device=embedded.device)
    groups = layer.form.heads // layer.form.kv_heads
    scale = layer.form.head_dim**-0.5
    all_keys: list[Tensor] = []  # by draft
    all_values: list[Tensor] = []
    outputs: list[Tensor] = []
    for draft in range(drafts):
        residual, queries, keys, values = layer.begin(embedded, feature, places)
        all_keys.append(keys.repeat_interleave(groups, dim=1))
        all_values.append(values.repeat_interleave(groups, dim=1))
        if draft == 0:
            residual = residual[:, start:]
            queries = queries[:, :, start:]
            embedded = embedded[:, start:]
            feature = feature[:, start:]
            places = places[:, start:]
        ends = order[start:, None] - draft
        visible = [order <= ends]
        for later in range(1, draft + 1):
            visible.append(order[start:] == ends + later)
        scores = (queries * scale) @ torch.cat(all_keys, dim=2).transpose(2, 3)
        weights = scores.masked_fill(~torch.cat(visible, dim=1), -torch.inf).softmax(-1)
        outputs.append(layer.finish(residual, weights @ torch.cat(all_values, dim=2)))
        feature = torch.cat((feature[:, :1], layer.own_feature(outputs[-1][:, :-1])), dim=1)
    return outputs
