"""Tasks and measurements."""

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from ..errors import require
from ..splits import VALIDATION, HeldOut
from .decoding import REMEMBERED, STRATEGIES, DecodingOptions, Remember, Strategy
from .model import MachineConfig, PackingConfig, PromptingConfig
from .options import (
    BatchSize,
    Count,
    CountOrNone,
    Drafts,
    Flag,
    Layer,
    ModelName,
    Seed,
    Share,
    Text,
    Without,
    one_of,
)

# The TaskLoaders of tasks, imported on use.
TASKS = {
    "commands": "layerskip_core.evaluation.tasks.texts:COMMANDS",
    "topv2": "layerskip_core.evaluation.tasks.texts:TOPV2",
    "jsonl": "layerskip_core.evaluation.tasks.texts:PROMPTS",
    "cnn_dm": "layerskip_core.evaluation.tasks.texts:CNN_DM",
    "xsum": "layerskip_core.evaluation.tasks.texts:XSUM",
    "scitldr": "layerskip_core.evaluation.tasks.texts:SCITLDR",
    "humaneval": "layerskip_core.evaluation.tasks.code:HUMANEVAL",
    "mbpp": "layerskip_core.evaluation.tasks.code:MBPP",
    "lm": "layerskip_core.evaluation.tasks.texts:LANGUAGE_MODELLING",
}


@dataclass(frozen=True)
class BaselineKind:
    """What reports know of a decoder that `bench` compares with; see Strategy."""

    drafts: bool = False
    has_exit: bool = False
    by_transformers: bool = False
    by_llama_cpp: bool = False


BASELINES = {
    "transformers": BaselineKind(by_transformers=True),
    "assistant-early-exit": BaselineKind(drafts=True, has_exit=True, by_transformers=True),
    "prompt-lookup": BaselineKind(drafts=True, by_transformers=True),
    "assistant-model": BaselineKind(drafts=True, by_transformers=True),
    "no-reuse": BaselineKind(drafts=True, has_exit=True),
    "llama.cpp": BaselineKind(by_llama_cpp=True),
    "llama.cpp-lookup": BaselineKind(by_llama_cpp=True),
}
# Columns of `jsonl`; the first one present counts.
PROMPT_NAMES = (
    "prompt",
    "instruction",
    "article",
    "document",
    "source",
    "question",
    "input",
    "turns",
    "messages",
)
REFERENCE_NAMES = (
    "completion",
    "response",
    "reference",
    "summary",
    "summary_gt",
    "highlights",
    "target",
    "answer",
    "output",
)
UNSANDBOXED = "unsandboxed"
HARNESS = "lm-eval:"  # prefix of lm-evaluation-harness's tasks

_TIMED = 8  # prompts to time, with batches
_OF_THE_TASK = ("max_new_tokens", "seed")  # options that TaskConfig has


def kind_of(name: str) -> Strategy | BaselineKind:
    """The strategy or baseline of this name."""
    return STRATEGIES[name] if name in STRATEGIES else BASELINES[name]


def with_transformers(names: Iterable[str]) -> bool:
    """Whether one of these baselines is transformers' own."""
    return any(BASELINES[name].by_transformers for name in names)


def with_llama_cpp(names: Iterable[str]) -> bool:
    """Whether one of these baselines is llama.cpp's."""
    return any(BASELINES[name].by_llama_cpp for name in names)


