"""What is evaluated, and how."""

from dataclasses import dataclass, field
from typing import Literal, cast

from .checks import require, require_choice, require_given
from .decoding import DRAFTERS, STRATEGIES, DecodingOptions
from .machine import MachineConfig
from .packing import PackingConfig
from .prompting import PromptingConfig
from .ranges import require_ranges

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
    pass_k: tuple[int, ...] = (1,)
    problem_samples: int = 1
    allow_code_execution: bool | Literal["unsandboxed"] = False
    include_path: str | None = None
    prompting: PromptingConfig = field(default_factory=PromptingConfig)

    def __post_init__(self) -> None:
        require_given("task", self.task)
        require_given("data", self.data)
        require_ranges(
            samples=self.samples, seed=self.seed, max_new_tokens=self.max_new_tokens, shots=self.shots,
            problem_samples=self.problem_samples,
        )  # fmt: skip
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

    model: str = "embedded"
    task: TaskConfig = field(default_factory=lambda: TaskConfig(samples=20))
    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    strategies: tuple[str, ...] = field(
        default_factory=lambda: ("autoregressive", "early-exit", *(name for name in DRAFTERS if name != "draft-and-verify"))
    )
    batch_size: int = 1
    timed: int | None = None
    repeats: int = 3
    baselines: tuple[str, ...] = ()
    draft_model: str | None = None
    gguf: str | None = None
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
        require_given("model", self.model)
        require_given("draft_model", self.draft_model)
        require_given("gguf", self.gguf)
        require_ranges(num_draft_tokens=self.num_draft_tokens, repeats=self.repeats)
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

    model: str = "embedded"
    task: TaskConfig = field(default_factory=TaskConfig)
    exits: tuple[int, ...] = ()
    specs: tuple[int, ...] = (2, 4, 6, 8, 12)
    keep: float = 0.98
    exit_confidences: tuple[float, ...] | None = None
    quick: bool = False
    search_skips: bool = False
    batch_size: int = 1
    timed: int | None = None
    generation: DecodingOptions = field(default_factory=lambda: DecodingOptions())
    machine: MachineConfig = field(default_factory=MachineConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)

    def __post_init__(self) -> None:
        require(all(exit_layer >= 1 for exit_layer in self.exits), "exits", "layers of at least 1", _listed(self.exits))
        require(bool(self.specs), "specs", "at least one draft length", "none")
        require(all(spec >= 1 for spec in self.specs), "specs", "draft lengths of at least 1", _listed(self.specs))
        require_given("model", self.model)
        require_ranges(num_draft_tokens=max(self.specs), keep=self.keep)
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
    require_ranges(batch_size=batch_size, timed=timed)
    require(batch_size == 1 or not packing.exact, "batch_size", "1 with `exact`", batch_size)
    require(batch_size == 1 or temperature == 0, "batch_size", "1 with a `temperature` above 0", batch_size)
    require(timed is None or batch_size > 1, "timed", "used with `batch_size`; without it every prompt is timed", timed)
    require(timed is None or timed >= fewest, "timed", f"at least {fewest}", timed)


def _require_drawn(problem_samples: int, temperature: float) -> None:
    drawn = problem_samples == 1 or temperature > 0
    require(drawn, "temperature", "above 0 for several `problem_samples`", temperature)


def _listed(numbers: tuple[float, ...]) -> str:
    return ",".join(map(str, numbers))
