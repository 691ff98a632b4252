"""What is asked, and what it resolves to for a checkpoint."""

from dataclasses import replace

import pytest

from layerskip_core.config.decoding import (
    DecodingConfig,
    DecodingSettings,
    ExitChoice,
    GenerationSettings,
    SamplingConfig,
    SkipChoice,
    spread_exits,
)
from layerskip_core.config.evaluation import BenchConfig, SweepConfig, TaskConfig
from layerskip_core.config.packing import PackingConfig
from layerskip_core.config.prompting import PromptingConfig
from layerskip_core.config.training import FinetuneConfig, RecipeConfig, RecipeSettings
from layerskip_core.errors import ConfigError

TRAINED = ExitChoice(4, 12, "self-speculative")
UNKNOWN = ExitChoice(2, 6)
_LOOKUPS = DecodingSettings(generation=GenerationSettings(lookup=3))
_CONFIDENT = DecodingSettings(generation=GenerationSettings(exit_confidence=0.9))


@pytest.mark.parametrize(
    ("asked", "recommended", "strategy", "exit_layer", "drafts"),
    [
        (DecodingSettings(), TRAINED, "self-speculative", 4, 12),
        (DecodingSettings(), UNKNOWN, "adaptive", 2, 32),
        (DecodingSettings("adaptive", num_draft_tokens=5), TRAINED, "adaptive", 4, 5),
        (DecodingSettings(), ExitChoice(4, 12, "autoregressive"), "autoregressive", 4, 12),
        (DecodingSettings(exit_layer=3), UNKNOWN, "self-speculative", 3, 6),
        (DecodingSettings(num_draft_tokens=1), UNKNOWN, "self-speculative", 2, 1),
        (DecodingSettings(generation=GenerationSettings(draft_confidence=0.5)), UNKNOWN, "self-speculative", 2, 6),
        (DecodingSettings("early-exit", 8), TRAINED, "early-exit", 8, 12),
        (DecodingSettings("autoregressive"), TRAINED, "autoregressive", 4, 12),
        (_LOOKUPS, TRAINED, "self-speculative", 4, 12),
        (_LOOKUPS, ExitChoice(4, 12, "autoregressive"), "adaptive", 4, 32),  # it was ignored
    ],
)
def test_the_checkpoint_decides_what_was_not_said(asked, recommended, strategy, exit_layer, drafts):
    config = asked.resolve(recommended, 8)
    assert (config.strategy, config.exit_layer, config.num_draft_tokens) == (strategy, exit_layer, drafts)
    assert config.max_new_tokens == 256


def test_weights_for_drafts_imply_drafting():
    plain = ExitChoice(2, 6, "autoregressive")  # found best without such weights
    assert DecodingSettings().resolve(plain, 8, PackingConfig(draft_vocab=9)).strategy == "adaptive"
    asked, copies = DecodingSettings(num_draft_tokens=3), PackingConfig(draft_weights=("int4", "int8"))
    low = asked.resolve(UNKNOWN, 8, copies)
    assert (low.strategy, low.exit_layer, low.draft_weights) == ("self-speculative", 8, "int4")
    trained = ExitChoice(4, 12, "self-speculative", exits=(4, 6))
    assert asked.resolve(trained, 8, copies).exit_layer == 4


SEARCHED = ExitChoice(4, 12, skip=SkipChoice((3, 5), 9))


@pytest.mark.parametrize(
    ("asked", "recommended", "skip", "drafts"),
    [
        (DecodingSettings(generation=GenerationSettings(skip=(2,))), UNKNOWN, (2,), 6),  # implies the strategy
        (DecodingSettings(None, None, 3, GenerationSettings(draft_confidence=0.5, skip=(2,))), SEARCHED, (2,), 3),
        (DecodingSettings("draft-and-verify"), SEARCHED, (3, 5), 9),
        (DecodingSettings("draft-and-verify", num_draft_tokens=2), SEARCHED, (3, 5), 2),
        (DecodingSettings(), ExitChoice(4, 12, "draft-and-verify", skip=SkipChoice((1,), 5)), (1,), 5),
    ],
)
def test_the_layers_to_skip_are_given_or_searched(asked, recommended, skip, drafts):
    packing = PackingConfig(draft_weights=("int8",))
    for weights in (PackingConfig(), packing) if asked.implied_strategy else (PackingConfig(),):
        config = asked.resolve(recommended, 8, weights)
        assert (config.strategy, config.skip, config.num_draft_tokens) == ("draft-and-verify", skip, drafts)
        assert config.exit_layer is None and config.draft_weights == next(iter(weights.draft_weights), None)


def test_other_strategies_skip_nothing():
    asked = DecodingSettings(generation=GenerationSettings(skip=(2,)))
    for strategy in ("autoregressive", "early-exit", "self-speculative", "lookup"):
        assert asked.resolve_as(strategy, SEARCHED, 8).skip == ()


def test_a_depth_per_token_is_early_exit_among_the_trained_exits():
    asked = DecodingSettings(generation=GenerationSettings(exit_confidence=0.9))
    config = asked.resolve(ExitChoice(4, 12, "self-speculative", exits=(4, 6)), 8)
    assert (config.strategy, config.exit_layer, config.exits, config.exit_confidence) == ("early-exit", None, (4, 6), 0.9)
    all_exits = ExitChoice(4, 12, exits=tuple(range(1, 24)))
    assert asked.resolve(all_exits, 24).exits == (3, 4, 6, 8, 12, 18)
    assert spread_exits((1, 2, 5, 9, 10, 11, 20, 23), 24) == (2, 5, 9, 11, 20)
    assert replace(asked, exits=(2, 7)).resolve(UNKNOWN, 8).exits == (2, 7)
    assert asked.resolve_as("self-speculative", TRAINED, 8).exit_confidence == 0


