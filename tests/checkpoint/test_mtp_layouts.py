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
from decodings import WIDE, UnroundedDrafter, first_draft, ids_of, rounds_of
from evaluating import tiny_loaded
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

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
_MIMO = [
    f"model.mtp_layers.0.{part}"
    for part in ("", "input_proj.", "token_layernorm.", "hidden_layernorm.", "final_layernorm.")
]
# What names begin with: of the layer, the map, the norms of embedding and state, the last norm
FAMILIES = {"deepseek_v3": _NEXTN, "mimo": _MIMO}
PROMPT = list(range(20, 32))
EXACT = UnroundedDrafter()
CONFIG = DecodingConfig("mtp", num_draft_tokens=3, max_new_tokens=10)


class Formula:
    """A random drafter, written out in fp64."""

    def __init__(self, model, state_first):
        torch.manual_seed(3)
        self.model = deepcopy(model).double()
        self.state_first = state_first
        self.model.config._experts_implementation = "eager"  # others take no fp64
        self.layer = deepcopy(self.model.model.layers[-1])
        with torch.no_grad():
            for weight in self.layer.state_dict().values():
                weight.add_(
                    0.2 * weight.std() * torch.randn_like(weight)
                    if weight.dim() > 1
                    else 0.1 * torch.rand_like(weight)
                )
        width = model.config.hidden_size
        self.map = torch.randn(width, 2 * width, dtype=torch.float64) / (2 * width) ** 0.5
        norms = 0.5 + torch.rand(3, width, dtype=torch.float64)
        self.of_embedding, self.of_state, self.norm = norms.unbind()
        self.eps = model.config.rms_norm_eps

    def tensors(self, begins):
        """In fp32, as a checkpoint has them: experts one by one."""
        layer, join, of_embedding, of_state, norm = begins
        found = {}
        for name, weight in self.layer.state_dict().items():
            start, _, kind = name.partition(".experts.")
            for expert, own in enumerate(weight if kind else ()):
                gated = zip(("gate_proj", "up_proj"), own.chunk(2), strict=True)
                for part, rows in gated if kind == "gate_up_proj" else [(kind, own)]:
                    found[f"{layer}{start}.experts.{expert}.{part}.weight"] = rows
            if not kind:
                found[layer + name] = weight
        found[f"{join}weight"] = self.map
        found[f"{of_embedding}weight"] = self.of_embedding
        found[f"{of_state}weight"] = self.of_state
        found[f"{norm}weight"] = self.norm
        if begins is _NEXTN:  # copies of the model's
            found[f"{layer}embed_tokens.weight"] = self.model.get_input_embeddings().weight
            found[f"{layer}shared_head.head.weight"] = self.model.lm_head.weight
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
            out = self.layer(
                x[None],
                attention_mask=mask[None, None],
                position_ids=positions,
                position_embeddings=inner.rotary_emb(x[None], positions),
            )
            own = self._normed(out[0], self.norm)[-1:]
            logits.append(self.model.lm_head(own)[0])
            drafts.append(int(logits[-1].argmax()))
            ids = [*ids, drafts[-1]]
            states = torch.cat((states, own))
        return drafts, torch.stack(logits)


def made(family, folder):
    """A folder as on the hub, and the formula of its drafter."""
    tokenizer = tiny_loaded(torch.float32).tokenizer
    if family == "mimo":
        model = tiny_model(
            "qwen2", torch.float32, vocab_size=len(tokenizer), num_hidden_layers=LAYERS, **WIDE
        )
    else:
        config = deepcopy(decoder_types.tiny(family).config)
        config.vocab_size = len(tokenizer)
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
    formula = Formula(model, family == "mimo")
    path = folder / "model.safetensors"
    save_file(load_file(path) | formula.tensors(FAMILIES[family]), path, {"format": "pt"})
    if family == "mimo":
        settings = json.loads((folder / "config.json").read_text())
        settings |= {
            "model_type": "mimo",
            "architectures": ["MiMoForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_mimo.MiMoConfig"},
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
    found = first_draft(backend, PROMPT)
    right = formula.drafts(PROMPT, 1)[1][0]
    assert float((found - right).norm() / right.norm()) < 1e-4
    ids, rounds = rounds_of(backend, PROMPT, CONFIG)
    assert len(rounds) > 2
    for text, drafts in rounds:
        assert drafts == formula.drafts(text, len(drafts))[0]
    imported = tmp_path / "imported"
    done = run(f"import {tmp_path}/hub --output {imported}")
    assert not done.code, done.err
    again = for_decoding(str(imported), "cpu", "fp32", EXACT)
    assert rounds_of(again.backend, PROMPT, CONFIG) == (ids, rounds) and not again.notes
    if family == "mimo":
        done = run(f"export {imported} --exit {LAYERS} --format gguf --output {tmp_path}/gguf")
        assert not done.code and "(mtp) is left out: GGUF files are written without it" in done.err
    assert ids == ids_of(
        decode(again.backend, PROMPT, DecodingConfig("autoregressive", max_new_tokens=10))
    )
