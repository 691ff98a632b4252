"""What is evaluated, and how."""

from dataclasses import dataclass, field
from typing import Annotated, Literal, cast

from msgspec import Meta

from .checks import require, require_choice
from .decoding import DRAFTERS, STRATEGIES, DecodingOptions
from .machine import MachineConfig
from .options import DECODING, MEASUREMENT, MODEL, TASK, Flag, Seed, Text, parse_counts, parse_names, parse_shares
from .packing import PackingConfig
from .prompting import PromptingConfig

# Each task, and the TaskLoader that loads it. It is imported when the task is used.
TASKS = {
    "commands": "layerskip_core.evaluation.tasks.pairs:COMMANDS",
    "topv2": "layerskip_core.evaluation.tasks.pairs:TOPV2",
    "jsonl": "layerskip_core.evaluation.tasks.pairs:PROMPTS",
    "cnn_dm": "layerskip_core.evaluation.tasks.summaries:CNN_DM",
    "xsum": "layerskip_core.evaluation.tasks.summaries:XSUM",
    "scitldr": "layerskip_core.evaluation.tasks.summaries:SCITLDR",
    "humaneval": "layerskip_core.evaluation.tasks.code:HUMANEVAL",
    "mbpp": "layerskip_core.evaluation.tasks.code:MBPP",
    "lm": "layerskip_core.evaluation.tasks.language_modelling:LANGUAGE_MODELLING",
}
METRICS = ("exact_match", "rouge1", "rouge2", "rougeL")
TRANSFORMERS_BASELINES = ("transformers", "assistant-early-exit", "prompt-lookup", "draft-model")
BASELINES = (*TRANSFORMERS_BASELINES, "no-reuse", "draft-and-verify", "llama.cpp")
UNSANDBOXED = "unsandboxed"
HARNESS = "lm-eval:"  # before the names of tasks of lm-evaluation-harness


@dataclass(frozen=True)
class TaskConfig:
    """What is evaluated on which rows: `samples` of them (0: all) from `data`, by default the task's own.

    `task` is one of evaluation/tasks, names data with prompts and references, or is `lm-eval:` with tasks of
    lm-evaluation-harness, whose own files can be in the folder `include_path`. None for `max_new_tokens`, `shots` and the
    columns: the task decides. `seed` is that of generated rows. A template with {prompt} in it is also the form of each row's
    prompt. Code problems get `problem_samples` answers each, from which pass@k is estimated for each k of `pass_k`.
    `allow_code_execution` runs them in a sandbox, with "unsandboxed" also on a machine where no layer of the sandbox works.
    """

    task: Annotated[
        Text | None,
        Flag(
            TASK,
            f"{', '.join(TASKS)}, data with prompts and references, or {HARNESS}TASK,TASK of lm-evaluation-harness.",
            default="by --data, else commands",
        ),
    ] = None
    data: Annotated[Text | None, Flag(TASK, "A file, a TOPv2 folder or a hub id.", default="the task's own, from the hub")] = (
        None
    )
    split: Annotated[str, Flag(TASK, "train, validation or test; compositional too for `commands`.")] = "test"
    samples: Annotated[int, Meta(ge=0, le=10_000_000), Flag(TASK, "Number of rows; 0: all, 20000 for `commands`.")] = 12
    seed: Annotated[Seed, Flag(TASK, "Seed of generated rows and of sampling.")] = 0
    max_new_tokens: Annotated[
        Annotated[int, Meta(ge=1, le=10_000_000)] | None,
        Flag(DECODING, "Maximum number of tokens in an answer.", default="the task's"),
    ] = None
    prompt_column: Annotated[str | None, Flag(TASK, "Column of the prompt.", default="the first of the usual names")] = None
    completion_column: Annotated[str | None, Flag(TASK, "Column of the reference.", default="the first of the usual names")] = (
        None
    )
    metric: Annotated[
        str | None, Flag(TASK, "For jsonl: exact_match, rouge1, rouge2 or rougeL.", default="by the references")
    ] = None
    shots: Annotated[
        Annotated[int, Meta(ge=0, le=1_000)] | None, Flag(TASK, "Solved rows before each prompt.", default="the task's")
    ] = None
    pass_k: Annotated[tuple[int, ...], Flag(TASK, "The k of pass@k, such as 1,10.", parse=parse_counts)] = (1,)
    problem_samples: Annotated[
        int, Meta(ge=1, le=10_000), Flag(TASK, "Answers to each code problem, for pass@k; needs --temperature if above 1.")
    ] = 1
    allow_code_execution: Annotated[
        bool | Literal["unsandboxed"],
        Flag(
            TASK,
            f"Run the programs that the model writes, in a sandbox; `{UNSANDBOXED}`: even where no layer of the sandbox works.",
            parse=lambda text, field: text or True,
            optional=UNSANDBOXED,
        ),
    ] = False
    include_path: Annotated[str | None, Flag(TASK, f"Folder with task files of your own, for {HARNESS}.")] = None
    prompting: PromptingConfig = field(default_factory=PromptingConfig)

    def __post_init__(self) -> None:
        if self.metric is not None:
            require_choice(self.metric, "metric", METRICS)
        require(bool(self.pass_k) and min(self.pass_k) >= 1, "pass_k", "counts of at least 1", _listed(self.pass_k))
        known = self.allow_code_execution in (False, True, UNSANDBOXED)
        require(known, "allow_code_execution", f"given without a value, or {UNSANDBOXED}", self.allow_code_execution)
        most = max(self.pass_k)
        require(self.problem_samples >= most, "problem_samples", f"at least {most}, for `pass_k`", self.problem_samples)
        named = self.task is not None and self.task.startswith(HARNESS)
        require(not named or bool(self.harness_tasks), "task", f"{HARNESS} with the name of a task", self.task)
        local = self.include_path is None or named
        require(local, "include_path", f"used with `task` {HARNESS}...", self.include_path)

    @property
    def harness_tasks(self) -> tuple[str, ...]:
        """The tasks of lm-evaluation-harness that `task` names; empty if it is none of those."""
        if self.task is None or not self.task.startswith(HARNESS):
            return ()
        return tuple(filter(None, map(str.strip, self.task.removeprefix(HARNESS).split(","))))


