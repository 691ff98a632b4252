"""Loads model and rows for a run that trains exit blocks, and plans it. Nothing is written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...checkpoint.beside import fingerprint, read_exit_blocks
from ...checkpoint.folder import refuse_packed, weight_files
from ...checkpoint.info import CheckpointInfo
from ...checkpoint.loaded import pick_device
from ...checkpoint.locate import downloaded, is_adapter, own_folder, reading
from ...checkpoint.open import for_decoding, for_training
from ...checkpoint.save import refuse_overwrite
from ...config.checks import require
from ...config.training import FinetuneConfig
from ...errors import CheckpointError, ConfigError
from ...files import require_disk
from ...model.exit_blocks import ExitBlocks
from ..loop.checkpoints import ResumePoint, checkpoints_folder, has_checkpoints, newest_whole, require_own
from ..loop.trainer import require_trackers
from ..prepare import autocasts, require_device, require_same_run, tokens_per_row
from ..rows.answers import Writing, answers_digest, digest, read_answers
from ..rows.step_rows import world_size
from .plan import FrozenPlan, make_frozen_plan
from .run import FrozenJob, RunFiles
from .run_data import RunRows, run_rows
from .settings import Resolved, resolved, writing
from .states import states_bytes


def prepare_frozen(config: FinetuneConfig) -> FrozenJob:
    """The job that `config` asks for. Raises LayerSkipError for whatever would make the run fail."""
    require(world_size() == 1, "frozen", "used in one process", f"{world_size()} by torchrun")
    if is_adapter(config.model):
        raise CheckpointError(f"`model` {config.model} is an adapter; needed a folder with all weights: `layerskip import`")
    source = downloaded(config.model)
    reading(config.model, lambda: refuse_packed(source))
    if not weight_files(source):
        raise CheckpointError(f"`model` {config.model} has no safetensors, which are copied as they are: `layerskip import`")
    own = own_folder(config.model)
    in_place = own is not None and Path(config.output).resolve() == Path(own).resolve()
    refuse_overwrite(config.output, config.overwrite or in_place)
    device = pick_device(config.device)
    require_device(device)
    require_trackers(config.report_to)
    resume = _resume_point(config)
    trainable = for_training(config.model, str(device), config.dtype)
    weight_of = trainable.model.get_parameter
    spec = trainable.backend.spec
    kept = read_exit_blocks(source, spec, weight_of)
    settings = resolved(config, spec.layers)
    if in_place and resume is None:  # a run that goes on was allowed to when it began
        _require_new(config, settings, kept)
    max_length = tokens_per_row(config, trainable.backend.max_positions)
    rows = run_rows(config, settings, trainable, max_length)
    decoder = for_decoding(config.model, str(device), config.dtype)
    made_for = fingerprint(spec, weight_of)
    how = writing(config, settings, max_length)
    files = _run_files(config, settings, rows, made_for, how, decoder.backend.implementation)
    known = read_answers(files.answers, rows.prompts, how, spec.vocab)
    autocast = autocasts(config, device, spec.parameters)
    plan = make_frozen_plan(config, settings, rows, known, how, decoder, autocast)
    plan = replace(plan, notes=_notes(trainable.info))
    needed = states_bytes(plan.tokens, spec.hidden, len(settings.exits))
    require_disk(files.states, needed, "the states of the texts", "give fewer rows (`limit`) or fewer `exits`")
    sealed = _sealed(config, plan, made_for, files)
    if resume is not None:
        require_same_run(resume.settings, sealed)
        notes = (*(f"{fault}; it is not used" for fault in resume.damaged), f"going on from {resume.folder}")
        plan = replace(plan, notes=(*plan.notes, *notes))
    return FrozenJob(config, decoder, trainable, rows, how, plan, files, sealed, made_for, kept, in_place, resume)


def _notes(info: CheckpointInfo) -> tuple[str, ...]:
    """A line on the saved settings that `CheckpointInfo.with_exit_blocks` removes."""
    if not info.advice:
        return ()
    why = "chosen without these blocks, which `layerskip sweep-exits --save` includes"
    return (f"saved settings that will be left out: {', '.join(info.advice)}; they were {why}",)


def _resume_point(config: FinetuneConfig) -> ResumePoint | None:
    """As for the recipe, except that a run without checkpoints may have left answers and states, which are always found."""
    folder = checkpoints_folder(config.output)
    require_own(folder)
    if not has_checkpoints(folder):
        return None
    if config.resume:
        return newest_whole(folder)
    if config.overwrite:
        return None
    raise ConfigError(
        f"`output` {config.output} holds the checkpoints of a run; give `resume` to go on with it, or `overwrite` to start "
        "anew without them"
    )


def _require_new(config: FinetuneConfig, settings: Resolved, kept: ExitBlocks) -> None:
    known = [block.exit_layer for block in kept.blocks]
    there = [exit_layer for exit_layer in settings.exits if exit_layer in known]
    if there and not config.overwrite:
        raise ConfigError(f"`output` {config.output} already has a block at exit {there[0]}; give `overwrite` to replace it")


def _run_files(
    config: FinetuneConfig, settings: Resolved, rows: RunRows, made_for: str, how: Writing, implementation: str
) -> RunFiles:
    """Where the answers and states of this run are, under names that other rows, models or settings do not have."""
    folder = checkpoints_folder(config.output)
    texts = [(text.ids, text.labels) for text in rows.texts]
    answers = answers_digest(made_for, rows.prompts, how, config.dtype)
    states = digest([made_for, answers, texts, settings.exits, config.dtype, implementation])
    return RunFiles(folder / f"answers-{answers}.jsonl", folder / f"states-{states}")


def _sealed(config: FinetuneConfig, plan: FrozenPlan, made_for: str, files: RunFiles) -> dict[str, Any]:
    """What decides the steps of a run: it is resumed with the same or not at all."""
    settings: dict[str, Any] = json.loads(json.dumps(vars(plan.settings)))
    names = ("batch_size", "accumulation", "warmup", "weight_decay", "seed")
    own = {name: getattr(config, name) for name in names}
    facts = {"steps": plan.steps, "lr": plan.lr, "dtype": plan.dtype, "rows": plan.texts, "model": made_for}
    return settings | own | facts | {"data": files.states.name}
