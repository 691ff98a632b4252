"""A planned run from its first step to the saved model."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from ..checkpoint.info import CheckpointInfo
from ..checkpoint.loaded import Trainable
from ..checkpoint.save import save_checkpoint
from ..checkpoint.transformers_read import quiet_transformers
from ..config.training import FinetuneConfig
from ..errors import first_line
from ..interruption import Interruption
from ..model.draft_vocabulary import ORDER_FILE
from ..prompting import PromptTemplate
from .loop.attention import use_fp32_attention
from .loop.checkpoints import ResumePoint
from .loop.schedule import recipe_schedule
from .loop.session import run_lock, stage_reporter, train_to_end
from .loop.sharding import gather_whole
from .loop.trainer import make_trainer
from .loss_plot import loss_plot
from .plan import TrainingPlan, resolved_config
from .progress import LossHistory, StageProgress, StepReport
from .recipe.anchor import anchor_of
from .recipe.module import RecipeModule
from .rows.encoded_data import Collator, EncodedData
from .rows.order import OrderedRows, run_order
from .rows.replay import ReplayedRows, replayed_texts
from .rows.step_rows import data_rows, rows_per_step
from .rows.tokenizer import token_order, token_order_json


@dataclass(frozen=True)
class FinetuneJob:
    """A planned run, made by `prepare`: `plan` says what it will do, `run` does it."""

    config: FinetuneConfig
    trainable: Trainable
    model: Any  # of `trainable`, with adapters if the run trains those
    data: EncodedData
    held_out: EncodedData | None
    template: PromptTemplate
    plan: TrainingPlan
    save_dtype: torch.dtype
    resume: ResumePoint | None = None

    def run(
        self, on_step: Callable[[StepReport], None], on_progress: Callable[[StageProgress], None] = lambda _: None
    ) -> CheckpointInfo:
        """Trains, then writes the checkpoint to `config.output`; the info that it returns has the last losses of every exit.

        Raises:
            CheckpointError: a checkpoint cannot be read or written.
            TrainingError: the loss is not finite, or explodes.
            TrainingInterrupted: by Ctrl-C or SIGTERM; the run was saved and can be resumed.
            LockedError: another process writes to the folder.
        """
        with run_lock(self.config.output):
            info, undrawn = self._run(on_step, on_progress)
        if undrawn is not None:
            warnings.warn(f"losses.png was not drawn: {undrawn}", stacklevel=2)
        return info

    @quiet_transformers()
    def _run(
        self, on_step: Callable[[StepReport], None], on_progress: Callable[[StageProgress], None]
    ) -> tuple[CheckpointInfo, str | None]:
        """The info of the saved model, and why the losses could not be drawn."""
        config, plan, tokenizer = self.config, self.plan, self.trainable.tokenizer
        if plan.autocast and plan.device == "cpu":
            use_fp32_attention(self.trainable.model)
        model = self.model
        scratch, recompute = config.regime == "scratch", config.gradient_checkpointing
        module = RecipeModule(model, plan.recipe, config.seed, scratch, recompute, tokenizer)
        order = token_order(self.data, module.backend.vocab_size)  # before training: reading a stream may fail
        with Interruption() as interruption:
            rows = self._rows(on_progress, interruption)
            layer_classes = tuple(dict.fromkeys(type(layer).__name__ for layer in module.backend.layers))
            schedule = recipe_schedule(config, plan, self.held_out is not None, layer_classes)
            held_out = None if self.held_out is None else self.held_out.rows
            pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
            trainer = make_trainer(module, schedule, rows, held_out, Collator(pad or 0), on_step, interruption)
            module.anchor = anchor_of(config, model, module.backend, str(trainer.args.device))
            train_to_end(trainer, config.output, plan.steps, self.resume, interruption)
            first = trainer.is_world_process_zero()
            if config.fsdp:
                gather_whole(module, keep=first)
            history = LossHistory.of_log(trainer.state.log_history)
            details = self._details(history)
            info = CheckpointInfo(prompt_template=self.template.text, system=self.template.system, details=details)
            undrawn = None
            if first:
                trained = model.merge_and_unload() if config.lora_rank and not config.lora_keep else model
                files = {"losses.jsonl": history.to_jsonl().encode(), ORDER_FILE: token_order_json(order)}
                try:
                    files["losses.png"] = loss_plot(history)
                except Exception as error:  # matplotlib's settings are the user's; a picture is not worth a training
                    undrawn = first_line(error)
                save_checkpoint(trained, tokenizer, info, config.output, self.save_dtype, files)
        return info, undrawn

    def _rows(self, on_progress: Callable[[StageProgress], None], interruption: Interruption) -> Any:
        """The rows of the run in their order: batches of similar length, or a stream as it comes; and those of a replay."""
        rows, config, replay = self.data.rows, self.config, self.plan.replay
        if self.data.streamed:
            return rows
        ordered = OrderedRows(rows, run_order(rows["length"][:], data_rows(config), self.plan.steps, config.seed))
        if replay is None:
            return ordered
        report = stage_reporter("replay texts", len(replay.starts), on_progress, interruption)
        texts = replayed_texts(config, replay, self.plan.device, report)
        return ReplayedRows(ordered, texts, replay.rows, rows_per_step(config))

    def _details(self, history: LossHistory) -> dict[str, Any]:
        return {
            "base_model": self.config.model,
            "config": resolved_config(self.config, self.plan),
            "steps": self.plan.steps,
            "rows": self.plan.rows,
            "final_losses": {str(layer): loss for layer, loss in history.latest.items()},
            "validation_losses": {str(layer): loss for layer, loss in history.validated.items()},
            "validation_rows": None if self.held_out is None else self.held_out.digest,
            "versions": {name: version(name) for name in ("layerskip", "torch", "transformers")},
        }
