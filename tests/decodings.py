"""What the tests of decoding share: prompts, the ids of a decoding, and the tiny model on native
kernels.
"""

import pytest
import torch
from conftest import tiny_model

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import decode, sampling
from layerskip_core.decoding.drafters import DrafterSetup, DraftInput
from layerskip_core.decoding.drafters.stepwise import StepwiseDraft
from layerskip_core.decoding.drafters.submodel import SubmodelDrafter
from layerskip_core.decoding.row import Row
from layerskip_core.model import (
    DraftEnds,
    ModelSpec,
    NativeBackend,
    TorchBackend,
    TransformersBackend,
    can_run_native,
)
from layerskip_core.model.exit_blocks import NO_STORED_DRAFTERS
from layerskip_core.model.pages import PAGE, PagedCache

PLAIN = DecodingConfig()
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # widths that the kernels run
# What a row's statistics count, whatever batch it is in
COUNTS = (
    "prompt_tokens",
    "new_tokens",
    "drafted",
    "accepted",
    "rounds",
    "tested_by_position",
    "accepted_by_position",
)


def prompt_of(length, seed=0, vocabulary=67):
    return torch.randint(
        3, vocabulary, (length,), generator=torch.Generator().manual_seed(length + seed)
    ).tolist()


def ids_of(decoding):
    return [token for [step] in decoding for token in step.ids]


def rounds_of(backend, prompt, config):
    """The text before each round of a decoding, and its drafts."""
    loop = decode(backend, prompt, config)
    rounds = []
    draft = loop.engine.drafter.draft

    def recorded(context, limits):
        found = draft(context, limits)
        rounds.append((list(context.ids[0]), found.tokens[1:].tolist()))
        return found

    loop.engine.drafter.draft = recorded
    return ids_of(loop), rounds


def probabilities(logits, config):
    """The distribution (..., V) of a sampled token."""
    if not sampling.truncates(config):
        return sampling._softmax(logits, config.temperature)
    kept, ids = sampling.candidates(logits, config)
    probs = sampling._softmax(kept, config.temperature)
    return torch.zeros(logits.shape, dtype=probs.dtype).scatter(-1, ids, probs)


def letters(ids):
    """A tokenizer whose tokens are single characters."""
    return "".join(chr(ord("0") + token) for token in ids)


def answer_of(model, prompt, config, eos_ids=frozenset(), **options):
    decoding = decode(model, prompt, config, frozenset(eos_ids), letters, **options)
    return ids_of(decoding), decoding.finish_reason, decoding.stats


def context_of(texts, newest, cache, indices, filled, config=PLAIN, eos_ids=frozenset()):
    """Before a round of rows with these ids."""
    rows = [Row(ids, config, eos_ids=frozenset(eos_ids)) for ids in texts]
    return DraftInput(rows, newest, cache, indices, filled)


def stepwise(drafter, given, limits, ends):
    """The draft of an SubmodelDrafter, pass by pass."""
    return StepwiseDraft(drafter._part, given, limits, ends).make()


def context_after(backend, ids, **settings):
    """Before a round: all of `ids` but the last are cached."""
    last = len(ids) - 1
    cache = backend.new_cache()
    with torch.inference_mode():
        hidden = backend.embed(torch.tensor([ids[:last]]))
        backend.run_layers(hidden, 0, backend.num_layers, cache.span(0, last))
    return context_of([ids], torch.tensor(ids[last:]), cache, [0], [last], **settings)


def draft_of(
    backend,
    weights,
    submodel,
    ids,
    positions,
    cache,
    feature=None,
    eos_ids=frozenset(),
    survival=0.0,
    **settings,
):
    """A draft after the last of `ids` (1, T); `positions` (1, d+1) are that token's and the
    drafts'.
    """
    config = DecodingConfig(**settings)
    setup = DrafterSetup(backend, config)
    if feature is not None:
        cache.features[0][submodel.exit_layer or "drafts"] = feature.flatten()
    start = int(positions[0, 0])
    context = context_of(ids.tolist(), ids[0, -1:], cache, [0], [start], config, eos_ids)
    with torch.inference_mode():
        return SubmodelDrafter(setup, weights, submodel).draft(
            context, [positions.shape[1] - 1], DraftEnds(survival=survival)
        )