def test_every_setting_of_an_answer_reaches_the_decoding():
    generation = GenerationSettings(9, 0.25, ("x",), SamplingConfig(0.5, 3, 0.75, 7))
    expected = DecodingConfig("self-speculative", 2, 6, 9, 0.25, ("x",), SamplingConfig(0.5, 3, 0.75, 7))
    assert DecodingSettings("self-speculative", generation=generation).resolve(UNKNOWN, 8) == expected
    assert GenerationSettings().decoding("autoregressive", max_new_tokens=5).max_new_tokens == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DecodingSettings(exit_layer=8).resolve(UNKNOWN, 8), "`exit_layer` must be in 1..7, got 8"),
        (
            lambda: DecodingSettings("magic"),
            "`strategy` must be one of adaptive, self-speculative, lookup, draft-and-verify, early-exit, "
            "autoregressive, got magic",
        ),
        (
            lambda: DecodingSettings("early-exit", generation=GenerationSettings(skip=(2,))).resolve(UNKNOWN, 8),
            "`skip` must be used with `strategy` draft-and-verify, got `strategy` early-exit",
        ),
        (
            lambda: DecodingSettings(exit_layer=3, generation=GenerationSettings(skip=(2,))).resolve(UNKNOWN, 8),
            "`exit_layer` must be used with `strategy` self-speculative or early-exit, got `strategy` draft-and-verify",
        ),
        (
            lambda: DecodingSettings("draft-and-verify").resolve(UNKNOWN, 8),
            "`skip` must be given for `strategy` draft-and-verify, or found by `layerskip sweep-exits --search-skips --save`",
        ),
        (
            lambda: DecodingSettings(generation=GenerationSettings(skip=(2, 9))).resolve(UNKNOWN, 8),
            r"`skip` must be in 1..8, got 9 \(model has 8 layers\)",
        ),
        (lambda: GenerationSettings(skip=(0,)), "`skip` must be layers of at least 1, got 0"),
        (
            lambda: _CONFIDENT.resolve(UNKNOWN, 8),
            r"`exit_confidence` must be used with a model whose exits were trained \(`layerskip finetune`\), or with `exits`",
        ),
        (lambda: replace(_CONFIDENT, exits=(2, 8)).resolve(UNKNOWN, 8), r"`exits` must be in 1\.\.7, got 8"),
        (lambda: DecodingSettings(policy="fast", exits=(2, 3)), "`policy` must be given without `exits`, got `exits` 2,3"),
        (lambda: DecodingSettings(exits=(2,)).resolve(TRAINED, 8), "`exits` must be used with `exit_confidence`, got none"),
        (lambda: replace(_CONFIDENT, exit_layer=3).resolve(TRAINED, 8), "`exit_layer` must be left out with `exit_confidence`"),
        (
            lambda: replace(_CONFIDENT, strategy="autoregressive").resolve(TRAINED, 8),
            "`exit_confidence` must be used with `strategy` early-exit, got `strategy` autoregressive",
        ),
        (
            lambda: replace(_LOOKUPS, strategy="early-exit").resolve(TRAINED, 8),
            "`lookup` must be used with `strategy` adaptive or self-speculative or lookup or draft-and-verify, got",
        ),
        (
            lambda: DecodingSettings("lookup", 3).resolve(TRAINED, 8),
            "`exit_layer` must be used with `strategy` self-speculative or early-exit, got `strategy` lookup",
        ),
        (
            lambda: DecodingSettings("autoregressive", 3).resolve(TRAINED, 8),
            "`exit_layer` must be used with `strategy` self-speculative or early-exit, got `strategy` autoregressive",
        ),
        (lambda: DecodingSettings("adaptive", 3).resolve(TRAINED, 8), "`exit_layer` must be used with `strategy` self-spec"),
        (
            lambda: DecodingSettings("early-exit", 3, 5).resolve(TRAINED, 8),
            "`num_draft_tokens` must be used with `strategy` adaptive or .*, got `strategy` early-exit",
        ),
        (
            lambda: DecodingSettings("lookup", generation=GenerationSettings(draft_confidence=0.5)).resolve(TRAINED, 8),
            "`draft_confidence` must be used with `strategy` adaptive or self-speculative or draft-and-verify, got",
        ),
        (
            lambda: replace(_CONFIDENT, num_draft_tokens=3, exits=(2,)).resolve(TRAINED, 8),
            "`num_draft_tokens` must be left out with `exit_confidence`, which drafts nothing, got 3",
        ),
        (lambda: DecodingSettings(policy=""), "`policy` must be a name that is not empty"),
        (lambda: GenerationSettings(stop=("",)), "`stop` must be a text that is not empty"),
        (lambda: GenerationSettings(draft_confidence=1.0), r"`draft_confidence` must be in \[0, 1\), got 1.0"),
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
        (lambda: RecipeSettings(p_max=1.0), r"`p_max` must be in \[0, 1\), got 1.0"),
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
