"""`layerskip sweep-exits`: which exit and draft length pay on this model and machine."""

from dataclasses import replace
from typing import Annotated, cast

import typer

from layerskip_core.config import DType, SweepConfig, TaskConfig, parse_counts, require_choice
from layerskip_core.errors import ConfigError

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
    Seed,
    Shots,
    Source,
    Split,
    TaskName,
    Temperature,
    Template,
    narrate_failures,
    print_result,
    watch,
)


def sweep_exits(
    model: Model = "embedded",
    task: TaskName = None,
    data: Source = None,
    split: Split = "test",
    samples: Samples = 12,
    exits: Annotated[str | None, typer.Option(help="3,6,8 or A:B:STEP, both ends included. [default: six of them]")] = None,
    specs: Annotated[str, typer.Option(help="Draft lengths, in the same form.")] = "2,4,6,8,12",
    quick: Annotated[bool, typer.Option("--quick", help="Measure only the settings that should be fastest.")] = False,
    max_new_tokens: MaxNewTokens = None,
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
    save: Annotated[bool, typer.Option("--save", help="Write the recommendation into the model's layerskip.json.")] = False,
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
    """Measure every exit, alone and as the draft of self-speculation, beside what was predicted of it, and recommend one.

    Example: layerskip sweep-exits --model layerskip-model --exits 4:12:2 --specs 4,8 --save
    """
    require_choice(format, "--format", FORMATS)
    config = SweepConfig(
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
        exits=parse_counts(exits, "--exits") if exits is not None else (),
        specs=parse_counts(specs, "--specs"),
        quick=quick,
        device=device,
        dtype=cast(DType, dtype),
        threads=threads,
        packing=packing(quantize, draft_weights, draft_vocab, exact),
    )
    use_threads(threads)
    from layerskip_core.checkpoint import holds_model, load_checkpoint, write_info
    from layerskip_core.evaluation.report import pareto_plot, prepare_output, sweep_table, to_csv, to_json, write_files
    from layerskip_core.evaluation.sweep import sweep
    from layerskip_core.evaluation.tasks import load_task

    if save and not holds_model(model):
        raise ConfigError(f"--save needs a --model that is a folder, to write its layerskip.json; got {model}")
    folder = prepare_output(output) if output is not None else None
    rows = load_task(config.task)
    for note in rows.notes:
        narrate(note)
    loaded = load_checkpoint(model, device, dtype, trust_remote_code, "auto", config.packing)
    record = watch(sweep(loaded, rows, config))
    narrate_failures(record)
    if folder is not None:
        plot = pareto_plot(record, rows.quality_metric)
        write_files(folder, {"sweep.json": to_json(record).encode(), "sweep.csv": to_csv(record).encode(), "pareto.png": plot})
        narrate(f"wrote sweep.json, sweep.csv and pareto.png to {folder}")
    print_result(record, sweep_table(record), format)
    advice = record.recommendation
    if advice is None or advice.exit_layer is None:
        if save:
            narrate(f"--save changed nothing: {advice.reason if advice else 'no recommendation'}")
    elif save:
        write_info(model, replace(loaded.info, exit_layer=advice.exit_layer, num_draft_tokens=advice.num_draft_tokens))
        narrate(f"saved exit {advice.exit_layer} and {advice.num_draft_tokens} draft tokens as the defaults of {model}")
