"""The training forward under the recipe, against plain computations."""

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model
from training_runs import batch, recipe_module

from layerskip_core import losses
from layerskip_core.config.training import RecipeSettings
from layerskip_core.losses import IGNORED
from layerskip_core.training import exit_blocks
from layerskip_core.training import module as recipe_modules
from layerskip_core.training.data import collate
from layerskip_core.training.encoding import packed
from layerskip_core.training.module import use_fp32_attention
from layerskip_core.training.recipe import RunStep, exit_scales, exit_weights


def run(model, recipe, step, ids, labels, **keywords):
    return recipe_module(model, recipe, **keywords).train()(ids, labels, step)


def layer_rows(model):
    rows = [0] * len(model.model.layers)

    def count(at):
        return lambda _, args: rows.__setitem__(at, rows[at] + args[0].shape[0])

    for at, layer in enumerate(model.model.layers):
        # Inside the layer, so that a recomputation counts too
        layer.mlp.register_forward_pre_hook(count(at))
    return rows


def test_dropout_over_the_run():
    """From scratch S(t) is 0 at the first step and 1 at the last, where p is 0.9 at the last layer;
    falling, it ends at 0.
    """
    ids, labels = batch(40)
    for step, schedule, expected in (
        (0, "rising", 40),
        (9, "rising", 4),
        (0, "constant", 4),
        (0, "falling", 4),
        (9, "falling", 40),
    ):
        recipe = RecipeSettings("finetune", p_max=0.9, curriculum="none", dropout_schedule=schedule)
        module = recipe_module(tiny_model(), recipe).train()
        rows = layer_rows(module.model)
        module(ids, labels, RunStep(step, 10))
        assert rows[0] == 40  # p of the first layer is 0
        assert rows[5] == pytest.approx(expected, abs=6)  # 3 standard deviations of 40 draws at 0.9


@pytest.mark.parametrize(
    "bf16, lora", [(False, True), (True, False)], ids=["fp64, LoRA", "bf16 autocast, all weights"]
)
def test_recomputing_layers_gives_the_same_gradients_bit_by_bit(monkeypatch, bf16, lora):
    """The backward pass runs layers again: dropping the same rows, with taps, in the same
    precision.
    """
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 5 * 67)
    monkeypatch.setattr(losses, "_SHARE_OF_HEAD", 0)
    ids, labels = batch(4)
    recipe = RecipeSettings("finetune", p_max=0.8, curriculum="all", distill=0.5)
    gradients = []
    for recompute in (False, True):
        model = tiny_model(dtype=torch.float32 if bf16 else torch.float64, tie_word_embeddings=True)
        if lora:
            torch.manual_seed(1)
            model = get_peft_model(
                model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
            )
        module = recipe_module(model, recipe, recompute=recompute).train()
        rows = layer_rows(module.backend.model)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = module(ids, labels, RunStep(2, 10))["loss"]
        assert loss.dtype == torch.float32
        loss.backward()
        gradients.append(
            {
                name: parameter.grad
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            }
        )
        assert rows[0] == (8 if recompute else 4) and rows[5] < rows[0]
    assert gradients[0].keys() == gradients[1].keys()
    assert any(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)


def truncated(model, exit_layer):
    """The first layers of a model with its final norm and head, as a model of their own."""
    first_layers = tiny_model(num_hidden_layers=exit_layer)
    first_layers.load_state_dict(model.state_dict(), strict=False)
    return first_layers


def manual_cross_entropy(model, ids, labels):
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
    assert exit_weights([1, 2, 3, 4, 5], 5, 0.2) == pytest.approx(
        [e / 7.2 for e in (0, 0.2, 0.6, 1.2, 5.2)]
    )
    assert exit_weights([5], 5, 0.2) == [1.0]
    assert exit_weights([3, 5], 5, 0.0) == [0.0, 1.0]
    assert exit_scales(4, 0.5, "uniform") == [0.5, 0.5, 0.5, 1.0]
    assert exit_weights([1, 4], 4, 0.5, "uniform") == pytest.approx([1 / 3, 2 / 3])


