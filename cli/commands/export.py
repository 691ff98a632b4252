"""Write an exit as a draft model for another engine."""

from dataclasses import replace

import typer

from layerskip_core.config.model import ExportConfig
from layerskip_core.errors import plural
from layerskip_core.files import hold

from ..console import narrate, waiting
from ..options import ModelArgument, command


@command
def export(model: ModelArgument = "embedded", *, config: ExportConfig) -> None:
    """Write an exit of a model as a plain checkpoint that drafts for the model in another engine.

    It has the first layers, the exit's block if there is one, the norm and the head. --format gguf
    writes model and draft for llama.cpp. --format packed writes the whole model in the layout of
    our kernels, so that decoding starts at once.

    Example: layerskip export embedded --exit 4 --output draft-model --engine vllm
    """
    config, output = replace(config, model=model), config.output
    with waiting(f"exporting {model}"), hold(output, "layerskip export"):
        from layerskip_core.export.run import README, export, export_packed

        if config.format == "packed":
            kinds, size = export_packed(config)
            narrate(f"wrote {model}, packed in {kinds}, to {output}: {size / 1e6:,.1f} MB")
            return
        exported = export(config)
    if not exported.trained:
        narrate(f"exit {exported.exit_layer} was not trained, so most of its drafts will be wrong")
    if exported.lost:
        narrate(
            "the drafter that the checkpoint ships (mtp) is left out: GGUF files are written without it"
        )
    usage = f", and how to use it to {output}/{README}" if exported.readme else ""
    written = f"exit {exported.exit_layer} of {model}, {plural(exported.layers, 'layer')},"
    if exported.exit_layer is None:
        written = f"{model} and its drafter in the EAGLE-3 layout"
    narrate(f"wrote {written} to {output}{usage}")
    if exported.readme:
        typer.echo(exported.readme, nl=False)
