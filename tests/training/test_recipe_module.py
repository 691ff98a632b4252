import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model
from training_runs import recipe_module

from layerskip_core import losses
from layerskip_core.config.training import RecipeSettings
from layerskip_core.losses import IGNORED
from layerskip_core.training.data import collate
from layerskip_core.training.encoding import packed
from layerskip_core.training.recipe import RunStep, exit_weights


def batch(rows=4, length=9):
    ids = torch.randint(3, 67, (rows, length), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[:, :3] = IGNORED
    return ids, labels


def run(model, recipe, step, ids, labels, **keywords):
    return recipe_module(model, recipe, **keywords).train()(ids, labels, step)


def layer_rows(model):
    """Counts the rows that each layer runs from now on."""
    rows = [0] * len(model.model.layers)

    def count(at):
        return lambda _, args: rows.__setitem__(at, rows[at] + args[0].shape[0])

    for at, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(count(at))  # inside the layer, so that a recomputation counts too
    return rows


@pytest.mark.parametrize(
    ("curriculum", "step", "exits"),
    [
        ("rotational", 1, (2, 5, 6)),  # R = 3: layer indices 1 and 4, and the last
        ("gradual", 2, (5, 6)),  # T = 12, L = 6: one more exit a step from t = 1 on
        ("none", 3, (6,)),
    ],
)
def test_the_curriculum_decides_which_exits_have_a_loss(llama, curriculum, step, exits):
    ids, labels = batch()
    rotation = 3 if curriculum == "rotational" else None
    recipe = RecipeSettings(p_max=0, e_scale=0.2, curriculum=curriculum, rotation=rotation)
    output = run(llama, recipe, RunStep(step, 12), ids, labels)
    assert output["exit_layers"] == exits
    weights = torch.tensor(exit_weights(exits, 6, 0.2))
    torch.testing.assert_close(output["loss"], (weights * output["per_exit"]).sum())


def test_without_the_recipe_it_is_the_plain_loss(llama):
    ids, labels = batch()
    output = run(llama, RecipeSettings(p_max=0, curriculum="none"), RunStep(0, 1), ids, labels)
    targets = (labels[:, 1:] != IGNORED).sum()
    torch.testing.assert_close(output["loss"] / targets, llama(ids, labels=labels).loss.float())


def test_padding_at_the_right_changes_nothing(llama):
    ids, labels = batch()
    recipe = RecipeSettings(p_max=0, curriculum="all")
    plain = run(llama, recipe, RunStep(0, 1), ids, labels)["per_exit"]
    filler, ignored = torch.zeros(4, 2, dtype=torch.long), torch.full((4, 2), IGNORED)
    padded = run(llama, recipe, RunStep(0, 1), torch.cat([ids, filler], 1), torch.cat([labels, ignored], 1))
    torch.testing.assert_close(padded["per_exit"], plain)


def test_from_scratch_dropout_starts_at_nothing_and_ends_at_its_rate():
    """S(t) is 0 at the first step and 1 at the last, where p is 0.9 at the last layer."""
    ids, labels = batch(rows=40)
    recipe = RecipeSettings(p_max=0.9, curriculum="none")
    for step, scratch, expected in ((0, True, 40), (9, True, 4), (0, False, 4)):
        model = tiny_model()
        rows = layer_rows(model)
        run(model, recipe, RunStep(step, 10), ids, labels, from_scratch=scratch)
        assert rows[0] == 40  # p of the first layer is 0
        assert rows[5] == pytest.approx(expected, abs=6)  # 3 standard deviations of 40 draws at 0.9


def test_constant_dropout_drops_as_much_at_the_first_layer_as_at_the_last():
    """p_max 0.9 in 6 layers has a mean of 0.41: 24 of 40 rows run each layer."""
    ids, labels = batch(rows=40)
    model = tiny_model()
    rows = layer_rows(model)
    run(model, RecipeSettings(p_max=0.9, dropout_profile="constant", curriculum="none"), RunStep(0, 10), ids, labels)
    assert rows == pytest.approx([24] * 6, abs=9)  # 3 standard deviations


@pytest.mark.parametrize(("bf16", "lora"), [(False, True), (True, False)], ids=["fp64, LoRA", "bf16 autocast, all weights"])
def test_recomputing_layers_gives_the_same_gradients_bit_by_bit(monkeypatch, bf16, lora):
    """The backward pass runs layers and heads again: dropping the same rows, with taps, in the same precision."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 5 * 67)
    ids, labels = batch()
    recipe = RecipeSettings(p_max=0.8, curriculum="all", distill=0.5)
    gradients = []
    for recompute in (False, True):
        model = tiny_model(dtype=torch.float32 if bf16 else torch.float64, tie_word_embeddings=True)
        if lora:
            torch.manual_seed(1)
            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        module = recipe_module(model, recipe, recompute=recompute).train()
        rows = layer_rows(module.backend.model)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = module(ids, labels, RunStep(2, 10))["loss"]
        assert loss.dtype == torch.float32
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad})
        assert rows[0] == (8 if recompute else 4) and rows[5] < rows[0]
    assert gradients[0].keys() == gradients[1].keys()
    assert any(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)


def test_packed_documents_give_the_losses_of_each_alone():
    """Documents of 5, 9 and 4 tokens in a row of 18, one sliding window of 4; and a second row with padding."""
    for model_type, changes in (("llama", {}), ("mistral", {"sliding_window": 4}), ("gemma2", {"sliding_window": 4})):
        model = tiny_model(model_type, **changes)
        if model_type == "gemma2":
            model.set_attn_implementation("eager")  # masks are numbers there, not truth values
        module = recipe_module(model, RecipeSettings(p_max=0, curriculum="all")).train()
        ids, _ = batch(rows=1, length=18)
        alone = []
        for start, stop in ((0, 5), (5, 14), (14, 18)):
            part = ids[:, start:stop]
            alone.append(module(part, part, RunStep(0, 1))["per_exit"])
        (row,) = packed([ids[0, :5].tolist(), ids[0, 5:14].tolist(), ids[0, 14:].tolist()], 18)
        (short,) = packed([ids[0, :5].tolist()], 18)
        collated = collate([row, short])
        assert collated["documents"][1].tolist() == [0] * 5 + [-1] * 13
        collated.pop("lengths")
        together = module(**collated, step=RunStep(0, 1))["per_exit"]
        torch.testing.assert_close(together, sum(alone) + alone[0])