def manual_mixed_loss(model, ids, labels, exit_layer, share):
    """Cross-entropy and KL(last || exit) token by token in fp64, from the truncated model and the
    whole one.
    """
    student = truncated(model, exit_layer)(ids).logits.log_softmax(-1)
    teacher = model(ids).logits.log_softmax(-1).detach()
    total = 0.0
    for row in range(ids.shape[0]):
        for column in range(1, ids.shape[1]):
            if labels[row, column] != IGNORED:
                said = student[row, column - 1]
                aim = teacher[row, column - 1]
                divergence = (aim.exp() * (aim - said)).sum()
                total += (1 - share) * -said[labels[row, column]] + share * divergence
    return total


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_equals_a_manual_loop(llama, monkeypatch, share):
    """With distillation and without, in one chunk and in chunks of five tokens.

    The last layer keeps its cross-entropy; the reports do not mix.
    """
    ids, labels = batch()
    recipe = RecipeSettings("finetune", p_max=0, e_scale=0.5, curriculum="all", distill=share)
    weights = exit_weights(range(1, 7), 6, 0.5)
    expected = [
        manual_mixed_loss(llama, ids, labels, exit_layer, share) for exit_layer in range(1, 6)
    ]
    expected.append(manual_cross_entropy(llama, ids, labels))
    monkeypatch.setattr(losses, "_SHARE_OF_HEAD", 0)
    for logits in (losses.CHUNK_LOGITS, 5 * 67):
        monkeypatch.setattr(losses, "CHUNK_LOGITS", logits)
        output = recipe_module(llama, recipe).train()(ids, labels, RunStep(0, 10))
        total = sum(weight * loss for weight, loss in zip(weights, expected, strict=True))
        torch.testing.assert_close(output["loss"].double(), total, rtol=1e-5, atol=1e-4)
        plain = [
            manual_cross_entropy(truncated(llama, exit_layer), ids, labels)
            for exit_layer in range(1, 7)
        ]
        torch.testing.assert_close(
            output["per_exit"].double(), torch.stack(plain).detach(), rtol=1e-5, atol=1e-4
        )


def test_a_share_of_the_exits_gradient_trains_the_layers_below():
    """The gradient of the whole loss is that of the last layer's, and this share of what exit 3's
    adds.

    The block that reads exit 3, and the losses, are the same bit by bit at every share.
    """
    model, (ids, labels) = tiny_model(dtype=torch.float32), batch()

    def found(share):
        recipe = RecipeSettings(p_max=0, exits=(3,), exit_gradient=share)
        module = recipe_module(model, recipe).train()
        model.zero_grad()
        output = module(ids, labels, RunStep(0, 10))
        output["loss"].backward()
        trunk = [weight.grad.clone() for weight in model.model.layers[:3].parameters()]
        reader = [
            weight.grad.clone()
            for weight in module.exit_blocks.parameters()
            if weight.requires_grad
        ]
        return (
            torch.cat([each.flatten() for each in trunk]),
            torch.cat([each.flatten() for each in reader]),
            output,
        )

    fixed, half, whole = (found(share) for share in (0.0, 0.5, 1.0))
    for other in (half, whole):
        assert torch.equal(fixed[1], other[1]) and torch.equal(fixed[2]["loss"], other[2]["loss"])
    torch.testing.assert_close(half[0], (fixed[0] + whole[0]) / 2, rtol=1e-4, atol=1e-5)
    assert (whole[0] - fixed[0]).norm() > 0.01 * whole[0].norm()
    # Without the exits' gradient the layers get that of the last layer's loss alone, by its weight.
    plain = recipe_module(model, RecipeSettings("none")).train()
    model.zero_grad()
    plain(ids, labels, RunStep(0, 10))["loss"].backward()
    alone = torch.cat([weight.grad.flatten() for weight in model.model.layers[:3].parameters()])
    weight = exit_weights((3, 6), 6, 0.2, "uniform")[-1]
    torch.testing.assert_close(fixed[0], weight * alone, rtol=1e-4, atol=1e-5)


def gradients(model, *, autocast, **inputs):
    module = recipe_module(model, RecipeSettings("finetune", p_max=0.3, curriculum="all")).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        module(step=RunStep(2, 10), **inputs)["loss"].backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def inputs(kind):
    ids, labels = batch(4)
    if kind == "packed":
        collated = collate(
            list(packed([ids[0].tolist(), ids[1, :4].tolist(), ids[2].tolist()], 18))
        )
        return {name: collated[name] for name in ("input_ids", "labels", "documents")}
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("kind, model_type", [("causal", "mistral"), ("packed", "llama")])
def test_attention_in_fp32_changes_nothing_but_rounding(kind, model_type):
    """In fp32 the same bits, whichever mask; under autocast no further from them than bf16
    attention is.
    """
    changes = {"sliding_window": 4} if model_type == "mistral" else {}

    def found(in_fp32, autocast):
        model = tiny_model(model_type, dtype=torch.float32, **changes)
        if in_fp32:
            use_fp32_attention(model)
            assert model.config._attn_implementation == "sdpa_fp32"
        return gradients(model, autocast=autocast, **inputs(kind))

    exact = found(False, False)
    assert torch.equal(found(True, False), exact)
    ours, torchs = (
        (found(in_fp32, True) - exact).norm() / exact.norm() for in_fp32 in (True, False)
    )
    assert 0 < ours < 1.1 * torchs < 0.2


