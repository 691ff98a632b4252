"""`layerskip finetune`: the recipe on an existing checkpoint, or from scratch."""

import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from layerskip_core.config.checks import require_choice
from layerskip_core.config.data import DataConfig
from layerskip_core.config.packing import DType
from layerskip_core.config.ranges import parse_counts
from layerskip_core.config.training import REGIMES, FinetuneConfig, Regime
from layerskip_core.errors import TrainingInterrupted

from .config_file import read_config
from .console import Device, Precision, Threads, narrate, progress_bar, use_threads


def finetune(
    model: Annotated[str, typer.Option(help="embedded-base, a folder, a .gguf file or a hub id.")] = "embedded-base",
    data: Annotated[
        str, typer.Option(help="commands, topv2, a .jsonl/.json/.csv/.parquet/.txt file, a TOPv2 folder, a hub id.")
    ] = "commands",
    output: Annotated[str, typer.Option(help="Folder for the new checkpoint.")] = "layerskip-model",
    regime: Annotated[str, typer.Option(help="Preset: finetune, continual, scratch or code.")] = "finetune",
    pmax: Annotated[float | None, typer.Option(help="Dropout rate of the last layer. [default: the regime's]")] = None,
    escale: Annotated[float | None, typer.Option(help="Scale of the early exits' loss. [default: the regime's]")] = None,
    exit_weights: Annotated[str, typer.Option(help="How exits weigh: paper, linear, sqrt or uniform.")] = "paper",
    curriculum: Annotated[str | None, typer.Option(help="rotational, gradual, all or none. [default: the regime's]")] = None,
    rotation: Annotated[int | None, typer.Option(help="R: each exit is trained once every R steps.")] = None,
    exits: Annotated[str | None, typer.Option(help="Exits to train, 3,6,8 or A:B:STEP. [default: every layer]")] = None,
    distill: Annotated[float, typer.Option(help="Share of KL to the last layer in the exits' loss, 0 to 1.")] = 0.0,
    lr: Annotated[float | None, typer.Option(help="Initial learning rate. [default: by regime and model size]")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; overrides --epochs. [default: 300 on commands]")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Rows of a forward pass.")] = 16,
    accumulation: Annotated[int, typer.Option(help="Forward passes of an optimizer step.")] = 1,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute layers in the backward pass: less memory, more time.")
    ] = False,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a row, prompt included. [default: the regime's]")] = None,
    warmup: Annotated[float, typer.Option(help="Share of the steps over which the learning rate rises.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.01,
    samples: Annotated[int, typer.Option(help="Rows to use; 0 is all, for `commands` as many as the steps need.")] = 0,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read a file or hub set as it goes; needs --steps.")] = False,
    pack: Annotated[
        bool | None, typer.Option(help="Pack plain text into full rows. [default: yes, but for --regime finetune]")
    ] = None,
    validation: Annotated[str | None, typer.Option(help="A split of --data, or other data, to measure every exit on.")] = None,
    validation_samples: Annotated[int, typer.Option(help="Rows of it to use; 0 is all.")] = 256,
    eval_steps: Annotated[int, typer.Option(help="Steps between validations. [default: ten a run]")] = 0,
    split: Annotated[str, typer.Option(help="Split of the data to train on.")] = "train",
    prompt_column: Annotated[str, typer.Option(help="Column of the prompt.")] = "prompt",
    completion_column: Annotated[str, typer.Option(help="Column of what should follow it.")] = "completion",
    prompt_template: Annotated[str | None, typer.Option(help="'chat', or a text with {prompt} in it.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="scratch: train a BPE tokenizer of this size on the data.")] = None,
    lora_rank: Annotated[int, typer.Option(help="Rank of LoRA adapters; 0 trains all weights.")] = 0,
    lora_targets: Annotated[str, typer.Option(help="Modules that get one: all-linear, or names with commas.")] = "all-linear",
    lora_keep: Annotated[
        bool, typer.Option("--lora-keep", help="Save the adapter alone, not merged; it loads as a model.")
    ] = False,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints; 0 writes none.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
    report_to: Annotated[str, typer.Option(help="Where losses go too: tensorboard, wandb, ...; several with commas.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that --output holds.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of data, order, dropout and fresh weights.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    device: Device = "auto",
    dtype: Precision = "auto",
    threads: Threads = 0,
    config: Annotated[
        Path | None,
        typer.Option(callback=read_config, is_eager=True, help="TOML file with any of these flags; flags given here win."),
    ] = None,
) -> None:
    """Convert a checkpoint to the LayerSkip recipe: layer dropout and early-exit loss through one shared head."""
    require_choice(regime, "regime", REGIMES)
    use_threads(threads)
    from layerskip_core.training.prepare import prepare
    from layerskip_core.training.run import run_lock

    from .training_text import losses_text, plan_text, report_text, resume_command

    given: dict[str, Any] = {
        "p_max": pmax,
        "e_scale": escale,
        "exit_weights": exit_weights,
        "curriculum": curriculum,
        "rotation": rotation,
        "exits": parse_counts(exits, "exits") if exits is not None else None,
        "distill": distill,
    }
    settings = FinetuneConfig(
        model=model,
        data=DataConfig(data, split, prompt_column, completion_column, samples, seed),
        output=output,
        regime=cast(Regime, regime),
        recipe_changes={name: value for name, value in given.items() if value is not None},
        lr=lr,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        accumulation=accumulation,
        gradient_checkpointing=gradient_checkpointing,
        max_length=max_length,
        warmup=warmup,
        weight_decay=weight_decay,
        seed=seed,
        dtype=cast(DType, dtype),
        device=device,
        lora_rank=lora_rank,
        lora_targets=lora_targets,
        lora_keep=lora_keep,
        save_steps=save_steps,
        resume=resume,
        report_to=report_to,
        streaming=streaming,
        pack=pack,
        validation=validation,
        validation_samples=validation_samples,
        eval_steps=eval_steps,
        overwrite=overwrite,
        prompt_template=prompt_template,
        vocab_size=vocab_size,
    )
    with nullcontext() if dry_run else run_lock(output):
        job = prepare(settings)
        narrate(plan_text(job.config, job.plan))
        if dry_run:
            return
        try:
            with progress_bar(job.plan.steps, "training") as update:
                info = job.run(lambda report: update(report.step, report_text(report)))
        except TrainingInterrupted as interrupted:
            narrate(f"{interrupted}; go on with: {resume_command()}")
            raise typer.Exit(128 + interrupted.signal) from None
    narrate(losses_text(info))
    narrate(f"saved {output}; next: layerskip sweep-exits --model {shlex.quote(output)}")
