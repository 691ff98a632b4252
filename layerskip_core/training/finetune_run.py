"""What a run of `finetune` reads, trains on and saves. Its course is that of run.py."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from ..checkpoint.folder import EXIT_BLOCKS_FILE, MTP_FILE
from ..checkpoint.info import EXIT_BLOCKS, CheckpointInfo
from ..checkpoint.loaded import Trainable, decoder_of
from ..checkpoint.locate import ModelRef, adapters_of
from ..checkpoint.model_weights import cast_weights
from ..checkpoint.open import for_decoding, for_training, outline
from ..checkpoint.save import RUN_FILES, refuse_overwrite, save_checkpoint
from ..checkpoint.shipped import files_of_shipped, read_stored_drafters, shipped_by
from ..checkpoint.sidecars import EAGLE3_FILES, EAGLE3_FOLDER, fingerprint
from ..checkpoint.transformers_read import blank, stored_dtype
from ..config.training import FinetuneConfig
from ..data import Row
from ..errors import ConfigError
from ..model.exit_blocks import NO_STORED_DRAFTERS, ExitBlock
from ..model.spec import AnySpec
from ..model.vocabulary import ORDER_FILE, order_content
from ..splits import HeldOut
from . import data
from .answers import ModelAnswers, plan_replay
from .cost import CostBaseline
from .encoding import EncodedRow, encoded_row, train_tokenizer
from .exit_blocks import new_exit_blocks
from .module import RecipeModule, use_fp32_attention, with_lora
from .plan import VERSIONS, RunPlan, RunResult, fixed_settings, require_same_run
from .precision import Precision, choose_precision
from .progress import LOSSES, LossHistory, WorkReport
from .recipe import SMALL_MODEL, learning_rate, resolve_recipe, steps_on, trained_exits
from .sharding import gather_whole, process_index

_PACKED = "documents are packed into whole rows; attention stays within a document"
_STREAMED = "streaming: `resume` reads past the rows already seen, and is exact only if they come in the same order again"
_SHALLOW = "a model of one layer has no place for exits or a drafter"
_SHIPPED = "the drafter of its checkpoint (mtp) is saved as it is"
_TRAINS_SHIPPED = f"{_SHIPPED}; `layerskip train-drafter --start-from shipped` trains it"
_EAGLE3 = "its drafter (eagle3), made for the old weights, is not saved; `layerskip train-drafter --start-from {}` trains it on"
_REPLAY = 0.25  # share of replayed rows in a step


@dataclass(frozen=True)
class FinetuneJob:
    """A planned run of `finetune`, and what it works on."""

    plan: RunPlan
    fixed_settings: Mapping[str, Any]  # a resumed run must share them
    trainable: Trainable
    data: data.RunData
    replay: ModelAnswers | None  # texts of the model, written before it is trained
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

    def measure_before(self, report: WorkReport) -> CostBaseline | None:
        """What the model does before its training; in the first process only."""
        if process_index() > 0 or self.from_scratch:
            return None
        report("measurements before the training", 0, 1)
        held_out = self.data.held_out_rows
        if self.config.fsdp:
            # Rows would run on the CPU: minutes for a model that needs shards, while others wait
            held_out = []
        trained_rows = self.plan.steps * data.step_rows(self.config)[0]
        return CostBaseline(self.trainable, held_out, self.config.seed, trained_rows)

    def data_sets(self, report: WorkReport) -> tuple[Any, Any]:
        """As in Job. Batches have rows of similar length, replayed texts among them; a stream keeps
        its order.
        """
        training = self.data.training
        held_out = self.data.held_out_rows or None
        if training.stream is not None:
            return training.stream, held_out
        lengths = [len(row["input_ids"]) for row in training.rows]
        texts = list[EncodedRow]()
        if self.replay is not None:
            texts = self._replayed(self.replay, report)
        order = data.ordered(self.config, lengths, self.plan.steps, len(texts))
        rows: Any = [*training.rows, *texts]
        return Subset(rows, order), held_out

    def _replayed(self, replay: ModelAnswers, report: WorkReport) -> list[EncodedRow]:
        """Texts, each with its prompt, and with a label on every token."""
        is_packed = "documents" in self.data.training.rows[0]
        texts = []
        for prompt, answer in zip(
            replay.prompts, replay.write("replay texts", report), strict=True
        ):
            ids = prompt + answer
            text = encoded_row(ids, ids)
            if is_packed:
                text["documents"] = np.zeros_like(text["input_ids"])
            texts.append(text)
        return texts

    def save(self, history: LossHistory, baseline: CostBaseline | None) -> RunResult:
        """Writes the model in the first process. The info has the last losses of every exit."""
        is_first = process_index() == 0
        if self.config.fsdp:
            gather_whole(self.module, keep=is_first)
        details = self._details(history)
        example = None
        if baseline is not None:
            cost, example = baseline.cost()
            details["cost"] = msgspec.to_builtins(cost)
        template = self.plan.template
        info = CheckpointInfo(template.text, system=template.system, details=details)
        if is_first:
            self._write(history, info)
        return RunResult(info, example)

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
            ORDER_FILE: order_content(self.token_order),
            **self.shipped,
        }
        if self.module.exit_blocks:
            # Now, as the blocks' file has the fingerprint of the weights as they are saved
            cast_weights(model, self.dtype)
            files[EXIT_BLOCKS_FILE] = self.module.blocks_content(model, self.dtype)
        tokenizer = self.trainable.tokenizer
        save_checkpoint(model, tokenizer, info, self.config.output, self.dtype, files)


def _by_name(losses: Mapping[int, float]) -> dict[str, float]:
    return {str(layer): loss for layer, loss in losses.items()}


@dataclass(frozen=True)
class _Model:
    """The model before its training."""

    trainable: Trainable
    weight: Callable[[str], Tensor]  # by name; in a dry run from the files
    folder: str | None = None  # None: not trained before
    shipped: Mapping[str, bytes] = field(default_factory=dict)  # files of its drafters

    @property
    def spec(self) -> AnySpec:
        return self.trainable.backend.spec


def prepare_finetune(
    config: FinetuneConfig, device: torch.device, checkpoint: Path | None, dry: bool
) -> FinetuneJob:
    """`dry`: without weights. This takes as long as reading the configuration and the data."""
    refuse_overwrite(config.output, config.overwrite, RUN_FILES)
    if config.lora_keep:
        _refuse_own_base(config)
    if config.recipe.preset == "scratch":
        rows = data.read_rows(config)
        model = _fresh_model(config, rows.training)
    else:
        model = _read_model(config, dry)
        # The rows of `commands` are as many as the replayed ones leave
        config = replace(config, replay=_replay_share(config, model.spec))
        rows = data.read_rows(config)
    trainable = model.trainable
    precision = choose_precision(config, device, trainable.backend, checkpoint)
    if precision.autocast and device.type == "cpu":
        use_fp32_attention(trainable.model)
    encoded = data.encode(config, trainable, rows)
    plan = _resolve(config, model, encoded, rows.division, str(device), precision, checkpoint)

    model_digest = fingerprint(model.spec, model.weight)
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
        order = data.token_order(encoded.training, model.spec.vocab)
        module = _build_module(plan, trainable, model.folder, order)
        if not config.fsdp:  # FSDP places shards itself
            module.to(device)
    elif config.lora_rank:
        with_lora(trainable.model, config)  # peft may refuse the names of modules
    dtype = stored_dtype(config.model)
    return FinetuneJob(
        plan, settings, trainable, encoded, replay, model.shipped, dtype, module, order
    )


def _fresh_model(config: FinetuneConfig, rows: Sequence[Row]) -> _Model:
    tokenizer = None
    if config.vocab_size is not None:
        tokenizer = train_tokenizer(rows, config.vocab_size)
    trainable = blank(config.model, config.seed, tokenizer)
    return _Model(trainable, trainable.model.get_parameter)


def _read_model(config: FinetuneConfig, dry: bool) -> _Model:
    outlined = outline(config.model) if dry else None
    if outlined is None:
        trainable = for_training(config.model, "cpu", "fp32")
        weight = trainable.model.get_parameter
    else:
        trainable, weight = outlined
    shipped: Mapping[str, bytes] = {}
    if not config.lora_keep:  # an adapter stands beside the folder that has them
        spec = trainable.backend.spec
        drafters = shipped_by(config.model, spec)
        shipped = files_of_shipped(drafters, spec, lambda: fingerprint(spec, weight))
    return _Model(trainable, weight, ModelRef.of(config.model).sidecar_folder, shipped)


def _resolve(
    config: FinetuneConfig,
    model: _Model,
    encoded: data.RunData,
    division: HeldOut | None,
    device: str,
    precision: Precision,
    checkpoint: Path | None,
) -> RunPlan:
    """The plan of a run: the settings, completed by what the model and the rows decide."""
    spec = model.spec
    training = encoded.training
    steps = data.run_steps(config, len(training.rows))
    # An adapter is saved without exit blocks
    recipe = resolve_recipe(
        config.recipe, spec, steps, has_blocks=not config.lora_keep, is_sharded=config.fsdp
    )
    usual_lr = learning_rate(config.recipe.preset, spec.parameters, config.lora_rank > 0)
    notes = []
    if encoded.encoder.pack:
        notes.append(_PACKED)
    if config.streaming:
        notes.append(_STREAMED)
    if spec.layers == 1:
        notes.append(_SHALLOW)
    return RunPlan(
        config=replace(config, lr=config.lr or usual_lr, max_length=encoded.encoder.max_length),
        device=device,
        precision=precision,
        spec=spec,
        template=encoded.encoder.template,
        rows=None if config.streaming else len(training.rows),
        held_out=len(encoded.held_out_rows),
        left_out=training.left_out,
        tokens=training.tokens,
        division=division,
        steps=steps,
        checkpoint=checkpoint,
        notes=(*notes, *_drafter_notes(model)),
        truncated=sum(row["truncated"] for row in training.rows),
        recipe=recipe,
        exit_steps=steps_on(recipe, steps, spec.layers),
    )


def _build_module(
    plan: RunPlan, trainable: Trainable, folder: str | None, order: Sequence[int]
) -> RecipeModule:
    """The module that is trained. Exit blocks in `folder`, if any, are trained on. `order`: token
    ids, the most frequent first.
    """
    config = plan.config
    recipe = plan.recipe
    assert isinstance(config, FinetuneConfig) and recipe is not None
    model: Any = trainable.model
    backend = trainable.backend
    blocks = None
    if recipe.exit_reader == "block":  # copied from layers before they get adapters
        stored = NO_STORED_DRAFTERS
        if folder is not None:
            stored = read_stored_drafters(folder, backend.spec, trainable.fingerprint)
        blocks = new_exit_blocks(backend, [ExitBlock(layer) for layer in recipe.exits], stored)
    if config.lora_rank:
        model = with_lora(model, config)
    frequent: Sequence[int] = ()
    if isinstance(model.get_output_embeddings(), nn.Linear):  # not a head with an adapter
        frequent = order[: recipe.exit_vocab]
    return RecipeModule(
        model,
        recipe,
        config.seed,
        config.gradient_checkpointing,
        blocks,
        trainable.tokenizer,
        frequent,
    )


def _refuse_own_base(config: FinetuneConfig) -> None:
    """Raises ConfigError if an adapter would replace the model that it needs."""
    adapters, base = adapters_of(config.model)
    if os.path.realpath(config.output) in map(os.path.realpath, (*adapters, base)):
        raise ConfigError(
            f"`lora_keep`: the adapter needs its base {config.output}, which `output` {config.output} would replace"
        )


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


def _drafter_notes(model: _Model) -> list[str]:
    """What becomes of drafters that were made for the model before its training."""
    notes = []
    if model.shipped:
        notes.append(_TRAINS_SHIPPED if MTP_FILE in model.shipped else _SHIPPED)
    if model.folder is not None and Path(model.folder, EAGLE3_FILES[0]).is_file():
        notes.append(_EAGLE3.format(Path(model.folder, EAGLE3_FOLDER)))
    return notes
