"""A training run and its recipe."""

import os
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from msgspec import Meta

from ..errors import require
from .model import DataConfig, DType, PromptingConfig
from .options import BatchSize, Count, CountOrNone, Flag, Fraction, Layer, Seed, Steps, Temperature, Text

Curriculum = Literal["rotational", "gradual", "all", "none"]
ExitWeights = Literal["paper", "linear", "sqrt", "uniform"]
DropoutProfile = Literal["exponential", "constant"]
Regime = Literal["finetune", "continual", "scratch", "code"]
Feature = Literal["none", "final"]  # what an exit block reads besides the exit's state, see model/exit_blocks.py
Answers = Literal["model", "data"]
BlockLoss = Literal["kl", "tv", "acceptance"]
BlockLayout = Literal["exit", "eagle3"]
AnchorWeights = Literal["bf16", "int8"]
LoraLayers = Literal["all", "below-exit"]
_Weight = Annotated[float, Meta(ge=0, le=1_000_000)]
_DRAFTER_ROWS, _DRAFTER_BATCH = 2_000, 8  # of a drafter's run after a task's


@dataclass(frozen=True)
class RecipeSettings:
    """What is asked of the LayerSkip recipe (Elhoushi et al., ACL 2024, section 4.1). None: the regime's preset decides.

    `exit_weights`: the paper's weights give early exits very little. `exits`: the n exit layers (counts, 1..L-1) that the
    curriculum chooses among; empty is all L, as in the paper. `rotation`: None picks n/3 (at least 1) up to a vocabulary of 8k
    and n-1 above it, where every extra exit costs a head. The rest of the loss beside `distill` is cross-entropy.
    """

    p_max: Annotated[
        Fraction | None, Flag("Dropout rate of the last layer.", "--pmax/--p-max", "by --regime", panel="Recipe")
    ] = None
    dropout_profile: Annotated[
        DropoutProfile | None,
        Flag(
            "Dropout over depth: exponential, up to --pmax at the last layer, or constant, the same mean at every layer.",
            default="exponential",
        ),
    ] = None
    e_scale: Annotated[_Weight | None, Flag("Scale of the early exits' loss.", "--escale/--e-scale", "by --regime")] = None
    exit_weights: Annotated[ExitWeights | None, Flag("Weights of the exits' losses.", default="paper")] = None
    curriculum: Annotated[Curriculum | None, Flag("Which exits a step trains.", default="by --regime")] = None
    rotation: Annotated[
        Annotated[int, Meta(ge=1, le=10_000)] | None,
        Flag("R of the rotational curriculum: each exit is trained every R steps.", default="by --regime"),
    ] = None
    exits: Annotated[
        tuple[Layer, ...] | None,
        Flag("Exits to train: 3,6,8 or A:B:STEP.", default="every layer; with --frozen a third of the layers"),
    ] = None
    distill: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Flag("Share of KL divergence from the last layer in the exits' loss, 0 to 1.", default="0"),
    ] = None

    def __post_init__(self) -> None:
        rotates = self.curriculum in (None, "rotational")  # that of every preset
        require(rotates or self.rotation is None, "rotation", "used with `curriculum` rotational", self.curriculum)


@dataclass(frozen=True)
class RetentionSettings:
    """What holds the trained model to the original, the model as it came.

    `anchor` is the weight of KL(original || trained model). LoRA needs no copy of the original: it is the model without the
    adapters. `replay`: of the rows of each step.
    """

    anchor: Annotated[
        _Weight,
        Flag(
            "Weight of the KL divergence from the original model at full depth, on the same tokens; 0: none.", panel="Retention"
        ),
    ] = 0.0
    anchor_weights: Annotated[
        AnchorWeights | None, Flag("Weights of the copy of the original: bf16, or int8 on a CPU.", default="bf16")
    ] = None
    replay: Annotated[Fraction, Flag("Share of the rows that are the original's own text, sampled before the training.")] = 0.0
    replay_tokens: Annotated[Count | None, Flag("Tokens of such a text, after its beginning.", default="the mean row's")] = None

    def __post_init__(self) -> None:
        require(self.replay_tokens is None or self.replay > 0, "replay_tokens", "used with `replay`", self.replay_tokens)
        if self.anchor_weights is not None:
            require(self.anchor > 0, "anchor_weights", "used with `anchor`", self.anchor_weights)


