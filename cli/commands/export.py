"""`layerskip export`: an exit of a model, as a draft model for another engine."""

from typing import Annotated

import typer

from layerskip_core.config.export import ENGINES, FORMATS, ExportConfig
from layerskip_core.config.options import checked

from ..console import narrate


def export(
    model: Annotated[
        str, typer.Argument(help="An embedded name, a folder, an adapter's folder, a .gguf file or a hub id.")
    ] = "embedded",
    exit_layer: Annotated[
        int | None,
        typer.Option("--exit", help="Layers of the draft; the last: the whole model. [default: the checkpoint's]"),
    ] = None,
    output: Annotated[str, typer.Option("--output", help="Folder for the draft model.")] = "draft-model",
    form: Annotated[
        str | None,
        typer.Option("--format", help=f"{', '.join(FORMATS)}. [default: gguf with --engine llama.cpp, else transformers]"),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help=f"Also print how it drafts in this engine: {', '.join(ENGINES)}."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="Of the weights written: fp32, bf16, or auto: as stored, packed as generate chooses; "
            "in GGUF f16, q8_0, q4_0, or auto: f16.",
        ),
    ] = "auto",
    quantize: Annotated[
        str | None, typer.Option("--quantize", help="int8 or int4 weights, with --format packed. [default: none]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that --output holds.")] = False,
) -> None:
    """Write the first layers of a model as a model of its own, which drafts for the whole model in another engine.

    It has the exit's block if there is one, the norm and the head, and gives the logits of this exit. --format gguf writes
    the whole model and the draft for llama.cpp. --format packed writes the whole model as the compiled kernels read it, so
    that commands that decode start at once.

    Example: layerskip export embedded --exit 4 --output draft-model --engine vllm
    """
    given = {
        "model": model, "exit_layer": exit_layer, "output": output, "format": form, "engine": engine, "dtype": dtype,
        "overwrite": overwrite, "quantize": quantize,
    }  # fmt: skip
    config = ExportConfig(**checked(ExportConfig, given))
    from layerskip_core.files import hold

    if config.is_packed:
        from layerskip_core.export.packed import export_packed

        with hold(output, "layerskip export"):
            packed = export_packed(config)
        narrate(f"wrote {model}, packed in {packed.kinds}, to {output}: {packed.nbytes / 1e6:,.1f} MB")
        return
    from layerskip_core.export.run import README, export

    with hold(output, "layerskip export"):
        exported = export(config)
    if not exported.trained:
        narrate(f"exit {exported.exit_layer} was not trained, so most of its drafts will be wrong")
    told = f", and how to use it to {output}/{README}" if exported.readme else ""
    narrate(f"wrote exit {exported.exit_layer} of {model}, {exported.layers} layers, to {output}{told}")
    if exported.readme:
        typer.echo(exported.readme, nl=False)
