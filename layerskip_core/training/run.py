"""Training: `prepare` loads and plans a run, and writes nothing; the plan trains and saves a model,
or a drafter beside one.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property, partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.utils.data import Subset

from ..checkpoint.folder import EXIT_BLOCKS_FILE, MTP_FILE, weight_files
from ..checkpoint.info import EXIT_BLOCKS, CheckpointInfo
from ..checkpoint.loaded import Decoder, Trainable, decoder_of, pick_device
from ..checkpoint.locate import EMBEDDED, ModelRef, adapters_of
from ..checkpoint.open import for_decoding, for_training, outline
from ..checkpoint.save import (
    RUN_FILES,
    copy_checkpoint,
    refuse_overwrite,
    save_checkpoint,
    save_sidecar,
)
from ..checkpoint.shipped import files_of_shipped, read_exit_blocks, shipped_by
from ..checkpoint.sidecars import EAGLE3_FILES, EAGLE3_FOLDER, fingerprint
from ..checkpoint.transformers_read import blank, stored_dtype
from ..config.training import DrafterConfig, FinetuneConfig, TrainingConfig
from ..data import has_prompts
from ..errors import CheckpointError, ConfigError, DataError, require
from ..losses import IGNORED
from ..model.exit_blocks import NO_BLOCKS, ExitBlock, ExitBlocks
from ..model.vocabulary import ORDER_FILE
from ..model.weights import cast_weights
from ..splits import HeldOut
from . import data
from .answers import Answers, Writing, answered, digest, plan_replay
from .eagle3 import FrozenEagle3, suits_engines
from .encoding import Encoder, train_tokenizer
from .exit_blocks import MUON_LR, FrozenExits, new_readers
from .module import RecipeModule, with_lora
from .plan import Plan
from .progress import LOSSES, LossHistory, checkpoints_folder, resume_point
from .recipe import SMALL_MODEL, Recipe, learning_rate, resolve_recipe, steps_on, trained_exits
from .sharding import check_sharding, gather_whole, process_index, world_size
from .verdict import AnsweredRow, Original, SpeedEstimate

_PACKED = "documents are packed into whole rows; attention stays within a document"
_STREAMED = "streaming: `resume` reads past the rows already seen, and is exact only if they come in the same order again"
_SHIPPED = "the drafter of its checkpoint (mtp) is saved as it is"
_TRAINS = f"{_SHIPPED}; `layerskip train-drafter --start-from shipped` trains it"
_LEFT = "its drafter (eagle3), made for the old weights, is not saved; `layerskip train-drafter --start-from {}` trains it on"
_REPLAY = 0.25  # share of replayed rows in a step
_VERSIONS = {name: version(name) for name in ("layerskip", "torch", "transformers")}
_SHALLOW = "a model of one layer has no place for exits or a drafter"


class WholeModel(Plan):
    """The training of a model."""

    config: FinetuneConfig
    module: RecipeModule
    recipe: Recipe
    truncated: int  # rows

    def __init__(
        self, config: FinetuneConfig, device: torch.device, resume: Path | None, dry: bool
    ) -> None:
        """`dry`: the plan is for reading only. Then it takes as long as reading the configuration
        and the data.
        """
        refuse_overwrite(config.output, config.overwrite, RUN_FILES)
        if config.lora_keep:
            (adapters, below), output = adapters_of(config.model), config.output
            if os.path.realpath(output) in map(os.path.realpath, (*adapters, below)):
                raise ConfigError(
                    f"`lora_keep`: the adapter needs its base {output}, which `output` {output} would replace"
                )
        self.original: Original | None = None  # None from scratch
        self.scratch = config.recipe.preset == "scratch"
        if not self.scratch:
            outlined = outline(config.model) if dry else None
            if outlined is None:
                trainable = for_training(config.model, "cpu", "fp32")
                weight_of = trainable.model.get_parameter
            else:
                trainable, weight_of = outlined
            if config.replay is None:
                # Which may know more than its task
                large = trainable.backend.spec.parameters >= SMALL_MODEL
                knows = large and config.recipe.preset in ("auto", "none") and not config.streaming
                config = replace(
                    config,
                    replay=_REPLAY if knows and sum(data.step_rows(config)) * _REPLAY >= 1 else 0.0,
                )
        given = data.read_rows(config)
        rows = given.training
        self.division = given.division
        if self.scratch:
            tokenizer = (
                None if config.vocab_size is None else train_tokenizer(rows, config.vocab_size)
            )
            trainable = blank(config.model, config.seed, tokenizer)
            weight_of = trainable.model.get_parameter
        spec = trainable.backend.spec
        shipped = NO_BLOCKS if self.scratch or config.lora_keep else shipped_by(config.model, spec)
        self.shipped = files_of_shipped(shipped, spec, weight_of)
        self.place(config, device, trainable, resume)
        self.stored_dtype = stored_dtype(config.model)  # of the saved weights
        encoder = data.make_encoder(config, trainable, rows)
        self.template = encoder.template
        if config.streaming:
            assert given.division is not None  # data with splits of its own is not streamed
            self.data = data.encode_stream(config.data, encoder, config.seed, given.division)
        else:
            self.data = data.encode_rows(rows, encoder)
        self.held_out_data = None
        if given.held_out:
            held_out = data.encode_rows(
                given.held_out, encoder, required=config.validation is not None
            )
            self.held_out_data = held_out if held_out.seen else None
        self._resolve(config, encoder, resume, dry, weight_of)
        if dry:
            if config.lora_rank:  # peft may refuse the names of modules
                with_lora(trainable.model, config)
            return
        self.module = self._module() if config.fsdp else self._module().to(device)
        self.order = data.token_order(self.data, spec.vocab)

    def _resolve(
        self,
        config: FinetuneConfig,
        encoder: Encoder,
        resume: Path | None,
        dry: bool,
        weight_of: Callable[[str], Tensor],
    ) -> None:
        spec = self.trainable.backend.spec
        rows = self.data
        seen = self.data.seen
        self.rows = None if config.streaming else len(seen)
        self.tokens = rows.tokens
        self.left_out = rows.left_out
        self.truncated = sum(row["truncated"] for row in seen)
        self.held_out = 0 if self.held_out_data is None else len(self.held_out_data.seen)
        self.notes = (
            (_PACKED,) * encoder.pack
            + (_STREAMED,) * config.streaming
            + (_SHALLOW,) * (spec.layers == 1)
        )
        self.notes += (_TRAINS if MTP_FILE in self.shipped else _SHIPPED,) * bool(self.shipped)
        source = None if self.scratch else ModelRef.of(config.model).folder
        if source is not None and Path(source, EAGLE3_FILES[0]).is_file():
            self.notes += (_LEFT.format(Path(source, EAGLE3_FOLDER)),)
        self.steps = data.run_steps(config, len(seen))
        # An adapter is saved without readers.
        self.recipe = resolve_recipe(config.recipe, spec, self.steps, can_read=not config.lora_keep)
        self.exit_steps = steps_on(self.recipe, self.steps, spec.layers)
        usual = learning_rate(config.recipe.preset, spec.parameters, config.lora_rank > 0)
        self.config = replace(config, lr=config.lr or usual, max_length=encoder.max_length)
        facts = asdict(self.recipe) | {"tokens": rows.tokens, "data_digest": rows.digest}
        facts["model_digest"] = original = fingerprint(spec, weight_of)
        if config.replay:
            decoder = (
                decoder_of(self.trainable)
                if dry
                else for_decoding(config.model, self.device, config.dtype)
            )
            self.answers = plan_replay(self.config, original, rows, encoder, decoder, self.steps)
            facts["replayed"] = self.answers.journal.name
        self.seal(resume, facts)

    def _module(self) -> RecipeModule:
        config = self.config
        model = self.trainable.model
        readers = None
        backend = self.trainable.backend
        if self.recipe.exit_reader != "none":  # copied from layers before they get adapters
            source = ModelRef.of(config.model).folder
            blocks = NO_BLOCKS
            if source is not None and not self.scratch:
                blocks = read_exit_blocks(source, backend.spec, model.get_parameter)
            readers = new_readers(
                backend, [ExitBlock(layer) for layer in self.recipe.exits], blocks
            )
        if config.lora_rank:
            model = with_lora(model, config)
        module = RecipeModule(
            model, self.recipe, config.seed, config.gradient_checkpointing, readers
        )
        module.tokenizer = self.trainable.tokenizer
        module.by_muon = config.optimizer == "muon"
        return module

    def _divisions(self) -> tuple[HeldOut, ...]:
        """What this training and the earlier ones of its model held out, the newest first."""
        new = () if self.division is None else (self.division,)
        earlier = () if self.scratch else self.trainable.info.held_out
        return tuple(dict.fromkeys((*new, *earlier)))

    def data_sets(self, progress: Callable[..., None]) -> tuple[Any, Any]:
        """Batches have rows of similar length, replayed texts among them; a stream keeps its
        order.
        """
        rows: Any = self.data.rows
        held_out = None if self.held_out_data is None else self.held_out_data.rows
        if process_index() == 0 and not self.scratch:
            progress("measurements before the training", 1, 0)
            few: Any = held_out or ()
            # Rows would run on the CPU: minutes for a model that needs shards, while processes wait
            if self.config.fsdp:
                few = ()
            trained_rows = self.steps * data.step_rows(self.config)[0]
            self.original = Original(self.trainable, few, self.config.seed, trained_rows)
        if isinstance(rows, data.StreamedRows):
            return rows, held_out
        lengths = [len(row["input_ids"]) for row in rows]
        if self.answers is not None:
            starts = self.answers.prompts
            packed = "documents" in rows[0]
            answers = self.answers.write(partial(progress, "replay texts", len(starts)))
            texts = [start + answer for start, answer in zip(starts, answers, strict=True)]
            documents = [{"documents": [0] * len(text)} if packed else {} for text in texts]
            rows = rows + [
                {"input_ids": text, "labels": text} | own
                for text, own in zip(texts, documents, strict=True)
            ]
        return Subset(
            rows, data.ordered(self.config, lengths, self.steps, len(rows) - len(lengths))
        ), held_out

    @property
    def example(self) -> AnsweredRow | None:
        return None if self.original is None else self.original.example

    def save(self, history: LossHistory) -> CheckpointInfo:
        """The info has the last losses of every exit."""
        config = self.config
        recipe = self.recipe
        first = process_index() == 0
        if config.fsdp:
            gather_whole(self.module, keep=first)
        resolved = {"recipe": asdict(recipe), "epochs": config.epochs or config.usual_epochs}
        details = {
            "base_model": config.model,
            "config": json.loads(json.dumps(asdict(config) | resolved)),  # as it is read back
            "steps": self.steps,
            "rows": self.rows,
            "final_losses": {str(layer): loss for layer, loss in history.latest.items()},
            "validation_losses": {str(layer): loss for layer, loss in history.validated.items()},
            "validation_rows": None if self.held_out_data is None else self.held_out_data.digest,
            "held_out": [asdict(each) for each in self._divisions()],
            "trained_exits": list(trained_exits(recipe, self.steps, self.num_layers)),
            "agreement": {
                str(layer): share
                for layer, share in history.agreement.items()
                if layer < self.num_layers
            },
            "precision": self.precision.name,
            "versions": _VERSIONS,
        }
        if self.original is not None:
            details["cost"] = msgspec.to_builtins(self.original.cost())
        if self.module.readers:
            details[EXIT_BLOCKS] = {str(layer): {} for layer in recipe.exits}
        info = CheckpointInfo(
            prompt_template=self.template.text, system=self.template.system, details=details
        )
        if first:
            model = self.module.model
            trained = (
                model.merge_and_unload() if config.lora_rank and not config.lora_keep else model
            )
            order = json.dumps(self.order, separators=(",", ":")).encode()
            files = {LOSSES: history.to_jsonl(), ORDER_FILE: order, **self.shipped}
            if self.module.readers:
                cast_weights(trained, self.stored_dtype)
                files[EXIT_BLOCKS_FILE] = self.module.readers_content(trained, self.stored_dtype)
            save_checkpoint(
                trained, self.trainable.tokenizer, info, config.output, self.stored_dtype, files
            )
        return info


class FrozenModel(Plan):
    """The training of a drafter for a frozen model. Held-out prompts and texts come last."""

    config: DrafterConfig
    module: FrozenExits | FrozenEagle3
    kept: ExitBlocks  # blocks and drafters that the model already has
    decoder: Decoder  # the model, for answers and states
    model_fingerprint: str
    answers: Answers

    def __init__(
        self, config: DrafterConfig, device: torch.device, trainable: Trainable, resume: Path | None
    ) -> None:
        self.config = config
        self.place(config, device, trainable, resume)

    @cached_property
    def estimate(self) -> SpeedEstimate:
        """The estimate for the first exit or drafter, timed on this machine."""
        return self.module.estimated_speedup(self.decoder.backend, min(self.module.names))

    def encode(self) -> None:
        """Reads the rows, and plans the answers to them."""
        *given, self.division = data.read_rows(self.config)
        encoder = data.make_encoder(self.config, self.trainable, given[0])
        first = self.module.first_target
        longest = encoder.max_length
        self.template = encoder.template
        self.config = config = replace(self.config, max_length=longest)
        encoded: list[list[Any]]
        if config.answers == "data":
            encoded = [list(encoder.rows(rows)) for rows in given]
            for text in chain(*encoded):
                text["labels"] = [
                    IGNORED if at < first else label for at, label in enumerate(text["labels"])
                ]
            encoded = [list(filter(data.has_target, rows)) for rows in encoded]
        else:
            encoded = [
                [ids for ids in encoder.prompts(rows) if first <= len(ids) < longest]
                for rows in given
            ]
        if not encoded[0]:
            needed = (
                f"{first} tokens before an answer, and room for it within `max_length` {longest}"
            )
            raise DataError(f"no row has at least {needed}")
        self.rows, self.held_out = map(len, encoded)
        self.left_out = sum(map(len, given)) - self.rows - self.held_out
        # Encoded rows; `data_sets` adds those with written answers
        self.texts = [*chain(*encoded)]
        prompts = list[list[int]]()
        if config.answers == "model":
            self.texts, prompts = [], self.texts
        how = Writing(config.answer_tokens, longest)
        journal = f"answers-{digest(self.model_fingerprint, prompts, how, config.dtype)}.jsonl"
        self.answers = Answers(
            self.decoder, prompts, how, checkpoints_folder(config.output) / journal
        )

    def resolve(self, resume: Path | None) -> None:
        """Counts tokens and steps, and seals the run."""
        config = self.config
        answers = self.answers
        self.tokens = sum(len(text["input_ids"]) for text in self.texts)
        self.tokens += sum(
            len(prompt) + answers.how.room(len(prompt)) for prompt in answers.prompts
        )
        # Which CheckpointInfo.with_exit_blocks removes
        if advice := ", ".join(self.trainable.info.advice):
            why = "chosen without these blocks, which `layerskip sweep-exits --save` includes"
            self.notes = (f"saved settings that will be left out: {advice}; they were {why}",)
        self.steps = data.run_steps(config, self.rows or 0)
        texts = [(text["input_ids"], text["labels"]) for text in self.texts]
        self.seal(
            resume,
            {"model_digest": self.model_fingerprint, "texts": digest(answers.journal.name, texts)},
        )

    def data_sets(self, progress: Callable[..., None]) -> tuple[Any, Any]:
        texts: Any = self.texts
        trained = self.rows or 0
        if prompts := self.answers.prompts:
            texts += map(
                answered, prompts, self.answers.write(partial(progress, "answers", len(prompts)))
            )
        self.module.begin(texts[:trained])
        order = data.ordered(
            self.config, [len(text["input_ids"]) for text in texts[:trained]], self.steps
        )
        return Subset(texts, order), texts[trained:] or None

    def save(self, history: LossHistory) -> CheckpointInfo:
        """Adds the drafter or blocks, and how they were trained, to the model's own folder or to a
        copy of it.
        """
        config = self.config
        info = self.trainable.info
        how: dict[str, Any] = {
            "data": asdict(config.data),
            "validation": config.validation,
            "versions": _VERSIONS,
        }
        if self.division is not None:
            how["held_out"] = asdict(self.division)
        # As it is read back
        shared = json.loads(json.dumps({**self.sealed, **self.module.details, **how}))
        trained = {
            name: shared | {"divergence": history.latest[layer]}
            for layer, name in self.module.names.items()
        }
        for layer, share in history.agreement.items():
            trained[self.module.names[layer]]["agreement"] = share
        verifier = (
            config.model
            if ModelRef.of(config.model).folder is None
            else str(Path(config.output).resolve())
        )
        files = self.module.files(
            stored_dtype(config.model), self.kept, self.model_fingerprint, verifier
        )
        if config.in_place:
            # A replaced drafter ends with its config.json
            for name in files.keys() & {EAGLE3_FILES[0]}:
                (Path(config.output) / name).unlink(missing_ok=True)
            for name in sorted(files, reverse=True):  # weights before their config.json
                save_sidecar(
                    config.output, name, files[name], lambda info: info.with_exit_blocks(trained)
                )
        else:
            if (
                info.prompt_template is None
                and self.template.text != "raw"
                and config.prompting.asked is not None
            ):
                info = replace(
                    info, prompt_template=self.template.text, system=self.template.system
                )
            # An assistant may be outside the folder
            model = self.trainable
            assistant = replace(self.kept, mtp=None)
            beside = files_of_shipped(assistant, model.backend.spec, model.model.get_parameter)
            copy_checkpoint(
                ModelRef.of(config.model).whole_folder(),
                info.with_exit_blocks(trained),
                config.output,
                beside | files,
            )
        return info.with_exit_blocks(trained)


def plan_drafter(config: DrafterConfig, device: torch.device, resume: Path | None) -> FrozenModel:
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
    answers = config.answers or ("model" if has_prompts(config.data) else "data")
    trainable = for_training(config.model, str(device), config.dtype)
    plan = FrozenModel(config, device, trainable, resume)
    backend = trainable.backend
    weight_of = trainable.model.get_parameter
    require(backend.num_layers > 1, "model", "a model of at least 2 layers", backend.num_layers)
    layout = config.implied_layout or ("eagle3" if suits_engines(backend) else "exit")
    module = (FrozenEagle3 if layout == "eagle3" else FrozenExits).of(
        backend, replace(config, layout=layout)
    )
    exits = module.layers if layout == "exit" else None
    plan.module = module
    plan.config = replace(
        config, lr=config.lr or MUON_LR, layout=layout, answers=answers, exits=exits
    )
    plan.kept = kept = read_exit_blocks(source, backend.spec, weight_of)
    held = {str(block.exit_layer): f"a block at exit {block.exit_layer}" for block in kept.blocks}
    held |= {} if kept.eagle3 is None else {"eagle3": "a drafter"}
    held |= {} if kept.mtp is None or config.start_from else {"mtp": "a drafter"}
    there = [held[name] for name in module.names.values() if name in held]
    if there and config.in_place and not (config.overwrite or resume):
        raise ConfigError(
            f"`output` {config.output} already has {there[0]}; give `overwrite` to replace it"
        )
    plan.decoder = for_decoding(config.model, str(device), config.dtype)
    plan.model_fingerprint = fingerprint(backend.spec, weight_of)
    module.decoder = plan.decoder.backend
    plan.encode()
    plan.resolve(resume)
    return plan


def prepare(config: TrainingConfig, dry: bool = False) -> WholeModel | FrozenModel:
    """Plans the run of `config`. Raises LayerSkipError for anything that would make it fail.

    `dry`: the plan of a `finetune` is for reading only, and its weights are not loaded.
    """
    require(
        config.output not in EMBEDDED, "output", "a name that no embedded model has", config.output
    )
    device = own_device(pick_device(config.device))
    if config.report_to:
        from .trainer import trackers  # imports transformers' Trainer, which a plan does not need

        trackers(config.report_to)
    resume = resume_point(config)
    plan: WholeModel | FrozenModel
    if isinstance(config, DrafterConfig):
        plan = plan_drafter(config, device, resume)
    else:
        check_sharding(config, device)
        plan = WholeModel(config, device, resume, dry)
    if config.training_arguments:
        from .trainer import training_arguments

        training_arguments(plan)
    return plan


def own_device(device: torch.device) -> torch.device:
    """The device without its index. For `cuda`, selects the GPU of this process under torchrun."""
    number = int(os.environ.get("LOCAL_RANK", "0"))
    # Trainer uses the first visible GPU
    seen = f"{device.type}, of the GPUs that CUDA_VISIBLE_DEVICES={device.index} leaves"
    require(not device.index, "device", seen, device)
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        require(
            number < gpus,
            "device",
            f"cuda with at least {number + 1} GPUs here, one per process of torchrun",
            gpus,
        )
        torch.cuda.set_device(number)
    return torch.device(device.type)
