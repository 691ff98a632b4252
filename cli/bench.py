"""`layerskip bench`: autoregressive, early-exit and self-speculative decoding side by side."""

from typing import Annotated, cast

import typer

from layerskip_core.config import BenchConfig, DType, TaskConfig, parse_counts, require, require_choice

from .console import (
    Device,
    DraftVocab,
    DraftWeights,
    Exact,
    Precision,
    Quantize,
    Threads,
    narrate,
    packing,
    use_threads,
)
from .evaluation import (
    FORMATS,
    AllowCode,
    CompletionColumn,
    Format,
    MaxNewTokens,
    Metric,
    Model,
    Output,
    PassK,
    ProblemSamples,
    PromptColumn,
    RemoteCode,
    Samples,
    Saved,
    Seed,
    Shots,
    Source,
    Split,
    TaskName,
    Temperature,
    Template,
    deliver,
    watch,
)


def bench(
    model: Model = "embedded",
    task: TaskName = None,
    data: Source = None,
    split: Split = "test",
    samples: Samples = 20,
    exit_layer: Annotated[int | None, typer.Option("--exit", help="Exit and draft layers. [default: the checkpoint's]")] = None,
    spec: Annotated[int | None, typer.Option("--spec", help="Drafted tokens a round. [default: the checkpoint's]")] = None,
    max_new_tokens: MaxNewTokens = None,
    repeats: Annotated[int, typer.Option(help="How often everything is measured; medians are reported.")] = 3,
    baselines: Annotated[
        str,
        typer.Option(help="Besides: transformers,assistant-early-exit,prompt-lookup,draft-model,no-reuse, or some of them."),
    ] = "",
    draft_model: Annotated[str | None, typer.Option(help="The model that the baseline draft-model drafts with.")] = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    metric: Metric = None,
    shots: Shots = None,
    template: Template = None,
    pass_k: PassK = "1",
    problem_samples: ProblemSamples = 1,
    temperature: Temperature = 0.0,
    allow_code_execution: AllowCode = False,
    format: Format = "table",
    output: Output = None,
    saved: Saved = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that was interrupted in --output.")] = False,
    seed: Seed = 0,
    trust_remote_code: RemoteCode = False,
    device: Device = "auto",
    dtype: Precision = "auto",
    quantize: Quantize = None,
    draft_weights: DraftWeights = None,
    draft_vocab: DraftVocab = 0,
    exact: Exact = False,
    threads: Threads = 0,
) -> None:
    """Compare three ways of decoding, and baselines, on one task: quality, acceptance, speed, latency and memory.

    Example: layerskip bench --exit 8 --spec 6 --baselines transformers,no-reuse --output results
    """
    require_choice(format, "--format", FORMATS)
    require(output is not None or not resume, "--resume", "used with the --output of the interrupted run", "none")
    config = BenchConfig(
        model=model,
        task=TaskConfig(
            task,
            data,
            split,
            samples,
            seed,
            max_new_tokens,
            prompt_column,
            completion_column,
            metric,
            shots,
            template,
            parse_counts(pass_k, "--pass-k"),
            problem_samples,
            temperature,
            allow_code_execution,
        ),
        exit_layer=exit_layer,
        num_draft_tokens=spec,
        repeats=repeats,
        baselines=tuple(dict.fromkeys(name.strip() for name in baselines.split(",") if name.strip())),
        draft_model=draft_model,
        device=device,
        dtype=cast(DType, dtype),
        threads=threads,
        packing=packing(quantize, draft_weights, draft_vocab, exact),
    )
    use_threads(threads)
    from layerskip_core.checkpoint import load_checkpoint
    from layerskip_core.evaluation.bench import BenchResult
    from layerskip_core.evaluation.bench import bench as run_bench
    from layerskip_core.evaluation.journal import forget
    from layerskip_core.evaluation.report import bench_table, prepare_output, read_record
    from layerskip_core.evaluation.tasks import load_task

    folder = prepare_output(output) if output is not None else None
    if saved is not None:
        record = read_record(saved, BenchResult)
    else:
        rows = load_task(config.task)
        for note in rows.notes:
            narrate(note)
        loaded = load_checkpoint(model, device, dtype, trust_remote_code, "auto", config.packing)
        record = watch(run_bench(loaded, rows, config, folder, resume, trust_remote_code))
    deliver(record, bench_table(record), format, folder)
    if folder is not None and saved is None:
        forget(folder)
