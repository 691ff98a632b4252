"""A run that trains exit blocks beside a model that stays as it is: its plan, its texts and states, and the file it saves."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Subset

from ..checkpoint.beside import exit_blocks_content, fingerprint, read_exit_blocks
from ..checkpoint.folder import EXIT_BLOCKS_FILE, weight_files
from ..checkpoint.info import CheckpointInfo
from ..checkpoint.locate import downloaded, own_folder
from ..checkpoint.open import for_decoding, for_training
from ..checkpoint.save import copy_checkpoint, refuse_overwrite, save_beside
from ..checkpoint.transformers_read import stored_dtype
from ..config.decoding import require_exit_layer
from ..config.training import FinetuneConfig, RecipeSettings
from ..errors import CheckpointError, ConfigError, DataError, require
from ..files import require_disk
from ..losses import IGNORED
from ..model.exit_blocks import ExitBlock
from .answers import Answers, Writing, digest
from .checkpoints import ResumePoint, checkpoints_folder, discard_after
from .data import has_target, make_encoder, ordered, read_rows, run_steps
from .exit_blocks import FrozenExits, States, states_bytes, write_states
from .module import use_fp32_attention
from .plan import Plan, make_plan, timed
from .progress import LossHistory
from .sharding import world_size

_SMALL_MODEL = 50_000_000  # parameters
_LR, _SMALL_LR = 1.5e-3, 2e-3


class FrozenModel:
    """A run that `prepare` has loaded and planned. The held-out prompts and texts are the last ones."""

    def __init__(self, config: FinetuneConfig, device: torch.device, resume: ResumePoint | None) -> None:
        require(world_size() == 1, "frozen", "used in one process", f"{world_size()} by torchrun")
        source, own = downloaded(config.model), own_folder(config.model)
        if not weight_files(source):
            raise CheckpointError(
                f"`model` {config.model} has no safetensors, which are copied as they are: `layerskip import`"
            )
        self.in_place = own is not None and Path(config.output).resolve() == Path(own).resolve()  # the model gets the blocks
        refuse_overwrite(config.output, config.overwrite or self.in_place)
        # The same model twice: of transformers, whose parts the blocks are made of, and on the kernels of decoding.
        self.trainable = for_training(config.model, str(device), config.dtype)
        spec, weight_of = self.trainable.backend.spec, self.trainable.model.get_parameter
        self.kept = read_exit_blocks(source, spec, weight_of)  # that the model has already
        self.exits = tuple(sorted(config.recipe.exits or (max(1, spec.layers // 3),)))
        there = {block.exit_layer for block in self.kept.blocks} if self.in_place and not (config.overwrite or resume) else ()
        for exit_layer in self.exits:
            require_exit_layer(exit_layer, spec.layers, field="exits")
            if exit_layer in there:
                raise ConfigError(
                    f"`output` {config.output} already has a block at exit {exit_layer}; give `overwrite` to replace it"
                )

        asked, given = config.exit_blocks, read_rows(config)
        encoder = make_encoder(config, self.trainable, given[0])
        self.template, max_length = encoder.template, encoder.max_length
        prompts: list[list[int]] = []  # for the model to answer
        self.texts: list[dict[str, Any]] = []  # encoded rows: prompts with their answers, once these are written
        encoded: list[list[Any]]
        if asked.answers == "data":
            encoded = [list(filter(has_target, encoder.rows(rows))) for rows in given]
            self.texts = encoded[0] + encoded[1]
        else:
            encoded = [[ids for ids in encoder.prompts(rows) if 0 < len(ids) < max_length] for rows in given]
            prompts = encoded[0] + encoded[1]
        if not encoded[0]:
            raise DataError(f"no row has room for an answer within `max_length` {max_length}: every prompt is longer")
        self.decoder = for_decoding(config.model, str(device), config.dtype)
        self.made_for, heat = fingerprint(spec, weight_of), asked.answer_temperature
        how = Writing(asked.answer_tokens, max_length, heat, config.seed if heat else 0)  # greedy ones need none
        journal = f"answers-{digest(self.made_for, prompts, how, config.dtype)}.jsonl"
        self.answers = Answers(self.decoder, prompts, how, checkpoints_folder(config.output) / journal)
        lr = config.lr or (_SMALL_LR if spec.parameters < _SMALL_MODEL else _LR)
        config = replace(config, lr=lr, max_length=max_length, recipe=RecipeSettings(exits=self.exits))
        self.plan = self._planned(config, device, resume, len(encoded[0]), len(encoded[1]), sum(map(len, given)))

    def _planned(
        self, config: FinetuneConfig, device: torch.device, resume: ResumePoint | None, rows: int, held_out: int, given: int
    ) -> Plan:
        spec, asked, answers = self.trainable.backend.spec, config.exit_blocks, self.answers
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
            phases=len(self.exits),
            rows=rows,
            held_out=held_out,
            tokens=tokens,
            left_out=given - len(longest),
            answers=answers,
            state_seconds=tokens * answers.token_seconds,
            disk_mb=disk / 2**20,
        )
        if plan.autocast and device.type == "cpu":
            use_fp32_attention(self.trainable.model)
        self.module = FrozenExits(self.trainable.backend, [ExitBlock(stop, asked.feature) for stop in self.exits], asked.loss)
        example = max(longest, key=lambda text: len(text["input_ids"]))
        shape = (len(example["input_ids"]), spec.hidden)
        states = {"exits": self.exits[:1], "states": torch.randn(1, *shape), "finals": torch.randn(shape)}
        return timed(plan, self.module, [example | states], tokens / len(longest))

    def rows(self, progress: Callable[[str, int, int], None]) -> tuple[Any, Any]:
        """(the states of the rows of the run in their order, those of the held-out rows), written where they are not there.

        The run's rows come once for each exit, one exit after the other.
        """
        plan, config, texts, exits, backend = self.plan, self.plan.config, self.texts, self.exits, self.trainable.backend
        if prompts := self.answers.prompts:
            texts += map(_text, prompts, self.answers.write(partial(progress, "answers", len(prompts))))
        for other in self.states.parent.glob(f"states-{'[0-9a-f]' * 16}"):
            if other != self.states:  # of an earlier run with other rows or settings
                shutil.rmtree(other, ignore_errors=True)
        write_states(self.decoder.backend, backend, texts, exits, self.states, partial(progress, "states", len(texts)))
        states = partial(States, texts, self.states, backend.spec.hidden, exits)
        trained = len(texts) - plan.held_out
        lengths = [len(text["input_ids"]) for text in texts[:trained]]
        order = ordered(config, lengths, plan.steps)
        phases = [Subset(states((exit_layer,)), order) for exit_layer in exits]
        held_out = Subset(states(exits), range(trained, len(texts))) if plan.held_out else None
        return ConcatDataset(phases), held_out

    def save(self, history: LossHistory, first: bool) -> tuple[CheckpointInfo, list[str]]:
        """Adds the blocks to the model's own folder, or to a copy of it. Returns its info with how each was trained."""
        config, info, trained = self.plan.config, self.trainable.info, self._described(history)
        dtype = stored_dtype(config.model)
        weights = {name: weight.to(dtype) for name, weight in self.module.weights().items()}
        content = exit_blocks_content(self.trainable.backend.spec, weights, self.made_for, self.kept)
        if self.in_place:
            save_beside(config.output, EXIT_BLOCKS_FILE, content, lambda info: info.with_exit_blocks(trained))
        else:
            if info.prompt_template is None and self.template.text != "raw" and config.prompting.asked is not None:
                info = replace(info, prompt_template=self.template.text, system=self.template.system)
            copy_checkpoint(
                downloaded(config.model), info.with_exit_blocks(trained), config.output, {EXIT_BLOCKS_FILE: content}
            )
        shutil.rmtree(self.states, ignore_errors=True)
        discard_after(checkpoints_folder(config.output), 0)
        return info.with_exit_blocks(trained), []

    def _described(self, history: LossHistory) -> dict[str, Any]:
        """How each exit's block was trained, by exit."""
        plan, config, blocks = self.plan, self.plan.config, self.plan.config.exit_blocks
        shared = {
            "feature": blocks.feature,
            "loss": blocks.loss,
            "data": config.data.name,
            "answers": blocks.answers,
            "rows": plan.rows,
            "target_tokens": sum(label != IGNORED for text in self.texts[: plan.rows] for label in text["labels"][1:]),
            "steps": plan.steps,
            "batch_size": config.batch_size * config.accumulation,
            "lr": config.lr,
            "seed": config.seed,
            "versions": {name: version(name) for name in ("layerskip", "torch", "transformers")},
        }
        return {
            str(exit_layer): shared
            | {"divergence": history.latest[exit_layer]}
            | ({"agreement": history.agreement[exit_layer]} if exit_layer in history.agreement else {})
            for exit_layer in self.exits
        }


def _text(prompt: list[int], answer: list[int]) -> dict[str, Any]:
    """An encoded row; the answer has labels."""
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}
