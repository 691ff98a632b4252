"""The record of a measurement: its settings, the machine and its results, as one JSON document."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, TypedDict, TypeVar

from ..config.decoding import DraftProfile
from ..config.policies import EXACT, Policy, require_lossless

Result = TypeVar("Result")


@dataclass(frozen=True)
class Recommendation:
    """The exit and draft length to decode with, and a sentence that says why. Both are None if another setting is recommended.

    `baseline_drift`: by how much the autoregressive time changed between the two measurements of a prompt, as a share (median
    over the prompts). `policies`: the recommendation as `exact`, and `fast` if there is one; `fast_reason` says why, or why
    not. Older versions wrote neither.
    """

    exit_layer: int | None
    num_draft_tokens: int | None
    speedup: float | None
    baseline_drift: float
    reason: str
    fast_reason: str = ""
    policies: dict[str, Policy] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_lossless(self.policies)

    @property
    def pays(self) -> bool:
        """Whether anything but plain decoding is recommended."""
        exact = self.policies.get(EXACT)
        return self.exit_layer is not None if exact is None else exact.strategy != "autoregressive"


@dataclass(frozen=True)
class PredictionError:
    """The cost model's error, predicted over measured speedup less 1, over `settings` settings."""

    settings: int
    median: float  # of the absolute values
    largest: float
    mean: float  # signed: above 0 the model was too optimistic


class Environment(TypedDict, total=False):
    """The keys of RunRecord.environment; older versions wrote fewer."""

    versions: dict[str, str]
    platform: str
    device: str
    device_name: str
    cpu: str
    cores: int | None
    threads: int
    dtype: str
    implementation: str
    llama_cpp: str
    notes: list[str]
    exit_blocks: dict[str, str]  # their features, by exit
    load_average: list[float] | None


@dataclass(frozen=True)
class Answered:
    """A prompt, its reference if it has one, and the answer of each result; None where that was not measured or failed."""

    prompt: str
    reference: str
    answers: tuple[str | None, ...]


@dataclass(frozen=True)
class RunRecord(Generic[Result]):
    """One run. `config` is complete: it holds the value that each default took. `answered` is not part of its document."""

    config: dict[str, Any]
    environment: dict[str, Any]
    results: tuple[Result, ...]
    recommendation: Recommendation | None = None  # of a sweep
    prediction_error: PredictionError | None = None  # of a sweep
    profile: DraftProfile | None = None  # of a sweep
    answered: tuple[Answered, ...] = ()

    def document(self) -> dict[str, Any]:
        """The record as plain values; every float in it is finite."""
        fields = asdict(replace(self, answered=()))
        del fields["answered"]
        optional = ("recommendation", "prediction_error", "profile")
        return {key: value for key, value in fields.items() if value is not None or key not in optional}
