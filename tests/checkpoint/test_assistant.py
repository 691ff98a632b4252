"""The assistant of a Gemma 4 model: against transformers' class, found beside the model, carried
along and told of.
"""

import json
import shutil

import pytest
import torch
from command_line import run
from conftest import tiny_model
from decodings import WIDE, UnroundedDrafter, ids_of, native_or_skip, prompt_of
from evaluating import tiny_loaded
from safetensors.torch import load_file, save_file
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM

from layerskip_core.checkpoint.info import CheckpointInfo, read_info
from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.checkpoint.save import save_checkpoint
from layerskip_core.checkpoint.shipped import ASSISTANT_FILES, STALE_ASSISTANT
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import decode, decode_batch
from layerskip_core.decoding.drafters.submodel import SubmodelDrafter

SHAPE = {**WIDE, "max_position_embeddings": 256}
PROMPT = prompt_of(20)


def random_assistant(target, clusters):
    """For a tiny model; the names of its weights are those of google/gemma-4-E2B-it-assistant."""
    torch.manual_seed(1)
    own = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "layer_types": None,
        "head_dim": 16,
    }
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    unused = dict.fromkeys(
        ("hidden_size_per_layer_input", "vocab_size_per_layer_input", "num_kv_shared_layers"), 0
    )
    own |= {
        "layer_types": kinds,
        "use_double_wide_mlp": False,
        "sliding_window": 6,
        "vocab_size": target.vocab_size,
        **unused,
    }
    text = {**target.to_dict(), **own, "num_attention_heads": 4}
    text["per_layer_config"] = {"3": {"head_dim": 32}}
    how = {
        "backbone_hidden_size": target.hidden_size,
        "use_ordered_embeddings": bool(clusters),
        "num_centroids": clusters or 1,
    }
    config = Gemma4AssistantConfig(text_config=text, centroid_intermediate_top_k=3, **how)
    model = (
        Gemma4AssistantForCausalLM._from_config(config, attn_implementation="eager").float().eval()
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(
                1 + 0.3 * torch.randn(weight.shape)
                if weight.dim() == 1
                else 0.25 * torch.randn(weight.shape)
            )
        for layer, scale in enumerate(
            part for name, part in model.named_buffers() if name.endswith("layer_scalar")
        ):
            scale.fill_(1.2 - 0.2 * layer)
        if clusters:
            model.masked_embedding.token_ordering.copy_(torch.randperm(target.vocab_size))
    return model


@pytest.fixture(scope="module", params=[0, 8], ids=["dense", "clusters"])
def pair(request, tmp_path_factory):
    """Folders as on the hub, the assistant's beside the model's, and transformers' models."""
    root = tmp_path_factory.mktemp("assistant")
    tokenizer = tiny_loaded(torch.float32).tokenizer
    native_or_skip(tiny_model("gemma4_text", torch.float32, **SHAPE))
    target = tiny_model(
        "gemma4_text", torch.float32, vocab_size=-(-len(tokenizer) // 8) * 8, **SHAPE
    )
    save_checkpoint(
        target, tokenizer, CheckpointInfo("{prompt}\n"), str(root / "hub"), torch.float32
    )
    assistant = random_assistant(target.config, request.param)
    assistant.save_pretrained(root / "hub-assistant")
    return root / "hub", target.float(), assistant


@pytest.fixture
def folder(pair, tmp_path):
    """A copy of both folders."""
    for path in pair[0].parent.iterdir():
        shutil.copytree(path, tmp_path / path.name)
    return tmp_path / "hub"


def decoded(folder, strategy="mtp", packing=None, **options):
    """The ids of a decoding, what was accepted of how many drafts, and the notes."""
    loaded = for_decoding(str(folder), "cpu", "fp32", packing)
    decoding = decode(
        loaded.backend,
        PROMPT,
        DecodingConfig(strategy, num_draft_tokens=3, max_new_tokens=24, **options),
    )
    return ids_of(decoding), (decoding.stats.accepted, decoding.stats.drafted), loaded.notes


@torch.no_grad()
def reference(target, assistant, ids, count):
    """Logits of greedy drafts after a text, all at the position of the last token with KV
    entries.
    """
    output = target.model(torch.tensor([ids[:-1]]), return_shared_kv_states=True)
    window = assistant.config.text_config.sliding_window
    last = len(ids) - 2
    token = ids[-1]
    shared = dict(output.shared_kv_states)
    shared["sliding_attention"] = tuple(
        part[:, :, -window:] for part in shared["sliding_attention"]
    )
    state = output.last_hidden_state[:, -1:]
    logits = []
    for _ in range(count):
        embedded = target.model.embed_tokens(torch.tensor([[token]]))
        both = torch.cat((embedded, state), dim=-1)
        at = torch.tensor([[last]])
        found = assistant(inputs_embeds=both, position_ids=at, shared_kv_states=shared)
        state = found.last_hidden_state
        logits.append(found.logits[0, 0])
        token = int(logits[-1].argmax())
    return logits


@pytest.mark.parametrize("length", [2, 5, 20])
def test_logits_of_several_drafts_are_those_of_transformers(pair, length):
    """Texts shorter and longer than the window."""
    folder, target, assistant = pair
    backend = for_decoding(str(folder), "cpu", "fp32", UnroundedDrafter()).backend
    block = backend.drafters["mtp"]
    cache = backend.new_cache(1)
    ids = prompt_of(length)
    expected = reference(target, assistant, ids, 4)
    with torch.inference_mode():
        hidden = backend.run_layers(
            backend.embed(torch.tensor(ids[:-1])), 0, backend.num_layers, cache.span(0, length - 1)
        )
        feature = block.features(backend, {}, hidden)[-1:]
        token = torch.tensor(ids[-1:])
        for right in expected:
            hidden = block.run(
                backend, backend.embed(token), feature, cache.span(length - 1, length)
            )
            found = block.head(hidden)[0]
            feature = block.own_feature(hidden)
            token = found.argmax()[None]
            known = found.isfinite()
            assert known.sum() in (len(found), 3 * len(found) // 8)
            assert int(token) == int(right.argmax())
            assert float((found - right)[known].norm() / right[known].norm()) < 1e-4


def test_it_is_found_beside_the_model_and_changes_no_output(pair):
    """Greedily, in low bits, in a batch whose rows draft at different positions, and as an arm of
    adaptive drafting.
    """
    (ids, (_, count), notes), plain = (
        decoded(pair[0]),
        DecodingConfig("autoregressive", max_new_tokens=12),
    )
    assert count > 10 and not notes
    assert ids == decoded(pair[0], "autoregressive")[0] == decoded(pair[0], "adaptive")[0]
    low = PackingConfig("int8")
    assert decoded(pair[0], packing=low)[0] == decoded(pair[0], "autoregressive", packing=low)[0]
    backend = for_decoding(str(pair[0]), "cpu", "fp32").backend
    prompts = [prompt_of(length) for length in (3, 30, 90)]
    together = decode_batch(
        backend, prompts, DecodingConfig("mtp", num_draft_tokens=3, max_new_tokens=12)
    )
    alone = [ids_of(decode(backend, prompt, plain)) for prompt in prompts]
    assert [answer.ids for answer in together] == alone
    sampled = decoded(pair[0], temperature=1.0)
    assert len(sampled[0]) == 24 and sampled[1][1] > 0


def test_what_is_made_of_the_model_keeps_it(folder, tmp_path):
    expected = decoded(folder)
    few = ["--answers data --max-length 48 --samples 8 --batch-size 4 --steps 1 --threads 1"]
    for name, arguments in {
        "imported": (f"import {folder}",),
        "exported": (f"export {folder} --exit 6",),
        "packed": (f"export {folder} --format packed --dtype fp32",),
        "with-block": (f"train-drafter --model {folder} --exits 2", *few),
    }.items():
        done = run(*arguments, "--output", str(tmp_path / name))
        assert not done.code, done.err
        assert decoded(tmp_path / name) == expected, name
        assert {*ASSISTANT_FILES} <= {*read_info(str(tmp_path / name)).files}
    stored, own = (
        load_file(tmp_path / path / "model.safetensors")
        for path in ("imported/assistant", "hub-assistant")
    )
    assert stored.keys() == own.keys() and all(torch.equal(stored[name], own[name]) for name in own)
    assert (
        Gemma4AssistantForCausalLM.from_pretrained(
            tmp_path / "imported/assistant"
        ).config.text_config.num_hidden_layers
        == 4
    )
    # As after a training by others
    weights = load_file(tmp_path / "imported" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(weights, tmp_path / "imported" / "model.safetensors", {"format": "pt"})
    assert decoded(tmp_path / "imported")[2] == (STALE_ASSISTANT,)
    assert not run(f"import {tmp_path}/imported --output {tmp_path}/again").code
    assert decoded(tmp_path / "again")[2] == (STALE_ASSISTANT,)


def test_import_gives_a_model_an_assistant_from_elsewhere(folder, tmp_path):
    expected = decoded(folder)
    (tmp_path / "hub-assistant").rename(tmp_path / "elsewhere")
    assert "mtp" not in for_decoding(str(folder), "cpu", "fp32").backend.drafters
    given = f"--drafter {tmp_path}/elsewhere"
    assert not run(f"import {folder}", given, f"--output {tmp_path}/imported").code
    assert decoded(tmp_path / "imported") == expected


def changed(folder, **values):
    path = folder.with_name("hub-assistant") / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | values | {"text_config": config["text_config"] | values}))


def test_a_configuration_of_an_older_transformers_is_completed(folder):
    """As the released ones are written: without values by layer."""
    expected = decoded(folder)
    path = folder.with_name("hub-assistant") / "config.json"
    config = json.loads(path.read_text())
    text = config["text_config"]
    del text["per_layer_config"]
    path.write_text(json.dumps(config | {"text_config": text | {"global_head_dim": 32}}))
    assert decoded(folder) == expected


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"backbone_hidden_size": 128}, "`backbone_hidden_size` must be 64"),
        ({"vocab_size": 7}, "`vocab_size` must be"),
        ({"head_dim": 32}, "`head_dim` must be"),
        ({"intermediate_size": 65}, "model.layers.0.mlp.down_proj.weight must be"),
    ],
)
def test_one_of_another_model_is_left_aside_and_told(folder, values, reason):
    changed(folder, **values)
    loaded = for_decoding(str(folder), "cpu", "fp32")
    [note] = loaded.notes
    assert not loaded.backend.drafters and reason in note and "hub-assistant" in note


