"""Measure exits and draft lengths, and recommend a setting."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from layerskip_core.config.decoding import DecodingOptions
from layerskip_core.config.evaluation import SweepConfig
from layerskip_core.config.options import Flag, counts_text
from layerskip_core.config.resolution import EXACT, FAST, policy_text
from layerskip_core.errors import ConfigError, require

from .. import evaluation
from ..console import narrate
from ..options import Format, Overwrite, ReportFolder, SavedReport, command

if TYPE_CHECKING:
    from layerskip_core.evaluation.results import RunRecord

_BY_EXIT = {"strategy", "exit_layer", "num_draft_tokens", "draft_confidence", "measured"}  # of a policy without more


@command
def sweep_exits(
    config: SweepConfig,
    format: Format = "table",
    output: ReportFolder = None,
    overwrite: Overwrite = False,
    log_samples: evaluation.LogSamples = False,
    saved: SavedReport = None,
    save: Annotated[
        bool, Flag("Write the recommendation and the policies exact and fast into the model's layerskip.json.", panel="Output")
    ] = False,
) -> None:
    """Measure every exit, alone and as the draft of self-speculative decoding, predict its speed, and recommend one.

    Example: layerskip sweep-exits --model layerskip-model --exits 4:12:2 --specs 4,8 --save
    """
    from layerskip_core.evaluation.measure.sweep import sweep
    from layerskip_core.evaluation.report import REPORT, output_folder
    from layerskip_core.evaluation.report.tables import has_scores
    from layerskip_core.evaluation.results import read_record

    require(output is not None or not log_samples, "log_samples", "used with `output`", "none")
    record = None if saved is None else read_record(saved, "sweep-exits")
    scored = bool(config.task.harness_tasks) if record is None else has_scores(record)
    require(not (save and scored), "save", "left out for tasks of lm-eval, whose sweep recommends nothing", config.task.task)
    model = config.model if record is None else str(record.config["model"])
    holding = output_folder(output, "layerskip sweep-exits", REPORT, overwrite)
    with _model_folder(model) if save else nullcontext(), holding as folder:
        if record is None:
            loaded, rows = evaluation.load(config, log_samples)
            if scored:
                from layerskip_core.harness.tasks import sweep_scores

                record = evaluation.watch(sweep_scores(loaded, rows, config))
            else:
                record = evaluation.watch(sweep(loaded, rows, config))
        if save:  # first: the reader of stdout may go away
            _save(model, record)
        evaluation.deliver_report(record, format, folder, saved)


@contextmanager
def _model_folder(model: str) -> Iterator[None]:
    """Holds the lock of the folder that --save writes to. Raises ConfigError if the model is no folder."""
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
    """Stores the findings in layerskip.json, in one step, and reports them; of Draft & Verify the fastest row."""
    from layerskip_core.checkpoint.info import read_info
    from layerskip_core.checkpoint.save import write_info

    advice, skip, info, lines = record.recommendation, None, read_info(model), []
    skipping = [result for result in record.results if result.skip and result.num_draft_tokens is not None]
    if skipping:
        fastest = max(skipping, key=lambda result: result.speedup or 0.0)
        skip = DecodingOptions(skip=fastest.skip, num_draft_tokens=fastest.num_draft_tokens or 1)
    info = replace(info, profile=record.profile or info.profile, skip=skip or info.skip)
    if advice is not None:
        exact = advice.policies[EXACT]
        by_exit = exact["strategy"] == "self-speculative" and exact.keys() <= _BY_EXIT
        exit_layer, count = (advice.exit_layer, advice.num_draft_tokens) if by_exit else (None, None)
        strategy = "autoregressive" if exit_layer is None else None
        info = replace(info, exit_layer=exit_layer, num_draft_tokens=count, strategy=strategy, policies=advice.policies)
        found, why = (policy_text(exact), "") if advice.pays else ("plain decoding", f": {advice.reason}")
        lines = [f"saved {found} as the default of {model}{why}", f"policy {FAST}: {advice.fast_reason}"]
    if skip is not None:
        layers, count = counts_text(skip["skip"]), skip["num_draft_tokens"]
        lines += [f"saved --skip {layers} and {count} draft tokens for --strategy draft-and-verify"]
    write_info(model, info)
    for line in lines:
        narrate(line)
