"""A training run and its recipe."""

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from msgspec import Meta

from .checks import require
from .data import DataConfig
from .machine import DType
from .options import (
    ADAPTERS,
    DATA,
    EXIT_BLOCKS,
    MACHINE,
    MODEL,
    OPTIMISATION,
    RECIPE,
    RETENTION,
    RUN,
    Flag,
    Seed,
    Text,
    parse_counts,
)
from .prompting import PromptingConfig

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
class RecipeSettings:
    """What is asked of the LayerSkip recipe (Elhoushi et al., ACL 2024, section 4.1). None: the regime's preset decides.

    `dropout_profile`: how the dropout rate grows with depth; the mean rate over the layers is the same for each profile.
    `exit_weights`: how the exits' losses are weighted by depth; the paper's weights give early exits very little.
    `exits`: the n exit layers (counts, 1..L-1) that the curriculum chooses among; empty is all L, as in the paper. `rotation`
    is R of the rotational curriculum; None picks n/3 (at least 1) up to a vocabulary of 8k and n-1 above it, where every
    extra exit costs a head. `distill` is the share of KL(last layer || exit) in an early exit's loss; the rest is
    cross-entropy.
    """

    p_max: Annotated[
        Annotated[float, Meta(ge=0, lt=1)] | None, Flag(RECIPE, "Dropout rate of the last layer.", "--pmax", "by --regime")
    ] = None
    dropout_profile: Annotated[
        DropoutProfile | None,
        Flag(
            RECIPE,
            "Dropout over depth: exponential, up to --pmax at the last layer, or constant, the same mean at every layer.",
            default="exponential",
        ),
    ] = None
    e_scale: Annotated[
        Annotated[float, Meta(ge=0, le=1_000_000)] | None,
        Flag(RECIPE, "Scale of the early exits' loss.", "--escale", "by --regime"),
    ] = None
    exit_weights: Annotated[
        ExitWeights | None, Flag(RECIPE, "Weights of the exits' losses: paper, linear, sqrt or uniform.", default="paper")
    ] = None
    curriculum: Annotated[Curriculum | None, Flag(RECIPE, "rotational, gradual, all or none.", default="by --regime")] = None
    rotation: Annotated[
        Annotated[int, Meta(ge=1, le=10_000)] | None,
        Flag(RECIPE, "R of the rotational curriculum: each exit is trained every R steps.", default="by --regime"),
    ] = None
    exits: Annotated[
        tuple[int, ...] | None,
        Flag(
            RECIPE,
            "Exits to train: 3,6,8 or A:B:STEP.",
            default="every layer; with --frozen a third of the layers",
            parse=parse_counts,
        ),
    ] = None
    distill: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Flag(RECIPE, "Share of KL divergence from the last layer in the exits' loss, 0 to 1.", default="0"),
    ] = None

    def __post_init__(self) -> None:
        rotates = self.curriculum in (None, "rotational")  # that of every preset
        require(rotates or self.rotation is None, "rotation", "used with `curriculum` rotational", self.curriculum)


@dataclass(frozen=True)
class RetentionSettings:
    """What holds the trained model to the original, the model as it came.

    `anchor` is the weight of KL(original || trained model) at full depth, on the tokens that the loss is taken of.
    `anchor_weights`: how the copy of the original is stored; None is bf16. LoRA needs no copy: its original is the model
    without the adapters.

    `replay` is the share of each step's rows that are text of the original's own, written before the training: up to
    `replay_tokens` each; None is the mean length of the data's rows.
    """

    anchor: Annotated[
        float,
        Meta(ge=0, le=1_000_000),
        Flag(RETENTION, "Weight of the KL divergence from the original model at full depth, on the same tokens; 0: none."),
    ] = 0.0
    anchor_weights: Annotated[
        AnchorWeights | None, Flag(RETENTION, "Weights of the copy of the original: bf16, or int8 on a CPU.", default="bf16")
    ] = None
    replay: Annotated[
        float,
        Meta(ge=0, lt=1),
        Flag(RETENTION, "Share of the rows that are the original's own text, sampled before the training."),
    ] = 0.0
    replay_tokens: Annotated[
        Annotated[int, Meta(ge=1, le=10_000_000)] | None,
        Flag(RETENTION, "Tokens of such a text, after its beginning.", default="the mean row's"),
    ] = None

    def __post_init__(self) -> None:
        require(self.replay_tokens is None or self.replay > 0, "replay_tokens", "used with `replay`", self.replay_tokens)
        if self.anchor_weights is not None:
            require(self.anchor > 0, "anchor_weights", "used with `anchor`", self.anchor_weights)


