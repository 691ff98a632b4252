"""A run that trains exit blocks beside a model that stays as it is: its plan, its texts and states, and the file it saves."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from ..checkpoint.beside import exit_blocks_content, fingerprint, read_exit_blocks
from ..checkpoint.folder import EXIT_BLOCKS_FILE, refuse_packed, weight_files
from ..checkpoint.importing import stored_dtype
from ..checkpoint.info import CheckpointInfo
from ..checkpoint.locate import downloaded, is_adapter, own_folder, reading
from ..checkpoint.open import for_decoding, for_training
from ..checkpoint.save import copy_checkpoint, refuse_overwrite, save_beside
from ..config.decoding import require_exit_layer
from ..config.training import FinetuneConfig
from ..errors import CheckpointError, ConfigError, DataError, require
from ..files import require_disk
from ..losses import IGNORED
from ..model.exit_blocks import ExitBlock
from .answers import Writing, answers_digest, digest, estimated_seconds, read_answers, write_answers
from .checkpoints import ResumePoint, checkpoints_folder, discard_after
from .data import RunRows, data_rows, has_target, make_encoder, ordered_rows, read_rows, run_steps
from .exit_blocks import FrozenExits, States, states_bytes, write_states
from .module import use_fp32_attention
from .plan import Blocks, Plan, make_plan, timed
from .progress import LossHistory
from .sharding import world_size

_ANSWER_TOKENS = 128
_SMALL_MODEL = 50_000_000  # parameters
_LR, _SMALL_LR = 1.5e-3, 2e-3


class FrozenModel:
    """A run that `prepare` has loaded and planned. The held-out prompts and texts are the last ones."""

    def __init__(self, config: FinetuneConfig, device: torch.device, resume: ResumePoint | None) -> None:
        require(world_size() == 1, "frozen", "used in one process", f"{world_size()} by torchrun")
        source, own = _source(config.model), own_folder(config.model)
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
        max_length = encoder.max_length
        self.template = encoder.template
        self.writing = Writing(asked.answer_tokens or _ANSWER_TOKENS, max_length, asked.answer_temperature or 0.0, config.seed)
        self.prompts: list[list[int]] = []  # for the model to answer
        self.texts: list[dict[str, Any]] = []  # encoded rows: prompts with their answers, once these are written
        encoded: list[list[Any]]
        if asked.answers == "data":
            encoded = [list(filter(has_target, encoder.rows(rows))) for rows in given]
            self.texts = encoded[0] + encoded[1]
        else:
            encoded = [[ids for ids in encoder.prompts(rows) if 0 < len(ids) < max_length] for rows in given]
            self.prompts = encoded[0] + encoded[1]
        if not encoded[0]:
            raise DataError(f"no row has room for an answer within `max_length` {max_length}: every prompt is longer")
        self.decoder = for_decoding(config.model, str(device), config.dtype)
        self.made_for = fingerprint(spec, weight_of)
        self.plan = self._planned(config, device, resume, len(encoded[0]), len(encoded[1]), sum(map(len, given)))

    def _planned(
        self, config: FinetuneConfig, device: torch.device, resume: ResumePoint | None, rows: int, held_out: int, given: int
    ) -> Plan:
        spec, asked, how = self.trainable.backend.spec, config.exit_blocks, self.writing
        folder, answers = checkpoints_folder(config.output), answers_digest(self.made_for, self.prompts, how, config.dtype)
        texts = [(text["input_ids"], text["labels"]) for text in self.texts]
        named = digest([self.made_for, answers, texts, self.exits, config.dtype, self.decoder.backend.implementation])
        self.journal, self.states = folder / f"answers-{answers}.jsonl", folder / f"states-{named}"
        known = read_answers(self.journal)
        longest = self.texts or [
            _text(prompt, known.get(row, [0] * how.room(len(prompt)))) for row, prompt in enumerate(self.prompts)
        ]
        missing = [prompt for row, prompt in enumerate(self.prompts) if row not in known]
        tokens = sum(len(text["input_ids"]) for text in longest)
        disk = states_bytes(tokens, spec.hidden, len(self.exits))
        require_disk(self.states, disk, "the states of the texts", "give fewer rows (`limit`) or fewer `exits`")
        answer_seconds, token_seconds = estimated_seconds(self.decoder, missing, how)
        blocks = Blocks(
            self.exits,
            feature=asked.feature or "none",
            answers=asked.answers or "model",
            loss=asked.loss or "kl",
            answered=len(longest) - len(missing),
            answer_seconds=answer_seconds,
            state_seconds=tokens * token_seconds,
            disk_mb=disk / 2**20,
        )
        plan = make_plan(
            config,
            device,
            spec,
            resume,
            {
                "exits": blocks.exits, "feature": blocks.feature, "answers": blocks.answers, "loss": blocks.loss,
                "answer_tokens": how.tokens, "answer_temperature": how.temperature, "original": self.made_for, "texts": named,
            },
            notes=_notes(self.trainable.info),
            lr=config.lr or (_SMALL_LR if spec.parameters < _SMALL_MODEL else _LR),
            max_length=how.max_length,
            steps=run_steps(config, rows),
            phases=len(self.exits),
            rows=rows,
            held_out=held_out,
            tokens=tokens,
            left_out=given - len(longest),
            blocks=blocks,
        )  # fmt: skip
        if plan.autocast and device.type == "cpu":
            use_fp32_attention(self.trainable.model)
        placed = [ExitBlock(exit_layer, blocks.feature) for exit_layer in self.exits]
        self.module = FrozenExits(self.trainable.backend, placed, blocks.loss)
        example = max(longest, key=lambda text: len(text["input_ids"]))
        shape = (len(example["input_ids"]), spec.hidden)
        states = {"exits": self.exits[:1], "states": torch.randn(1, *shape), "finals": torch.randn(shape)}
        return timed(plan, self.module, [example | states], tokens / len(longest))

    def rows(self, stage: Callable[[str, int], Callable[[int], None]]) -> tuple[Any, Any]:
        """(the states of the rows of the run in their order, those of the held-out rows), written where they are not there.

        The run's rows come once for each exit, one exit after the other.
        """
        plan, config, texts, exits = self.plan, self.plan.config, self.texts, self.exits
        if self.prompts:
            report = stage("answers", len(self.prompts))
            answers = write_answers(self.decoder, self.prompts, self.writing, self.journal, report)
            texts += map(_text, self.prompts, answers)
        for other in self.states.parent.glob(f"states-{'[0-9a-f]' * 16}"):
            if other != self.states:  # of an earlier run with other rows or settings
                shutil.rmtree(other, ignore_errors=True)
        backend = self.trainable.backend

        def final_norm(hidden: Tensor) -> Tensor:
            return backend.normed(hidden.to(backend.dtype))

        write_states(self.decoder.backend, final_norm, texts, exits, self.states, stage("states", len(texts)))
        states = States(texts, exits, backend.spec.hidden, self.states)
        trained = len(texts) - plan.held_out
        lengths = [len(text["input_ids"]) for text in texts[:trained]]
        phases = [
            ordered_rows(lengths, data_rows(config), plan.steps, config.seed, partial(states.row, exits=(exit_layer,)))
            for exit_layer in exits
        ]
        held_out = RunRows(plan.held_out, lambda row: states.row(trained + row, exits)) if plan.held_out else None
        return ConcatDataset(phases), held_out

    def save(self, history: LossHistory, first: bool) -> tuple[CheckpointInfo, list[str]]:
        """Adds the blocks to the model's own folder, or to a copy of it. Returns its info with how each was trained."""
        config, info = self.plan.config, self.trainable.info
        trained = self._described(history)
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
        plan, config, blocks = self.plan, self.plan.config, self.plan.blocks
        assert blocks is not None
        shared = {
            "feature": blocks.feature,
            "loss": blocks.loss,
            "data": config.data.name,
            "answers": blocks.answers,
            "rows": plan.rows,
            "target_tokens": sum(map(_targets, self.texts[: plan.rows])),
            "steps": plan.steps,
            "batch_size": config.batch_size * config.accumulation,
            "lr": plan.lr,
            "seed": config.seed,
            "versions": {name: version(name) for name in ("layerskip", "torch", "transformers")},
        }
        return {
            str(exit_layer): shared
            | {"divergence": history.latest[exit_layer]}
            | ({"agreement": history.agreement[exit_layer]} if exit_layer in history.agreement else {})
            for exit_layer in blocks.exits
        }


def _text(prompt: list[int], answer: list[int]) -> dict[str, Any]:
    """An encoded row; the answer has labels."""
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


def _targets(text: dict[str, Any]) -> int:
    return sum(label != IGNORED for label in text["labels"][1:])


def _source(model: str) -> str:
    """The folder of a model that can be copied as it is. Raises CheckpointError for others."""
    if is_adapter(model):
        raise CheckpointError(f"`model` {model} is an adapter; needed a folder with all weights: `layerskip import`")
    source = downloaded(model)
    reading(model, lambda: refuse_packed(source))
    if not weight_files(source):
        raise CheckpointError(f"`model` {model} has no safetensors, which are copied as they are: `layerskip import`")
    return source


def _notes(info: CheckpointInfo) -> tuple[str, ...]:
    """A line on the saved settings that `CheckpointInfo.with_exit_blocks` removes."""
    if not info.advice:
        return ()
    why = "chosen without these blocks, which `layerskip sweep-exits --save` includes"
    return (f"saved settings that will be left out: {', '.join(info.advice)}; they were {why}",)