@dataclass(frozen=True)
class TaskConfig:
    """The task and its rows. A `prompting.template` with {prompt} also replaces the task's own form
    of prompts.

    `held_out`, what trainings of the model held out, and `side` (splits.py) are set by
    `load_trained`. `side` None: by `split` in a file, both sides of a hub data set's split.
    """

    task: Annotated[
        Text | None,
        Flag(
            f"{', '.join(TASKS)}, data, or {HARNESS}NAME.",
            None,
            "by --data or the model",
            "Task",
            reads="perhaps data",
        ),
    ] = None
    data: Annotated[
        Text | None,
        Flag("A file, a TOPv2 folder or a hub id.", None, "the task's own", reads="data"),
    ] = None
    split: Annotated[
        str,
        Flag(
            "train, validation or test; compositional, sealed too for `commands`; of a file validation or test."
        ),
    ] = "test"
    samples: Annotated[
        CountOrNone, Flag("Number of rows; 0: all, 20000 for `commands`.", "--samples/--limit")
    ] = 12
    seed: Annotated[Seed, Flag("Seed of generated rows and of sampling.")] = 0
    max_new_tokens: Annotated[
        Count | None, Flag("Most tokens in an answer.", None, "the task's", "Decoding")
    ] = None
    prompt_column: Annotated[
        str | None,
        Flag("Column of the prompt.", None, f"the first of {', '.join(PROMPT_NAMES)}", "Task"),
    ] = None
    completion_column: Annotated[
        str | None,
        Flag("Column of the reference.", None, f"the first of {', '.join(REFERENCE_NAMES)}"),
    ] = None
    metric: Annotated[
        Literal["exact_match", "rouge1", "rouge2", "rougeL"] | None,
        Flag("Ranks answers of jsonl.", None, "by the references"),
    ] = None
    shots: Annotated[
        Annotated[int, Meta(ge=0, le=1_000)] | None,
        Flag("Solved rows before each prompt.", "--shots/--num-fewshot", "the task's"),
    ] = None
    pass_k: Annotated[tuple[Count, ...], Flag("The k of pass@k, such as 1,10.")] = (1,)
    problem_samples: Annotated[
        int, Meta(ge=1, le=10_000), Flag("Answers to each code problem; sampled if above 1.")
    ] = 1
    allow_code_execution: Annotated[
        bool | Literal["unsandboxed"],
        Meta(description=f"given without a value, or {UNSANDBOXED}"),
        Flag(
            f"Run the model's programs in a sandbox; `{UNSANDBOXED}`: even without protected files.",
            optional=UNSANDBOXED,
        ),
    ] = False
    include_path: Annotated[
        str | None, Flag(f"Folder with task files of your own, for {HARNESS}.")
    ] = None
    prompting: PromptingConfig = field(default_factory=PromptingConfig)
    held_out: tuple[HeldOut, ...] | None = None
    side: str | None = None

    def __post_init__(self) -> None:
        most = max(self.pass_k)
        require(
            self.problem_samples >= most,
            "problem_samples",
            f"at least {most}, for `pass_k`",
            self.problem_samples,
        )
        named = self.task is not None and self.task.startswith(HARNESS)
        require(
            not named or bool(self.harness_tasks),
            "task",
            f"{HARNESS} with the name of a task",
            self.task,
        )
        require(
            self.include_path is None or named,
            "include_path",
            f"used with `task` {HARNESS}...",
            self.include_path,
        )

    @property
    def harness_tasks(self) -> tuple[str, ...]:
        """The tasks of lm-evaluation-harness that `task` names."""
        other, _, names = (self.task or "").partition(HARNESS)
        return () if other else tuple(filter(None, map(str.strip, names.split(","))))


@dataclass(frozen=True)
class MeasurementConfig:
    """Settings of every measurement. With a `batch_size` above 1 only `timed` of the prompts (0:
    none) are timed.
    """

    model: ModelName = "embedded"
    task: TaskConfig = field(default_factory=TaskConfig)
    _: KW_ONLY
    batch_size: Annotated[
        BatchSize,
        Flag("Prompts answered together, for quality; timed one by one.", panel="Measurement"),
    ] = 1
    timed: Annotated[
        Annotated[int, Meta(ge=0, le=1_000_000)] | None,
        Flag("With --batch-size: prompts to time.", None, str(_TIMED)),
    ] = None
    remember: int = 0
    generation: DecodingOptions = field(default_factory=DecodingOptions)
    machine: MachineConfig = field(default_factory=MachineConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)

    def __post_init__(self) -> None:
        size = self.batch_size
        timed = self.timed
        temperature = self.generation.get("temperature", 0.0)
        require(size == 1 or not self.packing.exact, "batch_size", "1 with `exact`", size)
        require(size == 1 or temperature == 0, "batch_size", "1 with a `temperature` above 0", size)
        require(
            timed is None or size > 1,
            "timed",
            "used with `batch_size`; without it every prompt is timed",
            timed,
        )
        if size > 1 and timed is None:
            object.__setattr__(self, "timed", _TIMED)
        drawn = self.task.problem_samples == 1 or temperature > 0
        require(drawn, "temperature", "above 0 for several `problem_samples`", temperature)