@dataclass(frozen=True)
class ExitBlockSettings:
    """With `frozen` the model stays as it is, and blocks are trained at its exits (see model/exit_blocks.py).

    `answers`: who writes the texts that they are trained on, the model itself or the data; of the model's, at most
    `answer_tokens` each. `loss`: KL(full depth || exit), or their total variation, which is one minus the expected acceptance.
    None: not said, see training/frozen_model.py for the defaults.
    """

    frozen: Annotated[
        bool, Flag(EXIT_BLOCKS, "Leave the model as it is, and train a block at each of --exits that drafts for it.")
    ] = False
    feature: Annotated[
        Feature | None,
        Flag(
            EXIT_BLOCKS,
            "What a block reads besides the exit's state: none, or final, the model's output state for the token before.",
            default="none",
        ),
    ] = None
    answers: Annotated[
        Answers | None, Flag(EXIT_BLOCKS, "Who writes the answers to the prompts of --data: model or data.", default="model")
    ] = None
    answer_tokens: Annotated[
        Annotated[int, Meta(ge=1, le=10_000_000)] | None,
        Flag(EXIT_BLOCKS, "Maximum number of tokens in an answer of the model.", default="128"),
    ] = None
    answer_temperature: Annotated[
        Annotated[float, Meta(ge=0, le=1_000)] | None,
        Flag(EXIT_BLOCKS, "Temperature of these answers; 0 is greedy.", default="0"),
    ] = None
    loss: Annotated[
        BlockLoss | None, Flag(EXIT_BLOCKS, "kl (divergence) or tv (total variation) from the last layer.", default="kl")
    ] = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(self.frozen or not value, name, "used with `frozen`", value)
        if self.answers == "data":
            for name in ("answer_tokens", "answer_temperature"):
                require(getattr(self, name) is None, name, "left out with `answers` data", getattr(self, name))


