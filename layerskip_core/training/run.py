"""A run of training, from its settings to the saved model.

`prepare` reads the model and the rows and resolves a RunPlan; it writes nothing. `execute` trains
and saves. This is the course of every run. What a run of `finetune` reads, trains on and saves
follows below it; a run of `train-drafter` (drafter_run.py) has the same parts.
"""

import ctypes
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.utils.data import Subset

from ..checkpoint.folder import EXIT_BLOCKS_FILE, MTP_FILE, quiet_transformers
from ..checkpoint.info import EXIT_BLOCKS, CheckpointInfo
from ..checkpoint.loaded import Trainable, decoder_of, pick_device
from ..checkpoint.locate import EMBEDDED, ModelRef, adapters_of
from ..checkpoint.open import for_decoding, for_training, outline
from ..checkpoint.save import (
    RUN_FILES,
    claim_repository,
    push,
    refuse_overwrite,
    save_checkpoint,
)
from ..checkpoint.shipped import files_of_shipped, read_exit_blocks, shipped_by
from ..checkpoint.sidecars import EAGLE3_FILES, EAGLE3_FOLDER, fingerprint
from ..checkpoint.transformers_read import blank, stored_dtype
from ..config.training import DrafterConfig, FinetuneConfig, TrainingConfig
from ..errors import ConfigError, TrainingInterrupted, require
from ..files import hold
from ..interruption import Interruption
from ..model.exit_blocks import NO_BLOCKS, ExitBlock
from ..model.spec import AnySpec
from ..model.vocabulary import ORDER_FILE
from ..model.weights import cast_weights
from . import data
from .answers import Answers, plan_replay
from .drafter_run import DrafterJob, prepare_drafter
from .encoding import train_tokenizer
from .exit_blocks import new_exit_blocks
from .module import RecipeModule, use_fp32_attention, with_lora
from .plan import VERSIONS, RunPlan, fixed_settings, require_same_run
from .precision import Precision, choose_precision
from .progress import (
    LOSSES,
    LossHistory,
    StepReport,
    checkpoints_folder,
    discard_after,
    resume_point,
)
from .recipe import SMALL_MODEL, learning_rate, resolve_recipe, steps_on, trained_exits
from .sharding import check_sharding, gather_whole, process_index
from .verdict import AnsweredRow, Baseline

_PACKED = "documents are packed into whole rows; attention stays within a document"
_STREAMED = "streaming: `resume` reads past the rows already seen, and is exact only if they come in the same order again"
_SHALLOW = "a model of one layer has no place for exits or a drafter"
_SHIPPED = "the drafter of its checkpoint (mtp) is saved as it is"
_TRAINS_SHIPPED = f"{_SHIPPED}; `layerskip train-drafter --start-from shipped` trains it"
_EAGLE3 = "its drafter (eagle3), made for the old weights, is not saved; `layerskip train-drafter --start-from {}` trains it on"
_REPLAY = 0.25  # share of replayed rows in a step
# Options of glibc's mallopt
_MMAP_MAX = -4
_TRIM_THRESHOLD = -1


@dataclass(frozen=True)
class RunResult:
    """What a run gives, besides the files in `output`."""

    info: CheckpointInfo
    example: AnsweredRow | None  # a held-out row with the trained model's answer


def prepare(config: TrainingConfig, dry: bool = False) -> "FinetuneJob | DrafterJob":
    """Reads the model and the rows of `config`, and plans its run. Writes nothing. Raises
    LayerSkipError for anything that would make the run fail.

    `dry`: the plan of a `finetune` is for reading only, and no weights are loaded.
    """
    require(
        config.output not in EMBEDDED, "output", "a name that no embedded model has", config.output
    )
    device = own_device(pick_device(config.device))
    if config.report_to:
        from .trainer import trackers  # imports transformers' Trainer, which a plan does not need

        trackers(config.report_to)
    checkpoint = resume_point(config)
    job: FinetuneJob | DrafterJob
    if isinstance(config, DrafterConfig):
        job = prepare_drafter(config, device, checkpoint)
    else:
        check_sharding(config, device)
        job = prepare_finetune(config, device, checkpoint, dry)
    if config.training_arguments:
        from .trainer import training_arguments

        training_arguments(job.plan, job.trainable)
    return job


