"""The C kernels: equal to the generic layers, batch-invariant, and replaced by torch's where they
cannot run.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import CHANGES, DENSE_MIXERS, MIXERS, OWN_LAYERS, at, ids_of, logits_of, tiny_model
from decodings import context_after, draft_of, entries, stepwise
from test_packed import BF16_ERROR, CASES, EACH_PART, assert_equal_spans, errors, pair, rms, spans  # noqa: F401  a fixture

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding.drafters import DrafterSetup, drafter_for
from layerskip_core.decoding.target import FixedTarget
from layerskip_core.model import (
    DraftEnds,
    ModelSpec,
    NativeBackend,
    Submodel,
    TorchBackend,
    TransformersBackend,
    can_run_native,
    native,
    repacked,
)
from layerskip_core.model.backend import DraftCall, TokenPass, states_at
from layerskip_core.model.native import compiled
from layerskip_core.model.vocabulary import most_probable

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4}
BUILT = [name for name in compiled.VARIANTS if compiled.kernels(name) is not None]
# But for one instruction
LIKE_AVX2 = [name for name in BUILT if name in ("avx512_vnni", "avx_vnni")]
PRECISIONS = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "int8": (torch.bfloat16, {"quantize": "int8"}),
    "int4": (torch.float32, {"quantize": "int4"}),
}

PARTIAL_ROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
}
KINDS = {  # of layers, between them with every part that the kernels have
    "llama": {},
    "mistral": {"sliding_window": 7},
    "gemma2": CHANGES["gemma2"],
    "gemma3_text": {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "granite": CHANGES["granite"],
    "granitemoe": CHANGES["granitemoe"],
    "olmo2": {},
    "phi3": PARTIAL_ROPE,
    "qwen3_moe": {**CHANGES["qwen3_moe"], "moe_intermediate_size": 32, "norm_topk_prob": False},
    "starcoder2": {},
    "hunyuan_v1_dense": {},
    "gpt_neox": {"head_dim": 16},
    "gpt2": {"n_inner": 96},
    "cohere2": {**CHANGES["cohere2"], "hidden_size": 128},
    "phi": {},
    "apertus": {},
    **{model_type: {} for model_type in MIXERS},
    "gemma4_text": {},
}

CELLS = [  # of each kind a wide and a low-bit precision, of three kinds all
    (kind, precision)
    for kind, precision in product(KINDS, PRECISIONS)
    if precision in ("bf16", "int4") or kind in ("llama", "qwen3_moe", "qwen3_5_text")
]
# With every variant of the kernels: between them all kinds of norms, activations and mixers
EVERYWHERE = ("llama", "gemma2", "gpt2", "qwen3_moe", "qwen3_5_text", "nemotron_h")
needs_kernels = pytest.mark.skipif(
    not BUILT, reason="no kernels were built here, or the CPU lacks what they need"
)


VARIANTS = [name for name in BUILT if name not in LIKE_AVX2]


def in_turn(names, cases, everywhere=()):
    """Runs the cases of `everywhere` with every variant, and each other one with one of them: they
    are builds of the same sources.
    """
    pairs = []
    for number, case in enumerate(cases if VARIANTS else ()):
        chosen = VARIANTS if case in everywhere else [VARIANTS[number % len(VARIANTS)]]
        values = case if isinstance(case, tuple) else (case,)
        pairs += [(variant, *values) for variant in chosen]
    return pytest.mark.parametrize(f"variant, {names}", pairs, indirect=["variant"])


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch):
    monkeypatch.setattr(native, "kernels", lambda: compiled.kernels(request.param))
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def model_of(precision, model_type="llama", **changes):
    dtype, packing = PRECISIONS[precision]
    return NativeBackend.of(
        tiny_model(model_type, dtype, **{**WIDE, **changes}), PackingConfig(**packing)
    )


@in_turn("case", CASES, EVERYWHERE)
def test_fp32_spans_equal_the_generic_ones(variant, pair, case):  # noqa: F811
    generic, fast = pair(case, torch.float32, NativeBackend)
    assert fast.implementation == f"native ({variant})"
    assert_equal_spans(generic, fast, ids_of(2, 17), [0, 9, 10, 17], torch.float32)


@in_turn("case", [*EACH_PART, *DENSE_MIXERS, "gemma4_text"], EVERYWHERE)
def test_bf16_spans_are_nearer_to_fp32_ones_than_those_of_transformers(variant, pair, case):  # noqa: F811
    """Over the same bf16 weights: the kernels keep hidden states and sums in fp32, and round
    less.
    """
    generic, fast = pair(case, torch.bfloat16, NativeBackend)
    ids = ids_of(2, 17)
    edges = [0, 9, 10, 17]
    ours = spans(fast, ids, edges)
    transformers = spans(generic, ids, edges)
    generic.model.float()
    expected = spans(generic, ids, edges)
    # Of transformers, which rounds between all parts of a recurrence
    bound = 5 if case == "qwen3_5_text" else 1
    assert (
        rms(errors(ours, expected)) < 0.8 * rms(errors(transformers, expected)) < bound * BF16_ERROR
    )


@in_turn("model_type, precision", CELLS, [cell for cell in CELLS if cell[0] in EVERYWHERE])
def test_the_kernels_are_batch_invariant(variant, model_type, precision, threads):
    """Rows of a call, rows of a batch, a span in pieces, and any number of threads."""
    model = model_of(precision, model_type, **KINDS[model_type])
    ids = ids_of(3, 20)
    results = []
    for count, rows, number in ((1, 1, 1), (4, 3, 2), (7, 1, 3), (20, 3, 1)):
        threads(number)
        results.append(
            torch.cat(
                [logits_of(model, part, range(count, 20, count)) for part in torch.split(ids, rows)]
            )
        )
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_kernels
@pytest.mark.parametrize("name", LIKE_AVX2)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_vnni_changes_no_bit(monkeypatch, precision, name):
    """Sums of levels are exact, so the instruction gives those of AVX2; of one row, of several and
    of whole tiles.
    """
    ids = ids_of(1, 60)
    results = []
    for chosen in ("avx2", name):
        monkeypatch.setattr(native, "kernels", lambda chosen=chosen: compiled.kernels(chosen))
        model = model_of(precision)
        assert model.implementation.startswith(f"native ({chosen}")
        results.append(spans(model, ids, [0, 1, 3, 6, 10, 15, 21, 28, 37, 60]))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("precision, width", [("fp32", 32), ("bf16", 40), ("fp32", 96)])
def test_rows_have_the_same_bits_in_any_number(variant, precision, width, threads):
    """Around the sizes of blocks, of widths that are multiples of 32 or not, through layers with
    biases and the head.
    """
    threads(2)
    model = model_of(
        precision, "starcoder2", num_hidden_layers=2, hidden_size=width, intermediate_size=width + 2
    )
    ids = ids_of(100, 1)
    positions = torch.zeros(100, 1, dtype=torch.long)

    def run(part):
        hidden = model.run_layers(
            model.embed(ids[part]), 0, 2, at(positions[part], model.new_cache(len(ids[part]), 1))
        )
        return model.unembed(hidden)

    with torch.inference_mode():
        alone = torch.cat([run(slice(row, row + 1)) for row in range(100)])
        for rows in (2, 11, 12, 13, 15, 16, 17, 25, 31, 32, 33, 48, 49, 64, 65, 100):
            assert torch.equal(run(slice(0, rows)), alone[:rows])


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_threads_that_take_each_others_panels_change_no_bit(variant, precision, threads):
    """Of products that are long enough, whose panels are no multiple of what is taken at once; on
    more threads than cores.
    """
    wide = {"hidden_size": 512, "intermediate_size": 1120, "num_hidden_layers": 2}
    model = model_of(precision, **wide)
    ids = ids_of(1, 20)

    def run(number, rows):
        threads(number)
        hidden = model.run_layers(
            model.embed(ids[:, :rows]), 0, 2, at(torch.arange(rows)[None], model.new_cache())
        )
        return model.unembed(hidden)

    with torch.inference_mode():
        for rows in (1, 2, 20):
            alone = run(1, rows)
            assert all(torch.equal(run(number, rows), alone) for number in (2, 3) for _ in range(2))


LONG = {  # of heads: sizes, many that share a key, and what bounds scores or the places seen
    "32": ("llama", {}),
    "64": ("qwen3", {"head_dim": 64}),
    "96": ("llama", {"head_dim": 96}),
    "256": ("gemma", {"head_dim": 256}),
    "256 and 512": ("gemma4_text", {"head_dim": 256, "sliding_window": 140}),
    "20 of one key": ("gemma", {"num_attention_heads": 20, "num_key_value_heads": 1}),
    "window and cap": (
        "gemma2",
        {"sliding_window": 140, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0},
    ),
}


@in_turn("case", LONG, ("64", "window and cap"))
def test_attention_over_long_texts(variant, case, threads):
    """In bf16, over several spans of places: near fp32, and the same bits in pieces, which end on
    the edges of spans or not.
    """
    model_type, changes = LONG[case]
    changes = {**WIDE, "num_hidden_layers": 2, "max_position_embeddings": 300, **changes}
    tiny, same = (tiny_model(model_type, torch.bfloat16, **changes) for _ in range(2))
    model = NativeBackend.of(tiny)
    ids = ids_of(2, 300)

    threads(1)
    whole = logits_of(model, ids)
    threads(2)
    edges = [1, 2, 18, 127, 128, 129, 160, 255, 256, 257, 258, 290, *range(291, 300)]
    assert torch.equal(whole, logits_of(model, ids, edges))
    expected = logits_of(TransformersBackend(same.float()), ids)
    assert rms(errors([whole], [expected])) < 0.06


LOW_BIT = list(product([kind for kind in KINDS if kind not in OWN_LAYERS], ("int8", "int4")))


@in_turn("model_type, precision", LOW_BIT, [cell for cell in LOW_BIT if cell[0] in EVERYWHERE])
def test_low_bit_layers_are_near_torchs_over_the_same_levels(variant, precision, model_type):
    """Against the packed model on torch's kernels over the same levels: what differs is the
    rounding of activations.
    """
    dtype, packing = PRECISIONS[precision]
    tiny = tiny_model(model_type, dtype, **{**WIDE, **KINDS[model_type]})
    reference = TorchBackend.of(tiny, PackingConfig(**packing))
    model = model_of(precision, model_type, **KINDS[model_type])
    ids = ids_of(1, 12)
    expected = logits_of(reference, ids).float()
    actual = logits_of(model, ids)
    assert (actual - expected).std() < 0.1 * expected.std()


@pytest.mark.parametrize(
    "model_type, packing",
    [
        *(
            ("llama", packing)
            for packing in (
                {},
                {"draft_vocab": 40},
                {"draft_weights": ("int8",)},
                {"quantize": "int4"},
            )
        ),
        ("gemma3_text", {}),
        ("olmo2", {"draft_weights": ("int8",)}),
        ("granite", {}),
        ("starcoder2", {}),
        ("granitemoe", {}),
        ("qwen3_moe", {"draft_weights": ("int8",)}),
        ("gemma4_text", {"draft_weights": ("int8",)}),
    ],
    ids=str,
)
def test_a_draft_in_one_call_equals_a_draft_in_steps(variant, model_type, packing, threads):
    """Tokens, states and the cache, bit for bit; and the same after an EOS, which ends the
    draft.
    """
    threads(1 + (model_type == "llama"))
    order = torch.randperm(67, generator=torch.Generator().manual_seed(3)).tolist()
    tiny = tiny_model(model_type, torch.bfloat16, **{**WIDE, **KINDS[model_type]})
    model = NativeBackend.of(tiny, PackingConfig(**packing), order)
    prompt = ids_of(1, 30)[0].tolist()

    weights = packing.get("draft_weights", (None,))[0]
    target = FixedTarget(model, DecodingConfig("autoregressive", logprobs=0))

    def drafted(ends, one_call):
        config = DecodingConfig("self-speculative", 4, 6, draft_weights=weights)
        drafter = drafter_for(DrafterSetup(model, config)).otherwise
        context = context_after(model, prompt, eos_ids=ends)
        with torch.inference_mode():
            draft = (
                drafter.draft(context, [6])
                if one_call
                else stepwise(drafter, context, [6], DraftEnds())
            )
            places = context.places([len(draft.tokens)], [0])
            return draft, target.run_drafts(draft.tokens, draft.exit_states, places).logits

    chosen = drafted((), False)[0].tokens.tolist()
    for ends in ((), (66, chosen[1]), (chosen[3],), (chosen[6],)):
        (expected, logits), (draft, ours) = drafted(ends, False), drafted(ends, True)
        assert torch.equal(draft.tokens, expected.tokens) and draft.counts == expected.counts
        assert list(draft.exit_states) == list(expected.exit_states)
        for stop, states in expected.exit_states.items():
            assert torch.equal(draft.exit_states[stop], states)
        assert torch.equal(ours, logits)


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "gemma4_text", "qwen3_moe", "qwen3_5_text"]
)
def test_guesses_save_passes_of_a_copy_and_change_no_draft(variant, model_type, monkeypatch):
    tiny = tiny_model(model_type, torch.bfloat16, **{**WIDE, **KINDS[model_type]})
    passes = []
    model = NativeBackend.of(tiny, PackingConfig(draft_weights=("int8",)))
    prompt = ids_of(1, 30)[0].tolist()
    side = model.draft_sides["int8"]
    kernels = compiled.kernels(variant)

    def draft(*arguments, kernel=kernels.draft):
        kernel(*arguments)
        passes.append(arguments[5].passes)

    def drafted(text, most=9):
        context = context_after(model, prompt)
        context.cache.steps_back = most
        places = context.places([most + 1], [0])
        submodel = Submodel(side.num_layers)
        ends = DraftEnds(survival=1e-30)
        with torch.inference_mode():
            text = torch.tensor(text)
            call = DraftCall(side.whole, text, submodel, places, ends, runs_last=False)
            tokens, _, probs = side.kernel(call)
        return tokens.tolist(), probs

    monkeypatch.setattr(kernels, "draft", draft)
    expected = tokens, _ = drafted(prompt[-1:])
    texts = (
        [*tokens, tokens[0]],
        [*tokens[:4], 0, *tokens[4:6], 0, tokens[0]],
        [tokens[0], *range(9), tokens[0]],
        prompt,
    )
    assert [drafted(text) for text in texts] == [expected] * len(texts)
    assert passes[0] == 9 and passes[1] < 6, (
        "where tokens differ 3: a match of 1, then of 3, then of 7 tokens"
    )


@pytest.mark.parametrize(
    "model_type, precision",
    [
        (kind, precision)
        for kind, precision in CELLS
        if kind == "llama" or (kind in MIXERS and precision == "bf16")
    ]
    + [
        ("gemma3_text", "int4"),
        ("gemma4_text", "bf16"),
        ("qwen3_moe", "int8"),
        ("gpt2", "fp32"),
        ("phi", "bf16"),
        ("cohere2", "fp32"),
    ],
)
def test_a_choice_in_one_call_is_that_of_the_logits(variant, model_type, precision, threads):
    """Of rows at different positions, some of whose neighbours have left the cache, from their
    tokens and from an exit on.
    """
    threads(1 + (model_type == "llama"))
    changes = {
        **KINDS[model_type],
        **({"final_logit_softcapping": None} if model_type == "gemma4_text" else {}),
    }
    model = model_of(precision, model_type, **changes)
    tokens = ids_of(3, 4)
    positions = torch.tensor([[9], [12], [5]]) + torch.arange(4)
    with torch.inference_mode():
        found = []
        caches = []
        for exit_layer in (None, 0, 3):
            cache = model.new_cache(4)
            model.run_layers(
                model.embed(ids_of(4, 12)), 0, 6, at(torch.arange(12).expand(4, -1), cache)
            )
            cache.keep_rows([0, 2, 3])
            states = model.run_layers(model.embed(tokens), 0, exit_layer or 0, at(positions, cache))
            if exit_layer is None:
                reached = states_at(model, states, (4, 5, 6), at(positions, cache))
                found.append(most_probable(model.unembed(reached[6])))
            else:
                start = states.clone()
                given = states.flatten(0, 1) if exit_layer else None
                step = TokenPass(
                    tokens.flatten(), at(positions, cache), 6, exit_layer, given, (4, 6)
                )
                chosen, kept = model.choose(step)
                assert torch.equal(start, states) and list(kept) == [4, 6]
                assert torch.equal(kept[4], reached[4].flatten(0, 1)) and torch.equal(
                    kept[6], reached[6].flatten(0, 1)
                )
                found.append(chosen.view(tokens.shape))
            caches.append(
                torch.cat(
                    [entries(cache, row)[..., :stop, :] for row, stop in enumerate((13, 16, 12))],
                    dim=3,
                )
            )
    for chosen, cache in zip(found, caches, strict=True):
        assert torch.equal(chosen, found[0]) and torch.equal(cache, caches[0])
    assert len(found[0].unique()) > 3


@pytest.mark.parametrize("best", [0, 255, 256, 599])
def test_of_equal_logits_the_first_is_drafted(variant, best):
    """In a vocabulary of 600: the kernel searches blocks of 256, and 599 is after the last whole
    vector of sixteen.
    """

    def drafted(change):
        tiny = tiny_model("llama", torch.float32, vocab_size=600, **WIDE)
        change(tiny.lm_head.weight.data)
        model = NativeBackend.of(tiny)
        return draft_of(
            model, None, Submodel(3), torch.tensor([[5]]), torch.arange(2)[None], model.new_cache()
        ).tokens.tolist()

    _, likely = drafted(lambda weight: None)

    def equal_from_best_on(weight):
        row = weight[likely].clone()
        weight[:best] = -row
        weight[best:] = row

    assert drafted(equal_from_best_on) == [5, best]


def test_which_precisions_devices_and_widths_the_kernels_support(variant):
    spec = ModelSpec.of(tiny_model("llama", torch.float32, **WIDE).config)
    cpu = torch.device("cpu")
    assert can_run_native(spec, torch.float32, cpu, None)
    assert can_run_native(spec, torch.bfloat16, cpu, PackingConfig(quantize="int4"))
    assert not can_run_native(spec, torch.float64, cpu, None)
    assert not can_run_native(spec, torch.float32, torch.device("cuda"), None)
    assert not can_run_native(replace(spec, activation="tanh"), torch.float32, cpu, None)
    narrow = replace(spec, inner=48)  # no whole groups of 32
    assert can_run_native(narrow, torch.float32, cpu, None)
    assert not can_run_native(narrow, torch.float32, cpu, PackingConfig(draft_weights=("int8",)))


SMALLEST = {
    "hidden_size": 2,
    "intermediate_size": 2,
    "head_dim": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}


@needs_kernels
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_row_counts_whose_products_exceed_32_bits(kind, threads, monkeypatch):
    """A call's rows times its tiles, which are of up to 12 rows, or of 8 by AVX-512 in int8, exceed
    2**31.
    """
    threads(2)
    monkeypatch.setattr(repacked, "MOST_BYTES", 1 << 50)
    wide = kind == "int8"  # whole groups of 32
    shape = {
        **SMALLEST,
        **({"hidden_size": 32, "intermediate_size": 32, "head_dim": 32} if wide else {}),
    }
    rows = 132_000 if wide and compiled.kernels().variant in ("amx", "avx512") else 161_000
    tiny = tiny_model(
        "llama",
        torch.float32,
        vocab_size=3,
        num_hidden_layers=1,
        pad_token_id=0,
        eos_token_id=2,
        **shape,
    )
    model = NativeBackend.of(tiny, PackingConfig("int8" if wide else None))
    hidden = torch.randn(
        rows, 1, tiny.config.hidden_size, generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():

        def run(part):
            cache = model.new_cache(len(part), 1)
            return model.unembed(
                model.run_layers(part, 0, 1, at(torch.zeros(len(part), 1, dtype=torch.long), cache))
            )

        together = run(hidden)
        for part in (slice(0, 40), slice(rows // 2, rows // 2 + 40), slice(rows - 40, rows)):
            assert torch.equal(together[part], run(hidden[part]))


def test_large_batches_run_in_parts_of_bounded_memory(variant, monkeypatch):
    """40 prompts of 50 tokens: 2,000 rows, of which no call has more than fit into the bytes
    allowed, or 16.
    """
    monkeypatch.setattr(repacked, "CHUNK", 16)
    model = model_of("fp32")
    ids = ids_of(40, 50)
    results = []
    calls = []
    layers = model._layers
    call_at = model._layers.call_at
    monkeypatch.setattr(
        layers,
        "call_at",
        lambda places, *given: calls.append(sum(places.counts)) or call_at(places, *given),
    )
    for most in (2000, 130, 16):
        monkeypatch.setattr(repacked, "MOST_BYTES", most * layers.row_bytes())
        calls.clear()
        results.append(logits_of(model, ids))
        assert max(calls) == most
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_fp32_weights_that_bf16_holds_take_half_the_room_and_give_the_same_bits(monkeypatch):
    if not getattr(compiled.kernels(), "widens_bf16", False):
        pytest.skip("no kernels that widen bf16")
    backends = []
    for narrows in (True, False):
        model = tiny_model("llama", torch.float32, **WIDE)
        for weight in model.parameters():
            weight.data = weight.data.bfloat16().float()
        if not narrows:
            monkeypatch.setattr(compiled.kernels(), "widens_bf16", False)
        backends.append(NativeBackend.of(model))
    matrices = [backend._layers.layers[0].matrices for backend in backends]
    assert [matrix.form.kind for matrix in matrices[0]] == 4 * ["widened"]
    sizes = [sum(matrix.parts["weight"].nbytes for matrix in of_layer) for of_layer in matrices]
    assert 2 * sizes[0] == sizes[1]
    assert torch.equal(*(logits_of(one, ids_of(1, 35)) for one in backends))