@dataclass(frozen=True)
class BenchConfig(MeasurementConfig):
    """A comparison of strategies (default: see `suiting_strategies`) and baselines. `skip` adds
    draft-and-verify.
    """

    task: TaskConfig = field(default_factory=lambda: TaskConfig(samples=20))
    remember: Remember = REMEMBERED
    strategies: Annotated[
        tuple[Annotated[str, one_of(*STRATEGIES)], ...],
        Flag(
            "The strategies to run, autoregressive among them.", None, "those that suit the model"
        ),
    ] = ()
    repeats: Annotated[
        int, Meta(ge=1, le=1_000), Flag("Repeats; medians are reported.", panel="Measurement")
    ] = 3
    baselines: Annotated[
        tuple[Annotated[str, one_of(*BASELINES)], ...], Flag("Also these decoders.")
    ] = ()
    gguf: Annotated[Text | None, Flag("The model as a GGUF file, for llama.cpp.")] = None
    generation: Annotated[
        DecodingOptions, Without(("strategy", "policy", "exits", *_OF_THE_TASK))
    ] = field(default_factory=DecodingOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        compared = not self.strategies or "autoregressive" in self.strategies
        listed = ",".join(self.strategies)
        require(
            compared,
            "strategies",
            "a list with autoregressive, which the others are compared with",
            listed,
        )
        temperature = self.generation.get("temperature", 0.0)
        require(
            not self.baselines or temperature == 0,
            "temperature",
            "0 with `baselines`, which are greedy",
            temperature,
        )
        needed = "given with baselines of llama.cpp, and only then"
        suits = with_llama_cpp(self.baselines) == (self.gguf is not None)
        require(suits, "gguf", needed, self.gguf or "none")
        given = self.packing.draft_model
        chosen = {*(self.strategies or ("adaptive",)), *self.baselines}
        users = (
            {"draft-model", "assistant-model"}
            if given is None
            else {"draft-model", "assistant-model", "adaptive"}
        )
        needed = "given for the strategy draft-model or the baseline assistant-model, and else only for adaptive"
        require(bool(chosen & users) == (given is not None), "draft_model", needed, given or "none")


@dataclass(frozen=True)
class SweepConfig(MeasurementConfig):
    """A sweep over exits and drafters, with the given draft lengths or those of the best predicted
    speed.
    """

    task: TaskConfig = field(default_factory=lambda: TaskConfig(split=VALIDATION))
    exits: Annotated[
        tuple[Layer, ...],
        Flag(
            "Exits: 3,6,8 or A:B:STEP.",
            None,
            "the trained, at most six, and the low-bit copy",
            "Decoding",
        ),
    ] = ()
    specs: Annotated[
        tuple[Drafts, ...],
        Flag("Draft lengths, in this form.", None, "the best of 2 to 32, as predicted"),
    ] = ()
    keep: Annotated[
        Share, Flag("Share of the quality that the policy `fast` keeps.", panel="Measurement")
    ] = 0.98
    exit_confidences: Annotated[
        tuple[Share, ...] | None,
        Flag(
            "Also early exits at each --exit-confidence.",
            None,
            "0.8,0.9,0.95 if exits were trained",
            "Decoding",
        ),
    ] = None
    packing: Annotated[PackingConfig, Without(("draft_model",))] = field(
        default_factory=PackingConfig
    )
    generation: Annotated[
        DecodingOptions,
        Without(
            (
                "strategy",
                "exit_layer",
                "num_draft_tokens",
                "exit_confidence",
                "policy",
                "exits",
                *_OF_THE_TASK,
            )
        ),
    ] = field(default_factory=DecodingOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.timed != 0, "timed", "at least 1", self.timed)
        single = self.generation.get("exit_confidence")
        require(
            not single,
            "exit_confidence",
            "left out of a sweep, which takes `exit_confidences`",
            single,
        )
