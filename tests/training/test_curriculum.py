import pytest

from layerskip_core.config.training import RecipeSettings
from layerskip_core.errors import ConfigError
from layerskip_core.training.recipe import exits_on, mean_exits, resolve_recipe


def recipe(layers=24, vocab_size=1024, **asked):
    return resolve_recipe(RecipeSettings(**asked), "finetune", 0, layers, vocab_size)


def test_rotational_is_on_once_every_r_steps_plus_the_last():
    rotational = recipe(curriculum="rotational", rotation=3)
    assert [exits_on(rotational, step, 10, 8) for step in range(4)] == [(1, 4, 7, 8), (2, 5, 8), (3, 6, 8), (1, 4, 7, 8)]


def test_gradual_adds_one_layer_every_t_over_2l_steps_from_the_top():
    """L = 4, T = 16: one more every 2 steps, layer 1 at T/2 = 8."""
    gradual = recipe(curriculum="gradual")
    on = [exits_on(gradual, step, 16, 4) for step in (0, 1, 2, 3, 4, 6, 7, 8, 15)]
    assert on == [(4,), (4,), (4,), (4,), (3, 4), (2, 3, 4), (2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("curriculum", "expected"),
    [
        ("rotational", [(6, 15, 30), (8, 30), (10, 30), (6, 15, 30)]),
        ("gradual", [(30,), (30,), (15, 30), (6, 8, 10, 15, 30)]),
        ("all", [(6, 8, 10, 15, 30)] * 4),
        ("none", [(30,)] * 4),
    ],
)
def test_named_exits_are_the_only_ones_besides_the_last(curriculum, expected):
    rotation = 3 if curriculum == "rotational" else None
    named = recipe(curriculum=curriculum, rotation=rotation, exits=() if curriculum == "none" else (10, 6, 8, 15))
    steps = (0, 1, 2, 3) if curriculum == "rotational" else (0, 1, 2, 15)
    assert [exits_on(named, step, 16, 30) for step in steps] == expected


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"curriculum": "none", "exits": (6,)}, "exits"),
        ({"curriculum": "none", "distill": 0.5}, "distill"),
        ({"curriculum": "all", "e_scale": 0.0}, "e_scale"),
        ({"exits": (1,)}, "exits"),  # which the paper's formula gives no weight
        ({"curriculum": "all", "rotation": 3}, "rotation"),
    ],
)
def test_settings_that_would_train_no_early_exit(asked, field):
    with pytest.raises(ConfigError) as refused:
        recipe(**asked)
    assert refused.value.field == field
    assert recipe(exits=(1, 2)).exits == recipe(exits=(1, 2), exit_weights="uniform").exits == (1, 2)


def test_the_default_rotation_depends_on_the_vocabulary():
    assert recipe().rotation == 8
    assert recipe(vocab_size=49152).rotation == 23
    assert recipe(vocab_size=49152, rotation=5).rotation == 5
    assert recipe(vocab_size=49152, exits=(2, 4, 6)).rotation == 2
    assert recipe(layers=2).rotation == 1
    assert recipe(vocab_size=49152, curriculum="gradual").rotation == 0


def test_mean_exits_counts_heads_per_step():
    """L = 8, R = 4: two rotating exits per step, one of them the last layer on one step in four: (3 + 3 + 3 + 2) / 4."""
    assert mean_exits(recipe(rotation=4), 400, 8) == pytest.approx(2.75)
    assert mean_exits(recipe(curriculum="none"), 400, 8) == 1
