"""What a run of `train-drafter` reads, trains on and saves. Its course is that of run.py; the model
stays as it is.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from ..checkpoint.folder import weight_files
from ..checkpoint.info import CheckpointInfo
from ..checkpoint.loaded import Decoder, Trainable
from ..checkpoint.locate import ModelRef, is_folder
from ..checkpoint.open import for_decoding, for_training
from ..checkpoint.save import copy_checkpoint, refuse_overwrite, save_sidecar
from ..checkpoint.shipped import files_of_shipped, read_stored_drafters
from ..checkpoint.sidecars import EAGLE3_FILES, eagle3_content
from ..checkpoint.transformers_read import stored_dtype
from ..config.model import PackingConfig
from ..config.training import DrafterConfig
from ..data import Row, has_prompts
from ..errors import CheckpointError, ConfigError, DataError, require
from ..losses import IGNORED
from ..model import missing_feature
from ..model.exit_blocks import NO_STORED_DRAFTERS, StoredDrafters
from ..model.vocabulary import exit_vocabulary
from . import data
from .answers import ModelAnswers, Writing, answered, digest
from .eagle3 import FrozenEagle3, suits_engines
from .encoding import EncodedRow, Encoder, has_target
from .exit_blocks import MUON_LR, FrozenExits
from .plan import VERSIONS, RunPlan, RunResult, fixed_settings, require_same_run
from .precision import choose_precision
from .progress import LossHistory, WorkReport, checkpoints_folder
from .sharding import world_size
from .speedup import SpeedEstimate


@dataclass(frozen=True)
class DrafterTexts:
    """What a drafter learns from: rows with answers, or prompts that the model answers. One of both
    is empty.
    """

    rows: list[EncodedRow]
    prompts: list[list[int]]
    trained: int  # the first ones; the others are held out
    left_out: int  # without room for an answer, or too short

    @property
    def held_out(self) -> int:
        return len(self.rows) + len(self.prompts) - self.trained


@dataclass(frozen=True)
class DrafterJob:
    """A planned run of `train-drafter`, and what it works on."""

    plan: RunPlan
    fixed_settings: Mapping[str, Any]  # a resumed run must share them
    trainable: Trainable
    module: FrozenExits | FrozenEagle3
    decoder: Decoder  # the model, for answers and states
    texts: DrafterTexts
    answers: ModelAnswers  # to the prompts of `texts`
    existing: StoredDrafters  # blocks and drafters that the model already has
    model_digest: str

    @property
    def config(self) -> DrafterConfig:
        assert isinstance(self.plan.config, DrafterConfig)
        return self.plan.config

    @cached_property
    def estimate(self) -> SpeedEstimate:
        """The estimate for the first exit or drafter, timed on this machine."""
        return self.module.estimated_speedup(self.decoder.backend, min(self.module.names))

    def measure_before(self, report: WorkReport) -> None:
        """Nothing: the model does not change."""

    def data_sets(self, report: WorkReport) -> tuple[Any, Any]:
        """As in Job."""
        rows = self.texts.rows
        prompts = self.texts.prompts
        if prompts:
            rows = list(map(answered, prompts, self.answers.write("answers", report)))
        trained = self.texts.trained
        training: Any = rows[:trained]
        self.module.begin(training)
        lengths = [len(row["input_ids"]) for row in training]
        order = data.ordered(self.config, lengths, self.plan.steps)
        return Subset(training, order), rows[trained:] or None

    def save(self, history: LossHistory, baseline: object) -> RunResult:
        """Adds the drafter or exit blocks, and how they were trained, to the model's own folder or
        to a copy of it.
        """
        config = self.config
        trained = self._details(history)
        files = self._files()
        if config.in_place:
            self._write_in_place(files, trained)
        else:
            self._write_copy(files, trained)
        return RunResult(self.trainable.info.with_exit_blocks(trained))

    def _files(self) -> dict[str, bytes]:
        """Files of the drafter or of all exit blocks, by name."""
        model = self.config.model
        dtype = stored_dtype(model)
        if ModelRef.of(model).gguf is not None:  # its weights are in fewer bits than 16
            dtype = torch.bfloat16
        if not isinstance(self.module, FrozenEagle3):
            return self.module.files(dtype, self.existing, self.model_digest)
        verifier = model  # a hub id
        if is_folder(ModelRef.of(model).path):
            verifier = str(Path(self.config.output).resolve())
        return eagle3_content(self.module.stored(dtype), self.plan.spec, verifier)

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
        # What the model's folder has is copied with it. Of the existing drafters only an assistant
        # (of Gemma 4) may be elsewhere.
        assistant = replace(self.existing, mtp=None)
        beside = files_of_shipped(assistant, self.trainable.backend.spec, lambda: self.model_digest)
        source = _source(config.model)
        described = info.with_exit_blocks(trained)
        files = {**beside, **files}
        copy_checkpoint(source.path, source.file_names, described, config.output, files)


def prepare_drafter(
    config: DrafterConfig, device: torch.device, checkpoint: Path | None
) -> DrafterJob:
    """Plans the run. Loads the model twice: in transformers, to copy blocks, and to decode, for
    answers and states.
    """
    source = _source(config.model)
    copied = () if source.gguf is None else (source.gguf.name,)
    refuse_overwrite(config.output, config.overwrite or config.in_place, copied)
    if config.answers is None:
        config = replace(config, answers="model" if has_prompts(config.data) else "data")
    trainable = for_training(config.model, str(device), config.dtype)
    backend = trainable.backend
    require(backend.num_layers > 1, "model", "a model of at least 2 layers", backend.num_layers)
    precision = choose_precision(config, device, backend, checkpoint)
    layout = config.implied_layout or ("eagle3" if suits_engines(backend) else "exit")
    config = replace(config, layout=layout)
    module = (FrozenEagle3 if layout == "eagle3" else FrozenExits).of(backend, config)
    model_digest = trainable.fingerprint()
    existing = NO_STORED_DRAFTERS
    if source.sidecar_folder is not None:
        existing = read_stored_drafters(source.sidecar_folder, backend.spec, lambda: model_digest)
    if config.in_place and not config.overwrite and checkpoint is None:
        _refuse_to_replace(existing, config, module.names.values())
    packing = None
    if layout == "exit" and missing_feature(backend.spec) is None:
        # What exits will draft from, for their estimated speedup
        packing = PackingConfig(draft_vocab=exit_vocabulary(backend.spec.vocab))
    decoder = for_decoding(config.model, str(device), config.dtype, packing)
    module.decoder = decoder.backend

    rows = data.read_rows(config)
    encoder = data.make_encoder(config, trainable, rows.training)
    texts = _texts(config, rows, encoder, module.first_target)
    answers = _answers(config, decoder, texts, encoder.max_length, model_digest)

    plan = RunPlan(
        config=replace(
            config,
            lr=config.lr or MUON_LR,
            exits=module.layers if layout == "exit" else None,
            max_length=encoder.max_length,
        ),
        device=str(device),
        precision=precision,
        spec=backend.spec,
        template=encoder.template,
        rows=texts.trained,
        held_out=texts.held_out,
        left_out=texts.left_out,
        tokens=_most_tokens(texts, answers.how),
        division=rows.division,
        steps=data.run_steps(config, texts.trained),
        checkpoint=checkpoint,
        notes=_notes(trainable.info),
    )
    labelled = [(row["input_ids"].tolist(), row["labels"].tolist()) for row in texts.rows]
    digests = {
        "model_digest": model_digest,
        "texts": digest(answers.journal.name, labelled),
    }
    settings = fixed_settings(plan, digests)
    require_same_run(checkpoint, settings)
    return DrafterJob(
        plan, settings, trainable, module, decoder, texts, answers, existing, model_digest
    )


def _source(name: str) -> ModelRef:
    """The model whose files are copied. Raises ConfigError, CheckpointError for one that cannot be
    trained or copied.
    """
    if world_size() > 1:
        raise ConfigError(f"a drafter is trained in one process, not in {world_size()} by torchrun")
    model = ModelRef.of(name)
    if model.gguf is not None:
        return model
    model = replace(model, path=model.whole_folder())
    if not weight_files(model.path):
        raise CheckpointError(
            f"`model` {name} has no safetensors, which are copied as they are: `layerskip import`"
        )
    return model


def _answers(
    config: DrafterConfig,
    decoder: Decoder,
    texts: DrafterTexts,
    max_length: int,
    model_digest: str,
) -> ModelAnswers:
    how = Writing(config.answer_tokens, max_length)
    journal = f"answers-{digest(model_digest, texts.prompts, how, config.dtype)}.jsonl"
    return ModelAnswers(decoder, texts.prompts, how, checkpoints_folder(config.output) / journal)


def _most_tokens(texts: DrafterTexts, how: Writing) -> int:
    tokens = sum(len(row["input_ids"]) for row in texts.rows)
    return tokens + sum(len(prompt) + how.max_new_tokens(len(prompt)) for prompt in texts.prompts)


def _notes(info: CheckpointInfo) -> tuple[str, ...]:
    advice = ", ".join(info.advice)
    if not advice:
        return ()
    return (  # which `with_exit_blocks` removes
        f"saved settings that will be left out: {advice}; they were chosen without these "
        "blocks, which `layerskip sweep-exits --save` includes",
    )


def _refuse_to_replace(
    existing: StoredDrafters, config: DrafterConfig, names: Collection[str]
) -> None:
    """Raises ConfigError if the model's own folder has a block or drafter of these names."""
    held = {
        str(block.exit_layer): f"a block at exit {block.exit_layer}" for block in existing.blocks
    }
    if existing.eagle3 is not None:
        held["eagle3"] = "a drafter"
    if existing.mtp is not None and config.start_from is None:
        held["mtp"] = "a drafter"
    for name in names:
        if name in held:
            raise ConfigError(
                f"`output` {config.output} already has {held[name]}; give `overwrite` to replace it"
            )


