import pytest

from layerskip_core.config.training import RecipeConfig
from layerskip_core.training.curriculum import exits_on, mean_exits, rotation_of


def test_rotational_is_on_once_every_r_steps_plus_the_last():
    recipe = RecipeConfig(curriculum="rotational", rotation=3)
    assert [exits_on(recipe, step, 10, 8) for step in range(4)] == [(1, 4, 7, 8), (2, 5, 8), (3, 6, 8), (1, 4, 7, 8)]


def test_gradual_adds_one_layer_every_t_over_2l_steps_from_the_top():
    """L = 4, T = 16: one more every 2 steps, layer 1 at T/2 = 8."""
    recipe = RecipeConfig(curriculum="gradual")
    found = [exits_on(recipe, step, 16, 4) for step in (0, 1, 2, 3, 4, 6, 7, 8, 15)]
    assert found == [(4,), (4,), (4,), (4,), (3, 4), (2, 3, 4), (2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)]


@pytest.mark.parametrize(("curriculum", "expected"), [("all", (1, 2, 3)), ("none", (3,))])
def test_constant_curricula(curriculum, expected):
    assert exits_on(RecipeConfig(curriculum=curriculum), 5, 9, 3) == expected


@pytest.mark.parametrize(
    ("curriculum", "found"),
    [
        ("rotational", [(6, 15, 30), (8, 30), (10, 30), (6, 15, 30)]),
        ("gradual", [(30,), (30,), (15, 30), (6, 8, 10, 15, 30)]),
        ("all", [(6, 8, 10, 15, 30)] * 4),
        ("none", [(30,)] * 4),
    ],
)
def test_named_exits_are_the_only_ones_besides_the_last(curriculum, found):
    recipe = RecipeConfig(curriculum=curriculum, rotation=3, exits=(6, 8, 10, 15))
    steps = (0, 1, 2, 3) if curriculum == "rotational" else (0, 1, 2, 15)
    assert [exits_on(recipe, step, 16, 30) for step in steps] == found


def test_the_default_rotation_depends_on_the_vocabulary():
    assert rotation_of(RecipeConfig(), 24, 1024) == 8
    assert rotation_of(RecipeConfig(), 24, 49152) == 23
    assert rotation_of(RecipeConfig(rotation=5), 24, 49152) == 5
    assert rotation_of(RecipeConfig(exits=(2, 4, 6)), 24, 49152) == 2


def test_mean_exits_counts_heads_a_step():
    """L = 8, R = 4: two rotating exits a step, one of them the last layer on one step in four: (3 + 3 + 3 + 2) / 4."""
    assert mean_exits(RecipeConfig(rotation=4), 400, 8) == pytest.approx(2.75)
    assert mean_exits(RecipeConfig(curriculum="none"), 400, 8) == 1