def test_dropout_is_off_in_evaluation_and_all_exits_are_on(llama):
    ids, labels = batch()
    module = recipe_module(llama, RecipeSettings("finetune", p_max=0.9)).eval()
    with torch.no_grad():
        first, second = (module(ids, labels, RunStep(step, 10)) for step in (0, 7))
    assert first["exit_layers"] == (1, 2, 3, 4, 5, 6)
    torch.testing.assert_close(first["per_exit"], second["per_exit"])


@pytest.mark.parametrize(
    "curriculum, step, exits",
    [
        ("rotational", 1, (2, 5, 6)),  # R = 3: layer indices 1 and 4, and the last
        ("gradual", 2, (5, 6)),  # T = 12, L = 6: one more exit a step from t = 1 on
        ("none", 3, (6,)),
    ],
)
def test_the_curriculum_decides_which_exits_have_a_loss(llama, curriculum, step, exits):
    ids, labels = batch(4)
    rotation = 3 if curriculum == "rotational" else None
    recipe = RecipeSettings(
        "finetune", p_max=0, e_scale=0.2, curriculum=curriculum, rotation=rotation
    )
    output = run(llama, recipe, RunStep(step, 12), ids, labels)
    assert output["exit_layers"] == exits
    weights = torch.tensor(exit_weights(exits, 6, 0.2))
    torch.testing.assert_close(output["loss"], (weights * output["per_exit"]).sum())


def test_the_teacher_is_a_constant(llama, monkeypatch):
    """With all of the loss on exit 3 and nothing but distillation, layers 4 to 6 get no gradient;
    in chunks too.
    """
    ids, labels = batch()
    monkeypatch.setattr(losses, "_SHARE_OF_HEAD", 0)
    for logits in (losses.CHUNK_LOGITS, 5 * 67):
        monkeypatch.setattr(losses, "CHUNK_LOGITS", logits)
        module = recipe_module(
            llama, RecipeSettings("finetune", p_max=0, curriculum="all", distill=1.0)
        ).train()
        monkeypatch.setattr(
            recipe_modules,
            "exit_weights",
            lambda exits, *_: [float(exit_layer == 3) for exit_layer in exits],
        )
        llama.zero_grad()
        module(ids, labels, RunStep(0, 10))["loss"].backward()
        seen = [layer.mlp.up_proj.weight.grad is not None for layer in llama.model.layers]
        assert seen == [True] * 3 + [False] * 3
    llama.zero_grad()


def test_a_part_of_the_vocabulary_changes_the_exits_losses_alone(monkeypatch):
    """All candidates: the whole loss. A few: the last layer's loss stays, a step repeats, and
    evaluation scores all tokens.
    """
    ids, labels = batch(4)
    recipe = RecipeSettings(exits=(2,), distill=0.5, exit_gradient=0.5)
    step = RunStep(3, 10)

    def outputs(frequent, training=True):
        module = recipe_module(tiny_model(dtype=torch.float32), recipe, frequent=frequent).train(
            training
        )
        output = module(ids, labels, step)
        if training:
            output["loss"].backward()
        return module, output

    vocabulary = tiny_model().config.vocab_size
    whole, of_whole = outputs(())
    every, of_every = outputs(range(vocabulary))
    torch.testing.assert_close(of_every["per_exit"], of_whole["per_exit"])
    own = every.exit_blocks.named_parameters()
    for (name, weight), expected in zip(own, whole.exit_blocks.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(weight.grad, expected.grad, msg=name)
    # The last layer alone trains the head
    heads = [module.model.get_output_embeddings().weight.grad for module in (every, whole)]
    assert not torch.allclose(*heads)

    monkeypatch.setattr(exit_blocks, "_SAMPLED", 5)
    few = (1, 2)
    _, of_few = outputs(few)
    _, again = outputs(few)
    assert torch.equal(of_few["loss"], again["loss"])
    assert of_few["per_exit"][0] != of_whole["per_exit"][0]
    assert of_few["per_exit"][1] == of_whole["per_exit"][1]
    _, measured = outputs(few, training=False)
    _, expected = outputs((), training=False)
    assert torch.equal(measured["per_exit"], expected["per_exit"])
    assert torch.equal(measured["agreeing"], expected["agreeing"])
