"""What a run of `train-drafter` reads, trains on and saves. Its course is that of run.py; the model
stays as it is.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import Subset

from ..checkpoint.folder import weight_files
from ..checkpoint.info import CheckpointInfo
from ..checkpoint.loaded import Decoder, Trainable
from ..checkpoint.locate import ModelRef
from ..checkpoint.open import for_decoding, for_training
from ..checkpoint.save import copy_checkpoint, refuse_overwrite, save_sidecar
from ..checkpoint.shipped import files_of_shipped, read_exit_blocks
from ..checkpoint.sidecars import EAGLE3_FILES, fingerprint
from ..checkpoint.transformers_read import stored_dtype
from ..config.training import DrafterConfig
from ..data import has_prompts
from ..errors import CheckpointError, ConfigError, DataError, require
from ..losses import IGNORED
from ..model.exit_blocks import ExitBlocks
from . import data
from .answers import Answers, Writing, answered, digest
from .eagle3 import FrozenEagle3, suits_engines
from .encoding import Encoder
from .exit_blocks import MUON_LR, FrozenExits
from .plan import VERSIONS, RunPlan, fixed_settings, require_same_run
from .precision import choose_precision
from .progress import LossHistory, checkpoints_folder
from .sharding import world_size
from .speedup import SpeedEstimate


@dataclass(frozen=True)
class DrafterTexts:
    """What a drafter learns from: encoded rows, or prompts that the model answers."""

    training: list[Any]
    held_out: list[Any]
    left_out: int  # rows without room for an answer, or too short

    @property
    def all(self) -> list[Any]:
        return [*self.training, *self.held_out]


@dataclass(frozen=True)
class DrafterJob:
    """A planned run of `train-drafter`, and what it works on."""

    plan: RunPlan
    fixed_settings: Mapping[str, Any]  # a resumed run must share them
    trainable: Trainable
    module: FrozenExits | FrozenEagle3
    decoder: Decoder  # the model, for answers and states
    texts: DrafterTexts
    answers: Answers  # to the prompts; none where the rows have answers
    present: ExitBlocks  # blocks and drafters that the model already has
    model_digest: str

    @property
    def config(self) -> DrafterConfig:
        assert isinstance(self.plan.config, DrafterConfig)
        return self.plan.config

    @cached_property
    def estimate(self) -> SpeedEstimate:
        """The estimate for the first exit or drafter, timed on this machine."""
        return self.module.estimated_speedup(self.decoder.backend, min(self.module.names))

    def measure_before(self, report: Callable[..., None]) -> None:
        """Nothing: the model does not change."""

    def data_sets(self, report: Callable[..., None]) -> tuple[Any, Any]:
        """(training rows in the run's order, held-out rows or None)."""
        texts = self.texts.all
        if prompts := self.answers.prompts:
            answers = self.answers.write(partial(report, "answers", len(prompts)))
            texts = list(map(answered, prompts, answers))
        trained = len(self.texts.training)
        training = texts[:trained]
        self.module.begin(training)
        lengths = [len(text["input_ids"]) for text in training]
        order = data.ordered(self.config, lengths, self.plan.steps)
        rows: Any = Subset(cast(Any, training), order)
        return rows, texts[trained:] or None

    def save(self, history: LossHistory, _: object) -> CheckpointInfo:
        """Adds the drafter or exit blocks, and how they were trained, to the model's own folder or
        to a copy of it.
        """
        config = self.config
        trained = self._details(history)
        verifier = config.model  # a hub id
        if ModelRef.of(config.model).folder is not None:
            verifier = str(Path(config.output).resolve())
        dtype = stored_dtype(config.model)
        files = self.module.files(dtype, self.present, self.model_digest, verifier)
        if config.in_place:
            self._write_in_place(files, trained)
        else:
            self._write_copy(files, trained)
        return self.trainable.info.with_exit_blocks(trained)

    def _details(self, history: LossHistory) -> dict[str, dict[str, Any]]:
        """By block or drafter, how it was trained, for layerskip.json."""
        how: dict[str, Any] = {
            **self.fixed_settings,
            **self.module.details,
            "data": asdict(self.config.data),
            "validation": self.config.validation,
            "versions": VERSIONS,
        }
        if self.plan.division is not None:
            how["held_out"] = asdict(self.plan.division)
        shared = json.loads(json.dumps(how))  # as it is read back
        trained = {}
        for layer, name in self.module.names.items():
            trained[name] = {**shared, "divergence": history.latest[layer]}
            if layer in history.agreement:
                trained[name]["agreement"] = history.agreement[layer]
        return trained

    def _write_in_place(self, files: Mapping[str, bytes], trained: Mapping[str, Any]) -> None:
        output = self.config.output
        # A drafter is there when its config.json is: it goes first and comes last.
        if EAGLE3_FILES[0] in files:
            (Path(output) / EAGLE3_FILES[0]).unlink(missing_ok=True)
        for name in sorted(files, reverse=True):
            save_sidecar(output, name, files[name], lambda info: info.with_exit_blocks(trained))

    def _write_copy(self, files: Mapping[str, bytes], trained: Mapping[str, Any]) -> None:
        config = self.config
        info = self.trainable.info
        template = self.plan.template
        chosen = config.prompting.asked is not None and template.text != "raw"
        if chosen and info.prompt_template is None:
            info = replace(info, prompt_template=template.text, system=template.system)
        # An assistant (a drafter of Gemma 4) may be outside the model's folder
        assistant = replace(self.present, mtp=None)
        model = self.trainable.model
        beside = files_of_shipped(assistant, self.trainable.backend.spec, model.get_parameter)
        source = ModelRef.of(config.model).whole_folder()
        copy_checkpoint(source, info.with_exit_blocks(trained), config.output, {**beside, **files})


def prepare_drafter(
    config: DrafterConfig, device: torch.device, checkpoint: Path | None
) -> DrafterJob:
    """Plans the run. Loads the model twice: in transformers, to copy blocks, and to decode, for
    answers and states.
    """
    if world_size() > 1:
        raise ConfigError(f"a drafter is trained in one process, not in {world_size()} by torchrun")
    source = ModelRef.of(config.model).whole_folder()
    if not weight_files(source):
        raise CheckpointError(
            f"`model` {config.model} has no safetensors, which are copied as they are: `layerskip import`"
        )
    refuse_overwrite(config.output, config.overwrite or config.in_place)
    if config.answers is None:
        config = replace(config, answers="model" if has_prompts(config.data) else "data")
    trainable = for_training(config.model, str(device), config.dtype)
    backend = trainable.backend
    require(backend.num_layers > 1, "model", "a model of at least 2 layers", backend.num_layers)
    precision = choose_precision(config, device, backend, checkpoint)
    layout = config.implied_layout or ("eagle3" if suits_engines(backend) else "exit")
    kind = FrozenEagle3 if layout == "eagle3" else FrozenExits
    module = kind.of(backend, replace(config, layout=layout))
    present = read_exit_blocks(source, backend.spec, trainable.model.get_parameter)
    if config.in_place and not config.overwrite and checkpoint is None:
        _refuse_present(config, module.names.values(), present)

    decoder = for_decoding(config.model, str(device), config.dtype)
    module.decoder = decoder.backend
    rows = data.read_rows(config)
    encoder = data.make_encoder(config, trainable, rows.training)
    config = replace(
        config,
        lr=config.lr or MUON_LR,
        layout=layout,
        exits=module.layers if layout == "exit" else None,
        max_length=encoder.max_length,
    )
    texts = _texts(config, rows, encoder, module.first_target)
    writes = config.answers == "model"
    prompts = texts.all if writes else []
    model_digest = fingerprint(backend.spec, trainable.model.get_parameter)
    how = Writing(config.answer_tokens, encoder.max_length)
    journal = f"answers-{digest(model_digest, prompts, how, config.dtype)}.jsonl"
    answers = Answers(decoder, prompts, how, checkpoints_folder(config.output) / journal)

    encoded = [] if writes else texts.all
    tokens = sum(len(text["input_ids"]) for text in encoded)
    tokens += sum(len(prompt) + how.room(len(prompt)) for prompt in prompts)
    notes = []
    if advice := ", ".join(trainable.info.advice):  # which `with_exit_blocks` removes
        notes.append(
            f"saved settings that will be left out: {advice}; they were chosen without these "
            "blocks, which `layerskip sweep-exits --save` includes"
        )
    if checkpoint is not None:
        notes.append(f"going on from {checkpoint}")
    plan = RunPlan(
        config=config,
        device=str(device),
        precision=precision,
        parameters=backend.spec.parameters,
        num_layers=backend.num_layers,
        template=encoder.template,
        rows=len(texts.training),
        held_out=len(texts.held_out),
        left_out=texts.left_out,
        tokens=tokens,
        division=rows.division,
        steps=data.run_steps(config, len(texts.training)),
        checkpoint=checkpoint,
        notes=tuple(notes),
    )
    labelled = [(text["input_ids"], text["labels"]) for text in encoded]
    digests = {"model_digest": model_digest, "texts": digest(journal, labelled)}
    settings = fixed_settings(plan, digests)
    require_same_run(checkpoint, settings)
    return DrafterJob(
        plan, settings, trainable, module, decoder, texts, answers, present, model_digest
    )


def _refuse_present(config: DrafterConfig, names: Any, present: ExitBlocks) -> None:
    """Raises ConfigError if the model's own folder has a block or drafter of these names."""
    held = {
        str(block.exit_layer): f"a block at exit {block.exit_layer}" for block in present.blocks
    }
    if present.eagle3 is not None:
        held["eagle3"] = "a drafter"
    if present.mtp is not None and config.start_from is None:
        held["mtp"] = "a drafter"
    for name in names:
        if name in held:
            raise ConfigError(
                f"`output` {config.output} already has {held[name]}; give `overwrite` to replace it"
            )


def _texts(
    config: DrafterConfig, rows: data.RunRows, encoder: Encoder, first_target: int
) -> DrafterTexts:
    """The rows with at least `first_target` tokens before an answer, and with room for it."""
    find = _own_answers if config.answers == "data" else _prompts
    training = find(rows.training, encoder, first_target)
    held_out = find(rows.held_out, encoder, first_target)
    if not training:
        raise DataError(
            f"no row has at least {first_target} tokens before an answer, and room for it within "
            f"`max_length` {encoder.max_length}"
        )
    given = len(rows.training) + len(rows.held_out)
    return DrafterTexts(training, held_out, given - len(training) - len(held_out))


def _own_answers(rows: Any, encoder: Encoder, first_target: int) -> list[dict[str, Any]]:
    """Encoded rows, without labels before `first_target`."""
    texts = list(encoder.rows(rows))
    for text in texts:
        unread = min(first_target, len(text["labels"]))
        text["labels"] = [IGNORED] * unread + text["labels"][unread:]
    return list(filter(data.has_target, texts))


def _prompts(rows: Any, encoder: Encoder, first_target: int) -> list[list[int]]:
    prompts = encoder.prompts(rows)
    return [ids for ids in prompts if first_target <= len(ids) < encoder.max_length]
