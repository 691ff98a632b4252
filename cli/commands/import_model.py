"""Write any model as a plain transformers checkpoint."""

from typing import Annotated

from layerskip_core.config.model import DType
from layerskip_core.config.options import Flag, Text

from ..console import narrate
from ..options import ModelArgument, command


@command
def import_model(
    model: ModelArgument = "embedded",
    output: Annotated[Text, Flag("Folder for the checkpoint.", panel="Output")] = "imported-model",
    dtype: Annotated[
        DType,
        Flag(
            "Precision of the weights: fp32, bf16, or auto: as stored (GGUF: one that loses nothing).",
            panel="Output",
        ),
    ] = "auto",
    drafter: Annotated[
        Text | None,
        Flag(
            "Drafter to add, in the EAGLE-3 layout or Gemma 4's assistant: a folder or hub id.",
            panel="Output",
        ),
    ] = None,
    overwrite: Annotated[
        bool, Flag("Replace a model that --output holds.", panel="Output")
    ] = False,
) -> None:
    """Write a model as a plain transformers checkpoint: GGUF files dequantised, adapters merged
    into their base.

    Calibrated int4 weights, exit blocks and drafters of the model are kept.

    Example: layerskip import SmolLM2-135M-Instruct.Q4_1.gguf --output smollm2
    """
    from layerskip_core.checkpoint.convert import import_checkpoint
    from layerskip_core.checkpoint.save import refuse_overwrite
    from layerskip_core.files import hold

    with hold(output, "layerskip import"):
        refuse_overwrite(output, overwrite)
        written, left_out = import_checkpoint(model, output, dtype, drafter=drafter)
    for reason in left_out:
        narrate(f"left out: {reason}")
    narrate(f"wrote {model} to {output} in {str(written).removeprefix('torch.')}")
