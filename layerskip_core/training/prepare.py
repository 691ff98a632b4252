"""Loads model and data, resolves what was not asked for, and plans the run. Nothing is written."""

import os
from dataclasses import asdict, replace
from typing import Any

import torch

from ..checkpoint.beside import fingerprint
from ..checkpoint.loaded import Trainable, pick_device, pick_dtype
from ..checkpoint.open import blank, for_training
from ..checkpoint.save import refuse_overwrite
from ..checkpoint.swap import RUN_FILES
from ..checkpoint.transformers_read import stored_dtype
from ..config.checks import require
from ..config.training import FinetuneConfig, RecipeConfig, RetentionSettings
from ..data.examples import Row
from ..errors import ConfigError
from ..files import require_disk
from .adapters import require_base_kept, with_lora
from .cost import disk_bytes
from .loop.checkpoints import ResumePoint, checkpoints_folder, has_checkpoints, newest_whole, require_own
from .loop.sharding import resolve_sharding
from .loop.trainer import require_trackers
from .plan import make_plan, sealed_settings, steps_of
from .recipe.presets import sequence_length
from .rows.replay import has_journal, plan_replay
from .rows.run_data import encode_training, encode_validation, make_encoder, training_rows
from .rows.tokenizer import train_tokenizer
from .run import FinetuneJob


def prepare(config: FinetuneConfig) -> FinetuneJob:
    """The job that `config` asks for. Raises LayerSkipError for whatever would make the run fail."""
    refuse_overwrite(config.output, config.overwrite, RUN_FILES)
    require_base_kept(config)
    device = pick_device(config.device)
    require_device(device)
    require_trackers(config.report_to)
    anchored = config.retention.anchor_weights
    require(anchored != "int8" or device.type == "cpu", "anchor_weights", "bf16 if `device` is not cpu", anchored)
    take_own_gpu(device)
    config = resolve_sharding(config, device)
    resume = resume_point(config)
    rows = training_rows(config)
    trainable = _model(config, rows)
    encoder = make_encoder(config, trainable, rows, tokens_per_row(config, trainable.backend.max_positions))
    data = encode_training(config, encoder, rows)
    held_out = encode_validation(config, encoder)
    autocast = autocasts(config, device, sum(parameter.numel() for parameter in trainable.model.parameters()))
    sealed = {} if resume is None else resume.settings
    original, replay = _original(config, trainable), None
    if original is not None and config.retention.replay:
        replay = plan_replay(config, original, data, encoder, str(device), steps_of(config, data))
    plan = make_plan(config, trainable, data, encoder, str(device), autocast, sealed, original, replay)
    if resume is not None:
        require_same_run(sealed, sealed_settings(config, plan))
        notes = (*(f"{fault}; it is not used" for fault in resume.damaged), f"going on from {resume.folder}")
        plan = replace(plan, notes=plan.notes + notes)
    dtype = stored_dtype(config.model)
    needed = disk_bytes(config, plan.parameters, plan.steps, dtype.itemsize)
    require_disk(checkpoints_folder(config.output), needed, "the model and the checkpoints of its run")
    model = with_lora(trainable.model, config, plan.adapted_layers) if config.lora_rank else trainable.model
    return FinetuneJob(config, trainable, model, data, held_out, encoder.template, plan, dtype, resume)


def _model(config: FinetuneConfig, rows: list[Row]) -> Trainable:
    if config.regime == "scratch":
        tokenizer = None if config.vocab_size is None else train_tokenizer(rows, config.vocab_size)
        return blank(config.model, config.seed, tokenizer)
    return for_training(config.model, "cpu", "fp32")


def _original(config: FinetuneConfig, trainable: Trainable) -> str | None:
    """The fingerprint of the model as it came, where the run needs it; None otherwise."""
    needed = config.retention.anchor or config.retention.replay or config.lora_rank
    return fingerprint(trainable.backend.spec, trainable.model.get_parameter) if needed else None


def tokens_per_row(config: FinetuneConfig, context: int) -> int:
    """Tokens per row: what was asked for, or the regime's length within the model's context."""
    if config.max_length is None:
        return sequence_length(config.regime, context)
    if config.max_length > context:
        raise ConfigError(f"`max_length` must be at most the model's context of {context} tokens, got {config.max_length}")
    return config.max_length


def require_device(device: torch.device) -> None:
    """Raises ConfigError for devices that Trainer would silently replace by others."""
    if device.index:
        raise ConfigError(
            f"`device` {device}: training takes the first GPU that it sees; set CUDA_VISIBLE_DEVICES={device.index} in the "
            "environment and give `device` cuda"
        )


def take_own_gpu(device: torch.device) -> None:
    """Makes `cuda` mean the GPU of this process, of those that torchrun started. Raises ConfigError if there is none for it."""
    if device.type == "cuda":
        number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        require(number < gpus, "device", f"cuda with at least {number + 1} GPUs here, one per process of torchrun", gpus)
        torch.cuda.set_device(number)


def autocasts(config: FinetuneConfig, device: torch.device, parameters: int) -> bool:
    """Whether to train in bf16 autocast. `auto` does wherever a model would be loaded in bf16, and also for small models on a
    CPU with bf16 instructions, where it is twice as fast.
    """
    if config.dtype == "auto" and device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return True
    return pick_dtype(config.dtype, device, parameters) == torch.bfloat16


def resume_point(config: FinetuneConfig) -> ResumePoint | None:
    """The checkpoint that `resume` goes on from; None if the run ended while it wrote the texts of a replay.

    Without `resume`, raises ConfigError if there is a run to lose.
    """
    folder = checkpoints_folder(config.output)
    require_own(folder)
    if config.resume:
        texts_only = config.retention.replay and has_journal(config.output) and not has_checkpoints(folder)
        return None if texts_only else newest_whole(folder)
    if has_checkpoints(folder) and not config.overwrite:
        raise ConfigError(
            f"`output` {config.output} holds an unfinished run; give `resume` to go on, or `overwrite` to start anew"
        )
    return None


def require_same_run(sealed: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises ConfigError where `settings` differ from those of the run that is resumed.

    A setting that the run's version did not know had its default; facts that it did not keep are not compared.
    """
    defaults = asdict(FinetuneConfig()) | asdict(RecipeConfig()) | asdict(RetentionSettings())
    for name, value in settings.items():
        if name not in sealed and name not in defaults:
            continue
        before = sealed.get(name, defaults.get(name))
        if before != value:
            raise ConfigError(
                f"`resume`: {name} was {before} in the run to go on with, and is {value} now; a run is resumed with "
                "the same settings on the same data"
            )
