"""A planned run that trains exit blocks: answers, states, training, and the file beside the model."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.beside import exit_blocks_content
from ...checkpoint.folder import EXIT_BLOCKS_FILE
from ...checkpoint.loaded import Decoder, Trainable
from ...checkpoint.save import copy_checkpoint, save_beside
from ...checkpoint.transformers_read import quiet_transformers, stored_dtype
from ...config.training import FinetuneConfig
from ...interruption import Interruption
from ...model.exit_blocks import ExitBlocks
from ..loop.attention import use_fp32_attention
from ..loop.checkpoints import ResumePoint, checkpoints_folder, discard_after
from ..loop.schedule import schedule_of
from ..loop.session import run_lock, stage_reporter, train_to_end
from ..loop.trainer import make_trainer
from ..progress import LossHistory, StageProgress, StepReport
from ..rows.answers import DIGITS, Text, Writing, write_answers
from ..rows.order import run_order
from .module import FrozenExits
from .plan import FrozenPlan
from .run_data import RunRows
from .states import StateRows, States, collate, write_states


@dataclass(frozen=True)
class RunFiles:
    """What a run keeps beside its checkpoints: the journal of answers, and the folder of states."""

    answers: Path
    states: Path


@dataclass(frozen=True)
class FrozenJob:
    """A planned run, made by `prepare_frozen`: `plan` says what it will do, `run` does it."""

    config: FinetuneConfig
    decoder: Decoder
    trainable: Trainable
    rows: RunRows
    writing: Writing
    plan: FrozenPlan
    files: RunFiles
    sealed: dict[str, Any]
    made_for: str  # fingerprint of the model
    kept: ExitBlocks  # that the model has already
    in_place: bool  # the model's own folder gets the blocks
    resume: ResumePoint | None = None

    @quiet_transformers()
    def run(
        self, on_step: Callable[[StepReport], None], on_progress: Callable[[StageProgress], None] = lambda _: None
    ) -> dict[str, Any]:
        """Trains the blocks and writes them to `config.output`; returns how each exit's was trained, by exit.

        Raises as `FinetuneJob.run` does. Answers and states of an interrupted run are found by the next one.
        """
        with run_lock(self.config.output), Interruption() as interruption:
            texts = self._texts(on_progress, interruption)
            states = self._states(texts, on_progress, interruption)
            module, history = self._train(states, on_step, interruption)
            trained = self._described(history, states)
            self._save(module, trained)
            shutil.rmtree(self.files.states, ignore_errors=True)
            discard_after(checkpoints_folder(self.config.output), 0)
        return trained

    def _texts(self, on_progress: Callable[[StageProgress], None], interruption: Interruption) -> list[Text]:
        prompts = self.rows.prompts
        if not prompts:
            return self.rows.texts
        report = stage_reporter("answers", len(prompts), on_progress, interruption)
        answers = write_answers(self.decoder, prompts, self.writing, self.files.answers, report)
        return [Text.of(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def _states(self, texts: list[Text], on_progress: Callable[[StageProgress], None], interruption: Interruption) -> States:
        folder, exits, backend = self.files.states, self.plan.settings.exits, self.trainable.backend
        for other in folder.parent.glob(f"states-{DIGITS * '[0-9a-f]'}"):
            if other != folder:  # of an earlier run with other rows or settings
                shutil.rmtree(other, ignore_errors=True)
        report = stage_reporter("states", len(texts), on_progress, interruption)
        write_states(self.decoder.backend, self._final_norm, texts, exits, folder, report)
        return States(texts, exits, backend.hidden_size, folder)

    def _final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        backend = self.trainable.backend
        return backend.normed(hidden.to(backend.dtype))

    def _train(
        self, states: States, on_step: Callable[[StepReport], None], interruption: Interruption
    ) -> tuple[FrozenExits, LossHistory]:
        config, plan, settings = self.config, self.plan, self.plan.settings
        if plan.autocast and plan.device == "cpu":
            use_fp32_attention(self.trainable.model)
        module = FrozenExits(self.trainable.backend, settings.blocks, settings.loss)
        last = range(plan.texts, plan.texts + plan.held_out)
        held_out = StateRows(states, last, one_by_one=False) if plan.held_out else None
        lengths = [len(text.ids) for text in states.texts[: plan.texts]]
        order = list(run_order(lengths, config.batch_size * config.accumulation, plan.steps, config.seed))
        schedule = schedule_of(
            config, plan.total_steps, plan.lr, plan.autocast, plan.device, held_out is not None, self.sealed,
            phases=len(settings.exits),
        )  # fmt: skip
        rows = StateRows(states, order, one_by_one=True)
        trainer = make_trainer(module, schedule, rows, held_out, collate, on_step, interruption)
        train_to_end(trainer, config.output, plan.total_steps, self.resume, interruption)
        return module, LossHistory.of_log(trainer.state.log_history)

    def _described(self, history: LossHistory, states: States) -> dict[str, Any]:
        config, plan, settings = self.config, self.plan, self.plan.settings
        shared = {
            "feature": settings.feature,
            "loss": settings.loss,
            "data": config.data.name,
            "answers": settings.answers,
            "rows": plan.texts,
            "target_tokens": sum(text.targets for text in states.texts[: plan.texts]),
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
            for exit_layer in settings.exits
        }

    def _save(self, module: FrozenExits, trained: dict[str, Any]) -> None:
        """Adds the blocks to the model's own folder, or to a copy of it."""
        config, info, spec = self.config, self.trainable.info, self.trainable.backend.spec
        dtype = stored_dtype(config.model)
        weights = {name: weight.to(dtype) for name, weight in module.weights().items()}
        content = exit_blocks_content(spec, weights, self.made_for, self.kept)
        if self.in_place:
            save_beside(config.output, EXIT_BLOCKS_FILE, content, lambda info: info.with_exit_blocks(trained))
            return
        template = self.rows.template
        if info.prompt_template is None and template.text != "raw" and config.prompting.asked is not None:
            info = replace(info, prompt_template=template.text, system=template.system)
        copy_checkpoint(config.model, info.with_exit_blocks(trained), config.output, {EXIT_BLOCKS_FILE: content})
