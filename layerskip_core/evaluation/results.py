"""Outputs for a prompt, the result of each setting, the record of a run, and the journal to resume
it from.
"""

import json
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
from ..errors import LayerSkipError, plural, shown
from ..files import append_lines, parse_json, read_bytes, whole_lines, write_file

ANSWERS_FILE = "answers.jsonl"
JOURNAL = "unfinished.jsonl"
OUTPUTS = "outputs.jsonl"  # the journal's name after a complete measurement

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


class Bounds(NamedTuple):
    """The ends of a 95% interval over prompts and repeats, see metrics.py."""

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

    strategy: str = ""
    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # means over the prompts
    # Of a sweep: of the references, through the exit; None for strategies that draft
    perplexity: float | None = None
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
    # No other result is at least as good by the quality metric and as fast, and better in one of
    # the two
    pareto: bool = False
    # By the cost model, from `pass_times_ms`, over the plain steps timed with them
    predicted_speedup: float | None = None
    pass_times_ms: dict[str, float] = field(default_factory=dict)
    # The share of autoregressive tokens that the exit or low-bit copy predicts too
    agreement: float | None = None
    # Accepted share of compared drafts, by position in the round
    acceptance_by_position: tuple[float, ...] | None = None
    # Where a strategy that drafts departs from the autoregressive tokens
    differences: tuple[Difference, ...] = ()
    failures: tuple[Failure, ...] = ()
    # Of the copy whose first `exit_layer` layers draft; None: the model's own
    draft_weights: Quantization | None = None
    steps_by_drafter: dict[str, int] = field(default_factory=dict)  # `plain`: steps without drafts
    # Each token leaves at the first of `exits` with this confidence
    exit_confidence: float | None = None
    exits: tuple[int, ...] = ()
    mean_layers: float | None = None  # per token
    skip: tuple[int, ...] = ()  # the layers that draft-and-verify skips in drafts, by number
    # 95% intervals of metrics and of ratios, by name
    intervals: dict[str, Bounds] = field(default_factory=dict)
    # 95% intervals of metrics minus full depth's on the same prompts
    changes: dict[str, Bounds] = field(default_factory=dict)
    # Rows that would halve the speedup's interval; 0: only more repeats would
    rows_to_halve: int | None = None
    categories: dict[str, "Result"] = field(default_factory=dict)
    # Of lm-evaluation-harness's metrics, by name
    stderr: dict[str, float] = field(default_factory=dict)
    # Row count: of a category, or by task of lm-evaluation-harness
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
    # Of the speedup's 95% interval, on prompts that did not choose the setting
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


@dataclass(frozen=True)
class RunRecord:
    """One run."""

    config: dict[str, Any]  # with defaults filled in
    environment: dict[str, Any]  # the machine and the software
    results: tuple[Result, ...]
    recommendation: Recommendation | None = None  # of a sweep
    profile: DraftProfile | None = None  # of a sweep
    # Not part of the document:
    answered: tuple[Answered, ...] = ()
    # Lm-evaluation-harness's own records of rows, each with the index of its result
    samples: tuple[dict[str, Any], ...] = ()

    def document(self) -> dict[str, Any]:
        """The record as plain values; every float is finite."""
        fields = asdict(replace(self, answered=(), samples=()))
        return {
            key: value
            for key, value in fields.items()
            if key not in ("answered", "samples") and value is not None
        }


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
    parts = [] if result.strategy == "self-speculative" else [result.strategy]
    if result.exit_layer is not None:
        parts.append(f"{result.draft_weights or ''} exit {result.exit_layer}".strip())
    parts += [plural(result.num_draft_tokens, "draft")] if result.num_draft_tokens else []
    return ", ".join(parts)


