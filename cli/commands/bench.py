"""Compare decoding strategies on the same prompts."""

from typing import Annotated

from layerskip_core.config.evaluation import BenchConfig, with_llama_cpp
from layerskip_core.config.options import Flag
from layerskip_core.errors import require

from .. import console, evaluation
from ..loading import FreeThreads
from ..options import Format, Overwrite, ReportFolder, SavedReport, command

_NO_EXITS = "no exit was trained, so exits are left out; `exit_layer` or `strategies` asks for them"


@command
def bench(
    config: BenchConfig,
    format: Format = "table",
    output: ReportFolder = None,
    overwrite: Overwrite = False,
    log_samples: evaluation.LogSamples = False,
    saved: SavedReport = None,
    resume: Annotated[
        bool, Flag("Continue the interrupted run in --output.", panel="Output")
    ] = False,
) -> None:
    """Compare the decoding strategies, and baselines, on one task: quality, acceptance, speed, time
    to first token, memory.

    Example: layerskip bench --exit 8 --spec 6 --baselines transformers,no-reuse --output results
    """
    scored = bool(config.task.harness_tasks)
    require(output is not None or not log_samples, "log_samples", "used with `output`", "none")
    require(
        output is not None or not resume,
        "resume",
        "used with the `output` of the interrupted run",
        "none",
    )
    require(not (scored and resume), "resume", "left out for tasks of lm-eval", config.task.task)
    from layerskip_core.evaluation.journal import JOURNAL, OUTPUTS
    from layerskip_core.evaluation.measure.bench import bench as run_bench
    from layerskip_core.evaluation.measure.bench import suiting_strategies
    from layerskip_core.evaluation.report.files import REPORT, output_folder
    from layerskip_core.evaluation.results import read_record

    with output_folder(output, "layerskip bench", REPORT, overwrite, resume) as folder:
        if saved is not None:
            record = read_record(saved, "bench")
        else:
            loaded, rows = evaluation.load(config, log_samples)
            if not config.strategies and "early-exit" not in suiting_strategies(loaded, config):
                console.narrate(_NO_EXITS)
            if scored:
                from layerskip_core.harness.tasks import bench_scores

                record = evaluation.watch(bench_scores(loaded, rows, config))
            else:
                fixed = with_llama_cpp(config.baselines)  # whose number of threads stays as it is
                free_threads = None if fixed else FreeThreads(config.machine.threads)
                record = evaluation.watch(
                    run_bench(loaded, rows, config, folder, resume), free_threads
                )
        evaluation.deliver_report(record, format, folder, saved)
        if folder is not None and saved is None and not scored:
            # A complete run cannot be resumed, and its answers can be read
            (folder / JOURNAL).replace(folder / OUTPUTS)
