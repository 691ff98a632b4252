"""Settings of every command, validated where they are made. Standard library only, so that `--help` stays fast."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .errors import ConfigError
from .ranges import require_ranges, shown

Strategy = Literal["self-speculative", "early-exit", "autoregressive"]
Curriculum = Literal["rotational", "gradual", "all", "none"]
ExitWeights = Literal["paper", "linear", "sqrt", "uniform"]
Regime = Literal["finetune", "continual", "scratch", "code"]
DType = Literal["auto", "fp32", "bf16"]
Quantization = Literal["int8", "int4"]

STRATEGIES: tuple[str, ...] = get_args(Strategy)
CURRICULA: tuple[str, ...] = get_args(Curriculum)
EXIT_WEIGHTS: tuple[str, ...] = get_args(ExitWeights)
REGIMES: tuple[str, ...] = get_args(Regime)
DTYPES: tuple[str, ...] = get_args(DType)
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
METRICS = ("exact_match", "rouge1", "rouge2", "rougeL")
BASELINES = ("transformers", "assistant-early-exit", "prompt-lookup", "draft-model", "no-reuse")


def require(condition: bool, flag: str, needed: str, found: object) -> None:
    """Raises ConfigError `flag must be needed, got found` unless the condition holds."""
    if not condition:
        raise ConfigError(f"{flag} must be {needed}, got {shown(found)}")


def require_choice(value: str, flag: str, choices: tuple[str, ...]) -> None:
    require(value in choices, flag, f"one of {', '.join(choices)}", value)


def require_unicode(flag: str, text: str | None) -> None:
    """Raises ConfigError for halves of surrogate pairs, which stand for an argument's bytes that are no UTF-8."""
    whole = text is None or text.encode("utf-8", "replace").decode() == text
    require(whole, flag, "valid Unicode", ascii(text))


def require_given(flag: str, name: str | None) -> None:
    """Raises ConfigError for an empty name, which would stand for the current folder; None, which is none given, passes."""
    require(name != "", flag, "a name that is not empty", "an empty one")


def require_exit_layer(exit_layer: int, num_layers: int, strategy: str = "self-speculative", flag: str = "--exit") -> None:
    """An early exit may stand at any layer 1..L; a draft needs layers left to verify it, so 1..L-1."""
    last = num_layers if strategy == "early-exit" else num_layers - 1
    if not 1 <= exit_layer <= last:
        raise ConfigError(f"{flag} must be in 1..{last}, got {exit_layer} (model has {num_layers} layers)")


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is chosen from logits. Temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_ranges(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)


