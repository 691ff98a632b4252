"""Check on this machine that batching, drafting and resuming do not change outputs."""

from dataclasses import replace
from typing import Annotated

import typer

from layerskip_core.config.evaluation import VerifyConfig
from layerskip_core.config.options import Flag, Text

from .. import evaluation
from ..loading import load_model
from ..options import Format, ModelArgument, Overwrite, command


@command
def verify(
    model: ModelArgument = "embedded",
    *,
    config: VerifyConfig,
    format: Format = "table",
    output: Annotated[
        Text | None, Flag("Folder for verification.md, .json and .csv.", panel="Output")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Check that batching, drafting and resuming do not change outputs on this machine.

    Every check runs in each precision on each kernel of this machine, over real prompts and random
    ones. With our own kernels logits must be bitwise equal; with PyTorch's, tokens may differ where
    two are almost equally likely. The exit status is 1 if a check fails.

    Example: layerskip verify embedded --precisions fp32,int8 --output verification
    """
    from layerskip_core.evaluation.report import output_folder, table_files
    from layerskip_core.evaluation.verification import tables, to_csv
    from layerskip_core.evaluation.verification import verify as run_verify

    with output_folder(
        output, "layerskip verify", list(table_files("verification")), overwrite
    ) as folder:
        # For its notes and threads; freed before the checks, which load their own
        load_model(model, config.machine)
        record = evaluation.watch(run_verify(replace(config, model=model)))
        evaluation.deliver(
            record, tables(record), format, to_csv(record), folder, {}, "verification"
        )
    if not all(result.passed for result in record.results):
        raise typer.Exit(1)