@dataclass(frozen=True)
class ExitBlockSettings:
    """With `frozen` the model stays as it is, and blocks are trained at its exits (see model/exit_blocks.py), or a drafter that
    other engines read (see model/eagle3.py).

    `loss`: KL(full depth || exit); their total variation, which is one minus the expected acceptance; or, for the layout
    eagle3, the negative logarithm of the expected acceptance.
    """

    frozen: Annotated[
        bool, Flag("Leave the model as it is, and train a block at each of --exits that drafts for it.", panel="Exit blocks")
    ] = False
    layout: Annotated[
        BlockLayout | None,
        Flag(
            "exit: a block at each of --exits; eagle3: one drafter that vLLM, SGLang and llama.cpp read too.",
            default="that of the other flags, else eagle3 where these engines run the model, else exit",
        ),
    ] = None
    layers: Annotated[
        tuple[Layer, ...] | None,
        Flag("Layers after which a drafter of the layout eagle3 reads states.", default="2, a half of all, and all but 3"),
    ] = None
    draft_vocab: Annotated[Count, Flag("Tokens that a drafter of the layout eagle3 scores, the most frequent ones.")] = 8192
    start_from: Annotated[Text | None, Flag("Drafter of the layout eagle3 to go on from: its folder.")] = None
    feature: Annotated[
        Feature,
        Flag("What a block reads besides the exit's state: none, or final, the model's output state for the token before."),
    ] = "none"
    answers: Annotated[
        Answers | None,
        Flag("Who writes the answers to the prompts of --data.", default="model, if it has prompts"),
    ] = None
    answer_tokens: Annotated[Count, Flag("Maximum number of tokens in an answer of the model.")] = 128
    answer_temperature: Annotated[Temperature, Flag("Temperature of these answers; 0 is greedy.")] = 0.0
    loss: Annotated[
        BlockLoss, Flag("kl (divergence) or tv (total variation) from the last layer, or acceptance (its negative logarithm).")
    ] = "kl"

    def __post_init__(self) -> None:
        at_exits = self.layout == "exit" or (self.layout is None and self.feature != "none")
        for name, value in vars(self).items():
            usual = value == getattr(type(self), name)
            require(self.frozen or usual, name, "used with `frozen`", value)
            if name in ("layers", "draft_vocab", "start_from"):
                require(not at_exits or usual, name, "used with `layout` eagle3", value)
            if self.answers == "data" and name in ("answer_tokens", "answer_temperature"):
                require(usual, name, "left out with `answers` data", value)
        require(self.layout != "eagle3" or self.feature == "none", "feature", "left out with `layout` eagle3", self.feature)
        require(not at_exits or self.loss != "acceptance", "loss", "kl or tv without `layout` eagle3", self.loss)


