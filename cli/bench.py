"""`layerskip bench`: autoregressive, early-exit and self-speculative decoding side by side."""

from typing import Annotated, cast

import typer

from layerskip_core.config.checks import require, require_choice, require_given
from layerskip_core.config.evaluation import BenchConfig, TaskConfig
from layerskip_core.config.packing import DType
from layerskip_core.config.ranges import parse_counts

from . import console, evaluation


def bench(
    model: evaluation.Model = "embedded",
    task: evaluation.TaskName = None,
    data: evaluation.Source = None,
    split: evaluation.Split = "test",
    samples: evaluation.Samples = 20,
    exit_layer: Annotated[int | None, typer.Option("--exit", help="Exit and draft layers. [default: the checkpoint's]")] = None,
    spec: Annotated[int | None, typer.Option("--spec", help="Drafted tokens a round. [default: the checkpoint's]")] = None,
    strategies: Annotated[
        str, typer.Option(help="Ways of decoding; those left out are not run.")
    ] = "autoregressive,early-exit,self-speculative",
    max_new_tokens: evaluation.MaxNewTokens = None,
    batch_size: evaluation.BatchSize = 1,
    timed: evaluation.Timed = None,
    repeats: Annotated[int, typer.Option(help="How often everything is measured; medians are reported.")] = 3,
    baselines: Annotated[
        str,
        typer.Option(help="Besides: transformers,assistant-early-exit,prompt-lookup,draft-model,no-reuse, or some of them."),
    ] = "",
    draft_model: Annotated[str | None, typer.Option(help="The model that the baseline draft-model drafts with.")] = None,
    prompt_column: evaluation.PromptColumn = None,
    completion_column: evaluation.CompletionColumn = None,
    metric: evaluation.Metric = None,
    shots: evaluation.Shots = None,
    template: evaluation.Template = None,
    pass_k: evaluation.PassK = "1",
    problem_samples: evaluation.ProblemSamples = 1,
    temperature: evaluation.Temperature = 0.0,
    allow_code_execution: evaluation.AllowCode = False,
    format: evaluation.Format = "table",
    output: evaluation.Output = None,
    saved: evaluation.Saved = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that was interrupted in --output.")] = False,
    seed: evaluation.Seed = 0,
    device: console.Device = "auto",
    dtype: console.Precision = "auto",
    quantize: console.Quantize = None,
    draft_weights: console.DraftWeights = None,
    draft_vocab: console.DraftVocab = 0,
    exact: console.Exact = False,
    threads: console.Threads = 0,
) -> None:
    """Compare three ways of decoding, and baselines, on one task: quality, acceptance, speed, latency and memory.

    Example: layerskip bench --exit 8 --spec 6 --baselines transformers,no-reuse --output results
    """
    require_choice(format, "format", evaluation.FORMATS)
    require_given("output", output)
    require_given("saved", saved)
    require(output is not None or not resume, "resume", "used with the `output` of the interrupted run", "none")
    config = BenchConfig(
        model=model,
        task=TaskConfig(
            task, data, split, samples, seed, max_new_tokens, prompt_column, completion_column, metric, shots, template,
            parse_counts(pass_k, "pass_k"), problem_samples, temperature, allow_code_execution,
        ),
        exit_layer=exit_layer,
        num_draft_tokens=spec,
        strategies=_names(strategies),
        batch_size=batch_size,
        timed=timed,
        repeats=repeats,
        baselines=_names(baselines),
        draft_model=draft_model,
        device=device,
        dtype=cast(DType, dtype),
        threads=threads,
        packing=console.packing(quantize, draft_weights, draft_vocab, exact),
    )  # fmt: skip
    console.use_threads(threads)
    from layerskip_core.evaluation.measure.bench import bench as run_bench
    from layerskip_core.evaluation.measure.journal import close
    from layerskip_core.evaluation.output_folder import output_folder
    from layerskip_core.evaluation.report.saved_record import read_record
    from layerskip_core.evaluation.report.tables import bench_table
    from layerskip_core.evaluation.results import BenchResult

    with output_folder(output, "layerskip bench") as folder:
        if saved is not None:
            record = read_record(saved, BenchResult)
        else:
            loaded, rows = evaluation.load(config)
            record = evaluation.watch(run_bench(loaded, rows, config, folder, resume))
        evaluation.deliver(record, bench_table(record), format, folder)
        if folder is not None and saved is None:
            close(folder)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
