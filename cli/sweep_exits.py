"""`layerskip sweep-exits`: which exit and draft length are fastest on this model and machine."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerskip_core.config.decoding import DraftProfile, SkipChoice
from layerskip_core.config.evaluation import SweepConfig
from layerskip_core.config.ranges import counts_text
from layerskip_core.errors import ConfigError

from . import console, evaluation, options
from .signature import command

if TYPE_CHECKING:
    from layerskip_core.evaluation.record import Recommendation
    from layerskip_core.evaluation.results import ExitResult


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
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
) -> None:
    """Measure every exit, alone and as the draft of self-speculative decoding, predict its speed, and recommend one.

    Example: layerskip sweep-exits --model layerskip-model --exits 4:12:2 --specs 4,8 --save
    """
    console.use_threads(config.machine.threads)
    from layerskip_core.evaluation.measure.sweep import sweep
    from layerskip_core.evaluation.output_folder import output_folder
    from layerskip_core.evaluation.report.saved_record import read_record
    from layerskip_core.evaluation.report.tables import sweep_table
    from layerskip_core.evaluation.results import ExitResult

    record = read_record(report.saved, ExitResult) if report.saved is not None else None
    target = config.model if record is None else str(record.config["model"])
    with _model_folder(target) if save else nullcontext(), output_folder(report.output, "layerskip sweep-exits") as folder:
        if record is None:
            loaded, rows = evaluation.load(config)
            record = evaluation.watch(sweep(loaded, rows, config))
        evaluation.deliver(record, sweep_table(record), report.format, folder)
        if save and record.recommendation is not None:
            _save(target, record.recommendation, record.profile)
        if save:
            _save_skip(target, record.results)


def _save_skip(model: str, results: "Sequence[ExitResult]") -> None:
    """Stores the layers that drafts skip, those of the fastest such row, for --strategy draft-and-verify."""
    from layerskip_core.checkpoint.info import read_info
    from layerskip_core.checkpoint.save import write_info

    rows = [result for result in results if result.skip and result.num_draft_tokens is not None]
    if not rows:
        return
    best = max(rows, key=lambda result: result.speedup or 0.0)
    skip = SkipChoice(best.skip, best.num_draft_tokens or 1)
    write_info(model, replace(read_info(model), skip=skip))
    console.narrate(
        f"saved --skip {counts_text(skip.layers)} and {skip.num_draft_tokens} draft tokens for --strategy draft-and-verify"
    )


@contextmanager
def _model_folder(model: str) -> Iterator[None]:
    """Holds the lock of the folder that --save writes to. Raises ConfigError if the model is not a folder."""
    from layerskip_core.checkpoint.info import INFO_FILE, holds_model, read_info
    from layerskip_core.checkpoint.swap import settle
    from layerskip_core.storage.locks import hold
    from layerskip_core.storage.writing import require_writable

    if Path(model).is_dir():
        settle(model)
    if not holds_model(model):
        raise ConfigError(f"`save` needs a `model` that is a folder, to write its layerskip.json; got {model}")
    with hold(model, "layerskip sweep-exits --save"):
        read_info(model)
        require_writable(Path(model) / INFO_FILE, ConfigError)
        yield


def _save(model: str, advice: "Recommendation", profile: DraftProfile | None) -> None:
    """Stores the policies, what is known of drafting, and the recommended exit and draft length for versions without policies.

    What these versions do not know, such as low-bit drafts, is plain decoding for them; so is a recommendation of it.
    """
    from layerskip_core.checkpoint.info import read_info
    from layerskip_core.checkpoint.save import write_info
    from layerskip_core.config.policies import EXACT, FAST, Policy

    exact = advice.policies.get(EXACT)
    known = advice.exit_layer is not None and (exact is None or exact.is_exit_drafting)
    exit_layer, drafts = (advice.exit_layer, advice.num_draft_tokens) if known else (None, None)
    info = replace(read_info(model), exit_layer=exit_layer, num_draft_tokens=drafts, policies=advice.policies)
    info = replace(info, profile=profile or info.profile)
    write_info(model, replace(info, strategy=None if known else "autoregressive"))
    if not advice.pays:
        console.narrate(f"saved plain decoding as the default of {model}: {advice.reason}")
    else:
        console.narrate(f"saved {exact or Policy('self-speculative', exit_layer, drafts)} as the default of {model}")
    if advice.fast_reason:
        console.narrate(f"policy {FAST}: {advice.fast_reason}")