def execute(
    job: "FinetuneJob | DrafterJob",
    on_step: Callable[[StepReport], None] = lambda _: None,
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
) -> RunResult:
    """Trains to the end, and writes the result to the config's `output`.

    `on_progress` gets (stage, done, total) of work before the training, such as "answers". Raises
    CheckpointError, TrainingError for a loss that is not finite or explodes, TrainingInterrupted,
    and LockedError.
    """
    from .trainer import RunTrainer  # imports transformers' Trainer, which a plan does not need

    config = job.plan.config
    is_first = process_index() == 0
    if config.push_to_hub is not None and is_first:
        claim_repository(config.push_to_hub)
    _keep_memory()
    with run_lock(config.output), Interruption() as interruption, quiet_transformers():

        def report(stage: str, total: int, done: int, begun: int = 0) -> None:
            if interruption.signal is not None:
                raise TrainingInterrupted(
                    f"interrupted after {done} of {total} {stage}, which are kept",
                    interruption.signal,
                    0,
                )
            on_progress(stage, done + begun, total)

        baseline = job.measure_before(report)
        rows, held_out = job.data_sets(report)
        trainer = RunTrainer(
            job.plan,
            job.module,
            job.trainable,
            job.fixed_settings,
            rows,
            held_out,
            on_step,
            interruption,
        )
        history = trainer.run()
        info = job.save(history, baseline)
        if is_first:
            discard_after(checkpoints_folder(config.output), None)
            if config.push_to_hub is not None:
                push(config.output, config.push_to_hub)
    return RunResult(info, None if baseline is None else baseline.example)


def run_lock(output: str) -> AbstractContextManager[None]:
    """The lock of `output` for a whole run; under torchrun the first process holds it for all."""
    return hold(output, "a training") if process_index() == 0 else nullcontext()


def own_device(device: torch.device) -> torch.device:
    """The device without its index. For `cuda`, selects the GPU of this process under torchrun."""
    number = int(os.environ.get("LOCAL_RANK", "0"))
    # Trainer uses the first visible GPU
    seen = f"{device.type}, of the GPUs that CUDA_VISIBLE_DEVICES={device.index} leaves"
    require(not device.index, "device", seen, device)
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        needed = f"cuda with at least {number + 1} GPUs here, one per process of torchrun"
        require(number < gpus, "device", needed, gpus)
        torch.cuda.set_device(number)
    return torch.device(device.type)


