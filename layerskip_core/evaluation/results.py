"""The results that sweeps and benchmarks report, one for each decoding strategy measured."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..config.packing import Quantization


class Step(NamedTuple):
    """The number of tokens from one step of the decoding loop, its wall-clock seconds, and what drafted.

    `drafter`: as in DecodeStats.steps_by_drafter; None of a prefill, and where nothing could draft.
    """

    tokens: int
    seconds: float
    drafter: str | None = None


class Bounds(NamedTuple):
    """The ends of a figure's 95% interval over the prompts, see bootstrap.py."""

    low: float
    high: float


@dataclass(frozen=True)
class Failure:
    """A sample without an output, and the reason."""

    sample: int
    error: str


@dataclass(frozen=True)
class Difference:
    """Where a sample's output first differs from the autoregressive one, and the target's top-2 logit gap there."""

    sample: int
    position: int
    top2_gap: float


@dataclass(frozen=True)
class ExitResult:
    """One row of a sweep: autoregressive decoding, an early exit, or a strategy that drafts.

    `exit_confidence`: each token leaves at the first of `exits` with this confidence, after `mean_layers` on average.
    `draft_weights`: the low-bit copy that drafts with its first `exit_layer` layers; None for the model's own weights.
    `perplexity` is measured on the references through the exit. It is None for strategies that draft, which answer with the
    last layer. `speedup` compares the total generation time per new token, prefill included, with autoregressive decoding in
    the same run. `pareto`: no other row is at least as good (by the task's quality metric) and as fast, and better in one of
    the two. `agreement` is the share of the autoregressive tokens that the exit, or the copy, would also have chosen.
    `steps_by_drafter`: the steps of a strategy that drafts, by what drafted; `plain` are those without drafts. `skip`: the
    layers that the drafts of draft-and-verify leave out, by number.

    The predictions come from the cost model, before the setting itself is measured; `pass_times_ms` are its inputs. The
    predicted speedup is relative to the autoregressive steps timed together with them. A quick sweep leaves settings
    unmeasured: these have predictions only, and empty `metrics`. What is predicted for layers that a search found is for the
    rows of the search.

    `intervals`: of metrics and of figures that are ratios, by their names. `changes`: the intervals of what a metric differs
    from full depth's, on the same prompts, where any prompt's differs. `stderr`: standard errors of metrics, by their names,
    and `samples`: numbers of rows by task; both only of lm-evaluation-harness.
    """

    strategy: str
    exit_layer: int | None
    num_draft_tokens: int | None
    metrics: dict[str, float]
    perplexity: float | None
    acceptance_rate: float | None
    mean_accepted_tokens: float | None
    tokens_per_second: float | None
    speedup: float | None
    identical_outputs: float | None
    pareto: bool = False
    predicted_speedup: float | None = None
    predicted_tokens_per_second: float | None = None
    predicted_acceptance_rate: float | None = None
    pass_times_ms: dict[str, float] = field(default_factory=dict)
    agreement: float | None = None
    acceptance_by_position: tuple[float, ...] | None = None
    time_split_ms: dict[str, float] = field(default_factory=dict)
    differences: tuple[Difference, ...] = ()
    failures: tuple[Failure, ...] = ()
    draft_weights: Quantization | None = None
    steps_by_drafter: dict[str, int] = field(default_factory=dict)
    exit_confidence: float | None = None
    exits: tuple[int, ...] = ()
    mean_layers: float | None = None
    skip: tuple[int, ...] = ()
    intervals: dict[str, Bounds] = field(default_factory=dict)
    changes: dict[str, Bounds] = field(default_factory=dict)
    stderr: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CategoryResult:
    """A strategy on the prompts of one category; the figures are those of BenchResult."""

    samples: int
    metrics: dict[str, float]
    acceptance_rate: float | None
    mean_accepted_tokens: float | None
    tokens_per_second: float | None
    speedup: float | None
    decode_speedup: float | None
    identical_outputs: float
    speedup_over_transformers: float | None = None
    intervals: dict[str, Bounds] = field(default_factory=dict)
    changes: dict[str, Bounds] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchResult:
    """One strategy or baseline of a benchmark.

    Rates and times are medians over the repeats. Metrics, acceptance and outputs come from the batched answers if there are
    any, else from the first repeat: greedy decoding gives the same tokens every time.

    `speedup` compares the total generation time per new token, prefill included, with autoregressive decoding in the same
    repeat; `speedup_over_transformers` with transformers' generate. `decode_speedup` leaves out prefill and first token.
    `identical_outputs` is the share of samples whose tokens equal the autoregressive ones; `differences` lists where the
    outputs of drafting strategies depart from them. `acceptance_by_position`: the share of drafts accepted at each position of
    a round, among those that were compared. `time_split_ms`: milliseconds per token by phase. `draft_weights`,
    `steps_by_drafter`, `exit_confidence`, `mean_layers`, `skip`, `intervals`, `changes`, `stderr` and `samples` are those of
    ExitResult.
    None means that the figure does not apply (no drafts, a single token, no such baseline) or cannot be measured.

    `longest_answer`: the steps of the longest answer, of adaptive decoding only, to show how its speed changes on the way.
    `categories`: the same by the data's categories, if it has any.
    """

    strategy: str
    exit_layer: int | None
    num_draft_tokens: int | None
    metrics: dict[str, float]
    acceptance_rate: float | None
    mean_accepted_tokens: float | None
    tokens_per_second: float | None
    time_per_token_ms: dict[str, float | None]
    ttft_ms: float | None
    peak_memory_mb: float | None
    speedup: float | None
    decode_speedup: float | None
    identical_outputs: float | None
    speedup_over_transformers: float | None = None
    acceptance_by_position: tuple[float, ...] | None = None
    time_split_ms: dict[str, float] = field(default_factory=dict)
    differences: tuple[Difference, ...] = ()
    failures: tuple[Failure, ...] = ()
    draft_weights: Quantization | None = None
    steps_by_drafter: dict[str, int] = field(default_factory=dict)
    exit_confidence: float | None = None
    mean_layers: float | None = None
    skip: tuple[int, ...] = ()
    longest_answer: tuple[Step, ...] = ()
    intervals: dict[str, Bounds] = field(default_factory=dict)
    changes: dict[str, Bounds] = field(default_factory=dict)
    categories: dict[str, CategoryResult] = field(default_factory=dict)
    stderr: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the Pareto-optimal points: no other point is at least as high in both coordinates and higher in one."""
    return [
        index
        for index, point in enumerate(points)
        if not any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points)
    ]
