"""`layerskip sweep-exits`: which exit and draft length pay on this model and machine."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from layerskip_core.config.checks import require_choice, require_given
from layerskip_core.config.evaluation import SweepConfig, TaskConfig
from layerskip_core.config.packing import DType
from layerskip_core.config.ranges import parse_counts
from layerskip_core.errors import ConfigError

from . import console, evaluation

if TYPE_CHECKING:
    from layerskip_core.evaluation.record import Recommendation


def sweep_exits(
    model: evaluation.Model = "embedded",
    task: evaluation.TaskName = None,
    data: evaluation.Source = None,
    split: evaluation.Split = "test",
    samples: evaluation.Samples = 12,
    exits: Annotated[str | None, typer.Option(help="3,6,8 or A:B:STEP, both ends included. [default: six of them]")] = None,
    specs: Annotated[str, typer.Option(help="Draft lengths, in the same form.")] = "2,4,6,8,12",
    quick: Annotated[bool, typer.Option("--quick", help="Measure only the settings that should be fastest.")] = False,
    max_new_tokens: evaluation.MaxNewTokens = None,
    batch_size: evaluation.BatchSize = 1,
    timed: evaluation.Timed = None,
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
    save: Annotated[bool, typer.Option("--save", help="Write the recommendation into the model's layerskip.json.")] = False,
    seed: evaluation.Seed = 0,
    device: console.Device = "auto",
    dtype: console.Precision = "auto",
    quantize: console.Quantize = None,
    draft_weights: console.DraftWeights = None,
    draft_vocab: console.DraftVocab = 0,
    exact: console.Exact = False,
    threads: console.Threads = 0,
) -> None:
    """Measure every exit, alone and as the draft of self-speculation, beside what was predicted of it, and recommend one.

    Example: layerskip sweep-exits --model layerskip-model --exits 4:12:2 --specs 4,8 --save
    """
    require_choice(format, "format", evaluation.FORMATS)
    require_given("output", output)
    require_given("saved", saved)
    config = SweepConfig(
        model=model,
        task=TaskConfig(
            task, data, split, samples, seed, max_new_tokens, prompt_column, completion_column, metric, shots, template,
            parse_counts(pass_k, "pass_k"), problem_samples, temperature, allow_code_execution,
        ),
        exits=parse_counts(exits, "exits") if exits is not None else (),
        specs=parse_counts(specs, "specs"),
        quick=quick,
        batch_size=batch_size,
        timed=timed,
        device=device,
        dtype=cast(DType, dtype),
        threads=threads,
        packing=console.packing(quantize, draft_weights, draft_vocab, exact),
    )  # fmt: skip
    console.use_threads(threads)
    from layerskip_core.evaluation.measure.sweep import sweep
    from layerskip_core.evaluation.output_folder import output_folder
    from layerskip_core.evaluation.report.saved_record import read_record
    from layerskip_core.evaluation.report.tables import sweep_table
    from layerskip_core.evaluation.results import ExitResult

    record = read_record(saved, ExitResult) if saved is not None else None
    target = model if record is None else str(record.config["model"])
    with _model_folder(target) if save else nullcontext(), output_folder(output, "layerskip sweep-exits") as folder:
        if record is None:
            loaded, rows = evaluation.load(config)
            record = evaluation.watch(sweep(loaded, rows, config))
        evaluation.deliver(record, sweep_table(record), format, folder)
        if save and record.recommendation is not None:
            _save(target, record.recommendation)


@contextmanager
def _model_folder(model: str) -> Iterator[None]:
    """Holds the lock of the folder that --save writes to. Raises ConfigError for a model that is no folder."""
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


def _save(model: str, advice: "Recommendation") -> None:
    """Makes the recommended exit and draft length the model's defaults; plain decoding, where none pays."""
    from layerskip_core.checkpoint.info import read_info
    from layerskip_core.checkpoint.save import write_info

    plain = advice.exit_layer is None
    info = replace(read_info(model), exit_layer=advice.exit_layer, num_draft_tokens=advice.num_draft_tokens)
    write_info(model, replace(info, strategy="autoregressive" if plain else None))
    if plain:
        console.narrate(f"saved plain decoding as the default of {model}: {advice.reason}")
        return
    console.narrate(f"saved exit {advice.exit_layer} and {advice.num_draft_tokens} draft tokens as the defaults of {model}")
