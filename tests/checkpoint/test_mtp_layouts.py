"""The drafters of other families, in folders as on the hub: against the formula in fp64 with
transformers' own layer.
"""

import json
from copy import deepcopy

import decoder_types
import pytest
import torch
from command_line import run
from conftest import tiny_model
from decodings import WIDE, UnroundedDrafter, ids_of, rounds_of
from evaluating import tiny_loaded
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from layerskip_core.checkpoint.folder import MTP_FILE
from layerskip_core.checkpoint.info import CheckpointInfo
from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.checkpoint.save import save_checkpoint
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding import decode

LAYERS = decoder_types.LAYERS
_NEXTN = [
    f"model.layers.{LAYERS}.{part}"
    for part in ("", "eh_proj.", "enorm.", "hnorm.", "shared_head.norm.")
]
# What names begin with of layers, the map, the norms of embedding and state, the last norm; like
# which layers
FAMILIES = {
    "deepseek_v3": (_NEXTN, (-1,)),
    "glm4_moe": (_NEXTN, (-1,)),
    "ernie4_5_moe": (
        [
            "model.mtp_block.0.",
            "model.mtp_linear_proj.0.",
            "model.mtp_emb_norm.0.",
            "model.mtp_hidden_norm.0.",
            None,
        ],
        (0,),
    ),
    "nemotron_h": (
        [
            "mtp.layers.",
            "mtp.layers.0.eh_proj.",
            "mtp.layers.0.enorm.",
            "mtp.layers.0.hnorm.",
            "mtp.layers.1.final_layernorm.",
        ],
        (3, 2),  # a layer of attention, then one of experts
    ),
    "mimo": (
        [
            f"model.mtp_layers.0.{part}"
            for part in (
                "",
                "input_proj.",
                "token_layernorm.",
                "hidden_layernorm.",
                "final_layernorm.",
            )
        ],
        (-1,),
    ),
}
PROMPT = list(range(20, 32))
EXACT = UnroundedDrafter()
CONFIG = DecodingConfig("mtp", num_draft_tokens=3, max_new_tokens=10)


class Formula:
    """A random drafter, written out in fp64."""

    def __init__(self, model, like, state_first, own_norm):
        torch.manual_seed(3)
        self.model = deepcopy(model).double()
        self.state_first = state_first
        self.model.config._experts_implementation = "eager"  # others take no fp64
        self.layers = deepcopy(torch.nn.ModuleList(self.model.model.layers[each] for each in like))
        with torch.no_grad():
            for weight in self.layers.state_dict().values():
                weight.add_(
                    0.2 * weight.std() * torch.randn_like(weight)
                    if weight.dim() > 1
                    else 0.1 * torch.rand_like(weight)
                )
        width = model.config.hidden_size
        self.map = torch.randn(width, 2 * width, dtype=torch.float64) / (2 * width) ** 0.5
        self.of_embedding, self.of_state, norm = (
            0.5 + torch.rand(3, width, dtype=torch.float64)
        ).unbind()
        self.norm = norm if own_norm else self.model.model.norm.weight.detach()
        self.eps = getattr(model.config, "rms_norm_eps", 1e-5)

    def tensors(self, begins):
        """In fp32, as a checkpoint has them: experts one by one."""
        layer, join, of_embedding, of_state, norm = begins
        found = {}
        for name, weight in (
            (self.layers if len(self.layers) > 1 else self.layers[0]).state_dict().items()
        ):
            start, _, kind = name.partition(".experts.")
            for expert, own in enumerate(weight if kind else ()):
                gated = zip(("gate_proj", "up_proj"), own.chunk(2), strict=True)
                for part, rows in gated if kind == "gate_up_proj" else [(kind, own)]:
                    found[f"{layer}{start}.experts.{expert}.{part}.weight"] = rows
            if not kind:
                found[layer + name] = weight
        others = {
            join: self.map,
            of_embedding: self.of_embedding,
            of_state: self.of_state,
            norm: self.norm,
        }
        found |= {f"{begin}weight": weight for begin, weight in others.items() if begin}
        if begins is _NEXTN:  # copies of the model's
            copies = self.model.get_input_embeddings().weight, self.model.lm_head.weight
            found |= dict(
                zip(
                    (f"{layer}embed_tokens.weight", f"{layer}shared_head.head.weight"),
                    copies,
                    strict=True,
                )
            )
        return {
            name: weight.detach().float().contiguous().clone() for name, weight in found.items()
        }

    def _normed(self, x, weight):
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * weight

    @torch.no_grad()
    def drafts(self, ids, count):
        """Greedy drafts after a text, and the logits that they were chosen by."""
        inner = self.model.model
        ids = list(ids)
        states = inner(torch.tensor([ids])).last_hidden_state[0][:-1]
        drafts = []
        logits = []
        for _ in range(count):
            parts = [
                self._normed(
                    self.model.get_input_embeddings()(torch.tensor(ids[1:])), self.of_embedding
                ),
                self._normed(states, self.of_state),
            ]
            x = torch.cat(parts[::-1] if self.state_first else parts, dim=-1) @ self.map.T
            positions = torch.arange(len(x))[None]
            mask = torch.full((len(x), len(x)), -torch.inf).triu(1).double()
            rotary = (
                {"position_embeddings": inner.rotary_emb(x[None], positions)}
                if hasattr(inner, "rotary_emb")
                else {}
            )
            out = self.layers[0](
                x[None], attention_mask=mask[None, None], position_ids=positions, **rotary
            )
            for layer in self.layers[1:]:
                out = layer(out)
            own = self._normed(out[0], self.norm)[-1:]
            logits.append(self.model.lm_head(own)[0])
            drafts.append(int(logits[-1].argmax()))
            ids = [*ids, drafts[-1]]
            states = torch.cat((states, own))
        return drafts, torch.stack(logits)


