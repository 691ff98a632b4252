"""A run that trains exit blocks beside a model that stays as it is: its plan, its texts and states, and the file it saves."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.beside import exit_blocks_content, fingerprint, read_exit_blocks
from ..checkpoint.folder import EXIT_BLOCKS_FILE, refuse_packed, weight_files
from ..checkpoint.info import CheckpointInfo
from ..checkpoint.loaded import Decoder, Trainable
from ..checkpoint.locate import downloaded, is_adapter, own_folder, reading
from ..checkpoint.open import for_decoding, for_training
from ..checkpoint.save import copy_checkpoint, refuse_overwrite, save_beside
from ..checkpoint.transformers_read import stored_dtype
from ..config.checks import require, require_exit_layer
from ..config.training import FinetuneConfig
from ..data.examples import PARSING_TEMPLATE, Conversation, Example, Row, is_parsing, load_prompts, load_rows
from ..errors import CheckpointError, ConfigError, DataError
from ..files import require_disk
from ..model.exit_blocks import ExitBlocks
from ..prompting import PromptTemplate, resolve_template
from .answers import Text, Writing, answers_digest, digest, measured_speed, read_answers, write_answers
from .checkpoints import ResumePoint, checkpoints_folder, discard_after
from .data import conversation_template, is_endless, run_order, validation_data
from .encoding import Encoder
from .exit_blocks import FrozenExits, StateRows, States, collate, states_bytes, write_states
from .layers import use_fp32_attention
from .plan import Blocks, Plan, StepCost, autocasts, dtype_name, resumed_notes, timed_step, tokens_per_row
from .progress import LossHistory
from .sharding import world_size

COMMANDS_STEPS = 600  # of each exit, of a run on `commands` without `steps`
_EPOCHS = 2.0
_ANSWER_TOKENS = 128
_SMALL_MODEL = 50_000_000  # parameters
_LR, _SMALL_LR = 1.5e-3, 2e-3
_HELD_OUT, _SHARE = 64, 20  # rows at most, and one in so many


@dataclass(frozen=True)
class RunRows:
    """`prompts` for the model to answer, or `texts` with the answers of the data, the `held_out` ones last."""

    prompts: list[list[int]]
    texts: list[Text]
    held_out: int
    left_out: int  # too long
    template: PromptTemplate

    @property
    def count(self) -> int:
        return len(self.prompts) or len(self.texts)


@dataclass(frozen=True)
class FrozenModel:
    """What `prepare` has loaded."""

    plan: Plan
    decoder: Decoder  # on the kernels of decoding: it writes answers and states
    trainable: Trainable  # the same model of transformers, whose parts the blocks are made of
    module: FrozenExits
    run_rows: RunRows
    writing: Writing
    journal: Path  # of the answers
    states: Path
    made_for: str  # fingerprint of the model
    kept: ExitBlocks  # that the model has already
    in_place: bool  # the model's own folder gets the blocks
    collate: Callable[[list[Any]], dict[str, Tensor]] = collate
    sharded_layers: tuple[str, ...] = ()
    texts: list[Text] = field(default_factory=list)  # those that it trains on, once they are written, the held-out ones last

    @property
    def blocks(self) -> Blocks:
        assert self.plan.blocks is not None
        return self.plan.blocks

    def rows(self, stage: Callable[[str, int], Callable[[int], None]]) -> tuple[Any, Any]:
        """(the states of the rows of the run in their order, those of the held-out rows), written where they are not there."""
        plan, config = self.plan, self.plan.config
        texts = self.texts
        texts += self._answered(stage)
        for other in self.states.parent.glob(f"states-{'[0-9a-f]' * 16}"):
            if other != self.states:  # of an earlier run with other rows or settings
                shutil.rmtree(other, ignore_errors=True)
        write_states(self.decoder.backend, self._final_norm, texts, self.blocks.exits, self.states, stage("states", len(texts)))
        states = States(texts, self.blocks.exits, self.trainable.backend.hidden_size, self.states)
        trained = len(texts) - plan.held_out
        lengths = [len(text.ids) for text in texts[:trained]]
        order = list(run_order(lengths, config.batch_size * config.accumulation, plan.steps, config.seed))
        held_out = StateRows(states, range(trained, len(texts)), one_by_one=False) if plan.held_out else None
        return StateRows(states, order, one_by_one=True), held_out

    def save(self, history: LossHistory, first: bool) -> tuple[CheckpointInfo, list[str]]:
        """Adds the blocks to the model's own folder, or to a copy of it. Returns its info."""
        config, info, spec = self.plan.config, self.trainable.info, self.trainable.backend.spec
        trained = self._described(history)
        dtype = stored_dtype(config.model)
        weights = {name: weight.to(dtype) for name, weight in self.module.weights().items()}
        content = exit_blocks_content(spec, weights, self.made_for, self.kept)
        template = self.run_rows.template
        if self.in_place:
            save_beside(config.output, EXIT_BLOCKS_FILE, content, lambda info: info.with_exit_blocks(trained))
        else:
            if info.prompt_template is None and template.text != "raw" and config.prompting.asked is not None:
                info = replace(info, prompt_template=template.text, system=template.system)
            copy_checkpoint(config.model, info.with_exit_blocks(trained), config.output, {EXIT_BLOCKS_FILE: content})
        shutil.rmtree(self.states, ignore_errors=True)
        discard_after(checkpoints_folder(config.output), 0)
        return info.with_exit_blocks(trained), []

    def _answered(self, stage: Callable[[str, int], Callable[[int], None]]) -> list[Text]:
        prompts = self.run_rows.prompts
        if not prompts:
            return self.run_rows.texts
        answers = write_answers(self.decoder, prompts, self.writing, self.journal, stage("answers", len(prompts)))
        return [Text.of(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def _final_norm(self, hidden: Tensor) -> Tensor:
        backend = self.trainable.backend
        return backend.normed(hidden.to(backend.dtype))

    def _described(self, history: LossHistory) -> dict[str, Any]:
        """How each exit's block was trained, by exit."""
        plan, config, blocks = self.plan, self.plan.config, self.blocks
        shared = {
            "feature": blocks.feature,
            "loss": blocks.loss,
            "data": config.data.name,
            "answers": blocks.answers,
            "rows": plan.rows,
            "target_tokens": sum(text.targets for text in self.texts[: plan.rows]),
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


def load_frozen_model(config: FinetuneConfig, device: torch.device, resume: ResumePoint | None) -> FrozenModel:
    """Loads model and rows, and plans the run."""
    require(world_size() == 1, "frozen", "used in one process", f"{world_size()} by torchrun")
    source = _source(config.model)
    own = own_folder(config.model)
    in_place = own is not None and Path(config.output).resolve() == Path(own).resolve()
    refuse_overwrite(config.output, config.overwrite or in_place)
    trainable = for_training(config.model, str(device), config.dtype)
    backend, weight_of = trainable.backend, trainable.model.get_parameter
    spec, asked = backend.spec, config.exit_blocks
    kept = read_exit_blocks(source, spec, weight_of)
    exits = tuple(sorted(config.recipe.exits or (max(1, spec.layers // 3),)))
    _require_exits(config, exits, spec.layers, kept if in_place and resume is None else None)
    max_length = tokens_per_row(config, backend.max_positions)
    of_data = asked.answers == "data"
    rows = _rows(config, trainable, max_length, of_data)
    decoder = for_decoding(config.model, str(device), config.dtype)
    made_for = fingerprint(spec, weight_of)
    how = Writing(asked.answer_tokens or _ANSWER_TOKENS, max_length, asked.answer_temperature or 0.0, config.seed)
    folder, answers = checkpoints_folder(config.output), answers_digest(made_for, rows.prompts, how, config.dtype)
    texts = [(text.ids, text.labels) for text in rows.texts]
    named = digest([made_for, answers, texts, exits, config.dtype, decoder.backend.implementation])
    journal, states = folder / f"answers-{answers}.jsonl", folder / f"states-{named}"
    known = read_answers(journal)
    lengths = [
        (len(prompt), len(known[row]) if row in known else how.room(len(prompt))) for row, prompt in enumerate(rows.prompts)
    ] or [(len(text.ids) - text.targets, text.targets) for text in rows.texts]
    tokens = sum(map(sum, lengths))
    require_disk(
        states, states_bytes(tokens, spec.hidden, len(exits)), "the states of the texts",
        "give fewer rows (`limit`) or fewer `exits`",
    )  # fmt: skip
    blocks = _blocks(config, exits, rows, known, how, tokens, decoder)
    autocast = autocasts(config, device, spec.parameters)
    if autocast and device.type == "cpu":
        use_fp32_attention(trainable.model)
    module = FrozenExits(backend, blocks.placed, blocks.loss)
    steps, lr = _steps(config, rows.count - rows.held_out), config.lr or (_SMALL_LR if spec.parameters < _SMALL_MODEL else _LR)
    sealed = {
        "exits": list(exits), "feature": blocks.feature, "answers": blocks.answers, "answer_tokens": how.tokens,
        "answer_temperature": how.temperature, "loss": blocks.loss, "steps": steps, "lr": lr,
        "dtype": dtype_name(autocast), "rows": rows.count - rows.held_out, "model": made_for, "data": states.name,
        **{name: getattr(config, name) for name in ("batch_size", "accumulation", "warmup", "weight_decay", "seed")},
    }  # fmt: skip
    plan = Plan(
        config=config,
        device=str(device),
        autocast=autocast,
        lr=lr,
        max_length=max_length,
        steps=steps,
        phases=len(exits),
        rows=rows.count - rows.held_out,
        held_out=rows.held_out,
        tokens=tokens,
        left_out=rows.left_out,
        parameters=spec.parameters,
        trained=sum(math.prod(shape) for block in blocks.placed for shape in block.shapes(spec).values()),
        num_layers=spec.layers,
        sealed=sealed,
        blocks=blocks,
        step=_timed(module, config, exits, lengths, device, autocast),
        notes=_notes(trainable.info) + resumed_notes(resume, sealed),
    )
    return FrozenModel(plan, decoder, trainable, module, rows, how, journal, states, made_for, kept, in_place)


def _blocks(
    config: FinetuneConfig,
    exits: tuple[int, ...],
    rows: RunRows,
    known: Mapping[int, list[int]],
    how: Writing,
    tokens: int,
    decoder: Decoder,
) -> Blocks:
    """The blocks asked for, with estimates by the measured speed of the model. `known`: answers that are there, by row."""
    asked, speed = config.exit_blocks, measured_speed(decoder)
    missing = [prompt for row, prompt in enumerate(rows.prompts) if row not in known]
    return Blocks(
        exits=exits,
        feature=asked.feature or "none",
        answers=asked.answers or "model",
        answer_tokens=how.tokens,
        answer_temperature=how.temperature,
        loss=asked.loss or "kl",
        answered=rows.count - len(missing),
        answer_seconds=speed.writing(missing, how),
        state_seconds=tokens * speed.token,
        disk_mb=states_bytes(tokens, decoder.backend.spec.hidden, len(exits)) / 2**20,
    )


def _source(model: str) -> str:
    """The folder of a model that can be copied as it is. Raises CheckpointError for others."""
    if is_adapter(model):
        raise CheckpointError(f"`model` {model} is an adapter; needed a folder with all weights: `layerskip import`")
    source = downloaded(model)
    reading(model, lambda: refuse_packed(source))
    if not weight_files(source):
        raise CheckpointError(f"`model` {model} has no safetensors, which are copied as they are: `layerskip import`")
    return source


def _require_exits(config: FinetuneConfig, exits: Sequence[int], num_layers: int, kept: ExitBlocks | None) -> None:
    """Raises ConfigError for an exit that is not below the last layer, or that has a block in `kept` already."""
    for exit_layer in exits:
        require_exit_layer(exit_layer, num_layers, field="exits")
    known = [block.exit_layer for block in kept.blocks] if kept is not None and not config.overwrite else []
    if there := [exit_layer for exit_layer in exits if exit_layer in known]:
        raise ConfigError(f"`output` {config.output} already has a block at exit {there[0]}; give `overwrite` to replace it")


def _notes(info: CheckpointInfo) -> tuple[str, ...]:
    """A line on the saved settings that `CheckpointInfo.with_exit_blocks` removes."""
    if not info.advice:
        return ()
    why = "chosen without these blocks, which `layerskip sweep-exits --save` includes"
    return (f"saved settings that will be left out: {', '.join(info.advice)}; they were {why}",)


def _steps(config: FinetuneConfig, rows: int) -> int:
    """Optimizer steps of each exit, over so many rows."""
    if config.steps is not None:
        return config.steps
    if is_endless(config.data):
        return COMMANDS_STEPS
    return max(1, math.ceil(rows / (config.batch_size * config.accumulation) * (config.epochs or _EPOCHS)))


def _timed(
    module: FrozenExits, config: FinetuneConfig, exits: Sequence[int], lengths: Sequence[tuple[int, int]], device: torch.device,
    autocast: bool,
) -> StepCost:  # fmt: skip
    """A step of the first exit, on random states of the longest text; `lengths` are those of prompts and answers."""
    prompt, answer = max(lengths, key=sum)
    length, width = prompt + answer, module.width
    row = {
        "input_ids": [0] * length,
        "labels": Text.of([0] * prompt, [0] * answer).labels,
        "exits": exits[:1],
        "states": torch.randn(1, length, width, generator=torch.Generator().manual_seed(0)),
        "finals": torch.randn(length, width, generator=torch.Generator().manual_seed(1)),
    }
    tokens = config.batch_size * config.accumulation * sum(map(sum, lengths)) / len(lengths)
    return timed_step(module, collate([row] * config.batch_size), device, autocast, 1, tokens)


def _rows(config: FinetuneConfig, trainable: Trainable, max_length: int, of_data: bool) -> RunRows:
    """The rows of a run within `max_length` tokens; a prompt must leave room for an answer. `of_data`: these have answers.

    Held out are the rows of `validation`, else the last twentieth of the rows, at most 64. Raises DataError if nothing is left.
    """
    data, load = config.data, load_rows if of_data else load_prompts
    if is_endless(data):
        own = 0 if config.validation is not None else _HELD_OUT
        seen = _steps(config, 0) * config.batch_size * config.accumulation
        data = replace(data, limit=max(1, round(seen / (config.epochs or _EPOCHS))) + own)
    rows: Sequence[Row] = load(data)
    if config.validation is None:
        cut = len(rows) - min(_HELD_OUT, len(rows) // _SHARE)
        rows, held_out = rows[:cut], rows[cut:]
    else:
        held_out = load(validation_data(config, config.validation))
    template = _template(config, trainable, rows)
    encoder = Encoder(trainable.tokenizer, template, max_length)
    left = len(rows) + len(held_out)
    if of_data:
        texts, held_texts = _texts(encoder, rows), _texts(encoder, held_out)
        made = RunRows([], texts + held_texts, len(held_texts), left, template)
    else:
        prompts, held_prompts = _prompts(encoder, rows), _prompts(encoder, held_out)
        made = RunRows(prompts + held_prompts, [], len(held_prompts), left, template)
    if made.count == made.held_out:
        raise DataError(f"no row has room for an answer within `max_length` {max_length}: every prompt is longer")
    return replace(made, left_out=left - made.count)


def _texts(encoder: Encoder, rows: Sequence[Row]) -> list[Text]:
    encoded = (Text(row["input_ids"], row["labels"]) for row in encoder.rows(rows))
    return [text for text in encoded if text.targets]


def _prompts(encoder: Encoder, rows: Sequence[Row]) -> list[list[int]]:
    examples = (row for row in rows if isinstance(row, Example))
    return [prompt for prompt in encoder.prompts(examples) if 0 < len(prompt) < encoder.max_length]


def _template(config: FinetuneConfig, trainable: Trainable, rows: Sequence[Row]) -> PromptTemplate:
    """What decoding uses; for parsing data the template of such data, where the model names none."""
    asked, system, stored = config.prompting.asked, config.prompting.system, trainable.info.template
    if any(isinstance(row, Conversation) for row in rows):
        return conversation_template(config)
    if asked is None and system is None and stored is None and is_parsing(config.data):
        return PromptTemplate(PARSING_TEMPLATE)
    return resolve_template(asked, system, stored, trainable.tokenizer)