def entries(cache, row=0):
    """What a row has, (L, 2, kv heads, places, head dim), in their order; attention.h tells that of
    our kernels.

    Where head sizes differ, L is 1 and head dim all of them.
    """
    if not isinstance(cache, PagedCache):
        [cache] = getattr(cache, "parts", {"all": cache}).values()
        return cache.storage[:, :, row]
    held = torch.stack([page.content for page in cache._pages[row]])
    found = []
    start = 0
    together = 4 // held.element_size()  # numbers that stand side by side
    for heads, size in cache._pool.sizes:
        stop = start + 2 * heads * PAGE * size
        keys, values = (
            held[:, start:stop]
            .reshape(-1, 2, heads, PAGE // 16, 16 * size)
            .transpose(0, 2)
            .unbind(1)
        )
        keys = keys.reshape(heads, -1, size // together, 16, together).transpose(2, 3)
        values = values.reshape(heads, -1, size, together).transpose(2, 3)
        found.append(torch.stack([part.reshape(heads, -1, size) for part in (keys, values)]))
        start = stop
    return torch.stack(found) if len({*cache._pool.sizes}) == 1 else torch.cat(found, dim=-1)[None]


def first_draft(backend, prompt):
    """Logits of the first draft of the backend's MTP drafter after a prompt."""
    block = backend.drafters["mtp"]
    cache = backend.new_cache(1)
    last = len(prompt) - 1
    with torch.inference_mode():
        embedded = backend.embed(torch.tensor(prompt))
        finals = backend.run_layers(embedded, 0, backend.num_layers, cache.span(0, len(prompt)))
        features = block.features(backend, {0: embedded}, finals)
        block.write(backend, {0: embedded[1:last]}, features[: last - 1], cache.span(1, last))
        places = cache.span(last, len(prompt))
        return block.head(block.run(backend, embedded[last:], features[last - 1 : last], places))[0]


def plainly(backend, prompt, limit=40, eos_ids=frozenset()):
    return ids_of(
        decode(backend, prompt, DecodingConfig("autoregressive", max_new_tokens=limit), eos_ids)
    )


def backend_on(
    kind, packing=None, model_type="llama", blocks_of=lambda model: NO_STORED_DRAFTERS, **changes
):
    """The tiny model on transformers' layers (`generic`) or torch's kernels (`packed`), in fp64, or
    on ours (`native`).

    `blocks_of`: makes its exit blocks.
    """
    model = tiny_model(model_type, torch.float32 if kind == "native" else torch.float64, **changes)
    if kind == "generic":
        return TransformersBackend(model, blocks_of(model))
    return (native_or_skip if kind == "native" else TorchBackend.of)(
        model, packing, stored_drafters=blocks_of(model)
    )


def silent_layers(*layers, **changes):
    """The tiny model, in which these layers (by number) add nothing."""
    model = tiny_model(**changes)
    with torch.no_grad():
        for layer in layers:
            model.model.layers[layer - 1].self_attn.o_proj.weight.zero_()
            model.model.layers[layer - 1].mlp.down_proj.weight.zero_()
    return TransformersBackend(model)


class UnroundedDrafter(PackingConfig):
    """A drafter in the precision of its file, to compare with a formula."""

    @property
    def drafter(self):
        return self.quantize, self.draft_head


def native_or_skip(model, packing=None, **options):
    if not can_run_native(ModelSpec.of(model.config), model.dtype, torch.device("cpu"), packing):
        pytest.skip("no kernels were built here, or the CPU lacks what they need")
    return NativeBackend.of(model, packing, **options)
