"""The anchor: its loss and gradients against plain computations, and runs that it holds to the original."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model
from torch.nn.functional import kl_div
from training_runs import RECIPE, batch, loss_rows, recipe_module, saved_base, train

from layerskip_core import losses
from layerskip_core.config.training import RecipeSettings, RetentionSettings
from layerskip_core.errors import ConfigError
from layerskip_core.losses import IGNORED, target_rows
from layerskip_core.model import TransformersBackend
from layerskip_core.training.module import Anchor, span_inputs
from layerskip_core.training.recipe import RunStep
from layerskip_core.training.run import prepare

ALL = RecipeSettings(p_max=0, e_scale=0.5, curriculum="all", distill=0.3)


def other_model():
    """The tiny model with other weights."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def divergence(original, trained, labels):
    """KL(original || trained) of logits (B, T, V), summed over the tokens with labels."""
    wanted = labels[:, 1:] != IGNORED
    aim, found = (logits[:, :-1][wanted].log_softmax(-1) for logits in (original, trained))
    return kl_div(found, aim, reduction="sum", log_target=True)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("logits", [losses.CHUNK_LOGITS, 5 * 67], ids=["one chunk", "chunks of five tokens"])
def test_loss_and_gradients_are_those_of_the_plain_divergence(monkeypatch, logits):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", logits)
    ids, labels = batch()
    trained, original = tiny_model(), other_model()
    plain = recipe_module(trained, ALL).train()(ids, labels, RunStep(0, 10))
    apart = divergence(original(ids).logits.detach(), trained(ids).logits, labels)
    expected = gradients(trained, plain["loss"] + 0.7 * apart)

    anchor = Anchor(0.7, TransformersBackend(original))
    output = recipe_module(trained, ALL, anchor=anchor).train()(ids, labels, RunStep(0, 10))
    torch.testing.assert_close(output["divergence"].double(), apart, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output["loss"].double(), plain["loss"].double() + 0.7 * apart, rtol=1e-5, atol=1e-5)
    assert torch.equal(output["per_exit"], plain["per_exit"])
    found = gradients(trained, output["loss"])
    assert found.keys() == expected.keys() == dict(trained.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in original.parameters())


def test_validation_knows_no_anchor(llama):
    ids, labels = batch()
    module = recipe_module(llama, ALL, anchor=Anchor(0.7, None)).eval()
    with torch.no_grad():
        assert "divergence" not in module(ids, labels, RunStep(0, 10))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=["layers", "head"])
def test_the_original_of_adapters_is_the_model_without_them(targets):
    ids, labels = batch()
    base = tiny_model()
    expected = base(ids).logits.detach()
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    module = recipe_module(model, ALL).train()
    module.anchor = Anchor(2.0, module.backend, model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    apart = divergence(expected, model(ids).logits, labels)
    assert apart > 1
    plain = recipe_module(model, ALL).train()(ids, labels, RunStep(0, 10))["loss"]
    wanted = gradients(model, plain + 2 * apart)
    output = module(ids, labels, RunStep(0, 10))
    torch.testing.assert_close(output["divergence"].double(), apart, rtol=1e-5, atol=1e-5)
    found = gradients(model, output["loss"])
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-4)
    assert model.training and module.backend.model.training


def test_a_copy_keeps_packed_documents_apart(llama):
    """Documents of 5 and 4 tokens in a row of 9, and one of 6 with padding: what masks give, where the tokens are real."""
    ids, _ = batch()
    documents = torch.tensor([[0] * 5 + [1] * 4, [0] * 6 + [-1] * 3, [0] * 9])
    backend = TransformersBackend(llama)
    hidden = backend.embed(ids)
    inputs = span_inputs(backend, hidden, documents)
    for layer in range(6):
        hidden = backend.run_layer(layer, hidden, inputs)
    labels = ids.masked_fill(documents < 0, IGNORED)
    found = Anchor(1.0, backend).teacher(ids, labels, documents).states
    torch.testing.assert_close(found.clone(), target_rows(hidden.detach(), labels)[0])


def anchored(weight, copy=None, **changes):
    """The settings of a run whose first divergence is that of rounding: no layer is dropped."""
    plain, retention = replace(RECIPE, p_max=0.0), RetentionSettings(anchor=weight, anchor_weights=copy)
    return {"retention": retention, "recipe": plain, "lr": 1e-2, "steps": 8, **changes}


@pytest.mark.parametrize(("copy", "rank"), [(None, 0), ("int8", 0), (None, 4)], ids=["a copy", "an int8 copy", "adapters off"])
def test_a_strong_anchor_keeps_the_model_near_the_original(settings, tmp_path, copy, rank):
    """The original's rounding is small beside what eight steps change."""
    loose, strong = (
        train(settings(**anchored(weight, copy), lora_rank=rank, output=str(tmp_path / f"{weight}")))
        for weight in (1e-6, 100.0)
    )
    assert strong[0].divergence == loose[0].divergence < (1e-3 if copy else 2e-4)  # the copy is rounded
    assert strong[-1].divergence < loose[-1].divergence / 4
    assert [row["divergence"] for row in loss_rows(tmp_path / "100.0")] == [report.divergence for report in strong]


def test_a_run_is_not_resumed_beside_another_original(settings, tmp_path):
    other = saved_base(tmp_path / "other", initializer_range=0.05)
    train(settings(**anchored(1.0, save_steps=2, steps=4), model=other))
    with pytest.raises(ConfigError, match=r"`resume`: original was .* in the run to go on with"):
        prepare(settings(**anchored(1.0, steps=4), resume=True, overwrite=True))