def test_without_kernels_a_note_says_that_it_is_not_used(pair, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_KERNELS", "torch")
    loaded = for_decoding(str(pair[0]), "cpu", "fp32")
    assert not loaded.backend.drafters and "drafting without its assistant" in loaded.notes[-1]


def test_drafts_of_every_round_are_those_of_transformers(pair, monkeypatch):
    """The state is that of the last accepted token, also where several rows draft at their own
    positions.
    """
    folder, target, assistant = pair
    backend = for_decoding(str(folder), "cpu", "fp32", UnroundedDrafter()).backend
    rounds = []
    draft = SubmodelDrafter.draft

    def recorded(drafter, context, limits, *ends):
        found = draft(drafter, context, limits, *ends)
        rounds.extend(
            (list(ids), own[1:].tolist())
            for ids, own in zip(context.ids, found.by_row(), strict=True)
        )
        return found

    monkeypatch.setattr(SubmodelDrafter, "draft", recorded)
    config = DecodingConfig("mtp", num_draft_tokens=2, max_new_tokens=6)
    assert len([*decode_batch(backend, [prompt_of(9), PROMPT], config)]) == 2
    assert len(rounds) > 6
    for text, drafts in rounds:
        assert drafts == [
            int(logits.argmax()) for logits in reference(target, assistant, text, len(drafts))
        ]
