"""The three ways of decoding and baselines side by side: the same prompts, in one process, interleaved."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

from ...checkpoint.loaded import Decoder
from ...config.checks import require_exit_layer
from ...config.decoding import DecodingConfig
from ...config.evaluation import BenchConfig
from ..metrics import Difference, ReferenceLosses
from ..outputs import Failure, Outputs, finite
from ..report.record import RunRecord, environment
from ..tasks import Task
from .baselines import load_baselines
from .batches import answer_together, timed_by_default, timed_examples
from .journal import Journal
from .runner import Progress, Setting, differences, drafts_tokens, measure_interleaved


@dataclass(frozen=True)
class BenchResult:
    """One strategy or baseline. Rates and times are medians over the repeats; metrics, drafts and outputs are those of the
    batches where there are any, else of the first repeat, for greedy decoding repeats itself.

    `speedup` compares the total generation time by new token, prefill included on both sides, with the autoregressive one of
    the same repeat, `speedup_over_transformers` with that of transformers' generate; `decode_speedup` compares the time behind
    the first token. `identical_outputs` is the share of samples whose tokens equal the autoregressive ones, and `differences`
    where those of drafting strategies part from them. `acceptance_by_position`: of the drafts compared at each position of a
    round, how many were accepted. `time_split_ms`: milliseconds a token by what they went to. None: it does not apply (no
    drafts, a single token, no such baseline), or cannot be measured.
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
    identical_outputs: float
    speedup_over_transformers: float | None = None
    acceptance_by_position: tuple[float, ...] | None = None
    time_split_ms: dict[str, float] = field(default_factory=dict)
    differences: tuple[Difference, ...] = ()
    failures: tuple[Failure, ...] = ()


def bench(
    loaded: Decoder,
    task: Task,
    config: BenchConfig,
    folder: Path | None = None,
    resume: bool = False,
) -> Iterator[Progress | RunRecord[BenchResult]]:
    """Yields progress, then the record. With a `folder` every prompt measured is noted there, for a later run to resume.

    With a batch size all prompts are answered in batches, for quality, and only some of them measured, alone as ever.

    Raises:
        ConfigError: the exit is outside the model, or a baseline cannot run this model.
        CheckpointError: a baseline's model cannot be read.
        LayerSkipError: no prompt could be answered, or the folder holds a run of other settings to resume.
    """
    config = _resolved(loaded, task, config)
    sampled = task.config.temperature > 0
    loaded = task.prepared(loaded)
    own = [task.decoding(setting) for setting in _settings(config, task.max_new_tokens)]
    settings: list[Setting] = [*own, *load_baselines(loaded, config, own[0])]
    machine = environment(loaded)
    journal = Journal(folder, asdict(config), resume, len(settings), loaded.backend.vocab_size) if folder is not None else None
    losses = ReferenceLosses(0, {})
    if task.text is not None:
        losses = sum(task.losses(loaded, [_depth(setting, loaded) for setting in own]), losses)
    together = None
    if config.batch_size > 1:
        together = yield from answer_together(loaded, task.examples, settings, config.batch_size, journal)
    outputs: list[list[Outputs]] = [[] for _ in settings]
    if examples := timed_examples(task.examples, config.timed):
        outputs = yield from measure_interleaved(loaded, examples, settings, config.repeats, journal)
    answers = together or [repeats[0] for repeats in outputs]
    transformers = next((found for one, found in zip(settings, outputs, strict=True) if one.strategy == "transformers"), None)
    results = []
    for setting, mine, times in zip(settings, answers, outputs, strict=True):
        comparable = setting.strategy != "early-exit" and not sampled
        parted = differences(loaded, task.examples, mine, answers[0]) if comparable else ()
        perplexity = losses.perplexity(_depth(setting, loaded)) if setting in own else None  # of this engine's own passes
        metrics = task.score(mine.texts, perplexity)
        results.append(bench_result(setting, times, outputs[0], metrics, parted, transformers, (mine, answers[0])))
    yield RunRecord(asdict(config) | {"quality_metric": task.quality_metric}, machine, tuple(results))


def bench_result(
    setting: Setting,
    repeats: Sequence[Outputs],
    baseline: Sequence[Outputs],
    metrics: dict[str, float],
    parted: tuple[Difference, ...] = (),
    transformers: Sequence[Outputs] | None = None,
    answers: tuple[Outputs, Outputs] | None = None,
) -> BenchResult:
    """The figures of one strategy, from its outputs and the autoregressive ones of the same repeats, ours and transformers'.

    `answers`: its own and the autoregressive ones that were found apart from the measurements.
    """
    first, expected = answers or (repeats[0], baseline[0])
    drafts = drafts_tokens(setting)
    pairs = list(zip(baseline, repeats, strict=True))
    peers = list(zip(transformers or (), repeats, strict=False))
    return BenchResult(
        strategy=setting.strategy,
        exit_layer=setting.exit_layer,
        num_draft_tokens=setting.num_draft_tokens if drafts else None,
        metrics=metrics,
        acceptance_rate=first.stats.acceptance_rate if drafts else None,
        mean_accepted_tokens=first.stats.mean_accepted_tokens if drafts else None,
        tokens_per_second=_median(1 / one.seconds_per_token for one in repeats),
        time_per_token_ms={
            "p50": _median(1000 * one.token_seconds(0.50) for one in repeats),
            "p95": _median(1000 * one.token_seconds(0.95) for one in repeats),
        },
        ttft_ms=_median(1000 * one.first_token_seconds for one in repeats),
        peak_memory_mb=max((one.peak_memory_mb for one in repeats if one.peak_memory_mb is not None), default=None),
        speedup=_median(base.seconds_per_token / one.seconds_per_token for base, one in pairs),
        decode_speedup=_median(base.decode_seconds_per_token / one.decode_seconds_per_token for base, one in pairs),
        identical_outputs=first.identical_outputs(expected),
        speedup_over_transformers=_median(base.seconds_per_token / one.seconds_per_token for base, one in peers),
        acceptance_by_position=first.acceptance_by_position if drafts else None,
        time_split_ms=repeats[0].time_split_ms if repeats else {},
        differences=parted,
        failures=first.failures,
    )


def _resolved(loaded: Decoder, task: Task, config: BenchConfig) -> BenchConfig:
    """The config with its defaults filled in."""
    exit_layer, num_draft_tokens = loaded.recommended()
    if config.exit_layer is not None:
        exit_layer = config.exit_layer
    require_exit_layer(exit_layer, loaded.backend.num_layers)
    num_draft_tokens = config.num_draft_tokens or num_draft_tokens
    config = replace(config, exit_layer=exit_layer, num_draft_tokens=num_draft_tokens)
    return replace(config, task=task.config, timed=timed_by_default(config))


def _settings(config: BenchConfig, max_new_tokens: int) -> list[DecodingConfig]:
    """The strategies, the baseline first."""
    exit_layer, drafts = config.exit_layer, config.num_draft_tokens
    assert exit_layer is not None and drafts is not None
    every = [
        DecodingConfig("autoregressive", max_new_tokens=max_new_tokens),
        DecodingConfig("early-exit", exit_layer, max_new_tokens=max_new_tokens),
        DecodingConfig("self-speculative", exit_layer, drafts, max_new_tokens),
    ]
    return [setting for setting in every if setting.strategy in config.strategies]


def _depth(setting: DecodingConfig, loaded: Decoder) -> int:
    """How many layers an answer comes from."""
    early = setting.strategy == "early-exit" and setting.exit_layer is not None
    return setting.exit_layer if early and setting.exit_layer else int(loaded.backend.num_layers)


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return finite(median(known)) if known else None