def _keep_memory() -> None:
    """Makes glibc keep the memory that a step frees: clearing new pages takes 5 to 10% of a step on
    a CPU.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another C library has none
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)


@dataclass(frozen=True)
class FinetuneJob:
    """A planned run of `finetune`, and what it works on."""

    plan: RunPlan
    fixed_settings: Mapping[str, Any]  # a resumed run must share them
    trainable: Trainable
    data: data.RunData
    replay: Answers | None  # texts of the model, written before it is trained
    shipped: Mapping[str, bytes]  # files of drafters that came with the model, saved as they are
    dtype: torch.dtype  # of the saved weights
    module: Any  # a RecipeModule; None in a dry run
    token_order: Sequence[int]  # the most frequent targets first

    @property
    def config(self) -> FinetuneConfig:
        assert isinstance(self.plan.config, FinetuneConfig)
        return self.plan.config

    @property
    def from_scratch(self) -> bool:
        return self.config.recipe.preset == "scratch"

    def measure_before(self, report: Callable[..., None]) -> Baseline | None:
        """What the model does before its training; in the first process only."""
        if process_index() > 0 or self.from_scratch:
            return None
        report("measurements before the training", 1, 0)
        held_out = self.data.held_out_rows
        if self.config.fsdp:
            # Rows would run on the CPU: minutes for a model that needs shards, while others wait
            held_out = []
        trained_rows = self.plan.steps * data.step_rows(self.config)[0]
        return Baseline(self.trainable, held_out, self.config.seed, trained_rows)

    def data_sets(self, report: Callable[..., None]) -> tuple[Any, Any]:
        """(training rows in the run's order, held-out rows or None).

        Batches have rows of similar length, replayed texts among them; a stream keeps its order.
        """
        rows: Any = self.data.training.rows
        held_out = self.data.held_out_rows or None
        if isinstance(rows, data.StreamedRows):
            return rows, held_out
        lengths = [len(row["input_ids"]) for row in rows]
        texts = list[dict[str, Any]]()
        if self.replay is not None:
            texts = self._replayed(self.replay, report)
        order = data.ordered(self.config, lengths, self.plan.steps, len(texts))
        return Subset(rows + texts, order), held_out

    def _replayed(self, replay: Answers, report: Callable[..., None]) -> list[dict[str, Any]]:
        """Encoded texts, each with its prompt, and with a label on every token."""
        written = replay.write(partial(report, "replay texts", len(replay.prompts)))
        is_packed = "documents" in self.data.training.seen[0]
        texts = []
        for prompt, answer in zip(replay.prompts, written, strict=True):
            ids = prompt + answer
            text: dict[str, Any] = {"input_ids": ids, "labels": ids}
            if is_packed:
                text["documents"] = [0] * len(ids)
            texts.append(text)
        return texts

    def save(self, history: LossHistory, baseline: Baseline | None) -> CheckpointInfo:
        """Writes the model in the first process. The info has the last losses of every exit."""
        is_first = process_index() == 0
        if self.config.fsdp:
            gather_whole(self.module, keep=is_first)
        details = self._details(history)
        if baseline is not None:
            details["cost"] = msgspec.to_builtins(baseline.cost())
        template = self.plan.template
        info = CheckpointInfo(template.text, system=template.system, details=details)
        if is_first:
            self._write(history, info)
        return info

    def _details(self, history: LossHistory) -> dict[str, Any]:
        """How the model was trained, for layerskip.json."""
        plan = self.plan
        recipe = plan.recipe
        assert recipe is not None
        earlier = () if self.from_scratch else self.trainable.info.held_out
        divisions = earlier if plan.division is None else (plan.division, *earlier)
        resolved = {
            "recipe": asdict(recipe),
            "epochs": self.config.epochs or self.config.usual_epochs,
        }
        details = {
            "base_model": self.config.model,
            "config": json.loads(json.dumps(asdict(self.config) | resolved)),  # as it is read back
            "steps": plan.steps,
            "rows": plan.rows,
            "final_losses": _by_name(history.latest),
            "validation_losses": _by_name(history.validated),
            "validation_rows": None if self.data.held_out is None else self.data.held_out.digest,
            "held_out": [asdict(division) for division in dict.fromkeys(divisions)],
            "trained_exits": list(trained_exits(recipe, plan.steps, plan.num_layers)),
            "agreement": _by_name(history.agreement),
            "precision": plan.precision.name,
            "versions": VERSIONS,
        }
        if self.module.exit_blocks:
            details[EXIT_BLOCKS] = {str(layer): {} for layer in recipe.exits}
        return details

    def _write(self, history: LossHistory, info: CheckpointInfo) -> None:
        model = self.module.model
        if self.config.lora_rank and not self.config.lora_keep:
            model = model.merge_and_unload()
        files = {
            LOSSES: history.to_jsonl(),
            ORDER_FILE: json.dumps(self.token_order, separators=(",", ":")).encode(),
            **self.shipped,
        }
        if self.module.exit_blocks:
            cast_weights(
                model, self.dtype
            )  # the blocks' file has the fingerprint of the saved weights
            files[EXIT_BLOCKS_FILE] = self.module.blocks_content(model, self.dtype)
        tokenizer = self.trainable.tokenizer
        save_checkpoint(model, tokenizer, info, self.config.output, self.dtype, files)


def _by_name(losses: Mapping[int, float]) -> dict[str, float]:
    return {str(layer): loss for layer, loss in losses.items()}


def prepare_finetune(
    config: FinetuneConfig, device: torch.device, checkpoint: Path | None, dry: bool
) -> FinetuneJob:
    """`dry`: without weights. This takes as long as reading the configuration and the data."""
    refuse_overwrite(config.output, config.overwrite, RUN_FILES)
    if config.lora_keep:
        _refuse_own_base(config)
    from_scratch = config.recipe.preset == "scratch"
    if not from_scratch:
        trainable, weight_of = _read_model(config.model, dry)
        config = replace(config, replay=_replay_share(config, trainable.backend.spec))
    rows = data.read_rows(config)
    if from_scratch:
        tokenizer = None
        if config.vocab_size is not None:
            tokenizer = train_tokenizer(rows.training, config.vocab_size)
        trainable = blank(config.model, config.seed, tokenizer)
        weight_of = trainable.model.get_parameter
    spec = trainable.backend.spec
    precision = choose_precision(config, device, trainable.backend, checkpoint)
    if precision.autocast and device.type == "cpu":
        use_fp32_attention(trainable.model)
    encoded = data.encode(config, trainable, rows)

    shipped = NO_BLOCKS
    if not from_scratch and not config.lora_keep:
        shipped = shipped_by(config.model, spec)
    shipped_files = files_of_shipped(shipped, spec, weight_of)
    folder = None if from_scratch else ModelRef.of(config.model).folder
    notes = _drafter_notes(shipped_files, folder)
    plan = resolve_finetune(config, spec, encoded, str(device), precision, checkpoint, notes)

    model_digest = fingerprint(spec, weight_of)
    digests = {
        "tokens": plan.tokens,
        "data_digest": encoded.training.digest,
        "model_digest": model_digest,
    }
    replay = None
    if config.replay:
        decoder = (
            decoder_of(trainable) if dry else for_decoding(config.model, str(device), config.dtype)
        )
        replay = plan_replay(config, model_digest, encoded, decoder, plan.steps)
        digests["replayed"] = replay.journal.name
    settings = fixed_settings(plan, digests)
    require_same_run(checkpoint, settings)

    module = None
    order: Sequence[int] = ()
    if not dry:
        module = build_module(plan, trainable, None if from_scratch else folder)
        if not config.fsdp:  # FSDP places shards itself
            module.to(device)
        order = data.token_order(encoded.training, spec.vocab)
    elif config.lora_rank:
        with_lora(trainable.model, config)  # peft may refuse the names of modules
    dtype = stored_dtype(config.model)
    return FinetuneJob(
        plan, settings, trainable, encoded, replay, shipped_files, dtype, module, order
    )


def resolve_finetune(
    config: FinetuneConfig,
    spec: AnySpec,
    encoded: data.RunData,
    device: str,
    precision: Precision,
    checkpoint: Path | None,
    drafter_notes: Sequence[str],
) -> RunPlan:
    """The plan of a run: the settings, completed by what the model and the rows decide."""
    training = encoded.training
    steps = data.run_steps(config, len(training.seen))
    # An adapter is saved without exit blocks
    recipe = resolve_recipe(config.recipe, spec, steps, has_blocks=not config.lora_keep)
    usual_lr = learning_rate(config.recipe.preset, spec.parameters, config.lora_rank > 0)
    notes = []
    if encoded.encoder.pack:
        notes.append(_PACKED)
    if config.streaming:
        notes.append(_STREAMED)
    if spec.layers == 1:
        notes.append(_SHALLOW)
    notes += drafter_notes
    if checkpoint is not None:
        notes.append(f"going on from {checkpoint}")
    return RunPlan(
        config=replace(config, lr=config.lr or usual_lr, max_length=encoded.encoder.max_length),
        device=device,
        precision=precision,
        parameters=spec.parameters,
        num_layers=spec.layers,
        template=encoded.encoder.template,
        rows=None if config.streaming else len(training.seen),
        held_out=len(encoded.held_out_rows),
        left_out=training.left_out,
        tokens=training.tokens,
        division=encoded.division,
        steps=steps,
        checkpoint=checkpoint,
        notes=tuple(notes),
        truncated=sum(row["truncated"] for row in training.seen),
        recipe=recipe,
        exit_steps=steps_on(recipe, steps, spec.layers),
    )


def build_module(plan: RunPlan, trainable: Trainable, folder: str | None) -> RecipeModule:
    """The module that is trained. Exit blocks in `folder`, if any, are trained on."""
    config = plan.config
    recipe = plan.recipe
    assert isinstance(config, FinetuneConfig) and recipe is not None
    model: Any = trainable.model
    backend = trainable.backend
    blocks = None
    if recipe.exit_reader == "block":  # copied from layers before they get adapters
        stored = NO_BLOCKS
        if folder is not None:
            stored = read_exit_blocks(folder, backend.spec, model.get_parameter)
        blocks = new_exit_blocks(backend, [ExitBlock(layer) for layer in recipe.exits], stored)
    if config.lora_rank:
        model = with_lora(model, config)
    module = RecipeModule(model, recipe, config.seed, config.gradient_checkpointing, blocks)
    module.tokenizer = trainable.tokenizer
    module.by_muon = config.optimizer == "muon"
    return module


def _refuse_own_base(config: FinetuneConfig) -> None:
    """Raises ConfigError if an adapter would replace the model that it needs."""
    adapters, base = adapters_of(config.model)
    if os.path.realpath(config.output) in map(os.path.realpath, (*adapters, base)):
        raise ConfigError(
            f"`lora_keep`: the adapter needs its base {config.output}, which `output` {config.output} would replace"
        )


def _read_model(name: str, dry: bool) -> tuple[Trainable, Callable[[str], Tensor]]:
    """A model, and a reader of its weights by name."""
    outlined = outline(name) if dry else None
    if outlined is not None:
        return outlined
    trainable = for_training(name, "cpu", "fp32")
    return trainable, trainable.model.get_parameter


def _replay_share(config: FinetuneConfig, spec: AnySpec) -> float:
    """By default models replay that are large enough to know more than the task of the rows."""
    if config.replay is not None:
        return config.replay
    replays_by_default = config.recipe.preset in ("auto", "none") and not config.streaming
    is_large = spec.parameters >= SMALL_MODEL
    rows_per_step = sum(data.step_rows(config))
    if replays_by_default and is_large and rows_per_step * _REPLAY >= 1:
        return _REPLAY
    return 0.0


def _drafter_notes(shipped: Mapping[str, bytes], folder: str | None) -> list[str]:
    """What becomes of drafters that were made for the model before its training."""
    notes = []
    if shipped:
        notes.append(_TRAINS_SHIPPED if MTP_FILE in shipped else _SHIPPED)
    if folder is not None and Path(folder, EAGLE3_FILES[0]).is_file():
        notes.append(_EAGLE3.format(Path(folder, EAGLE3_FOLDER)))
    return notes
