"""A planned run from its first step to the saved model."""

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from ..checkpoint.info import CheckpointInfo
from ..checkpoint.loaded import Trainable
from ..checkpoint.quiet import quiet_transformers
from ..checkpoint.save import output_lock, save_checkpoint
from ..config.training import FinetuneConfig
from ..errors import CheckpointError, LayerSkipError, TrainingInterrupted, first_line
from ..model.draft_vocabulary import ORDER_FILE
from ..prompting.template import PromptTemplate
from ..storage.writing import run_staging
from .adapters import with_lora
from .attention import use_fp32_attention
from .checkpoints import ResumePoint, checkpoints_folder, discard_after, last_checkpoint
from .encoded_data import EncodedData
from .interruption import Interruption
from .loss_plot import loss_plot
from .module import RecipeModule
from .plan import TrainingPlan, resolved_config
from .progress import LossHistory, StepReport
from .tokenizer import token_order, token_order_json
from .trainer import RecipeTrainer, make_trainer


@dataclass(frozen=True)
class FinetuneJob:
    """A planned run, made by `prepare`: `plan` says what it will do, `run` does it."""

    config: FinetuneConfig
    trainable: Trainable
    data: EncodedData
    held_out: EncodedData | None
    template: PromptTemplate
    plan: TrainingPlan
    save_dtype: torch.dtype
    resume: ResumePoint | None = None

    @quiet_transformers()
    def run(self, on_step: Callable[[StepReport], None]) -> CheckpointInfo:
        """Trains, then writes the checkpoint to `config.output`; the info that it returns has the last losses of every exit.

        Raises:
            CheckpointError: a checkpoint cannot be read or written.
            TrainingError: the loss is not finite, or explodes.
            TrainingInterrupted: by Ctrl-C or SIGTERM; the run was saved and can be resumed.
            LockedError: another process writes to the folder.
        """
        with run_lock(self.config.output):
            return self._run(on_step)

    def _run(self, on_step: Callable[[StepReport], None]) -> CheckpointInfo:
        config, plan, tokenizer = self.config, self.plan, self.trainable.tokenizer
        if plan.autocast and plan.device == "cpu":
            use_fp32_attention(self.trainable.model)
        model = with_lora(self.trainable.model, config) if config.lora_rank else self.trainable.model
        module = RecipeModule(model, plan.recipe, config.seed, config.regime == "scratch", config.gradient_checkpointing)
        order = token_order(self.data, module.backend.vocab_size)  # before training: reading a stream may fail
        with Interruption() as interruption:
            trainer = make_trainer(module, tokenizer, self.data, self.held_out, config, plan, on_step, interruption)
            self._train(trainer, interruption)
            trained = model.merge_and_unload() if config.lora_rank and not config.lora_keep else model
            history = LossHistory.of_log(trainer.state.log_history)
            details = self._details(history)
            info = CheckpointInfo(prompt_template=self.template.text, system=self.template.system, details=details)
            if trainer.is_world_process_zero():
                files = {
                    "losses.jsonl": history.to_jsonl().encode(),
                    "losses.png": loss_plot(history),
                    ORDER_FILE: token_order_json(order),
                }
                save_checkpoint(trained, tokenizer, info, config.output, self.save_dtype, files)
        return info

    def _train(self, trainer: RecipeTrainer, interruption: Interruption) -> None:
        """Trains to the end, or raises what stopped it."""
        folder = checkpoints_folder(self.config.output)
        if trainer.is_world_process_zero():
            # What an earlier run left there must never be what a later `resume` finds.
            discard_after(folder, 0 if self.resume is None else self.resume.step)
        try:
            trainer.train(resume_from_checkpoint=None if self.resume is None else str(self.resume.folder))
        except LayerSkipError:
            raise
        except Exception as error:  # safetensors, torch and pickle raise many kinds for a full disk or a bad file
            raise self._explained(error, trainer) from error
        finally:
            if trainer.is_world_process_zero():
                shutil.rmtree(run_staging(folder), ignore_errors=True)
                with suppress(OSError):
                    folder.rmdir()  # Trainer makes it even for a run that writes no checkpoints
        step = trainer.state.global_step
        if step < self.plan.steps:
            raise TrainingInterrupted(
                f"interrupted after step {step} of {self.plan.steps}; saved {last_checkpoint(folder)}",
                interruption.signal or 0,
                step,
            )

    def _explained(self, error: Exception, trainer: RecipeTrainer) -> Exception:
        """An error of the libraries as one for the user, if it came while a checkpoint was read or written."""
        if trainer.run.phase == "loading" and self.resume is not None:
            return CheckpointError(f"cannot resume from {self.resume.folder}: {first_line(error)}")
        if trainer.run.phase != "saving":
            return error
        folder = checkpoints_folder(self.config.output)
        last = last_checkpoint(folder)
        kept = "" if last is None else f"; {last} before it is whole: go on from it with `resume`"
        free = f"{shutil.disk_usage(folder).free / 2**20:.0f} MB are free there"
        step = trainer.state.global_step
        return CheckpointError(f"cannot write the checkpoint of step {step} to {folder}: {first_line(error)} ({free}){kept}")

    def _details(self, history: LossHistory) -> dict[str, Any]:
        return {
            "base_model": self.config.model,
            "config": resolved_config(self.config, self.plan),
            "steps": self.plan.steps,
            "rows": self.plan.rows,
            "final_losses": {str(layer): loss for layer, loss in history.latest.items()},
            "validation_losses": {str(layer): loss for layer, loss in history.validated.items()},
            "versions": {name: version(name) for name in ("layerskip", "torch", "transformers")},
        }


def run_lock(output: str) -> AbstractContextManager[None]:
    """The lock of `output`, which a run holds from its plan to its end; under torchrun the first process holds it for all."""
    return output_lock(output, "layerskip finetune") if os.environ.get("RANK", "0") == "0" else nullcontext()