@dataclass(frozen=True)
class FinetuneConfig:
    """One training run, as requested. None: the preset of the regime decides, or the data.

    Exits of the model are trained if anything of the recipe is given, or a regime. Else it is trained at full depth alone.
    Without a regime a second run (`drafter`) trains what drafts for the result, unless it is `frozen` from the beginning.
    """

    model: Annotated[Text, Flag("embedded-base, a folder, a .gguf file or a hub id.", panel="Model", reads="model")] = (
        "embedded-base"
    )
    data: DataConfig = field(default_factory=DataConfig)
    regime: Annotated[
        Regime | None,
        Flag(
            "Preset of the recipe.",
            default="finetune with a flag of the recipe, then a block at its exits; without any the task alone, then a drafter",
            panel="Recipe",
        ),
    ] = None
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    retention: RetentionSettings = field(default_factory=RetentionSettings)
    exit_blocks: ExitBlockSettings = field(default_factory=ExitBlockSettings)
    prompting: PromptingConfig = field(default_factory=PromptingConfig)
    lr: Annotated[
        Annotated[float, Meta(gt=0, le=100)] | None,
        Flag("Initial learning rate.", "--lr/--learning-rate", "by --regime or --frozen, and model size", panel="Optimisation"),
    ] = None
    steps: Annotated[
        Annotated[int, Meta(ge=1, le=1_000_000_000)] | None,
        Flag("Optimizer steps, with --frozen of each exit; overrides --epochs.", default="300 on `commands`"),
    ] = None
    epochs: Annotated[
        Annotated[float, Meta(gt=0, le=1_000_000)] | None, Flag("Passes over the data.", default="1; 2 with --frozen")
    ] = None
    batch_size: Annotated[BatchSize, Flag("Rows per forward pass.")] = 16
    accumulation: Annotated[BatchSize, Flag("Forward passes per optimizer step.")] = 1
    warmup: Annotated[Fraction, Flag("Share of the steps over which the learning rate rises.")] = 0.05
    weight_decay: Annotated[float, Meta(ge=0, le=1_000), Flag("The optimizer's weight decay.")] = 0.01
    gradient_checkpointing: Annotated[bool, Flag("Recompute layers in the backward pass: less memory, more time.")] = False
    max_length: Annotated[
        Annotated[int, Meta(ge=2, le=10_000_000)] | None,
        Flag("Tokens per row, prompt included.", default="by --regime", panel="Data"),
    ] = None
    streaming: Annotated[bool, Flag("Read a file or hub data set while training; needs --steps.")] = False
    pack: Annotated[bool | None, Flag("Pack plain text into full rows.", default="yes, except with --regime finetune")] = None
    validation: Annotated[Text | None, Flag("A split of --data, or other data, to measure every exit on.")] = None
    validation_samples: Annotated[CountOrNone | None, Flag("Rows of it to use; 0: all.", default="256")] = None
    eval_steps: Annotated[Steps, Flag("Steps between validations; 0: ten validations per run.")] = 0
    vocab_size: Annotated[
        Annotated[int, Meta(ge=260, le=10_000_000)] | None,
        Flag("With --regime scratch: train a BPE tokenizer of this size on the data."),
    ] = None
    lora_rank: Annotated[int, Meta(ge=0, le=16_384), Flag("Rank of LoRA adapters; 0 trains all weights.", panel="Adapters")] = 0
    lora_targets: Annotated[str, Flag("Modules with adapters: all-linear, or names with commas.")] = "all-linear"
    lora_layers: Annotated[
        LoraLayers, Flag("Layers with adapters: all, or below-exit, those that the highest of --exits runs.")
    ] = "all"
    lora_keep: Annotated[bool, Flag("Save the adapter alone, not merged; it loads as a model.")] = False
    dtype: Annotated[DType, Flag("Precision of the steps' arithmetic; weights stay in fp32.", panel="Machine")] = "auto"
    device: Annotated[str, Flag("auto, cpu, cuda, cuda:N or mps.")] = "auto"
    fsdp: Annotated[bool, Flag("Shard weights, gradients and optimizer over the processes of torchrun (FSDP2).")] = False
    output: Annotated[Text, Flag("Folder of the new checkpoint.", panel="Run")] = "layerskip-model"
    seed: Annotated[Seed, Flag("Seed of data, order, dropout and fresh weights.")] = 0
    save_steps: Annotated[Steps, Flag("Steps between checkpoints; 0: none.")] = 0
    resume: Annotated[bool, Flag("Continue from the last checkpoint in --output.")] = False
    report_to: Annotated[str, Flag("Also log losses to tensorboard, wandb, ...; several with commas.")] = ""
    overwrite: Annotated[bool, Flag("Replace a model in --output.")] = False

    def __post_init__(self) -> None:
        given = vars(self.recipe) | vars(self.retention) | vars(self) | {"limit": self.data.limit}
        frozen, scratch, validates = self.exit_blocks.frozen, self.regime == "scratch", self.validation is not None
        whole = (
            "regime",
            "lora_rank",
            "gradient_checkpointing",
            "streaming",
            "pack",
            "vocab_size",
            "fsdp",
            *vars(self.retention),
        )
        recipe = [name for name in vars(self.recipe) if name != "exits"]
        for is_so, needed, names in (
            (not validates and not frozen, "used with `validation`", ["eval_steps"]),  # frozen holds rows out
            (not validates, "used with `validation`", ["validation_samples"]),
            (self.streaming, "left out with `streaming`", ["limit", "vocab_size", "replay"]),
            (not scratch, "used with `regime` scratch", ["vocab_size"]),
            (scratch, "left out with `regime` scratch, which has no original", [*vars(self.retention)]),
            (self.lora_rank > 0, "left out with `lora_rank`, which needs no copy", ["anchor_weights"]),
            (frozen, "left out with `frozen`, which trains no weight of the model", [*recipe, *whole]),
            (self.exit_blocks.layout == "eagle3", "left out with `layout` eagle3, which has `layers`", ["exits"]),
        ):
            for name in names if is_so else ():
                require(not given[name], name, needed, given[name])
        if frozen and self.recipe.exits:
            replace(self.exit_blocks, layout=self.exit_blocks.layout or "exit")  # what fits no block is refused
        counted = not self.streaming or self.steps is not None
        require(counted, "steps", "given with `streaming`, whose rows cannot be counted", "none")
        endless = self.data.is_endless and self.steps is None
        require(not endless or self.epochs is None, "epochs", "used with `limit` for `commands`, which has no end", self.epochs)
        require(bool(self.lora_targets.strip(", ")), "lora_targets", "all-linear or names of modules", "none")
        usual = {"lora_targets": "all-linear", "lora_layers": "all", "lora_keep": False}
        for name, value in usual.items():
            require(given[name] == value or self.lora_rank > 0, name, "used with `lora_rank`", "no rank")

    @property
    def trains_exits(self) -> bool:
        return self.regime is not None or self.recipe != RecipeSettings()

    @property
    def in_place(self) -> bool:
        """Whether the model that stays as it is gets its drafter in its own folder."""
        return self.exit_blocks.frozen and os.path.realpath(self.output) == os.path.realpath(self.model)

    @property
    def drafter(self) -> "FinetuneConfig | None":
        """The run that follows in the same folder, on some of the rows: after the recipe for a block at each of its `exits` (at
        a third of the layers if it names none), else for a drafter. None after a preset of the paper, whose exits share the
        head, or a control without exits; after a drafter, for an adapter alone, and for rows that are read as they come.
        """
        preset = self.regime is not None or self.recipe.curriculum == "none"
        if preset or self.exit_blocks.frozen or self.lora_keep or self.streaming:
            return None
        seen = self.steps and self.steps * self.batch_size * self.accumulation
        rows = min(limit for limit in (self.data.limit, seen, _DRAFTER_ROWS) if limit)
        return FinetuneConfig(
            model=self.output,
            data=replace(self.data, limit=rows),
            recipe=RecipeSettings(exits=self.recipe.exits),
            exit_blocks=ExitBlockSettings(frozen=True, layout="exit" if self.trains_exits else None),
            prompting=self.prompting,
            batch_size=_DRAFTER_BATCH,
            max_length=self.max_length,
            dtype=self.dtype,
            device=self.device,
            output=self.output,
            seed=self.seed,
            save_steps=self.save_steps,
            resume=self.resume,
            report_to=self.report_to,
        )