def made(family, folder):
    """A folder as on the hub, and the formula of its drafter."""
    tokenizer, (begins, like) = tiny_loaded(torch.float32).tokenizer, FAMILIES[family]
    if family == "mimo":
        model = tiny_model(
            "qwen2", torch.float32, vocab_size=len(tokenizer), num_hidden_layers=LAYERS, **WIDE
        )
    else:
        config = deepcopy(decoder_types.tiny(family).config)
        config.vocab_size = len(tokenizer)
        if family == "nemotron_h":
            config.layers_block_type = [
                "linear_attention",
                "full_attention",
                "moe",
                "full_attention",
            ]
            config.moe_shared_expert_intermediate_size = 24
            config.moe_latent_size = 16
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for weight in model.state_dict().values():
                weight.add_(
                    0.2 * torch.randn_like(weight)
                    if weight.dim() > 1
                    else 0.1 * torch.rand_like(weight)
                )
    save_checkpoint(model, tokenizer, CheckpointInfo("{prompt}\n"), str(folder), torch.float32)
    (folder / "layerskip.json").unlink()
    formula = Formula(model, like, family == "mimo", begins[-1] is not None)
    path = folder / "model.safetensors"
    save_file(load_file(path) | formula.tensors(begins), path, {"format": "pt"})
    if family == "mimo":
        settings = json.loads((folder / "config.json").read_text())
        settings |= {
            "model_type": "mimo",
            "architectures": ["MiMoForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_mimo.MiMoConfig"},
        }
        settings |= {
            "transformers_version": "4.40.1",
            "num_nextn_predict_layers": 1,
            "rope_theta": settings.pop("rope_parameters")["rope_theta"],
        }
        (folder / "config.json").write_text(json.dumps(settings))
    return formula


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_are_those_of_the_formula(family, tmp_path):
    formula = made(family, tmp_path / "hub")
    backend = for_decoding(str(tmp_path / "hub"), "cpu", "fp32", EXACT).backend
    block = backend.drafters["mtp"]
    cache = backend.new_cache(1)
    last = len(PROMPT) - 1
    with torch.inference_mode():
        embedded = backend.embed(torch.tensor(PROMPT))
        finals = backend.run_layers(embedded, 0, backend.num_layers, cache.span(0, len(PROMPT)))
        features = block.features(backend, {0: embedded}, finals)
        block.write(backend, {0: embedded[1:last]}, features[: last - 1], cache.span(1, last))
        found = block.head(
            block.run(
                backend, embedded[last:], features[last - 1 : last], cache.span(last, len(PROMPT))
            )
        )[0]
    right = formula.drafts(PROMPT, 1)[1][0]
    assert float((found - right).norm() / right.norm()) < 1e-4
    ids, rounds = rounds_of(backend, PROMPT, CONFIG)
    assert len(rounds) > 2
    for text, drafts in rounds:
        assert drafts == formula.drafts(text, len(drafts))[0]
    imported = tmp_path / "imported"
    done = run("import", str(tmp_path / "hub"), "--output", str(imported))
    assert not done.code, done.err
    again = for_decoding(str(imported), "cpu", "fp32", EXACT)
    assert rounds_of(again.backend, PROMPT, CONFIG) == (ids, rounds) and not again.notes
    names = {
        name
        for name in formula.tensors(FAMILIES[family][0])
        if "embed_tokens" not in name and "shared_head.head" not in name
    }
    assert {name.partition(".experts.")[0] for name in load_file(imported / MTP_FILE)} == {
        name.partition(".experts.")[0] for name in names
    }
    if family == "mimo":
        done = run(
            "export",
            str(imported),
            "--exit",
            str(LAYERS),
            "--format",
            "gguf",
            "--output",
            str(tmp_path / "gguf"),
        )
        assert not done.code and "(mtp) is left out: GGUF files are written without it" in done.err
    assert ids == ids_of(
        decode(again.backend, PROMPT, DecodingConfig("autoregressive", max_new_tokens=10))
    )
