"""`layerskip verify`: whether outputs are what they are promised to be, on this machine."""

from dataclasses import replace
from typing import Annotated

import typer

from layerskip_core.config.checks import require_choice, require_given
from layerskip_core.config.options import OUTPUT
from layerskip_core.config.verification import VerifyConfig

from .. import evaluation, options
from ..console import narrate, narrate_notes
from ..loading import use_threads
from ..signature import command


@command
def verify(
    model: Annotated[
        str, typer.Argument(help="An embedded name, a folder, an adapter's folder, a .gguf file or a hub id.")
    ] = "embedded",
    *,
    config: VerifyConfig,
    form: options.Format = "table",
    output: Annotated[
        str | None,
        typer.Option(help="Folder for verification.md, .json and .csv.", rich_help_panel=OUTPUT),
    ] = None,
) -> None:
    """Check that batching, drafting and resuming do not change outputs on this machine.

    Every check runs in each precision on each kernel of this machine, over real prompts and random ones. With our own kernels
    logits must have the same bits; with PyTorch's, tokens may differ where two are almost equally likely. The exit status is 1
    if a promise was broken.

    Example: layerskip verify embedded --precisions fp32,int8 --output verification
    """
    require_choice(form, "format", options.FORMATS)
    require_given("model", model)
    require_given("output", output)
    use_threads(config.machine.threads)
    from layerskip_core.checkpoint.open import for_decoding
    from layerskip_core.evaluation.output_folder import output_folder, write_files
    from layerskip_core.evaluation.report.documents import to_json
    from layerskip_core.evaluation.verification.run import tables, to_csv
    from layerskip_core.evaluation.verification.run import verify as run_verify

    with output_folder(output, "layerskip verify") as folder:
        loaded = for_decoding(model, config.machine.device)
        narrate_notes(loaded)
        use_threads(config.machine.threads, loaded)
        del loaded
        record = evaluation.watch(run_verify(replace(config, model=model)))
        shown, document, rows = tables(record), to_json(record), to_csv(record)
        if folder is not None:
            files = {"md": "\n".join(table.markdown() for table in shown), "json": document, "csv": rows}
            write_files(folder, {f"verification.{ending}": text.encode() for ending, text in files.items()})
            narrate(f"wrote verification.md, .json and .csv to {folder}")
        evaluation.print_as(form, shown, lambda: document, lambda: rows)
    if not all(result.passed for result in record.results):
        raise typer.Exit(1)
