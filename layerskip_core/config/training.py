"""A training run and its recipe."""

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from .checks import require, require_choice, require_given
from .data import DataConfig
from .machine import DTYPES, DType
from .prompting import PromptingConfig
from .ranges import require_ranges

Curriculum = Literal["rotational", "gradual", "all", "none"]
ExitWeights = Literal["paper", "linear", "sqrt", "uniform"]
DropoutProfile = Literal["exponential", "constant"]
Regime = Literal["finetune", "continual", "scratch", "code"]
Feature = Literal["none", "final"]  # what an exit block reads besides the exit's state, see model/exit_blocks.py
Answers = Literal["model", "data"]
BlockLoss = Literal["kl", "tv"]
AnchorWeights = Literal["bf16", "int8"]
LoraLayers = Literal["all", "below-exit"]
CURRICULA: tuple[str, ...] = get_args(Curriculum)
EXIT_WEIGHTS: tuple[str, ...] = get_args(ExitWeights)
DROPOUT_PROFILES: tuple[str, ...] = get_args(DropoutProfile)
REGIMES: tuple[str, ...] = get_args(Regime)
FEATURES: tuple[str, ...] = get_args(Feature)
ANSWERS: tuple[str, ...] = get_args(Answers)
BLOCK_LOSSES: tuple[str, ...] = get_args(BlockLoss)
ANCHOR_WEIGHTS: tuple[str, ...] = get_args(AnchorWeights)
LORA_LAYERS: tuple[str, ...] = get_args(LoraLayers)


@dataclass(frozen=True)
class RecipeConfig:
    """The LayerSkip recipe (Elhoushi et al., ACL 2024, section 4.1).

    `dropout_profile`: how the dropout rate grows with depth; the mean rate over the layers is the same for each profile.
    `exit_weights`: how the exits' losses are weighted by depth; the paper's weights give early exits very little.
    `exits`: the n exit layers (counts, 1..L-1) that the curriculum chooses among; empty is all L, as in the paper. `rotation`
    is R of the rotational curriculum; None picks n/3 (at least 1) up to a vocabulary of 8k and n-1 above it, where every
    extra exit costs a head. `distill` is the share of KL(last layer || exit) in an early exit's loss; the rest is
    cross-entropy.
    """

    p_max: float = 0.2
    dropout_profile: DropoutProfile = "exponential"
    e_scale: float = 1.0
    exit_weights: ExitWeights = "paper"
    curriculum: Curriculum = "rotational"
    rotation: int | None = None
    exits: tuple[int, ...] = ()
    distill: float = 0.0

    def __post_init__(self) -> None:
        require_ranges(distill=self.distill, p_max=self.p_max, e_scale=self.e_scale, rotation=self.rotation)
        require_choice(self.dropout_profile, "dropout_profile", DROPOUT_PROFILES)
        require_choice(self.exit_weights, "exit_weights", EXIT_WEIGHTS)
        require_choice(self.curriculum, "curriculum", CURRICULA)


@dataclass(frozen=True)
class RecipeSettings:
    """What is asked of the recipe; the fields are those of RecipeConfig. None: the regime's preset decides."""

    p_max: float | None = None
    dropout_profile: DropoutProfile | None = None
    e_scale: float | None = None
    exit_weights: ExitWeights | None = None
    curriculum: Curriculum | None = None
    rotation: int | None = None
    exits: tuple[int, ...] | None = None
    distill: float | None = None

    def __post_init__(self) -> None:
        self.over(RecipeConfig())  # raises now what would otherwise be raised after the model is loaded
        rotates = self.curriculum in (None, "rotational")  # that of every preset
        require(rotates or self.rotation is None, "rotation", "used with `curriculum` rotational", self.curriculum)

    def over(self, preset: RecipeConfig) -> RecipeConfig:
        """The preset with what was asked in its place."""
        return replace(preset, **{name: value for name, value in vars(self).items() if value is not None})


@dataclass(frozen=True)
class RetentionSettings:
    """What holds the trained model to the original, the model as it came.

    `anchor` is the weight of KL(original || trained model) at full depth, on the tokens that the loss is taken of.
    `anchor_weights`: how the copy of the original is stored; None is bf16. LoRA needs no copy: its original is the model
    without the adapters.

    `replay` is the share of each step's rows that are text of the original's own, written before the training: up to
    `replay_tokens` each; None is the mean length of the data's rows.
    """

    anchor: float = 0.0
    anchor_weights: AnchorWeights | None = None
    replay: float = 0.0
    replay_tokens: int | None = None

    def __post_init__(self) -> None:
        require_ranges(anchor=self.anchor, replay=self.replay, replay_tokens=self.replay_tokens)
        require(self.replay_tokens is None or self.replay > 0, "replay_tokens", "used with `replay`", self.replay_tokens)
        if self.anchor_weights is not None:
            require_choice(self.anchor_weights, "anchor_weights", ANCHOR_WEIGHTS)
            require(self.anchor > 0, "anchor_weights", "used with `anchor`", self.anchor_weights)


