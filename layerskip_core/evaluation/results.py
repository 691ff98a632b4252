"""Outputs for a prompt, the result of each setting, and the record of a run, as results.json has
them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import torch

from ..config.decoding import DraftProfile
from ..config.model import Quantization
from ..config.resolution import EXACT, Policy
from ..decoding import DecodeStats, StopReason
from ..errors import LayerSkipError, plural
from ..files import read_bytes

ANSWERS_FILE = "answers.jsonl"

# A top-2 logit gap below this is a near-tie: kernels for one row and for several rows may round to
# either side of it. In bf16, logits of 16 to 32 are 1/8 apart, so the bound is two steps. In fp32
# it is a thousand times the spread between the kernels.
NEAR_TIE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.25}


class Step(NamedTuple):
    """The tokens of one step of the decoding loop, and its wall-clock seconds."""

    tokens: int
    seconds: float


@dataclass(frozen=True)
class Output:
    """The output for one prompt, or the `error` that prevented it. The journal stores these
    fields.
    """

    ids: tuple[int, ...] = ()
    text: str = ""
    # The first is the prefill, which gives the first token; answers of a batch have none
    steps: tuple[Step, ...] = ()
    stats: DecodeStats = field(default_factory=DecodeStats)
    finish_reason: StopReason | None = None
    peak_memory_mb: float | None = None
    error: str | None = None

    @property
    def seconds(self) -> float:
        """With the prefill."""
        return sum(step.seconds for step in self.steps)

    @property
    def tokens(self) -> int:
        """Of the timed steps."""
        return sum(step.tokens for step in self.steps)


class Bounds(NamedTuple):
    """The ends of a 95% interval over prompts and repeats, see intervals.py."""

    low: float
    high: float


@dataclass(frozen=True)
class Failure:
    """A sample without an output, and the reason."""

    sample: int
    error: str


@dataclass(frozen=True)
class Difference:
    """Where a sample's output first differs from the autoregressive one, and the target's top-2
    logit gap there.
    """

    sample: int
    position: int
    top2_gap: float


@dataclass(frozen=True)
class Result:
    """The figures of one setting (sweep), strategy or baseline (bench), or category. None and
    empty: not measured.

    Rates and times are medians over the repeats; other figures are of the batched answers, else of
    the first repeat.
    """

    # The setting
    strategy: str = ""
    exit_layer: int | None = None
    num_draft_tokens: int | None = None

    # Quality: means over the prompts
    metrics: dict[str, float] = field(default_factory=dict)
    # In a sweep, that of the references through the exit; None for strategies that draft
    perplexity: float | None = None

    # Drafts and speed
    acceptance_rate: float | None = None  # accepted / drafted
    mean_accepted_tokens: float | None = None  # per round
    tokens_per_second: float | None = None
    ttft_ms: float | None = None
    peak_memory_mb: float | None = None
    # Over autoregressive decoding in the same repeat, by seconds per new token with prefill
    speedup: float | None = None
    # The share of samples with the tokens of autoregressive decoding
    identical_outputs: float | None = None
    speedup_over_transformers: float | None = None  # over transformers' generate
    # On the Pareto frontier: no other result is at least as good by the quality metric and as
    # fast, and better in one of the two
    pareto: bool = False

    # By the cost model of a sweep: `predicted_speedup` follows from `pass_times_ms`
    predicted_speedup: float | None = None
    pass_times_ms: dict[str, float] = field(default_factory=dict)
    # The share of autoregressive tokens that the exit or low-bit copy predicts too
    agreement: float | None = None
    # Accepted share of compared drafts, by position in the round
    acceptance_by_position: tuple[float, ...] | None = None

    # Answers that differ from plain decoding's, or that there are not
    differences: tuple[Difference, ...] = ()
    failures: tuple[Failure, ...] = ()

    # The copy whose first `exit_layer` layers draft; None: the model's own
    draft_weights: Quantization | None = None
    steps_by_drafter: dict[str, int] = field(default_factory=dict)  # `plain`: steps without drafts
    # Each token leaves at the first of `exits` with this confidence, after `mean_layers` on average
    exit_confidence: float | None = None
    exits: tuple[int, ...] = ()
    mean_layers: float | None = None
    skip: tuple[int, ...] = ()  # the layers that draft-and-verify skips in drafts, by number

    # 95% intervals of metrics and of ratios, by name
    intervals: dict[str, Bounds] = field(default_factory=dict)
    # 95% intervals of metrics minus full depth's on the same prompts
    changes: dict[str, Bounds] = field(default_factory=dict)
    # Rows that would halve the speedup's interval; 0: only more repeats would
    rows_to_halve: int | None = None
    categories: dict[str, "Result"] = field(default_factory=dict)

    # Standard errors of the metrics of lm-evaluation-harness, by name
    stderr: dict[str, float] = field(default_factory=dict)
    # Rows of a category; of a result of lm-evaluation-harness, rows by task
    samples: int | dict[str, int] = field(default_factory=dict)

    def keeps_outputs(self, plain: "Result", near_tie: float) -> bool:
        """Whether its outputs equal those of plain decoding, except at near-ties."""
        return self.failures == plain.failures and all(
            difference.top2_gap <= near_tie for difference in self.differences
        )


@dataclass(frozen=True)
class Recommendation:
    """The exit and draft length to decode with (both None for another setting), and a sentence that
    says why.
    """

    exit_layer: int | None
    num_draft_tokens: int | None
    speedup: float | None  # of the best setting, also where plain decoding is recommended
    reason: str
    fast_reason: str  # why there is a policy `fast`, or why not
    policies: dict[str, Policy]  # the recommendation as `exact`, and `fast` if there is one
    # The lower end of the speedup's 95% interval, on prompts that did not choose the setting
    lower_end: float | None = None

    @property
    def pays(self) -> bool:
        """Whether anything but plain decoding is recommended."""
        return self.policies[EXACT]["strategy"] != "autoregressive"


@dataclass(frozen=True)
class Answered:
    """A prompt, its reference if it has one, and the answer of each result; None where it
    failed.
    """

    prompt: str
    reference: str
    answers: tuple[str | None, ...]
    # Of each result, by metric in 0..1; several answers to one prompt have theirs at the first
    scores: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """One run."""

    config: dict[str, Any]  # with defaults filled in
    environment: dict[str, Any]  # the machine and the software
    results: tuple[Result, ...]
    recommendation: Recommendation | None = None  # of a sweep
    profile: DraftProfile | None = None  # of a sweep
    # Files of their own have these, not results.json: the answers, and lm-evaluation-harness's
    # records of rows, each with the index of its result
    answered: tuple[Answered, ...] = ()
    samples: tuple[dict[str, Any], ...] = ()

    @property
    def is_bench(self) -> bool:
        """Whether `bench` wrote it, not `sweep-exits`, which measures without repeats."""
        return "repeats" in self.config

    def document(self) -> dict[str, Any]:
        """The record as plain values; every float is finite."""
        document = asdict(replace(self, answered=(), samples=()))
        del document["answered"], document["samples"]
        return {key: value for key, value in document.items() if value is not None}


def result_name(result: Result) -> str:
    """A result's name in figures: `exit 8, 6 drafts`, `int8 exit 8, 6 drafts`, `exit 8 alone`,
    `lookup, 6 drafts`.
    """
    if result.strategy in ("autoregressive", "transformers"):
        return result.strategy
    if result.exit_confidence is not None:
        return f"exits at {result.exit_confidence:.6g}"
    if result.strategy == "early-exit":
        return f"exit {result.exit_layer} alone"
    parts = []
    if result.strategy != "self-speculative":
        parts.append(result.strategy)
    if result.exit_layer is not None:
        parts.append(f"{result.draft_weights or ''} exit {result.exit_layer}".strip())
    if result.num_draft_tokens:
        parts.append(plural(result.num_draft_tokens, "draft"))
    return ", ".join(parts)


def drafts_name(result: Result) -> str:
    """`6 drafts`, `6 int8 drafts`."""
    return plural(result.num_draft_tokens or 0, f"{result.draft_weights or ''} draft".strip())


def bandwidth_text(read: Mapping[str, float]) -> str:
    """The result of `bandwidth.bandwidth` in words."""
    megabytes = read["bytes_per_token"] / 1e6
    speed = read["bytes_per_second"]
    text = f"plain decoding reads {megabytes:.3g} MB per token at {speed / 1e9:.1f} GB/s"
    share = speed / read["sum_bytes_per_second"]
    # A sum that is slower, because other processes disturbed it or caches held the weights, is no
    # yardstick.
    if share > 1:
        return text
    return f"{text}, {share:.0%} of what a plain sum of as many bytes reaches"


def read_record(
    file: str, command: Literal["sweep-exits", "bench"] | None = None, named: str = "`saved`"
) -> RunRecord:
    """Reads a results.json, which `command`, if given, must have written, and its answers. Raises
    LayerSkipError for other files.
    """

    def parsed(path: Path, where: str, kind: str, parse: Any) -> Any:
        data = read_bytes(path, f"{where} {path}", LayerSkipError)
        try:
            return parse(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise refusal(path, where, kind, error) from None

    def refusal(path: Path, where: str, kind: str, fault: object) -> LayerSkipError:
        writer = command or "sweep-exits or bench"
        return LayerSkipError(f"{where} {path} must be {kind} that {writer} wrote: {fault}")

    path = Path(file)
    record: RunRecord = parsed(
        path, named, "a results.json", msgspec.json.Decoder(RunRecord).decode
    )
    written = "bench" if record.is_bench else "sweep-exits"
    if not record.results or command not in (None, written):
        fault = f"its {len(record.results)} results are those of {written}"
        raise refusal(path, named, "a results.json", fault)
    answers = path.with_name(ANSWERS_FILE)
    if not answers.exists():
        return record
    decoder = msgspec.json.Decoder(Answered)
    rows = parsed(answers, f"beside {named}", "an answers.jsonl", decoder.decode_lines)
    return replace(record, answered=tuple(rows))


def require_outputs(outputs: Sequence[Output]) -> None:
    """Raises LayerSkipError if every prompt failed."""
    errors = [output.error for output in outputs if output.error is not None]
    if len(errors) == len(outputs):
        raise LayerSkipError(
            f"none of the {len(errors)} prompts could be answered; the first: {errors[0]}"
        )
