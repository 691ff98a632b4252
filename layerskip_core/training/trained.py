"""What a run trains: a model, or adapters on it, under the recipe or not; or what drafts for a model that stays as it is.

Each knows its plan, its rows and how the result is saved.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from torch.utils.data import ConcatDataset, Subset

from ..checkpoint.beside import fingerprint, read_exit_blocks
from ..checkpoint.folder import EXIT_BLOCKS_FILE, weight_files
from ..checkpoint.info import EXIT_BLOCKS, CheckpointInfo
from ..checkpoint.loaded import Trainable, decoder_of
from ..checkpoint.locate import adapters_of, downloaded, locate
from ..checkpoint.open import blank, for_decoding, for_training
from ..checkpoint.save import RUN_FILES, copy_checkpoint, refuse_overwrite, save_beside, save_checkpoint
from ..checkpoint.speculators import EAGLE3_FILES
from ..checkpoint.transformers_read import stored_dtype
from ..config.training import BlockLayout, DrafterConfig, FinetuneConfig
from ..data import has_prompts
from ..errors import CheckpointError, ConfigError, DataError, require
from ..files import require_disk
from ..losses import IGNORED
from ..model import TransformersBackend
from ..model.exit_blocks import NO_BLOCKS
from ..model.vocabulary import ORDER_FILE
from .answers import Answers, Writing, digest, own_texts, plan_replay
from .checkpoints import KEPT, ResumePoint, checkpoints_folder
from .data import (
    StreamedRows,
    encode_rows,
    encode_stream,
    epochs,
    has_target,
    make_encoder,
    ordered,
    parts_of,
    read_rows,
    rows_per_step,
    run_steps,
    token_order,
)
from .eagle3 import FrozenEagle3, suits_engines
from .encoding import Encoder, train_tokenizer
from .exit_blocks import DrafterModule, FrozenExits, States, new_readers, states_bytes, write_states
from .module import RecipeModule, adapted_layers, use_fp32_attention, with_lora
from .plan import Plan, make_plan, timed
from .progress import LossHistory
from .recipe import SMALL_MODEL, learning_rate, resolve_recipe, steps_on, trained_exits
from .sharding import gather_whole, process_index, world_size
from .worth import Original

_PACKED = "documents are packed into whole rows; attention stays within a document"
_STREAMED = "streaming: `resume` reads past the rows already seen, and is exact only if they come in the same order again"
_REPLAY = 0.25  # of the rows of a step
_SHALLOW = "a model of one layer has no place for exits or a drafter"


class Trained(Protocol):
    """A run that `prepare` has loaded and planned."""

    plan: Plan

    @property
    def module(self) -> RecipeModule | DrafterModule: ...

    def rows(self, progress: Callable[[str, int, int], None]) -> tuple[Any, Any]:
        """(the rows of the run in their order, the held-out rows).

        `progress` gets a stage, the number of its texts and how many of them are done.
        """
        ...

    def save(self, history: LossHistory, first: bool) -> CheckpointInfo:
        """Writes the result in the `first` process. Returns its info."""
        ...


class WholeModel:
    """The training of a model."""

    def __init__(self, config: FinetuneConfig, device: torch.device, resume: ResumePoint | None) -> None:
        _require_output(config)
        self.original: Original | None = None  # None from scratch, and of shards
        self.scratch = config.recipe.preset == "scratch"
        if not self.scratch:
            self.trainable = for_training(config.model, "cpu", "fp32")
            config = replace(config, replay=_replay(config, self.trainable.backend.spec.parameters))
        rows, held_out = read_rows(config)
        if self.scratch:
            tokenizer = None if config.vocab_size is None else train_tokenizer(rows, config.vocab_size)
            self.trainable = blank(config.model, config.seed, tokenizer)
        self.dtype = stored_dtype(config.model)  # of the saved weights
        encoder = make_encoder(config, self.trainable, rows)
        self.template = encoder.template
        self.data = encode_stream(config.data, encoder, config.seed) if config.streaming else encode_rows(rows, encoder)
        self.held_out = encode_rows(held_out, encoder) if held_out else None
        plan = self._planned(config, device, encoder, resume)
        # Of weights and two moments in fp32; one checkpoint more than are kept, while it is written. With LoRA they are small.
        every = 0 if config.lora_rank else config.save_steps
        checkpoints = min(KEPT + 1, plan.steps // every) if every else 0
        needed = plan.parameters * (self.dtype.itemsize + 12 * checkpoints)
        require_disk(checkpoints_folder(config.output), needed, "the model and the checkpoints of its run")
        self.module = _module(plan, self.trainable)
        seen = self.data.seen
        longest = sorted(seen, key=lambda row: -len(row["input_ids"]))[: config.batch_size]
        self.plan = timed(plan, self.module, longest, self.data.tokens / len(seen))
        self.order = token_order(self.data, self.trainable.backend.spec.vocab)

    def _planned(self, config: FinetuneConfig, device: torch.device, encoder: Encoder, resume: ResumePoint | None) -> Plan:
        spec, data, replay = self.trainable.backend.spec, self.data, None
        steps, usual = (
            run_steps(config, len(data.seen)),
            learning_rate(config.recipe.preset, spec.parameters, config.lora_rank > 0),
        )
        recipe = resolve_recipe(config.recipe, spec, steps)
        if config.lora_keep:  # beside an adapter alone nothing else is saved
            recipe = replace(recipe, exit_reader="none")
        config = replace(config, lr=config.lr or usual, max_length=encoder.max_length)
        facts = asdict(recipe) | {"original": None, "tokens": data.tokens, "data_digest": data.digest}
        if config.replay or config.lora_rank:
            facts["original"] = original = fingerprint(spec, self.trainable.model.get_parameter)
            if config.replay:
                replay = plan_replay(config, original, data, encoder, str(device), steps)
                config = replace(config, replay_tokens=replay.how.tokens)
                facts["replayed"] = replay.journal.name
        return make_plan(
            config,
            device,
            spec,
            resume,
            (_PACKED,) * encoder.pack + (_STREAMED,) * config.streaming + (_SHALLOW,) * (spec.layers == 1),
            facts,
            steps=steps,
            rows=None if config.streaming else len(data.seen),
            held_out=0 if self.held_out is None else len(self.held_out.seen),
            tokens=data.tokens,
            truncated=sum(row["truncated"] for row in data.seen),
            left_out=data.left_out,
            recipe=recipe,
            exit_steps=steps_on(recipe, steps, spec.layers),
            adapted_layers=adapted_layers(config, recipe, spec.layers),
            answers=replay,
        )

    def rows(self, progress: Callable[[str, int, int], None]) -> tuple[Any, Any]:
        """Batches have rows of similar length, with those of a replay among them; a stream is taken as it comes."""
        if process_index() == 0 and not self.scratch and not self.plan.is_sharded:
            progress("texts", 1, 0)
            self.module.eval()
            task = [] if self.held_out is None else parts_of(self.held_out.rows)
            self.original = Original(self.module, own_texts(decoder_of(self.trainable), self.plan.config.seed), task)
        rows: Any = self.data.rows
        plan, held_out = self.plan, None if self.held_out is None else self.held_out.rows
        if isinstance(rows, StreamedRows):
            return rows, held_out
        lengths = [len(row["input_ids"]) for row in rows]
        texts: list[list[int]] = []
        if plan.answers is not None:
            starts, packed = plan.answers.prompts, "documents" in rows[0]
            answers = plan.answers.write(partial(progress, "replay texts", len(starts)))
            texts = [start + answer for start, answer in zip(starts, answers, strict=True)]
            rows = rows + [
                {"input_ids": text, "labels": text} | ({"documents": [0] * len(text)} if packed else {}) for text in texts
            ]
        return Subset(rows, ordered(plan.config, lengths, plan.steps, len(texts))), held_out

    def save(self, history: LossHistory, first: bool) -> CheckpointInfo:
        """Writes the model. Its info has the last losses of every exit."""
        plan, config = self.plan, self.plan.config
        assert plan.recipe is not None and isinstance(config, FinetuneConfig)
        if config.fsdp:
            gather_whole(self.module, keep=first)
        details = {
            "base_model": config.model,
            # As they are read back from JSON.
            "config": json.loads(json.dumps(asdict(config) | {"recipe": asdict(plan.recipe), "epochs": epochs(config)})),
            "steps": plan.steps,
            "rows": plan.rows,
            "final_losses": {str(layer): loss for layer, loss in history.latest.items()},
            "validation_losses": {str(layer): loss for layer, loss in history.validated.items()},
            "validation_rows": None if self.held_out is None else self.held_out.digest,
            "trained_exits": list(trained_exits(plan.recipe, plan.steps, plan.num_layers)),
            "agreement": {str(layer): share for layer, share in history.agreement.items() if layer < plan.num_layers},
            "versions": {name: version(name) for name in ("layerskip", "torch", "transformers")},
        }
        if self.original is not None:
            details["cost"] = msgspec.to_builtins(self.original.cost(self.module))
        if self.module.readers:
            details[EXIT_BLOCKS] = {str(layer): {"feature": "none"} for layer in plan.recipe.exits}
        info = CheckpointInfo(prompt_template=self.template.text, system=self.template.system, details=details)
        if first:
            model = self.module.model
            trained = model.merge_and_unload() if config.lora_rank and not config.lora_keep else model
            files = {
                "losses.jsonl": history.to_jsonl().encode(),
                ORDER_FILE: json.dumps(self.order, separators=(",", ":")).encode(),
            }
            if self.module.readers:
                files[EXIT_BLOCKS_FILE] = self.module.readers_content(trained.to(self.dtype), self.dtype)
            save_checkpoint(trained, self.trainable.tokenizer, info, config.output, self.dtype, files)
        return info


def _replay(config: FinetuneConfig, parameters: int) -> float:
    """The share that was asked for, or a usual one where a model may know more than its task."""
    if config.replay is not None:
        return config.replay
    knows = parameters >= SMALL_MODEL and config.recipe.preset in ("auto", "none") and not config.streaming
    return _REPLAY if knows and rows_per_step(config) * _REPLAY >= 1 else 0.0


def _module(plan: Plan, trainable: Trainable) -> RecipeModule:
    config, model, readers, spec = plan.config, trainable.model, None, trainable.backend.spec
    assert plan.recipe is not None and isinstance(config, FinetuneConfig)
    if plan.autocast and plan.device == "cpu":
        use_fp32_attention(model)
    if plan.recipe.exit_reader != "none":  # copies of layers that have no adapters yet
        source, blocks = locate(config.model).folder, NO_BLOCKS
        if source is not None and config.recipe.preset != "scratch":
            blocks = read_exit_blocks(source, spec, model.get_parameter)
        readers = new_readers(trainable.backend, plan.recipe.exits, blocks)
    if config.lora_rank:
        model = with_lora(model, config, plan.adapted_layers)
    module = RecipeModule(model, plan.recipe, config.seed, config.gradient_checkpointing, readers)
    module.tokenizer, module.by_muon = trainable.tokenizer, config.optimizer == "muon"
    return module


def _require_output(config: FinetuneConfig) -> None:
    """Raises ConfigError for an output that must not be replaced, such as the model that a kept adapter belongs to."""
    refuse_overwrite(config.output, config.overwrite, RUN_FILES)
    if not config.lora_keep:
        return
    adapters, below = adapters_of(config.model)
    for base in (*adapters, below):
        if Path(base).is_dir() and Path(config.output).is_dir() and os.path.samefile(base, config.output):
            raise ConfigError(f"`lora_keep`: the adapter needs its base {base}, which `output` {config.output} would replace")


class FrozenModel:
    """The training of what drafts for a model that stays as it is. The held-out prompts and texts are the last ones."""

    module: DrafterModule

    def __init__(self, config: DrafterConfig, device: torch.device, resume: ResumePoint | None) -> None:
        if world_size() > 1:
            raise ConfigError(f"a drafter is trained in one process, not in {world_size()} by torchrun")
        source = downloaded(config.model)
        if not weight_files(source):
            raise CheckpointError(
                f"`model` {config.model} has no safetensors, which are copied as they are: `layerskip import`"
            )
        refuse_overwrite(config.output, config.overwrite or config.in_place)
        if config.answers is None:
            config = replace(config, answers="model" if has_prompts(config.data) else "data")
        # The same model twice: in transformers, where the blocks' parts are copied from, and on the kernels of decoding.
        self.trainable = for_training(config.model, str(device), config.dtype)
        spec, weight_of = self.trainable.backend.spec, self.trainable.model.get_parameter
        require(spec.layers > 1, "model", "a model of at least 2 layers", spec.layers)
        self.kept = read_exit_blocks(source, spec, weight_of)  # that the model has already
        config = replace(config, layout=_layout(config, self.trainable.backend))
        kind: type[FrozenEagle3 | FrozenExits] = FrozenEagle3 if config.layout == "eagle3" else FrozenExits
        config, self.exits = kind.resolved(config, self.trainable.backend)
        if config.in_place and not (config.overwrite or resume) and (there := kind.replaced(self.kept, self.exits)):
            raise ConfigError(f"`output` {config.output} already has {there}; give `overwrite` to replace it")

        given = read_rows(config)
        encoder = make_encoder(config, self.trainable, given[0])
        self.template, max_length = encoder.template, encoder.max_length
        prompts: list[list[int]] = []  # for the model to answer
        self.texts: list[dict[str, Any]] = []  # encoded rows: prompts with their answers, once these are written
        encoded: list[list[Any]]
        if config.answers == "data":
            masked = (map(partial(_from, kind.first_target), encoder.rows(rows)) for rows in given)
            encoded = [list(filter(has_target, rows)) for rows in masked]
            self.texts = encoded[0] + encoded[1]
        else:
            encoded = [[ids for ids in encoder.prompts(rows) if kind.first_target <= len(ids) < max_length] for rows in given]
            prompts = encoded[0] + encoded[1]
        if not encoded[0]:
            needed = f"{kind.first_target} tokens before an answer, and room for it within `max_length` {max_length}"
            raise DataError(f"no row has at least {needed}")
        self.decoder = for_decoding(config.model, str(device), config.dtype)
        self.made_for, heat = fingerprint(spec, weight_of), config.answer_temperature
        how = Writing(config.answer_tokens, max_length, heat, config.seed if heat else 0)  # greedy ones need none
        journal = f"answers-{digest(self.made_for, prompts, how, config.dtype)}.jsonl"
        self.answers = Answers(self.decoder, prompts, how, checkpoints_folder(config.output) / journal)
        self.config = config = replace(config, max_length=max_length)
        counts = len(encoded[0]), len(encoded[1]), sum(map(len, given))
        plan, longest = self._planned(config, device, resume, *counts)
        if plan.autocast and device.type == "cpu":
            use_fp32_attention(self.trainable.model)
        self.module = kind.of(self.trainable.backend, config, self.exits)
        chosen, example = self.module.phases[0], max(longest, key=lambda text: len(text["input_ids"]))
        shape = (len(example["input_ids"]), spec.hidden)
        states = {"exits": chosen, "states": torch.randn(len(chosen), *shape), "finals": torch.randn(shape)}
        worth = self.module.worth(self.decoder.backend, min(self.module.names))
        plan = replace(plan, phases=len(self.module.phases), worth=worth)
        self.plan = timed(plan, self.module, [example | states], plan.tokens / len(longest))

    def _planned(
        self, config: DrafterConfig, device: torch.device, resume: ResumePoint | None, rows: int, held_out: int, given: int
    ) -> tuple[Plan, list[dict[str, Any]]]:
        """The plan without times, and all encoded rows as long as they may become."""
        spec, answers = self.trainable.backend.spec, self.answers
        texts = [(text["input_ids"], text["labels"]) for text in self.texts]
        kernels, prompts = self.decoder.backend.implementation, answers.journal.name
        named = digest(self.made_for, prompts, texts, self.exits, config.dtype, kernels)
        self.states = answers.journal.with_name(f"states-{named}")
        longest = self.texts or [
            _text(prompt, answers.known.get(row, [0] * answers.how.room(len(prompt))))
            for row, prompt in enumerate(answers.prompts)
        ]
        tokens = sum(len(text["input_ids"]) for text in longest)
        disk = states_bytes(tokens, spec.hidden, len(self.exits))
        require_disk(self.states, disk, "the states of the texts", "give fewer rows (`limit`) or fewer `exits`")
        notes: tuple[str, ...] = ()
        if advice := ", ".join(self.trainable.info.advice):  # which CheckpointInfo.with_exit_blocks removes
            why = "chosen without these blocks, which `layerskip sweep-exits --save` includes"
            notes = (f"saved settings that will be left out: {advice}; they were {why}",)
        plan = make_plan(
            config,
            device,
            spec,
            resume,
            notes,
            {"original": self.made_for, "texts": named},
            steps=run_steps(config, rows),
            rows=rows,
            held_out=held_out,
            tokens=tokens,
            left_out=given - len(longest),
            answers=answers,
            state_seconds=tokens * answers.token_seconds,
            disk_mb=disk / 2**20,
        )
        return plan, longest

    def rows(self, progress: Callable[[str, int, int], None]) -> tuple[Any, Any]:
        """Of the states of rows, which are written where they are not there.

        The run's rows come once for each exit, one exit after the other.
        """
        plan, config, texts, exits, backend = self.plan, self.config, self.texts, self.exits, self.trainable.backend
        if prompts := self.answers.prompts:
            texts += map(_text, prompts, self.answers.write(partial(progress, "answers", len(prompts))))
        for other in self.states.parent.glob(f"states-{'[0-9a-f]' * 16}"):
            if other != self.states:  # of an earlier run with other rows or settings
                shutil.rmtree(other, ignore_errors=True)
        write_states(self.decoder.backend, backend, texts, exits, self.states, partial(progress, "states", len(texts)))
        del self.decoder  # frees its weights
        states = partial(States, texts, self.states, backend.spec.hidden, exits)
        trained = len(texts) - plan.held_out
        self.module.begin(texts[:trained])
        lengths = [len(text["input_ids"]) for text in texts[:trained]]
        order = ordered(config, lengths, plan.steps)
        phases = [Subset(states(chosen), order) for chosen in self.module.phases]
        held_out = Subset(states(exits), range(trained, len(texts))) if plan.held_out else None
        return ConcatDataset(phases), held_out

    def save(self, history: LossHistory, first: bool) -> CheckpointInfo:
        """Adds the blocks to the model's own folder, or to a copy of it. Its info has how each was trained."""
        config, info, trained = self.config, self.trainable.info, self._described(history)
        verifier = config.model if locate(config.model).folder is None else str(Path(config.output).resolve())
        files = self.module.files(stored_dtype(config.model), self.kept, self.made_for, verifier)
        if config.in_place:
            for name in files.keys() & {EAGLE3_FILES[0]}:  # of a drafter that is replaced: without it there is none
                (Path(config.output) / name).unlink(missing_ok=True)
            for name in sorted(files, reverse=True):  # the weights before their config.json
                save_beside(config.output, name, files[name], lambda info: info.with_exit_blocks(trained))
        else:
            if info.prompt_template is None and self.template.text != "raw" and config.prompting.asked is not None:
                info = replace(info, prompt_template=self.template.text, system=self.template.system)
            copy_checkpoint(downloaded(config.model), info.with_exit_blocks(trained), config.output, files)
        shutil.rmtree(self.states, ignore_errors=True)
        return info.with_exit_blocks(trained)

    def _described(self, history: LossHistory) -> dict[str, Any]:
        """How each exit's block was trained, or the drafter, by name."""
        plan, config = self.plan, self.config
        shared = {
            **self.module.details,
            "loss": config.loss,
            "data": asdict(config.data),
            "validation": config.validation,
            "answers": config.answers,
            "rows": plan.rows,
            "target_tokens": sum(label != IGNORED for text in self.texts[: plan.rows] for label in text["labels"][1:]),
            "steps": plan.steps,
            "batch_size": config.batch_size * config.accumulation,
            "lr": config.lr,
            "seed": config.seed,
            "versions": {name: version(name) for name in ("layerskip", "torch", "transformers")},
        }
        return {
            name: shared
            | {"divergence": history.latest[exit_layer]}
            | ({"agreement": history.agreement[exit_layer]} if exit_layer in history.agreement else {})
            for exit_layer, name in self.module.names.items()
        }


def _layout(config: DrafterConfig, backend: TransformersBackend) -> BlockLayout:
    """The layout that was asked for, or that the other settings belong to, else eagle3 where engines run the model."""
    if config.layout is not None:
        return config.layout
    if config.given("exits", "feature"):
        return "exit"
    of_eagle3 = config.given("layers", "draft_vocab", "start_from") or config.loss == "acceptance"
    return "eagle3" if of_eagle3 or suits_engines(backend) else "exit"


def _from(first: int, text: dict[str, Any]) -> dict[str, Any]:
    """An encoded row without labels before the token of index `first`."""
    return text | {"labels": [IGNORED if at < first else label for at, label in enumerate(text["labels"])]}


def _text(prompt: list[int], answer: list[int]) -> dict[str, Any]:
    """An encoded row; the answer has labels."""
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}