@dataclass(frozen=True)
class FinetuneConfig:
    """One training run, as requested. None: the preset of the regime decides, or the data.

    `lora_layers`: which layers have adapters, all or those below the highest early exit that is trained. `fsdp`: weights,
    gradients and optimizer state are sharded over the processes that torchrun started (FSDP2).
    """

    model: Annotated[Text, Flag(MODEL, "embedded-base, a folder, a .gguf file or a hub id.")] = "embedded-base"
    data: DataConfig = field(default_factory=DataConfig)
    output: Annotated[Text, Flag(RUN, "Folder of the new checkpoint.")] = "layerskip-model"
    regime: Annotated[Regime, Flag(RECIPE, "Preset: finetune, continual, scratch or code.")] = "finetune"
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    retention: RetentionSettings = field(default_factory=RetentionSettings)
    exit_blocks: ExitBlockSettings = field(default_factory=ExitBlockSettings)
    lr: Annotated[
        Annotated[float, Meta(gt=0, le=100)] | None,
        Flag(OPTIMISATION, "Initial learning rate.", default="by --regime or --frozen, and model size"),
    ] = None
    steps: Annotated[
        Annotated[int, Meta(ge=1, le=1_000_000_000)] | None,
        Flag(OPTIMISATION, "Optimizer steps, with --frozen of each exit; overrides --epochs.", default="300 on `commands`"),
    ] = None
    epochs: Annotated[
        Annotated[float, Meta(gt=0, le=1_000_000)] | None,
        Flag(OPTIMISATION, "Passes over the data.", default="1; 2 with --frozen"),
    ] = None
    batch_size: Annotated[int, Meta(ge=1, le=65_536), Flag(OPTIMISATION, "Rows per forward pass.")] = 16
    accumulation: Annotated[int, Meta(ge=1, le=65_536), Flag(OPTIMISATION, "Forward passes per optimizer step.")] = 1
    max_length: Annotated[
        Annotated[int, Meta(ge=2, le=10_000_000)] | None, Flag(DATA, "Tokens per row, prompt included.", default="by --regime")
    ] = None
    warmup: Annotated[float, Meta(ge=0, lt=1), Flag(OPTIMISATION, "Share of the steps over which the learning rate rises.")] = (
        0.05
    )
    weight_decay: Annotated[float, Meta(ge=0, le=1_000), Flag(OPTIMISATION, "AdamW's weight decay.")] = 0.01
    seed: Annotated[Seed, Flag(RUN, "Seed of data, order, dropout and fresh weights.")] = 0
    dtype: Annotated[DType, Flag(MACHINE, "auto, fp32 or bf16.")] = "auto"
    device: Annotated[str, Flag(MACHINE, "auto, cpu, cuda, cuda:N or mps.")] = "auto"
    lora_rank: Annotated[int, Meta(ge=0, le=16_384), Flag(ADAPTERS, "Rank of LoRA adapters; 0 trains all weights.")] = 0
    lora_targets: Annotated[str, Flag(ADAPTERS, "Modules with adapters: all-linear, or names with commas.")] = "all-linear"
    lora_layers: Annotated[
        LoraLayers, Flag(ADAPTERS, "Layers with adapters: all, or below-exit, those that the highest of --exits runs.")
    ] = "all"
    lora_keep: Annotated[bool, Flag(ADAPTERS, "Save the adapter alone, not merged; it loads as a model.")] = False
    gradient_checkpointing: Annotated[
        bool, Flag(OPTIMISATION, "Recompute layers in the backward pass: less memory, more time.")
    ] = False
    fsdp: Annotated[bool, Flag(MACHINE, "Shard weights, gradients and optimizer over the processes of torchrun (FSDP2).")] = (
        False
    )
    save_steps: Annotated[int, Meta(ge=0, le=1_000_000_000), Flag(RUN, "Steps between checkpoints; 0: none.")] = 0
    resume: Annotated[bool, Flag(RUN, "Continue from the last checkpoint in --output.")] = False
    report_to: Annotated[str, Flag(RUN, "Also log losses to tensorboard, wandb, ...; several with commas.")] = ""
    streaming: Annotated[bool, Flag(DATA, "Read a file or hub data set while training; needs --steps.")] = False
    pack: Annotated[
        bool | None, Flag(DATA, "Pack plain text into full rows.", default="yes, except with --regime finetune")
    ] = None
    validation: Annotated[Text | None, Flag(DATA, "A split of --data, or other data, to measure every exit on.")] = None
    validation_samples: Annotated[
        Annotated[int, Meta(ge=0, le=10_000_000)] | None, Flag(DATA, "Rows of it to use; 0: all.", default="256")
    ] = None
    eval_steps: Annotated[
        int, Meta(ge=0, le=1_000_000_000), Flag(DATA, "Steps between validations; 0: ten validations per run.")
    ] = 0
    overwrite: Annotated[bool, Flag(RUN, "Replace a model in --output.")] = False
    prompting: PromptingConfig = field(default_factory=PromptingConfig)
    vocab_size: Annotated[
        Annotated[int, Meta(ge=260, le=10_000_000)] | None,
        Flag(DATA, "With --regime scratch: train a BPE tokenizer of this size on the data."),
    ] = None

    def __post_init__(self) -> None:
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