@dataclass(frozen=True)
class ExitBlockSettings:
    """With `frozen` the model stays as it is, and blocks are trained at its exits (see model/exit_blocks.py).

    `answers`: who writes the texts that they are trained on, the model itself or the data; of the model's, at most
    `answer_tokens` each. `loss`: KL(full depth || exit), or their total variation, which is one minus the expected acceptance.
    None: not said, see training/frozen_model.py for the defaults.
    """

    frozen: bool = False
    feature: Feature | None = None
    answers: Answers | None = None
    answer_tokens: int | None = None
    answer_temperature: float | None = None
    loss: BlockLoss | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(self.frozen or not value, name, "used with `frozen`", value)
        require_ranges(answer_tokens=self.answer_tokens, answer_temperature=self.answer_temperature)
        choices: dict[str, tuple[str | None, tuple[str, ...]]] = {
            "feature": (self.feature, FEATURES),
            "answers": (self.answers, ANSWERS),
            "loss": (self.loss, BLOCK_LOSSES),
        }
        for name, (value, known) in choices.items():
            if value is not None:
                require_choice(value, name, known)
        if self.answers == "data":
            for name in ("answer_tokens", "answer_temperature"):
                require(getattr(self, name) is None, name, "left out with `answers` data", getattr(self, name))


@dataclass(frozen=True)
class FinetuneConfig:
    """One training run, as requested. None: the preset of the regime decides, or the data.

    `lora_layers`: which layers have adapters, all or those below the highest early exit that is trained. `fsdp`: weights,
    gradients and optimizer state are sharded over the processes that torchrun started (FSDP2).
    """

    model: str = "embedded-base"
    data: DataConfig = field(default_factory=DataConfig)
    output: str = "layerskip-model"
    regime: Regime = "finetune"
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    retention: RetentionSettings = field(default_factory=RetentionSettings)
    exit_blocks: ExitBlockSettings = field(default_factory=ExitBlockSettings)
    lr: float | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    accumulation: int = 1
    max_length: int | None = None
    warmup: float = 0.05
    weight_decay: float = 0.01
    seed: int = 0
    dtype: DType = "auto"
    device: str = "auto"
    lora_rank: int = 0
    lora_targets: str = "all-linear"
    lora_layers: LoraLayers = "all"
    lora_keep: bool = False
    gradient_checkpointing: bool = False
    fsdp: bool = False
    save_steps: int = 0
    resume: bool = False
    report_to: str = ""
    streaming: bool = False
    pack: bool | None = None
    validation: str | None = None
    validation_samples: int | None = None
    eval_steps: int = 0
    overwrite: bool = False
    prompting: PromptingConfig = field(default_factory=PromptingConfig)
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        for setting, name in (("model", self.model), ("output", self.output), ("validation", self.validation)):
            require_given(setting, name)
        require_choice(self.regime, "regime", REGIMES)
        require_choice(self.dtype, "dtype", DTYPES)
        require_ranges(
            lr=self.lr, steps=self.steps, epochs=self.epochs, batch_size=self.batch_size, accumulation=self.accumulation,
            max_length=self.max_length, warmup=self.warmup, weight_decay=self.weight_decay, lora_rank=self.lora_rank,
            validation_samples=self.validation_samples, eval_steps=self.eval_steps, save_steps=self.save_steps, seed=self.seed,
            vocab_size=self.vocab_size,
        )  # fmt: skip
        validates = self.validation is not None or self.exit_blocks.frozen  # which holds rows out
        require(not self.eval_steps or validates, "eval_steps", "used with `validation`", "none")
        sampled = self.validation_samples is not None
        require(not sampled or self.validation is not None, "validation_samples", "used with `validation`", "none")
        endless = self.data.name == "commands" and not self.data.limit and self.steps is None
        require(not endless or self.epochs is None, "epochs", "used with `limit` for `commands`, which has no end", self.epochs)
        if self.streaming:
            require(self.steps is not None, "steps", "given with `streaming`, whose rows cannot be counted", "none")
            require(not self.data.limit, "limit", "0 with `streaming`", self.data.limit)
            require(self.vocab_size is None, "vocab_size", "left out with `streaming`", self.vocab_size)
            require(not self.retention.replay, "replay", "left out with `streaming`", self.retention.replay)
        require(bool(self.lora_targets.strip(", ")), "lora_targets", "all-linear or names of modules", "none")
        require_choice(self.lora_layers, "lora_layers", LORA_LAYERS)
        usual = {"lora_targets": "all-linear", "lora_layers": "all", "lora_keep": False}
        for name, value in usual.items():
            require(getattr(self, name) == value or self.lora_rank > 0, name, "used with `lora_rank`", "no rank")
        require(self.vocab_size is None or self.regime == "scratch", "vocab_size", "used with `regime` scratch", self.regime)
        copy = self.retention.anchor_weights
        require(copy is None or not self.lora_rank, "anchor_weights", "left out with `lora_rank`, which needs no copy", copy)
        if self.regime == "scratch":
            for name, value in vars(self.retention).items():
                require(not value, name, "left out with `regime` scratch, which has no original", value)
        if self.exit_blocks.frozen:
            self._require_frozen()

    def _require_frozen(self) -> None:
        """Raises ConfigError for a setting that only the recipe has."""
        recipe = {name: value for name, value in vars(self.recipe).items() if name != "exits" and value is not None}
        others = {
            "lora_rank": self.lora_rank,
            "gradient_checkpointing": self.gradient_checkpointing,
            "streaming": self.streaming,
            "pack": self.pack,
            "vocab_size": self.vocab_size,
            "fsdp": self.fsdp,
        }
        require(self.regime == "finetune", "regime", "left out with `frozen`, which trains no weight of the model", self.regime)
        for name, value in (recipe | vars(self.retention) | others).items():
            require(not value, name, "left out with `frozen`, which trains no weight of the model", value)
