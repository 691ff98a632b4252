"""Settings that cannot be."""

import pytest

from layerskip_core.config.evaluation import BenchConfig, SweepConfig, TaskConfig
from layerskip_core.config.model import PromptingConfig
from layerskip_core.errors import ConfigError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptingConfig("Q:"), "`template` must be raw, chat or a text with {prompt} in it, got Q:"),
        (lambda: PromptingConfig("chat", raw=True), "`raw` must be given without `template`, got `template` chat"),
        (lambda: PromptingConfig(system="s", raw=True), "`system` must be given with a chat template, got a raw prompt"),
        (lambda: BenchConfig(task=TaskConfig(problem_samples=5)), "`temperature` must be above 0"),
        (lambda: SweepConfig(task=TaskConfig(problem_samples=5)), "`temperature` must be above 0"),
    ],
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert caught.value.field == message.split("`")[1]


def test_the_template_that_is_asked_for():
    asked = [PromptingConfig(), PromptingConfig("chat"), PromptingConfig(raw=True), PromptingConfig("{prompt}!")]
    assert [prompting.asked for prompting in asked] == [None, "chat", "raw", "{prompt}!"]
