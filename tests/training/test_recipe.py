"""The recipe's formulas against literal values."""

from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model

from layerskip_core.config.training import FinetuneConfig, RecipeSettings
from layerskip_core.errors import ConfigError
from layerskip_core.model import TransformersBackend
from layerskip_core.training.recipe import (
    depth_scale,
    dropout_rates,
    dropout_steps,
    exits_on,
    kept_rows,
    learning_rate,
    resolve_recipe,
    steps_on,
    time_scale,
    trained_exits,
)


def spec_of(layers, vocab=1024, parameters=0, blocks=True):
    return SimpleNamespace(
        layers=layers,
        vocab=vocab,
        parameters=parameters,
        block_shapes={"norm.weight": (8,)} if blocks else {},
    )


def recipe(layers=24, vocab_size=1024, **asked):
    return resolve_recipe(RecipeSettings("finetune", **asked), spec_of(layers, vocab_size), 100)


def test_the_curricula():
    rotational = recipe(curriculum="rotational", rotation=3)
    assert [exits_on(rotational, step, 10, 8) for step in range(4)] == [
        (1, 4, 7, 8),
        (2, 5, 8),
        (3, 6, 8),
        (1, 4, 7, 8),
    ]
    gradual = recipe(curriculum="gradual")
    on = [exits_on(gradual, step, 16, 4) for step in (0, 1, 2, 3, 4, 6, 7, 8, 15)]
    assert on == [(4,), (4,), (4,), (4,), (3, 4), (2, 3, 4), (2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "curriculum, expected",
    [
        ("rotational", [(6, 15, 30), (8, 30), (10, 30), (6, 15, 30)]),
        ("gradual", [(30,), (30,), (15, 30), (6, 8, 10, 15, 30)]),
        ("all", [(6, 8, 10, 15, 30)] * 4),
        ("none", [(30,)] * 4),
    ],
)
def test_named_exits_are_the_only_ones_besides_the_last(curriculum, expected):
    rotation = 3 if curriculum == "rotational" else None
    named = recipe(
        curriculum=curriculum,
        rotation=rotation,
        exits=() if curriculum == "none" else (10, 6, 8, 15),
    )
    steps = (0, 1, 2, 3) if curriculum == "rotational" else (0, 1, 2, 15)
    assert [exits_on(named, step, 16, 30) for step in steps] == expected


@pytest.mark.parametrize(
    "asked, field",
    [
        ({"curriculum": "none", "exits": (6,)}, "exits"),
        ({"curriculum": "none", "distill": 0.5}, "distill"),
        ({"curriculum": "none", "exit_gradient": 0.5}, "exit_gradient"),
        # Without a block an exit has no weights of its own
        ({"exit_gradient": 0.0}, "exit_gradient"),
        ({"curriculum": "all", "e_scale": 0.0}, "e_scale"),
        ({"exits": (1,)}, "exits"),  # which the paper's formula gives no weight
        ({"curriculum": "all", "rotation": 3}, "rotation"),
    ],
)
def test_settings_that_would_train_no_early_exit(asked, field):
    with pytest.raises(ConfigError) as refused:
        recipe(**asked)
    assert refused.value.field == field
    assert (
        recipe(exits=(1, 2)).exits == recipe(exits=(1, 2), exit_weights="uniform").exits == (1, 2)
    )


def test_the_default_rotation_depends_on_the_vocabulary():
    assert recipe().rotation == 8
    assert recipe(vocab_size=49152).rotation == 23
    assert recipe(vocab_size=49152, rotation=5).rotation == 5
    assert recipe(vocab_size=49152, exits=(2, 4, 6)).rotation == 2
    assert recipe(layers=2).rotation == 1
    assert recipe(vocab_size=49152, curriculum="gradual").rotation == 0


def test_steps_on_counts_the_steps_of_each_exit():
    """L = 8, R = 4: each exit but the last on one step in four; also of a run that is too long to
    count each step.
    """
    assert steps_on(recipe(rotation=4), 400, 8) == {**dict.fromkeys(range(1, 8), 100), 8: 400}
    assert steps_on(recipe(rotation=3), 60_000, 8)[2] == pytest.approx(20_000, rel=0.01)
    assert steps_on(recipe(curriculum="none"), 400, 8) == {8: 400}


def test_trained_are_the_exits_of_a_hundred_steps_with_a_weight():
    """R = 4: a hundred steps of 400, 99 of 396; exit 1 weighs nothing by the paper's formula. Of a
    short run, on each step.
    """
    rotational = recipe(layers=8, rotation=4)
    assert (
        trained_exits(rotational, 400, 8) == (2, 3, 4, 5, 6, 7)
        and trained_exits(rotational, 396, 8) == ()
    )
    assert trained_exits(recipe(layers=8, curriculum="all", exits=(1, 3)), 5, 8) == (3,)
    assert trained_exits(recipe(curriculum="none"), 400, 8) == ()


def auto(layers=24, steps=300, blocks=True, **asked):
    return resolve_recipe(
        RecipeSettings(**asked), spec_of(layers, 49152, 135_000_000, blocks), steps
    )


def test_auto_trains_a_few_exits_on_every_step_and_reads_each():
    assert [auto(layers).exits for layers in (2, 3, 16, 24, 30, 32)] == [
        (1,),
        (1,),
        (3, 5),
        (4, 8),
        (6, 10),
        (6, 10),
    ]
    assert auto(steps=99).exits == (8,)
    found = auto(p_max=0.2, exits=(3, 6))
    assert (found.p_max, found.exits, found.curriculum, found.exit_reader) == (
        0.2,
        (3, 6),
        "all",
        "block",
    )
    assert trained_exits(found, 40, 24) == (3, 6)
    assert auto(blocks=False).exit_reader == "none" and auto(exit_reader="none").exits == (4, 8)
    alone = auto(layers=1)
    assert (alone.curriculum, alone.exits, alone.p_max) == ("none", (), 0)
    control = auto(preset="none")
    assert (control.curriculum, control.exits, control.p_max, control.exit_reader) == (
        "none",
        (),
        0,
        "none",
    )
    assert auto(curriculum="none", p_max=0.2).exits == ()
    rates = [learning_rate("auto", int(size)) for size in (5e6, 7e7, 135e6, 3e8, 6.3e8, 8e9)]
    assert (
        rates == [5e-4, 5e-5, 5e-5, 1.5e-5, 5e-6, 5e-6]
        and learning_rate("none", 135_000_000, is_lora=True) == 5e-4
    )


def test_the_recipe_of_auto_follows_from_the_number_of_steps():
    """Dropout ends after T sqrt(T) / 100 steps, at most T / 3. T / 1,000 of the exits' gradient
    goes below, at least 0.3.
    """
    lengths = (1, 10, 50, 100, 300, 650, 1000, 3000)
    assert [dropout_steps(steps) for steps in lengths] == [1, 1, 4, 10, 52, 166, 316, 1000]
    assert [auto(steps=steps).exit_gradient for steps in lengths] == [
        0.3,
        0.3,
        0.3,
        0.3,
        0.3,
        0.65,
        1,
        1,
    ]
    assert [auto(steps=steps).p_max for steps in lengths] == [0, 0, 0, 0, 0, 0, 0.1, 0.1]
    assert [time_scale(step, 3000, "falling") for step in (0, 250, 500, 1000, 2999)] == [
        1,
        0.75,
        0.5,
        0,
        0,
    ]
    assert [time_scale(step, 50, "falling") for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]


def test_exits_without_blocks_train_the_layers_below_them():
    """So do those that are read where that is asked for, and all of the paper's."""
    assert (
        auto(exit_reader="none").exit_gradient
        == auto(blocks=False).exit_gradient
        == auto(exit_gradient=1.0).exit_gradient
        == 1
    )
    assert auto(curriculum="none").exit_gradient == auto(preset="none").exit_gradient == 1
    papers = [
        RecipeSettings(preset, exit_reader=reader)
        for preset, *_ in PAPER
        for reader in (None, "block")
    ]
    named = [replace(asked, exits=(8,)) if asked.exit_reader else asked for asked in papers]
    assert {resolve_recipe(asked, spec_of(24), 300).exit_gradient for asked in named} == {1.0}
    kept = resolve_recipe(RecipeSettings(), spec_of(24), 300, has_blocks=False)
    assert (kept.exit_reader, kept.exit_gradient) == ("none", 1)


def test_exits_with_blocks_score_a_part_of_a_large_vocabulary():
    def scored(settings=None, vocab=49_152, **keywords):
        spec = TransformersBackend(tiny_model(vocab_size=vocab)).spec
        spec = replace(spec, **keywords)
        return resolve_recipe(settings or RecipeSettings(), spec, 300).exit_vocab

    assert scored() == 4096
    assert scored(vocab=16_384) == scored(RecipeSettings(exit_reader="none")) == 0
    assert scored(RecipeSettings("finetune")) == scored(RecipeSettings(exit_vocab=0)) == 0
    assert scored(logits_cap=30.0) == scored(logits_divisor=2.0) == 0
    assert scored(RecipeSettings(exit_vocab=64), vocab=1024) == 64
    for settings, changes in (
        (RecipeSettings(exit_vocab=64), {"logits_cap": 30.0}),
        (RecipeSettings(exit_vocab=64, exit_reader="none"), {}),
    ):
        with pytest.raises(ConfigError, match="`exit_vocab` must be 0 without `exit_reader` block"):
            scored(settings, **changes)
    with pytest.raises(ConfigError, match="`exit_vocab` must be 0 with `fsdp`"):
        FinetuneConfig(fsdp=True, recipe=RecipeSettings(exit_vocab=64))


def test_the_literal_rates_and_constant_ones_of_the_same_mean():
    """RECIPE: L = 5, p_max = 0.2."""
    assert [depth_scale(layer, 5) for layer in range(5)] == pytest.approx(
        [0, 0.189207, 0.414214, 0.681793, 1], abs=1e-6
    )
    assert dropout_rates(0.2, 5) == pytest.approx([0, 0.037841, 0.082843, 0.136359, 0.2], abs=1e-6)
    assert sum(dropout_rates(0.2, 24)) / 24 == pytest.approx(0.089, abs=5e-4)
    assert dropout_rates(0.2, 5, profile="constant") == pytest.approx([0.0914086] * 5, abs=1e-6)
    assert dropout_rates(0.2, 5, 0.5, "constant") == pytest.approx([0.0457043] * 5, abs=1e-6)
    assert dropout_rates(0.0, 1, profile="constant") == [0.0]


def test_the_schedule_from_scratch():
    assert [time_scale(step, 5, "rising") for step in range(5)] == pytest.approx(
        [0, 0.189207, 0.414214, 0.681793, 1], abs=1e-6
    )
    assert time_scale(0, 1) == 1
    with pytest.raises(ConfigError, match="`steps` must be at least 2"):
        time_scale(0, 1, "rising")
    with pytest.raises(ConfigError, match="at least 2 layers, got 1"):
        depth_scale(0, 1)


def test_rows_are_drawn_by_the_moment_alone_at_the_rate_and_however_the_step_is_divided():
    draws = [
        kept_rows(0.5, 64, seed, step, first, layer)
        for seed, step, first, layer in [
            (0, 0, 0, 0),
            (1, 0, 0, 0),
            (0, 1, 0, 0),
            (0, 0, 64, 0),
            (0, 0, 0, 1),
        ]
    ]
    assert len({tuple(draw) for draw in draws}) == 5
    torch.manual_seed(123)
    assert kept_rows(0.5, 64, 0, 0, 0, 0) == draws[0]
    assert kept_rows(0.0, 3, 0, 0, 0, 0) == [0, 1, 2]
    whole = kept_rows(0.5, 64, 1, 2, 0, 3)
    parts = [
        [first + row for row in kept_rows(0.5, 16, 1, 2, first, 3)] for first in (0, 16, 32, 48)
    ]
    assert (
        list(chain(*parts)) == whole
        and len({tuple(row % 16 for row in part) for part in parts}) == 4
    )
    kept = sum(len(kept_rows(0.2, 50, 0, step, 0, 3)) for step in range(200))
    assert kept / 10_000 == pytest.approx(0.8, abs=0.012)  # 3 standard deviations


def test_a_layer_without_rows_still_gets_a_zero_gradient():
    backend = TransformersBackend(tiny_model())
    ids = torch.arange(3, 9).view(2, 3)
    states = backend.texts.states(ids, (1, 2), kept=lambda layer: [] if layer == 1 else range(2))
    torch.testing.assert_close(states[2], states[1])
    states[2].sum().backward()
    gradient = backend.layers[1].mlp.up_proj.weight.grad
    assert gradient is not None and gradient.abs().sum() == 0


# RECIPE, "Hyper-parameters that the paper used": preset, parameters, layers -> p_max, e_scale, R,
# learning rate with dropout
PAPER = [
    ("continual", 6.7e9, 32, 0.1, 0.2, 8, 3e-5),
    ("continual", 13e9, 40, 0.1, 0.1, 39, 2e-5),
    ("continual", 8e9, 32, 0.1, 0.1, 8, None),
    ("continual", 1.2e9, 16, 0.1, 0.1, 8, None),
    ("scratch", 1.5e9, 24, 0.1, 0.2, 23, 8e-4),
    ("scratch", 6.7e9, 32, 0.2, 0.2, 31, 8e-4),
    ("code", 6.7e9, 32, 0.1, 1.0, 16, 1e-4),
    # TOPv2: the paper's values but for its gradual curriculum
    ("finetune", 1.5e9, 24, 0.2, 1.0, 23, 1e-4),
]


@pytest.mark.parametrize("preset, parameters, layers, p_max, e_scale, rotation, rate", PAPER)
def test_the_papers_values(preset, parameters, layers, p_max, e_scale, rotation, rate):
    recipe = resolve_recipe(RecipeSettings(preset), spec_of(layers, 32_000, int(parameters)), 100)
    assert (
        recipe.dropout_schedule == ("rising" if preset == "scratch" else "constant")
        and recipe.exit_reader == "none"
    )
    assert (recipe.p_max, recipe.e_scale, recipe.curriculum, recipe.rotation) == (
        p_max,
        e_scale,
        "rotational",
        rotation,
    )
    if rate is not None:
        assert learning_rate(preset, int(parameters)) == rate < learning_rate(preset, 5_000_000)