@dataclass(frozen=True)
class BenchConfig:
    """Strategies and baselines side by side. None for exit and draft length: what the checkpoint recommends.

    Layers to skip in `generation` imply the strategy draft-and-verify.
    With a `batch_size` above 1, answers come from batches, and `timed` of the prompts (0: none, None: some) are timed.
    """

    model: Annotated[Text, Flag(MODEL, "embedded, embedded-base, a folder, a .gguf file or a hub id.")] = "embedded"
    task: TaskConfig = field(default_factory=lambda: TaskConfig(samples=20))
    exit_layer: Annotated[
        int | None, Flag(DECODING, "Layers of the early exit and of the drafts.", "--exit", "the checkpoint's")
    ] = None
    num_draft_tokens: Annotated[
        Annotated[int, Meta(ge=1, le=10_000)] | None, Flag(DECODING, "Draft tokens per round.", "--spec", "the checkpoint's")
    ] = None
    strategies: Annotated[
        tuple[str, ...], Flag(DECODING, "The strategies to run; autoregressive is required.", parse=parse_names)
    ] = field(
        default_factory=lambda: ("autoregressive", "early-exit", *(name for name in DRAFTERS if name != "draft-and-verify"))
    )
    batch_size: Annotated[
        int,
        Meta(ge=1, le=65_536),
        Flag(MEASUREMENT, "Prompts answered together, for quality; speed is measured at batch size 1."),
    ] = 1
    timed: Annotated[
        Annotated[int, Meta(ge=0, le=1_000_000)] | None,
        Flag(MEASUREMENT, "With --batch-size: the number of prompts that speed is measured on.", default="8"),
    ] = None
    repeats: Annotated[
        int, Meta(ge=1, le=1_000), Flag(MEASUREMENT, "Number of times that everything is measured; medians are reported.")
    ] = 3
    baselines: Annotated[tuple[str, ...], Flag(MEASUREMENT, f"Also: {','.join(BASELINES)}, or some.", parse=parse_names)] = ()
    draft_model: Annotated[Text | None, Flag(MEASUREMENT, "Model that the baseline draft-model drafts with.")] = None
    gguf: Annotated[Text | None, Flag(MEASUREMENT, "The model as a GGUF file, for the baseline llama.cpp.")] = None
    generation: DecodingOptions = field(default_factory=lambda: DecodingOptions())
    machine: MachineConfig = field(default_factory=MachineConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)

    def decoding(self, generation: DecodingOptions) -> DecodingOptions:
        """These options with the exit and the draft length."""
        own = {"exit_layer": self.exit_layer, "num_draft_tokens": self.num_draft_tokens}
        return cast(DecodingOptions, {**generation, **{name: value for name, value in own.items() if value is not None}})

    @property
    def skips(self) -> bool:
        """Whether Draft & Verify runs, as a strategy or as a baseline."""
        return bool(self.generation.get("skip")) or "draft-and-verify" in (*self.strategies, *self.baselines)

    def __post_init__(self) -> None:
        for name in self.strategies:
            require_choice(name, "strategies", STRATEGIES)
        known = "autoregressive" in self.strategies
        require(
            known, "strategies", "a list with autoregressive, which the others are compared with", ",".join(self.strategies)
        )
        temperature = self.generation.get("temperature", 0.0)
        _require_batches(self.batch_size, self.timed, 0, temperature, self.packing)
        _require_drawn(self.task.problem_samples, temperature)
        for name in self.baselines:
            require_choice(name, "baselines", BASELINES)
        require(not self.baselines or temperature == 0, "temperature", "0 with `baselines`, which are greedy", temperature)
        drafting = "draft-model" in self.baselines
        require(
            drafting == (self.draft_model is not None), "draft_model", "given with the baseline draft-model", self.draft_model
        )
        needed = ("llama.cpp" in self.baselines) == (self.gguf is not None)
        require(needed, "gguf", "given with the baseline llama.cpp, and only then", self.gguf or "none")


