"""Measure exits and draft lengths, and recommend a setting."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from layerskip_core.config.evaluation import SweepConfig
from layerskip_core.config.options import Flag
from layerskip_core.config.resolution import EXACT, FAST, policy_text
from layerskip_core.errors import ConfigError, require

from .. import evaluation
from ..console import narrate
from ..loading import FreeThreads
from ..options import Format, Overwrite, ReportFolder, SavedReport, command

if TYPE_CHECKING:
    from layerskip_core.evaluation.results import RunRecord

# Keys of a policy by exit alone
_BY_EXIT = {"strategy", "exit_layer", "num_draft_tokens", "measured"}


@command
def sweep_exits(
    config: SweepConfig,
    format: Format = "table",
    output: ReportFolder = None,
    overwrite: Overwrite = False,
    log_samples: evaluation.LogSamples = False,
    saved: SavedReport = None,
    save: Annotated[
        bool,
        Flag(
            "Save the recommendation and the policies exact and fast with the model, for generate.",
            panel="Output",
        ),
    ] = False,
) -> None:
    """Measure every exit, alone and as the draft of self-speculative decoding, predict its speed,
    and recommend a setting.

    Example: layerskip sweep-exits --model layerskip-model --exits 4:12:2 --specs 4,8 --save
    """
    from layerskip_core.evaluation.measure.sweep import sweep
    from layerskip_core.evaluation.report.files import REPORT, output_folder
    from layerskip_core.evaluation.report.tables import has_scores
    from layerskip_core.evaluation.results import read_record

    require(output is not None or not log_samples, "log_samples", "used with `output`", "none")
    record = None if saved is None else read_record(saved, "sweep-exits")
    scored = bool(config.task.harness_tasks) if record is None else has_scores(record)
    require(
        not (save and scored),
        "save",
        "left out for tasks of lm-eval, whose sweep recommends nothing",
        config.task.task,
    )
    model = config.model if record is None else str(record.config["model"])
    holding = output_folder(output, "layerskip sweep-exits", REPORT, overwrite)
    with _settings_file(model) if save else nullcontext() as settings, holding as folder:
        if record is None:
            loaded, rows = evaluation.load(config, log_samples)
            if scored:
                from layerskip_core.harness.tasks import sweep_scores

                record = evaluation.watch(sweep_scores(loaded, rows, config))
            else:
                record = evaluation.watch(
                    sweep(loaded, rows, config), FreeThreads(config.machine.threads)
                )
        if settings is not None:  # first: the reader of stdout may go away
            _save(model, settings, record)
        evaluation.deliver_report(record, format, folder, saved)


@contextmanager
def _settings_file(model: str) -> Iterator[Path]:
    """The file that --save writes, whose folder it locks if it is the model's. Raises ConfigError
    for other kinds of models.
    """
    from layerskip_core.checkpoint.info import holds_model
    from layerskip_core.checkpoint.locate import EMBEDDED, ModelRef
    from layerskip_core.checkpoint.save import settle
    from layerskip_core.checkpoint.settings import info_of, settings_file, write_settings
    from layerskip_core.files import hold, require_writable

    path = Path(model)
    is_gguf = path.suffix == ".gguf" and path.is_file()
    if path.is_dir():
        settle(path)
    if model in EMBEDDED or not (is_gguf or holds_model(path)):
        needed = "a folder or a .gguf file, to save settings with it"
        raise ConfigError(
            f"`save` needs a `model` that is {needed}; got {model}: `layerskip import {model}` writes a folder"
        )
    reference = ModelRef.of(model)
    settings = settings_file(reference)
    is_own = settings.parent == Path(reference.path)
    with hold(settings.parent, "layerskip sweep-exits --save") if is_own else nullcontext():
        info = info_of(reference)
        if is_own:
            require_writable(settings, ConfigError)
        else:
            # Now, so that a cache that cannot be written is told before the sweep
            write_settings(settings, info)
        yield settings


def _save(model: str, settings: Path, record: "RunRecord") -> None:
    """Stores profile and recommendation in one write, and reports them."""
    from layerskip_core.checkpoint.info import INFO_FILE
    from layerskip_core.checkpoint.locate import ModelRef
    from layerskip_core.checkpoint.settings import info_of, write_settings

    info = info_of(ModelRef.of(model))
    info = replace(info, profile=record.profile or info.profile)
    advice = record.recommendation
    if advice is None:
        write_settings(settings, info)
        return
    exact = advice.policies[EXACT]
    # The exit of requests that leave the policy, such as --spec 4, and of `export`
    info = replace(info, exit_layer=None, num_draft_tokens=None, strategy="autoregressive")
    if exact["strategy"] == "self-speculative" and exact.keys() <= _BY_EXIT:
        info = replace(
            info,
            exit_layer=advice.exit_layer,
            num_draft_tokens=advice.num_draft_tokens,
            strategy=None,
        )
    write_settings(settings, replace(info, policies=advice.policies))
    where = "" if settings.name == INFO_FILE else f", in {settings}"
    if advice.pays:
        narrate(f"saved {policy_text(exact)} as the default of {model}{where}")
    else:
        narrate(f"saved plain decoding as the default of {model}{where}: {advice.reason}")
    narrate(f"policy {FAST}: {advice.fast_reason}")
