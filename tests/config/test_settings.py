"""Settings that cannot be."""

import pytest

from layerskip_core.config.evaluation import BenchConfig, SweepConfig, TaskConfig
from layerskip_core.config.prompting import PromptingConfig
from layerskip_core.config.training import FinetuneConfig, RecipeConfig, RecipeSettings
from layerskip_core.errors import ConfigError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptingConfig("Q:"), "`template` must be raw, chat or a text with {prompt} in it, got Q:"),
        (lambda: PromptingConfig("chat", raw=True), "`raw` must be given without `template`, got `template` chat"),
        (lambda: PromptingConfig(system="s", raw=True), "`system` must be given with a chat template, got a raw prompt"),
        (lambda: PromptingConfig(system="\ud800"), "`system` must be valid Unicode"),
        (
            lambda: BenchConfig(task=TaskConfig(problem_samples=5)),
            "`temperature` must be above 0 for several `problem_samples`",
        ),
        (
            lambda: SweepConfig(task=TaskConfig(problem_samples=5)),
            "`temperature` must be above 0 for several `problem_samples`",
        ),
        (
            lambda: FinetuneConfig(prompting=PromptingConfig("Q:")),
            "`template` must be raw, chat or a text with {prompt} in it, got Q:",
        ),
    ],
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert caught.value.field == message.split("`")[1]


def test_the_template_that_is_asked_for():
    assert [PromptingConfig(*asked).asked for asked in ((), ("chat",), (None, None, True), ("{prompt}!",))] == [
        None, "chat", "raw", "{prompt}!",
    ]  # fmt: skip


def test_a_recipe_takes_what_was_not_said_from_the_preset():
    preset = RecipeConfig(p_max=0.1, e_scale=0.3, rotation=8)
    assert RecipeSettings().over(preset) == preset
    assert RecipeSettings(p_max=0.0, curriculum="all", exits=(2,)).over(preset) == RecipeConfig(
        p_max=0.0, e_scale=0.3, rotation=8, curriculum="all", exits=(2,)
    )
