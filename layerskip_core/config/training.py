"""Settings of the two trainings: of a model, with or without the recipe, and of a drafter for a
frozen model.
"""

import os
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from ..errors import ConfigError, require
from .model import DataConfig, DType, PromptingConfig
from .options import BatchSize, Count, CountOrNone, Flag, Fraction, Layer, Ratio, Seed, Steps, Text

Preset = Literal["auto", "finetune", "continual", "scratch", "code", "none"]
Curriculum = Literal["rotational", "gradual", "all", "none"]
ExitWeights = Literal["paper", "uniform"]
ExitReader = Literal["none", "block"]
DropoutProfile = Literal["exponential", "constant"]
DropoutSchedule = Literal["constant", "rising", "falling"]
Scheduler = Literal["cosine", "linear", "constant"]
AnswerSource = Literal["model", "data"]
BlockLayout = Literal["exit", "eagle3", "mtp"]
_Weight = Annotated[float, Meta(ge=0, le=1_000_000)]
_Rate = Annotated[float, Meta(gt=0, le=100)]
_Epochs = Annotated[float, Meta(gt=0, le=1_000_000)]
_RunSteps = Annotated[int, Meta(ge=1, le=1_000_000_000)]
_Length = Annotated[int, Meta(ge=2, le=10_000_000)]
_Rotation = Annotated[int, Meta(ge=1, le=10_000)]
_Vocabulary = Annotated[int, Meta(ge=260, le=10_000_000)]
_BY_PRESET = "by --recipe"
_REPLAY_HELP = "Share of a step's rows that the model itself wrote before the training, so that it keeps what it knew."
SHIPPED = "shipped"  # the drafter that the model's checkpoint has
_LAYOUT_OF_SETTING: dict[str, BlockLayout] = {
    "exits": "exit",
    "draft_vocab": "eagle3",
    "start_from": "eagle3",
}
# Arguments of transformers that a run decides, most of them by a flag of its own. Others could end
# it early, hide its checkpoints, change what its losses mean, or would have no effect.
_DECIDED = """
    max_steps num_train_epochs learning_rate warmup_steps per_device_train_batch_size
    gradient_accumulation_steps weight_decay seed data_seed
    output_dir save_strategy save_steps resume_from_checkpoint save_only_model save_on_each_node
    load_best_model_at_end push_to_hub hub_model_id report_to
    bf16 fp16 use_cpu bf16_full_eval fp16_full_eval gradient_checkpointing
    activation_checkpointing fsdp fsdp_config accelerator_config parallelism_config deepspeed
    local_rank average_tokens_across_devices auto_find_batch_size
    train_sampling_strategy ignore_data_skip dataloader_drop_last remove_unused_columns
    label_smoothing_factor do_train do_predict do_eval
    logging_strategy logging_steps logging_first_step logging_nan_inf_filter disable_tqdm
    eval_strategy eval_steps per_device_eval_batch_size eval_on_start eval_delay
    eval_accumulation_steps batch_eval_metrics
"""


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of both trainings. None: the model and the data decide."""

    model: Annotated[
        Text, Flag("A folder, .gguf file, hub id or embedded name.", panel="Model", reads="model")
    ] = "embedded-base"
    data: DataConfig = field(default_factory=DataConfig)
    prompting: PromptingConfig = field(default_factory=PromptingConfig)
    usual_epochs: ClassVar[float] = 1.0
    commands_steps: ClassVar[int] = 300  # about three minutes on two cores
    steps: Annotated[
        _RunSteps | None,
        Flag("Steps; overrides --epochs.", None, "300 on `commands`", "Optimisation"),
    ] = None
    epochs: Annotated[_Epochs | None, Flag("Passes over the data.", default="1")] = None
    batch_size: Annotated[BatchSize, Flag("Rows per forward pass.")] = 16
    accumulation: Annotated[BatchSize, Flag("Forward passes per optimizer step.")] = 1
    lr: Annotated[
        _Rate | None, Flag("Highest learning rate.", "--lr/--learning-rate", "by what is trained")
    ] = None
    scheduler: Annotated[Scheduler, Flag("How the learning rate falls after --warmup.")] = "cosine"
    warmup: Annotated[Fraction, Flag("Share of the steps over which the learning rate rises.")] = (
        0.05
    )
    weight_decay: Annotated[float, Meta(ge=0, le=1_000), Flag("The optimizer's weight decay.")] = (
        0.01
    )
    training_arguments: Annotated[
        dict[str, Any] | None, Flag("More TrainingArguments of transformers, a JSON object.")
    ] = None
    max_length: Annotated[
        _Length | None, Flag("Tokens per row.", None, "512; 2048 in recipes for plain text", "Data")
    ] = None
    validation: Annotated[
        Text | None, Flag("A split or other data.", None, "1 row in 20", reads="perhaps data")
    ] = None
    validation_samples: Annotated[
        CountOrNone | None, Flag("Rows of it to use; 0: all.", default="256")
    ] = None
    eval_steps: Annotated[
        Steps,
        Flag("Steps between validations; 0: ten per run with --validation, else one at the end."),
    ] = 0
    dtype: Annotated[
        DType, Flag("Precision of the steps' arithmetic; weights stay in fp32.", panel="Machine")
    ] = "auto"
    device: Annotated[str, Flag("auto, cpu, cuda, cuda:N or mps.")] = "auto"
    output: Annotated[Text, Flag("Folder of the new checkpoint.", panel="Run")] = "layerskip-model"
    seed: Annotated[Seed, Flag("Seed of data, order, dropout and fresh weights.")] = 0
    save_steps: Annotated[Steps, Flag("Steps between checkpoints; 0: none.")] = 0
    resume: Annotated[bool, Flag("Continue from the last checkpoint in --output.")] = False
    report_to: Annotated[
        str, Flag("Also log losses to tensorboard, wandb, ...; several with commas.")
    ] = ""
    overwrite: Annotated[bool, Flag("Replace a model in --output.")] = False

    def __post_init__(self) -> None:
        samples = self.validation_samples
        is_validated = self.validation is not None
        require(
            is_validated or samples is None, "validation_samples", "used with `validation`", samples
        )
        if self.data.is_endless and self.steps is None:
            needed = "used with `limit` for `commands`, which has no end"
            require(self.epochs is None, "epochs", needed, self.epochs)
        decided = [name for name in self.training_arguments or () if name in _DECIDED.split()]
        if decided:
            raise ConfigError(
                f"`training_arguments`: the run decides on {', '.join(decided)}, by a flag of its own or always",
                "training_arguments",
            )

    def _is_usual(self, name: str) -> bool:
        return bool(getattr(self, name) == getattr(type(self), name))


@dataclass(frozen=True)
class RecipeSettings:
    """Settings of the LayerSkip recipe (Elhoushi et al., ACL 2024, section 4.1). None: the preset
    decides.

    `exits`: the exit layers (counts, 1..L-1) that the curriculum chooses among. Share 1 - `distill`
    of a loss is cross-entropy.
    """

    preset: Annotated[
        Preset,
        Flag("auto: a few exits, each with a block; none: no exits.", "--recipe", panel="Recipe"),
    ] = "auto"
    p_max: Annotated[
        Fraction | None, Flag("Dropout rate of the last layer.", "--pmax/--p-max", _BY_PRESET)
    ] = None
    exits: Annotated[
        tuple[Layer, ...] | None, Flag("Exits to train: 3,6,8 or A:B:STEP.", None, _BY_PRESET)
    ] = None
    exit_reader: Annotated[
        ExitReader | None, Flag("Before the head: a block (a layer and a norm).", None, _BY_PRESET)
    ] = None
    dropout_schedule: Annotated[
        DropoutSchedule | None,
        Flag("Falling: to 0 in at most a third of the run.", None, _BY_PRESET),
    ] = None
    dropout_profile: Annotated[
        DropoutProfile | None, Flag("Constant: the same at every layer.", None, "exponential")
    ] = None
    e_scale: Annotated[
        _Weight | None, Flag("Scale of the early exits' loss.", "--escale/--e-scale", _BY_PRESET)
    ] = None
    exit_weights: Annotated[
        ExitWeights | None, Flag("Weights of the exits' losses.", default=_BY_PRESET)
    ] = None
    curriculum: Annotated[
        Curriculum | None, Flag("Which exits a step trains.", default=_BY_PRESET)
    ] = None
    rotation: Annotated[
        _Rotation | None, Flag("R: rotational trains each exit every R steps.", None, _BY_PRESET)
    ] = None
    distill: Annotated[
        Ratio | None, Flag("Share of KL from the last layer in the exits' loss.", None, _BY_PRESET)
    ] = None
    exit_gradient: Annotated[
        Ratio | None,
        Flag("Share of the exits' gradient that trains the layers below.", None, _BY_PRESET),
    ] = None
    exit_vocab: Annotated[
        CountOrNone | None,
        Flag(
            "Exits' losses score the N most frequent tokens and a sample; 0: all.", None, _BY_PRESET
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.preset == "none":
            needed = "left out with `preset` none, which has no exits and no dropout"
            for name, value in vars(self).items():
                require(name == "preset" or value is None, name, needed, value)
        usual = "all" if self.preset == "auto" else "rotational"
        curriculum = self.curriculum or usual
        if curriculum != "rotational":
            needed = "used with `curriculum` rotational"
            require(self.rotation is None, "rotation", needed, curriculum)


@dataclass(frozen=True)
class FinetuneConfig(TrainingSettings):
    """One training of a model, as requested."""

    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    gradient_checkpointing: Annotated[
        bool,
        Flag(
            "Recompute layers in the backward pass: less memory, more time.", panel="Optimisation"
        ),
    ] = False
    replay: Annotated[
        Fraction | None, Flag(_REPLAY_HELP, None, "0.25 with auto and none, from 50M parameters on")
    ] = None
    lora_rank: Annotated[
        int,
        Meta(ge=0, le=16_384),
        Flag("Rank of LoRA adapters; 0 trains all weights.", panel="Adapters"),
    ] = 0
    lora_alpha: Annotated[
        Count | None, Flag("Scale of the adapters, over the rank.", default="twice the rank")
    ] = None
    lora_dropout: Annotated[Fraction, Flag("Dropout before the adapters.")] = 0.0
    lora_targets: Annotated[
        str, Flag("Modules with adapters: all-linear, or names with commas.")
    ] = "all-linear"
    lora_keep: Annotated[bool, Flag("Save the adapter alone, not merged; it loads as a model.")] = (
        False
    )
    streaming: Annotated[
        bool, Flag("Read a file or hub data set while training; needs --steps.", panel="Data")
    ] = False
    vocab_size: Annotated[
        _Vocabulary | None, Flag("With --recipe scratch: train a BPE tokenizer of this size.")
    ] = None
    fsdp: Annotated[
        bool,
        Flag("Shard weights and optimizer over torchrun's processes (FSDP2).", panel="Machine"),
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming:
            for name, value in (
                ("limit", self.data.limit),
                ("vocab_size", self.vocab_size),
                ("replay", self.replay),
            ):
                require(not value, name, "left out with `streaming`", value)
            needed = "given with `streaming`, whose rows cannot be counted"
            require(self.steps is not None, "steps", needed, "none")
        if self.fsdp:
            needed = "0 with `fsdp`, which shards the head"
            require(not self.recipe.exit_vocab, "exit_vocab", needed, self.recipe.exit_vocab)
        if self.recipe.preset == "scratch":
            needed = "left out with `preset` scratch, which has no original"
            require(not self.replay, "replay", needed, self.replay)
        else:
            needed = "used with `preset` scratch"
            require(self.vocab_size is None, "vocab_size", needed, self.vocab_size)
        if self.lora_rank == 0:
            for name in ("lora_alpha", "lora_dropout", "lora_targets", "lora_keep"):
                require(self._is_usual(name), name, "used with `lora_rank`", "no rank")
        if self.lora_keep:
            reader = self.recipe.exit_reader
            needed = "none with `lora_keep`: exit blocks stand beside whole weights"
            require(reader in (None, "none"), "exit_reader", needed, reader)


@dataclass(frozen=True)
class DrafterConfig(TrainingSettings):
    """One training of exit blocks or a drafter (model/exit_blocks.py, model/eagle3.py) for a frozen
    model.
    """

    layout: Annotated[
        BlockLayout | None,
        Flag("eagle3: also for vLLM; mtp: Qwen3.5's.", None, "by --exits", "Drafter"),
    ] = None
    exits: Annotated[
        tuple[Layer, ...] | None,
        Flag("Exits with a block: 3,6,8 or A:B:STEP.", None, "a third of depth"),
    ] = None
    draft_vocab: Annotated[
        Count, Flag("Tokens that a drafter of the layout eagle3 scores, the most frequent ones.")
    ] = 8192
    start_from: Annotated[
        Text | None, Flag("Drafter to go on from: a folder of the layout eagle3, or `shipped`.")
    ] = None
    answers: Annotated[
        AnswerSource | None,
        Flag("Who writes answers to prompts.", None, "model, if --data has prompts"),
    ] = None
    answer_tokens: Annotated[Count, Flag("Maximum number of tokens in an answer of the model.")] = (
        128
    )
    steps: Annotated[
        _RunSteps | None,
        Flag("Steps; overrides --epochs.", None, "600 on `commands`", "Optimisation"),
    ] = None
    epochs: Annotated[_Epochs | None, Flag("Passes over the data.", default="2")] = None
    usual_epochs: ClassVar[float] = 2.0
    commands_steps: ClassVar[int] = 600
    # What only FinetuneConfig has as settings; the code of both runs reads them
    streaming: ClassVar[bool] = False
    fsdp: ClassVar[bool] = False
    replay: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, layout in self._given_for_one_layout.items():
            needed = f"used with `layout` {layout}"
            require(layout == self.implied_layout, name, needed, getattr(self, name))
        if self.answers == "data":
            needed = "left out with `answers` data"
            require(self._is_usual("answer_tokens"), "answer_tokens", needed, self.answer_tokens)

    @property
    def implied_layout(self) -> BlockLayout | None:
        """The requested layout, or the one that other settings belong to."""
        return self.layout or next(iter(self._given_for_one_layout.values()), None)

    @property
    def _given_for_one_layout(self) -> dict[str, BlockLayout]:
        """The given settings that only one layout has, with that layout."""
        layouts = dict(_LAYOUT_OF_SETTING)
        if self.start_from == SHIPPED:
            layouts["start_from"] = "mtp"
        return {name: layout for name, layout in layouts.items() if not self._is_usual(name)}

    @property
    def in_place(self) -> bool:
        """Whether the drafter is written into the model's own folder."""
        is_same = os.path.realpath(self.output) == os.path.realpath(self.model)
        return is_same and os.path.isdir(self.model)


TrainingConfig = FinetuneConfig | DrafterConfig
