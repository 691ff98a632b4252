"""`layerskip sweep-exits`: which exit and draft length are fastest on this model and machine."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerskip_core.config.checks import require
from layerskip_core.config.decoding import EXACT, FAST, DecodingOptions, Policy, is_exit_drafting, policy_text
from layerskip_core.config.evaluation import SweepConfig
from layerskip_core.config.options import OUTPUT, counts_text
from layerskip_core.errors import ConfigError

from .. import console, evaluation, options
from ..loading import use_threads
from ..pictures import front
from ..signature import command

if TYPE_CHECKING:
    from layerskip_core.checkpoint.info import CheckpointInfo
    from layerskip_core.evaluation.results import Recommendation, Result, RunRecord


@command
def sweep_exits(
    *,
    config: SweepConfig,
    report: options.Report,
    save: Annotated[
        bool,
        typer.Option(
            "--save",
            help="Write the recommendation and the policies exact and fast into the model's layerskip.json.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
) -> None:
    """Measure every exit, alone and as the draft of self-speculative decoding, predict its speed, and recommend one.

    Example: layerskip sweep-exits --model layerskip-model --exits 4:12:2 --specs 4,8 --save
    """
    use_threads(config.machine.threads)
    from layerskip_core.evaluation.measure.sweep import sweep
    from layerskip_core.evaluation.output_folder import output_folder
    from layerskip_core.evaluation.report.documents import with_answers
    from layerskip_core.evaluation.report.points import points_of
    from layerskip_core.evaluation.report.tables import has_scores, score_table, sweep_table
    from layerskip_core.evaluation.results import read_record

    record = with_answers(read_record(report.saved, "sweep-exits"), report.saved) if report.saved is not None else None
    scored = has_scores(record) if record is not None else bool(config.task.harness_tasks)
    require(not (save and scored), "save", "left out for tasks of lm-eval, whose sweep recommends nothing", config.task.task)
    target = config.model if record is None else str(record.config["model"])
    with _model_folder(target) if save else nullcontext(), output_folder(report.output, "layerskip sweep-exits") as folder:
        if record is None and scored:
            loaded, tasks = evaluation.load_scored(config)
            from layerskip_core.harness.measure import sweep_scores  # needs lm-eval

            record = evaluation.watch(sweep_scores(loaded, tasks, config))
        elif record is None:
            loaded, rows = evaluation.load(config)
            record = evaluation.watch(sweep(loaded, rows, config))
        elif save:
            _require_of_model(target, record)
        if save:  # first: the reader of stdout may go away
            _save(target, record)
        points = points_of(record)
        picture = None if points is None else partial(front, points)
        table = score_table(record) if scored else sweep_table(record)
        evaluation.deliver(record, [table], report.format, folder, picture)


@contextmanager
def _model_folder(model: str) -> Iterator[None]:
    """Holds the lock of the folder that --save writes to. Raises ConfigError if the model is not a folder."""
    from layerskip_core.checkpoint.info import INFO_FILE, holds_model, read_info
    from layerskip_core.checkpoint.save import settle
    from layerskip_core.files import hold, require_writable

    if Path(model).is_dir():
        settle(model)
    if not holds_model(model):
        raise ConfigError(f"`save` needs a `model` that is a folder, to write its layerskip.json; got {model}")
    with hold(model, "layerskip sweep-exits --save"):
        read_info(model)
        require_writable(Path(model) / INFO_FILE, ConfigError)
        yield


def _save(model: str, record: "RunRecord") -> None:
    """Stores in layerskip.json, in one step, what the sweep found, and says what that is."""
    from layerskip_core.checkpoint.info import read_info
    from layerskip_core.checkpoint.save import write_info

    advice, skip = record.recommendation, _skip_of(record.results)
    info = read_info(model)
    if advice is not None:
        info = _advised(info, advice)
    write_info(model, replace(info, profile=record.profile or info.profile, skip=skip or info.skip))
    if advice is not None:
        _narrate_advice(model, advice)
    if skip is not None:
        layers = counts_text(skip["skip"])
        console.narrate(f"saved --skip {layers} and {skip['num_draft_tokens']} draft tokens for --strategy draft-and-verify")


def _advised(info: "CheckpointInfo", advice: "Recommendation") -> "CheckpointInfo":
    """With the policies, and with the recommended exit and draft length for versions that know no policies.

    What these versions do not know, such as low-bit drafts, is plain decoding for them; so is a recommendation of it.
    """
    exit_layer, drafts = _known_exit(advice)
    strategy = "autoregressive" if exit_layer is None else None
    return replace(info, exit_layer=exit_layer, num_draft_tokens=drafts, policies=advice.policies, strategy=strategy)


def _known_exit(advice: "Recommendation") -> tuple[int | None, int | None]:
    """The exit and the draft length, if they say all of the recommendation."""
    exact = advice.policies.get(EXACT)
    known = advice.exit_layer is not None and (exact is None or is_exit_drafting(exact))
    return (advice.exit_layer, advice.num_draft_tokens) if known else (None, None)


def _exact_of(advice: "Recommendation") -> Policy:
    if EXACT in advice.policies:
        return advice.policies[EXACT]
    exit_layer, drafts = _known_exit(advice)
    return {"strategy": "self-speculative", "exit_layer": exit_layer or 1, "num_draft_tokens": drafts or 1}


def _narrate_advice(model: str, advice: "Recommendation") -> None:
    if advice.pays:
        console.narrate(f"saved {policy_text(_exact_of(advice))} as the default of {model}")
    else:
        console.narrate(f"saved plain decoding as the default of {model}: {advice.reason}")
    if advice.fast_reason:
        console.narrate(f"policy {FAST}: {advice.fast_reason}")


def _skip_of(results: "Sequence[Result]") -> DecodingOptions | None:
    """The layers that drafts skip, those of the fastest such row, for --strategy draft-and-verify."""
    rows = [result for result in results if result.skip and result.num_draft_tokens is not None]
    if not rows:
        return None
    best = max(rows, key=lambda result: result.speedup or 0.0)
    return {"skip": best.skip, "num_draft_tokens": best.num_draft_tokens or 1}


def _require_of_model(model: str, record: "RunRecord") -> None:
    """Raises ConfigError for results of a deeper model than the one in the folder, which could not decode with them."""
    from layerskip_core.checkpoint.folder import CONFIG_FILE, read_settings

    layers = read_settings(model, CONFIG_FILE).get("num_hidden_layers")  # an adapter's folder has none
    advice, skip = record.recommendation, _skip_of(record.results)
    named = [*skip["skip"]] if skip is not None else []
    for policy in advice.policies.values() if advice is not None else ():
        named += [*policy.get("exits", ()), *policy.get("skip", ()), policy.get("exit_layer", 0)]
    deepest = max([*named, (advice.exit_layer or 0) if advice is not None else 0])
    if layers is not None and deepest > layers:
        raise ConfigError(f"`saved` has settings with layer {deepest}, but {model} has {layers} layers")
