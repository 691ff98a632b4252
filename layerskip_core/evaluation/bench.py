"""Autoregressive, early-exit and self-speculative decoding side by side: the same prompts, in one process, interleaved."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

from ..checkpoint import LoadedModel
from ..config import BenchConfig, DecodingConfig, Strategy, require_exit_layer
from .generation import Failure, Outputs, Progress, differences, finite, measure_interleaved
from .metrics import Difference, ReferenceLosses
from .record import RunRecord, environment
from .tasks import Task


@dataclass(frozen=True)
class BenchResult:
    """One strategy. Rates and times are medians over the repeats; metrics, drafts and outputs are the first repeat's, for
    greedy decoding repeats itself.

    `speedup` compares the total generation time by new token, prefill included on both sides, with the autoregressive one of
    the same repeat; `decode_speedup` the same behind the first token. `identical_outputs` is the share of samples whose tokens
    equal the autoregressive ones, and `differences` where those of self-speculative decoding part from them. None: it does not
    apply (no drafts, a single token), or this system cannot measure it.
    """

    strategy: Strategy
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
    identical_outputs: float
    differences: tuple[Difference, ...] = ()
    failures: tuple[Failure, ...] = ()


def bench(loaded: LoadedModel, task: Task, config: BenchConfig) -> Iterator[Progress | RunRecord[BenchResult]]:
    """Yields progress, then the record.

    Raises:
        ConfigError: the exit is outside the model.
        LayerSkipError: no prompt could be answered.
    """
    config = _resolved(loaded, task, config)
    loaded = task.prepared(loaded)
    settings = [task.decoding(setting) for setting in _settings(config, task.max_new_tokens)]
    machine = environment(loaded)
    losses = ReferenceLosses(0, {})
    if task.text is not None:
        losses = sum(task.losses(loaded, [_depth(setting, loaded) for setting in settings]), losses)
    outputs = yield from measure_interleaved(loaded, task.examples, settings, config.repeats)
    baseline = outputs[0]
    results = []
    for setting, repeats in zip(settings, outputs, strict=True):
        comparable = setting.strategy == "self-speculative" and not setting.sampling.temperature
        parted = differences(loaded, task.examples, repeats[0], baseline[0]) if comparable else ()
        metrics = task.score(repeats[0].texts, losses.perplexity(_depth(setting, loaded)))
        results.append(bench_result(setting, repeats, baseline, metrics, parted))
    yield RunRecord(asdict(config), machine, tuple(results))


def bench_result(
    setting: DecodingConfig,
    repeats: Sequence[Outputs],
    baseline: Sequence[Outputs],
    metrics: dict[str, float],
    parted: tuple[Difference, ...] = (),
) -> BenchResult:
    """The figures of one strategy, from its outputs and the autoregressive ones of the same repeats."""
    first = repeats[0]
    speculative = setting.strategy == "self-speculative"
    pairs = list(zip(baseline, repeats, strict=True))
    return BenchResult(
        strategy=setting.strategy,
        exit_layer=setting.exit_layer,
        num_draft_tokens=setting.num_draft_tokens if speculative else None,
        metrics=metrics,
        acceptance_rate=first.stats.acceptance_rate if speculative else None,
        mean_accepted_tokens=first.stats.mean_accepted_tokens if speculative else None,
        tokens_per_second=_median(1 / one.seconds_per_token for one in repeats),
        time_per_token_ms={
            "p50": _median(1000 * one.token_seconds(0.50) for one in repeats),
            "p95": _median(1000 * one.token_seconds(0.95) for one in repeats),
        },
        ttft_ms=_median(1000 * one.first_token_seconds for one in repeats),
        peak_memory_mb=max((one.peak_memory_mb for one in repeats if one.peak_memory_mb is not None), default=None),
        speedup=_median(base.seconds_per_token / one.seconds_per_token for base, one in pairs),
        decode_speedup=_median(base.decode_seconds_per_token / one.decode_seconds_per_token for base, one in pairs),
        identical_outputs=first.identical_outputs(baseline[0]),
        differences=parted,
        failures=first.failures,
    )


def _resolved(loaded: LoadedModel, task: Task, config: BenchConfig) -> BenchConfig:
    """The config with its defaults filled in."""
    exit_layer, num_draft_tokens = loaded.recommended()
    if config.exit_layer is not None:
        exit_layer = config.exit_layer
    require_exit_layer(exit_layer, loaded.depth.num_layers)
    num_draft_tokens = config.num_draft_tokens or num_draft_tokens
    return replace(config, task=task.config, exit_layer=exit_layer, num_draft_tokens=num_draft_tokens)


def _settings(config: BenchConfig, max_new_tokens: int) -> list[DecodingConfig]:
    """The three strategies, the baseline first."""
    exit_layer, drafts = config.exit_layer, config.num_draft_tokens
    assert exit_layer is not None and drafts is not None
    return [
        DecodingConfig("autoregressive", max_new_tokens=max_new_tokens),
        DecodingConfig("early-exit", exit_layer, max_new_tokens=max_new_tokens),
        DecodingConfig("self-speculative", exit_layer, drafts, max_new_tokens),
    ]


def _depth(setting: DecodingConfig, loaded: LoadedModel) -> int:
    """How many layers an answer comes from."""
    early = setting.strategy == "early-exit" and setting.exit_layer is not None
    return setting.exit_layer if early and setting.exit_layer else int(loaded.depth.num_layers)


def _median(values: Iterable[float]) -> float | None:
    return finite(median(values))
