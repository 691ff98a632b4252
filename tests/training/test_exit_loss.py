import pytest
import torch
from conftest import tiny_model
from training_runs import recipe_module

from layerskip_core import losses
from layerskip_core.config.training import RecipeSettings
from layerskip_core.losses import IGNORED
from layerskip_core.training import module as recipe_modules
from layerskip_core.training.recipe import RunStep, exit_scales, exit_weights


def batch():
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 67, (3, 9), generator=generator)
    labels = ids.clone()
    labels[:, :4] = IGNORED
    labels[1, 7:] = IGNORED
    return ids, labels


def truncated(model, exit_layer):
    """The first layers of a model with its final norm and head, as a model of their own."""
    first_layers = tiny_model(num_hidden_layers=exit_layer)
    first_layers.load_state_dict(model.state_dict(), strict=False)
    return first_layers


def manual_cross_entropy(model, ids, labels):
    """Loop over rows and tokens: the definition, spelled out."""
    log_probs = model(ids).logits.log_softmax(-1)
    return -sum(
        log_probs[row, column - 1, labels[row, column]]
        for row in range(ids.shape[0])
        for column in range(1, ids.shape[1])
        if labels[row, column] != IGNORED
    )


def test_the_literal_scales():
    """RECIPE: L = 5, e_scale = 0.2: e = 0, 0.2, 0.6, 1.2, 5.2, sum 7.2."""
    assert exit_scales(5, 0.2) == pytest.approx([0, 0.2, 0.6, 1.2, 5.2])
    assert exit_weights([1, 2, 3, 4, 5], 5, 0.2) == pytest.approx([e / 7.2 for e in (0, 0.2, 0.6, 1.2, 5.2)])
    assert exit_weights([5], 5, 0.2) == [1.0]
    assert exit_weights([3, 5], 5, 0.0) == [0.0, 1.0]


def test_other_scales_by_hand():
    """L = 4, e_scale = 0.5: linear 0.5, 1, 1.5, 4; sqrt half of it under the root, 2; uniform 0.5 and 1."""
    assert exit_scales(4, 0.5, "linear") == [0.5, 1.0, 1.5, 4.0]
    assert exit_scales(4, 0.5, "sqrt") == pytest.approx([0.5, 0.5 * 2**0.5, 0.5 * 3**0.5, 2.0])
    assert exit_scales(4, 0.5, "uniform") == [0.5, 0.5, 0.5, 1.0]
    assert exit_weights([1, 4], 4, 0.5, "uniform") == pytest.approx([1 / 3, 2 / 3])


def test_the_loss_equals_a_manual_loop(llama):
    ids, labels = batch()
    module = recipe_module(llama, RecipeSettings(p_max=0, e_scale=0.5, curriculum="all")).train()
    output = module(ids, labels, RunStep(0, 10))
    expected = [manual_cross_entropy(truncated(llama, exit_layer), ids, labels) for exit_layer in range(1, 7)]
    assert output["exit_layers"] == (1, 2, 3, 4, 5, 6)
    torch.testing.assert_close(output["per_exit"].double(), torch.stack(expected).detach(), rtol=1e-5, atol=1e-4)
    weights = torch.tensor(exit_weights(range(1, 7), 6, 0.5), dtype=torch.float64)
    torch.testing.assert_close(output["loss"].double(), (weights * torch.stack(expected)).sum(), rtol=1e-5, atol=1e-4)


def test_every_layer_gets_a_gradient_without_dropout():
    ids, labels = batch()
    model = tiny_model()
    recipe_module(model, RecipeSettings(p_max=0)).train()(ids, labels, RunStep(0, 10))["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_dropout_is_off_in_evaluation_and_all_exits_are_on(llama):
    ids, labels = batch()
    module = recipe_module(llama, RecipeSettings(p_max=0.9, curriculum="none")).eval()
    with torch.no_grad():
        first, second = (module(ids, labels, RunStep(step, 10)) for step in (0, 7))
    assert first["exit_layers"] == (1, 2, 3, 4, 5, 6)
    torch.testing.assert_close(first["per_exit"], second["per_exit"])


def manual_mixed_loss(model, ids, labels, exit_layer, share):
    """Cross-entropy and KL(last || exit) token by token in fp64, from the truncated model and the whole one."""
    student = truncated(model, exit_layer)(ids).logits.log_softmax(-1)
    teacher = model(ids).logits.log_softmax(-1).detach()
    total = 0.0
    for row in range(ids.shape[0]):
        for column in range(1, ids.shape[1]):
            if labels[row, column] != IGNORED:
                said, aim = student[row, column - 1], teacher[row, column - 1]
                divergence = (aim.exp() * (aim - said)).sum()
                total += (1 - share) * -said[labels[row, column]] + share * divergence
    return total


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_distillation_equals_a_manual_computation(llama, monkeypatch, share):
    """In one chunk and in chunks of five tokens. The last layer keeps its cross-entropy; the reports do not mix."""
    ids, labels = batch()
    recipe = RecipeSettings(p_max=0, e_scale=0.5, curriculum="all", distill=share)
    weights = exit_weights(range(1, 7), 6, 0.5)
    expected = [manual_mixed_loss(llama, ids, labels, exit_layer, share) for exit_layer in range(1, 6)]
    expected.append(manual_cross_entropy(llama, ids, labels))
    for logits in (losses.CHUNK_LOGITS, 5 * 67):
        monkeypatch.setattr(losses, "CHUNK_LOGITS", logits)
        output = recipe_module(llama, recipe).train()(ids, labels, RunStep(0, 10))
        total = sum(weight * loss for weight, loss in zip(weights, expected, strict=True))
        torch.testing.assert_close(output["loss"].double(), total, rtol=1e-5, atol=1e-4)
        plain = [manual_cross_entropy(truncated(llama, exit_layer), ids, labels) for exit_layer in range(1, 7)]
        torch.testing.assert_close(output["per_exit"].double(), torch.stack(plain).detach(), rtol=1e-5, atol=1e-4)


def test_the_teacher_is_a_constant(llama, monkeypatch):
    """With all of the loss on exit 3 and nothing but distillation, layers 4 to 6 get no gradient; in chunks too."""
    ids, labels = batch()
    for logits in (losses.CHUNK_LOGITS, 5 * 67):
        monkeypatch.setattr(losses, "CHUNK_LOGITS", logits)
        module = recipe_module(llama, RecipeSettings(p_max=0, curriculum="all", distill=1.0)).train()
        monkeypatch.setattr(recipe_modules, "exit_weights", lambda exits, *_: [float(exit_layer == 3) for exit_layer in exits])
        llama.zero_grad()
        module(ids, labels, RunStep(0, 10))["loss"].backward()
        seen = [layer.mlp.up_proj.weight.grad is not None for layer in llama.model.layers]
        assert seen == [True] * 3 + [False] * 3
    llama.zero_grad()