def _texts(
    config: DrafterConfig, rows: data.RunRows, encoder: Encoder, first_target: int
) -> DrafterTexts:
    """The rows or prompts with at least `first_target` tokens before an answer, and with room for
    it.
    """
    encoded = list[EncodedRow]()
    prompts = list[list[int]]()
    if config.answers == "data":
        encoded = _own_answers(rows.training, encoder, first_target)
        trained = len(encoded)
        encoded += _own_answers(rows.held_out, encoder, first_target)
    else:
        prompts = _prompts(rows.training, encoder, first_target)
        trained = len(prompts)
        prompts += _prompts(rows.held_out, encoder, first_target)
    if not trained:
        raise DataError(
            f"no row has at least {first_target} tokens before an answer, and room for it within "
            f"`max_length` {encoder.max_length}"
        )
    given = len(rows.training) + len(rows.held_out)
    left_out = given - len(encoded) - len(prompts)
    return DrafterTexts(encoded, prompts, trained, left_out)


def _own_answers(rows: Sequence[Row], encoder: Encoder, first_target: int) -> list[EncodedRow]:
    """Encoded rows, without labels before `first_target`."""
    encoded = list(encoder.rows(rows))
    for row in encoded:
        row["labels"][:first_target] = IGNORED
    return list(filter(has_target, encoded))


def _prompts(rows: Sequence[Row], encoder: Encoder, first_target: int) -> list[list[int]]:
    prompts = encoder.prompts(rows)
    return [ids for ids in prompts if first_target <= len(ids) < encoder.max_length]