@dataclass(frozen=True)
class SweepConfig:
    """Every exit and drafter with every draft length; `quick`: only those predicted to be fastest.

    No exits: a spread over the layers, and all layers of low-bit copies; these alone if the exits were not trained.
    `exit_confidences`: early exits at a depth of each token's own; None: a few, if the exits were trained.

    `search_skips`: also Draft & Verify, with the layers to skip and the draft length that a search finds.
    `keep`: the share of full depth's quality that an early exit must keep to become the policy `fast`.
    With a `batch_size` above 1, answers come from batches, and `timed` of the prompts (None: some) are timed.
    """

    model: Annotated[Text, Flag(MODEL, "embedded, embedded-base, a folder, a .gguf file or a hub id.")] = "embedded"
    task: TaskConfig = field(default_factory=TaskConfig)
    exits: Annotated[
        tuple[int, ...],
        Flag(
            DECODING,
            "Exits: 3,6,8 or A:B:STEP, both ends included.",
            default="six of them, and all layers of --draft-weights; the latter alone if no exit was trained",
            parse=parse_counts,
        ),
    ] = ()
    specs: Annotated[tuple[int, ...], Flag(DECODING, "Draft lengths, in the same form.", parse=parse_counts)] = (2, 4, 6, 8, 12)
    keep: Annotated[
        float,
        Meta(gt=0, le=1),
        Flag(MEASUREMENT, "Share of full depth's quality that an early exit must keep to be the policy `fast`."),
    ] = 0.98
    exit_confidences: Annotated[
        tuple[float, ...] | None,
        Flag(
            DECODING,
            "Also early exits by confidence (--exit-confidence of generate), for each of 0.8,0.9.",
            default="0.8,0.9,0.95 if the exits were trained; none with --quick or --batch-size",
            parse=parse_shares,
        ),
    ] = None
    quick: Annotated[bool, Flag(MEASUREMENT, "Measure only the settings that are predicted to be fastest.")] = False
    search_skips: Annotated[
        bool,
        Flag(
            MEASUREMENT,
            "Also measure --strategy draft-and-verify, with layers to skip that are searched on validation rows.",
        ),
    ] = False
    batch_size: Annotated[
        int,
        Meta(ge=1, le=65_536),
        Flag(MEASUREMENT, "Prompts answered together, for quality; speed is measured at batch size 1."),
    ] = 1
    timed: Annotated[
        Annotated[int, Meta(ge=0, le=1_000_000)] | None,
        Flag(MEASUREMENT, "With --batch-size: the number of prompts that speed is measured on.", default="8"),
    ] = None
    generation: DecodingOptions = field(default_factory=lambda: DecodingOptions())
    machine: MachineConfig = field(default_factory=MachineConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)

    def __post_init__(self) -> None:
        require(all(exit_layer >= 1 for exit_layer in self.exits), "exits", "layers of at least 1", _listed(self.exits))
        require(bool(self.specs), "specs", "at least one draft length", "none")
        require(all(spec >= 1 for spec in self.specs), "specs", "draft lengths of at least 1", _listed(self.specs))
        shares = self.exit_confidences or ()
        require(all(0 < share <= 1 for share in shares), "exit_confidences", "above 0 and up to 1", _listed(shares))
        single = self.generation.get("exit_confidence")
        require(not single, "exit_confidence", "left out of a sweep, which takes `exit_confidences`", single)
        skip = self.generation.get("skip", ())
        require(not (self.search_skips and skip), "search_skips", "left out with `skip`", ",".join(map(str, skip)))
        temperature = self.generation.get("temperature", 0.0)
        _require_batches(self.batch_size, self.timed, 1, temperature, self.packing)
        _require_drawn(self.task.problem_samples, temperature)


def _require_batches(batch_size: int, timed: int | None, fewest: int, temperature: float, packing: PackingConfig) -> None:
    require(batch_size == 1 or not packing.exact, "batch_size", "1 with `exact`", batch_size)
    require(batch_size == 1 or temperature == 0, "batch_size", "1 with a `temperature` above 0", batch_size)
    require(timed is None or batch_size > 1, "timed", "used with `batch_size`; without it every prompt is timed", timed)
    require(timed is None or timed >= fewest, "timed", f"at least {fewest}", timed)


def _require_drawn(problem_samples: int, temperature: float) -> None:
    drawn = problem_samples == 1 or temperature > 0
    require(drawn, "temperature", "above 0 for several `problem_samples`", temperature)


def _listed(numbers: tuple[float, ...]) -> str:
    return ",".join(map(str, numbers))