@dataclass(frozen=True)
class DecodingConfig:
    """One way of decoding. `exit_layer` is a count of layers, 1..L; `num_draft_tokens` is the draft length of a round.

    `draft_confidence`: a round stops drafting where the draft's most probable token has less than this probability (0: never).
    """

    strategy: Strategy = "self-speculative"
    exit_layer: int | None = None
    num_draft_tokens: int = 6
    max_new_tokens: int = 256
    draft_confidence: float = 0.0
    stop: tuple[str, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        require_choice(self.strategy, "--strategy", STRATEGIES)
        if self.strategy != "autoregressive":
            require(self.exit_layer is not None, "--exit", f"given for --strategy {self.strategy}", "none")
        require_ranges(spec=self.num_draft_tokens, max_new_tokens=self.max_new_tokens, draft_confidence=self.draft_confidence)
        require(all(self.stop), "--stop", "a text that is not empty", "an empty one")
        for text in self.stop:
            require_unicode("--stop", text)


EXACT_TOKENS = 64  # an exact call has no more; longer ones are prompts, which every way of decoding runs alike


@dataclass(frozen=True)
class PackingConfig:
    """How the weights of a model that only decodes are stored; the embedding keeps its precision.

    `quantize`: low-bit linear layers and head. `draft_weights`: a low-bit copy of the head and of the first `draft_layers` (0:
    all but the last), used to draft only; without it `draft_layers` means nothing. `draft_vocab`: drafts are chosen among so
    many tokens, by token_order.json the most frequent of the training data, else the tokenizer's first (0: all). `exact`:
    self-speculative output is that of plain decoding bit for bit, in every precision.
    """

    quantize: Quantization | None = None
    draft_weights: Quantization | None = None
    draft_layers: int = 0
    draft_vocab: int = 0
    exact: bool = False

    def __post_init__(self) -> None:
        for flag, value in (("--quantize", self.quantize), ("--draft-weights", self.draft_weights)):
            if value is not None:
                require_choice(value, flag, QUANTIZATIONS)
        require_ranges(draft_vocab=self.draft_vocab)

    @property
    def drafts_apart(self) -> bool:
        """Whether drafts have a head, and perhaps layers, of their own."""
        return self.draft_weights is not None or self.draft_vocab > 0

    @property
    def is_plain(self) -> bool:
        """Whether the weights stay as they are, which is all that a model that is not repacked can do."""
        return self.quantize is None and not self.drafts_apart and not self.exact


@dataclass(frozen=True)
class RecipeConfig:
    """The LayerSkip recipe (Elhoushi et al., ACL 2024, sections 4.1 and 4.2).

    `exit_weights`: how the exits' losses weigh, see training/exit_loss.py; the paper's formula gives early ones very little.
    `exits`: the n exit layers (counts, 1..L-1) that the curriculum chooses among; empty is all L, as in the paper. `rotation`
    is R of the rotational curriculum; None picks n/3 (at least 1) up to a vocabulary of 8k and n-1 above it, where every
    extra exit costs a head. `distill` is the share of KL(last layer || exit) in an early exit's loss; the rest is
    cross-entropy.
    """

    p_max: float = 0.2
    e_scale: float = 1.0
    exit_weights: ExitWeights = "paper"
    curriculum: Curriculum = "rotational"
    rotation: int | None = None
    exits: tuple[int, ...] = ()
    distill: float = 0.0

    def __post_init__(self) -> None:
        require_ranges(distill=self.distill, pmax=self.p_max, escale=self.e_scale, rotation=self.rotation)
        require_choice(self.exit_weights, "--exit-weights", EXIT_WEIGHTS)
        require_choice(self.curriculum, "--curriculum", CURRICULA)


@dataclass(frozen=True)
class DataConfig:
    """A data set: a name (`commands`, `topv2`), a file or folder, or a hub id; which columns; how many rows (0: all).

    `flag` is the one that named it, for errors.
    """

    name: str = "commands"
    split: str = "train"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    limit: int = 0
    seed: int = 0
    flag: str = "--data"

    def __post_init__(self) -> None:
        require_given("--data", self.name)
        require_ranges(samples=self.limit, seed=self.seed)


@dataclass(frozen=True)
class FinetuneConfig:
    """One training run. None means: the preset of the regime (see training/presets.py), or the data decides.

    `recipe_changes`: fields of RecipeConfig that differ from the preset, where `recipe` is None.
    """

    model: str = "embedded-base"
    data: DataConfig = field(default_factory=DataConfig)
    output: str = "layerskip-model"
    regime: Regime = "finetune"
    recipe: RecipeConfig | None = None
    recipe_changes: dict[str, Any] = field(default_factory=dict)
    lr: float | None = None
    steps: int | None = None
    epochs: float = 1.0
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
    lora_keep: bool = False
    gradient_checkpointing: bool = False
    save_steps: int = 0
    resume: bool = False
    report_to: str = ""
    streaming: bool = False
    pack: bool | None = None
    validation: str | None = None
    validation_samples: int = 256
    eval_steps: int = 0
    overwrite: bool = False
    prompt_template: str | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        for flag, name in (("--model", self.model), ("--output", self.output), ("--validation", self.validation)):
            require_given(flag, name)
        require_choice(self.regime, "--regime", REGIMES)
        require_choice(self.dtype, "--dtype", DTYPES)
        require_ranges(
            lr=self.lr, steps=self.steps, epochs=self.epochs, batch_size=self.batch_size, accumulation=self.accumulation,
            max_length=self.max_length, warmup=self.warmup, weight_decay=self.weight_decay, lora_rank=self.lora_rank,
            validation_samples=self.validation_samples, eval_steps=self.eval_steps, save_steps=self.save_steps, seed=self.seed,
            vocab_size=self.vocab_size,
        )  # fmt: skip
        require(not self.eval_steps or self.validation is not None, "--eval-steps", "used with --validation", "none")
        RecipeConfig(**self.recipe_changes)  # raises now what would be raised after the model is loaded
        if self.streaming:
            require(self.steps is not None, "--steps", "given with --streaming, whose rows cannot be counted", "none")
            require(not self.data.limit, "--samples", "0 with --streaming", self.data.limit)
            require(self.vocab_size is None, "--vocab-size", "left out with --streaming", self.vocab_size)
        require(bool(self.lora_targets.strip(", ")), "--lora-targets", "all-linear or names of modules", "none")
        require(not self.lora_keep or self.lora_rank > 0, "--lora-keep", "used with --lora-rank", "no rank")
        require(self.vocab_size is None or self.regime == "scratch", "--vocab-size", "used with --regime scratch", self.regime)
        require_unicode("--prompt-template", self.prompt_template)
        require(
            self.prompt_template is None or "{prompt}" in self.prompt_template or self.prompt_template == "chat",
            "--prompt-template",
            "'chat' or a text with {prompt} in it",
            self.prompt_template,
        )


@dataclass(frozen=True)
class TaskConfig:
    """What is evaluated on which rows. The data are `data`, else the task's own; `samples` of them (0: all).

    `task` is one of evaluation/tasks, or a name of data with prompts and references. None for `max_new_tokens`, `shots` and the
    columns: the task decides. `template` is the form of a row's prompt with {prompt} in it, or `raw`, or `chat`. Code gets
    `problem_samples` answers a problem, drawn at `temperature`, of which pass@k is estimated for each of `pass_k`.
    """

    task: str | None = None
    data: str | None = None
    split: str = "test"
    samples: int = 12
    seed: int = 0
    max_new_tokens: int | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    metric: str | None = None
    shots: int | None = None
    template: str | None = None
    pass_k: tuple[int, ...] = (1,)
    problem_samples: int = 1
    temperature: float = 0.0
    allow_code_execution: bool = False

    def __post_init__(self) -> None:
        require_given("--task", self.task)
        require_given("--data", self.data)
        require_ranges(
            samples=self.samples, seed=self.seed, max_new_tokens=self.max_new_tokens, shots=self.shots,
            problem_samples=self.problem_samples, temperature=self.temperature,
        )  # fmt: skip
        if self.metric is not None:
            require_choice(self.metric, "--metric", METRICS)
        require_unicode("--template", self.template)
        require(
            self.template in (None, "raw", "chat") or "{prompt}" in (self.template or ""),
            "--template",
            "raw, chat or a text with {prompt} in it",
            self.template,
        )
        require(bool(self.pass_k) and min(self.pass_k) >= 1, "--pass-k", "counts of at least 1", _listed(self.pass_k))
        most = max(self.pass_k)
        require(self.problem_samples >= most, "--problem-samples", f"at least {most}, for --pass-k", self.problem_samples)
        drawn = self.problem_samples == 1 or self.temperature > 0
        require(drawn, "--temperature", "above 0 for several --problem-samples", self.temperature)


@dataclass(frozen=True)
class BenchConfig:
    """Ways of decoding side by side, and baselines. None for exit and draft length: what the checkpoint recommends.

    With a `batch_size` above 1 answers come from batches, and `timed` of the prompts (0: none, None: some) are measured.
    """

    model: str = "embedded"
    task: TaskConfig = field(default_factory=TaskConfig)
    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    strategies: tuple[str, ...] = STRATEGIES
    batch_size: int = 1
    timed: int | None = None
    repeats: int = 3
    baselines: tuple[str, ...] = ()
    draft_model: str | None = None
    device: str = "auto"
    dtype: DType = "auto"
    threads: int = 0
    packing: PackingConfig = field(default_factory=PackingConfig)

    def __post_init__(self) -> None:
        require_given("--model", self.model)
        require_given("--draft-model", self.draft_model)
        require_ranges(spec=self.num_draft_tokens, repeats=self.repeats, threads=self.threads)
        for name in self.strategies:
            require_choice(name, "--strategies", STRATEGIES)
        known = "autoregressive" in self.strategies
        require(
            known, "--strategies", "a list with autoregressive, which the others are compared with", ",".join(self.strategies)
        )
        _require_batches(self.batch_size, self.timed, 0, self.task, self.packing)
        for name in self.baselines:
            require_choice(name, "--baselines", BASELINES)
        temperature = self.task.temperature
        require(not self.baselines or temperature == 0, "--temperature", "0 with --baselines, which are greedy", temperature)
        drafting = "draft-model" in self.baselines
        require(
            drafting == (self.draft_model is not None), "--draft-model", "given with the baseline draft-model", self.draft_model
        )
        require_choice(self.dtype, "--dtype", DTYPES)


@dataclass(frozen=True)
class SweepConfig:
    """Every exit with every draft length; `quick`: only those that should be fastest. No exits: a spread over the layers.

    With a `batch_size` above 1 answers come from batches, and `timed` of the prompts (None: some) are measured.
    """

    model: str = "embedded"
    task: TaskConfig = field(default_factory=TaskConfig)
    exits: tuple[int, ...] = ()
    specs: tuple[int, ...] = (2, 4, 6, 8, 12)
    quick: bool = False
    batch_size: int = 1
    timed: int | None = None
    device: str = "auto"
    dtype: DType = "auto"
    threads: int = 0
    packing: PackingConfig = field(default_factory=PackingConfig)

    def __post_init__(self) -> None:
        require(all(exit_layer >= 1 for exit_layer in self.exits), "--exits", "layers of at least 1", _listed(self.exits))
        require(bool(self.specs), "--specs", "at least one draft length", "none")
        require(all(spec >= 1 for spec in self.specs), "--specs", "draft lengths of at least 1", _listed(self.specs))
        require_given("--model", self.model)
        require_ranges(spec=max(self.specs), threads=self.threads)
        _require_batches(self.batch_size, self.timed, 1, self.task, self.packing)
        require_choice(self.dtype, "--dtype", DTYPES)


def _require_batches(batch_size: int, timed: int | None, fewest: int, task: TaskConfig, packing: PackingConfig) -> None:
    require_ranges(batch_size=batch_size, timed=timed)
    require(batch_size == 1 or not packing.exact, "--batch-size", "1 with --exact", batch_size)
    require(batch_size == 1 or task.temperature == 0, "--batch-size", "1 with a --temperature above 0", batch_size)
    require(timed is None or batch_size > 1, "--timed", "used with --batch-size; without it every prompt is timed", timed)
    require(timed is None or timed >= fewest, "--timed", f"at least {fewest}", timed)


def _listed(counts: tuple[int, ...]) -> str:
    return ",".join(map(str, counts))