def bandwidth_text(read: Mapping[str, float]) -> str:
    """The result of `cost_model.bandwidth` in words."""
    share = read["bytes_per_second"] / read["sum_bytes_per_second"]
    text = f"plain decoding reads {read['bytes_per_token'] / 1e6:.3g} MB per token at {read['bytes_per_second'] / 1e9:.1f} GB/s"
    # A sum that is slower, because other processes disturbed it or caches held the weights, is no
    # yardstick.
    return (
        text if share > 1 else f"{text}, {share:.0%} of what a plain sum of as many bytes reaches"
    )


def drafts_name(result: Result) -> str:
    """`6 drafts`, `6 int8 drafts`."""
    noun = "draft" if result.draft_weights is None else f"{result.draft_weights} draft"
    return plural(result.num_draft_tokens or 0, noun)


def read_record(
    file: str, command: Literal["sweep-exits", "bench"] | None = None, named: str = "`saved`"
) -> RunRecord:
    """Reads a results.json; if a `command` must have written it, with its answers. Raises
    LayerSkipError for other files.
    """
    data = read_bytes(Path(file), f"{named} {file}", LayerSkipError)
    kind = "a results.json"
    try:
        record = msgspec.json.decode(data, type=RunRecord)
        written = "bench" if "repeats" in record.config else "sweep-exits"
        if record.results and command in (None, written):
            sidecar = Path(file).with_name(ANSWERS_FILE)
            if command is None or not sidecar.exists():
                return record
            named = f"beside {named}"
            file = str(sidecar)
            kind = "an answers.jsonl"
            lines = read_bytes(sidecar, f"{named} {file}", LayerSkipError)
            return replace(
                record, answered=tuple(msgspec.json.Decoder(Answered).decode_lines(lines))
            )
        fault: object = f"its {len(record.results)} results are those of {written}"
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        fault = error
    what = command or "sweep-exits or bench"
    raise LayerSkipError(f"{named} {file} must be {kind} that {what} wrote: {fault}")


def require_outputs(outputs: Sequence[Output]) -> None:
    """Raises LayerSkipError if every prompt failed."""
    errors = [output.error for output in outputs if output.error is not None]
    if len(errors) == len(outputs):
        raise LayerSkipError(
            f"none of the {len(errors)} prompts could be answered; the first: {errors[0]}"
        )


class _Row(msgspec.Struct):
    repeat: int
    sample: int
    outputs: list[Output]


class Journal:
    """JSON lines: the run's settings, then all settings' outputs by prompt and repeat; `known`:
    outputs read at the start.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool) -> None:
        """Raises LayerSkipError if the journal to `resume` belongs to other settings, or cannot be
        read.
        """
        self._path = folder / JOURNAL
        head = json.dumps(settings, sort_keys=True).encode()
        lines = whole_lines(self._path, LayerSkipError) if resume else []
        if lines and lines[0].strip() != head:
            old, new = (
                _by_name(parse_json(line, f"`resume`: {self._path}", LayerSkipError))
                for line in (lines[0], head)
            )
            changed = (name for name in (old | new) if old.get(name) != new.get(name))
            differing = ", ".join(
                f"{name} {shown(old.get(name))} then, {shown(new.get(name))} now"
                for name in changed
            )
            anew = "give `overwrite` instead to start anew"
            raise LayerSkipError(
                f"`resume`: {self._path} belongs to another run ({differing}); {anew}"
            )
        rows = (
            parse_json(line, f"`resume`: {self._path}", LayerSkipError, _Row) for line in lines[1:]
        )
        self.known = {(row.repeat, row.sample): row.outputs for row in rows}
        write_file(self._path, b"".join(lines) or head + b"\n", LayerSkipError)

    def add(self, repeat: int, sample: int, outputs: Sequence[Output]) -> None:
        line = {
            "repeat": repeat,
            "sample": sample,
            "outputs": [asdict(output) for output in outputs],
        }
        append_lines(self._path, [line], LayerSkipError)


def _by_name(settings: dict[str, Any]) -> dict[str, Any]:
    """Flattens nested settings, with names in backquotes."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _by_name(value) if isinstance(value, dict) else {f"`{name}`": value}
    return flat
