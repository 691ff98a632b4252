"""The training loop: transformers' Trainer around a module.

Three private methods of Trainer are overridden and `_n_gpu` is set; if a new version of
transformers changes these, tests/training/test_resume.py fails.
"""

import math
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Muon, Optimizer
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from ..errors import (
    CheckpointError,
    ConfigError,
    LayerSkipError,
    TrainingError,
    TrainingInterrupted,
    first_line,
)
from ..interruption import Interruption
from ..losses import IGNORED
from ..model import ModelSpec
from . import progress
from .data import collate
from .recipe import RunStep
from .sharding import process_index, read_shard, use_fsdp, write_shard

if TYPE_CHECKING:
    from .plan import Job, RunPlan

_BETAS = (0.9, 0.95)
_EXPLODED = 2.0  # times the greater of ln V (a uniform guess) and the run's first loss


class RunTrainer(Trainer, TrainerCallback):  # type: ignore[misc]
    """Trains a module through a run, as its own callback.

    Its hooks as a callback are those named `on_...`; the others override Trainer's methods. After
    the optimizer's step Trainer calls, in this order: `on_step_end`, which sums up the step over
    all processes and decides what follows it; `log`, which checks and reports it; `evaluate` and
    `save_model`, if they were decided on.
    """

    control: Any
    lr_scheduler: Any

    def __init__(
        self,
        job: "Job",
        rows: Any,
        held_out: Any,
        on_step: Callable[[progress.StepReport], None],
        interruption: Interruption,
    ) -> None:
        """`rows`: a data set in the order of the run."""
        self.plan = job.plan
        self.module = job.module
        self.fixed_settings = job.fixed_settings
        self.on_step = on_step
        self.interruption = interruption
        self.history = progress.LossHistory()
        self.checkpoints = progress.checkpoints_folder(job.plan.config.output)
        self.phase: Literal["loading", "training", "saving"] = "loading"  # to explain errors
        self.sums: Any = None  # a step's tokens and summed exit losses, on the device
        self.micro_batches = 0
        self.exit_layers = tuple[int, ...]()
        self.targets: Tensor | int = 1  # of a step, over all micro-batches and processes
        self.tokens = 0.0  # of the last step, over all processes
        self.exit_losses: dict[int, float] = {}  # of the last step, per target
        self.started = 0.0
        super().__init__(
            self.module,
            training_arguments(job),
            collate,
            train_dataset=rows,
            eval_dataset=held_out,
        )
        # How many to keep: the user's `training_arguments` may say. `on_save` removes the others,
        # as Trainer's own removal leaves a partial checkpoint when it is killed.
        self.most_checkpoints = self.args.save_total_limit
        self.args.save_total_limit = None
        self.remove_callback(PrinterCallback)  # it writes to stdout
        self.add_callback(self)

    def run(self) -> progress.LossHistory:
        """Trains to the end, or raises the error that stopped it."""
        folder = self.checkpoints
        checkpoint = self.plan.checkpoint
        if process_index() == 0:  # a later `resume` must not find checkpoints of an earlier run
            progress.discard_after(folder, checkpoint)
        try:
            if checkpoint is not None:
                self.history = progress.LossHistory.read(checkpoint)
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except LayerSkipError:
            raise
        # Safetensors, torch and pickle raise many kinds for a full disk or a bad file
        except Exception as error:
            reason = first_line(error)
            if self.phase == "loading" and checkpoint is not None:
                raise CheckpointError(f"cannot resume from {checkpoint}: {reason}") from error
            if self.phase == "saving":
                raise CheckpointError(
                    f"cannot write the checkpoint of step {self.state.global_step} to {folder}: "
                    f"{reason}; those before it are whole"
                ) from error
            raise
        step = self.state.global_step
        if step < self.plan.steps:
            [saved, *_] = progress.newest_first(folder)
            raise TrainingInterrupted(
                f"interrupted after step {step} of {self.plan.steps}; saved {saved}",
                self.interruption.signal or 0,
                step,
            )
        return self.history

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.plan.config.fsdp:
            use_fsdp(self.accelerator, self.module.backend.layers)
            self.is_fsdp_enabled = True

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Trainer's AdamW, and Muon for the matrices that the module gives it."""
        adamw = super().create_optimizer(model)
        config = self.plan.config
        # `self.model` is the module itself, not DDP around it; FSDP2 has sharded it in place by now
        weights, lr = self.model.muon(config.lr)
        if weights:
            by_muon = set(map(id, weights))
            for group in adamw.param_groups:
                group["params"] = [each for each in group["params"] if id(each) not in by_muon]
            self.optimizer = Optimizers(adamw, Muon(weights, lr, config.weight_decay))
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a micro-batch, over all targets of the step: `num_items_in_batch`, which
        Trainer counts for modules with `accepts_loss_kwargs`.
        """
        # Processes take the batches of a step in turns.
        number = self.micro_batches * self.args.world_size + self.args.process_index
        first_row = number * self.args.train_batch_size
        step = RunStep(self.state.global_step, self.state.max_steps, first_row)
        tokens = inputs.pop("lengths").sum()
        output = model(**inputs, step=step)
        values = torch.cat((tokens.to(torch.float32)[None], output["per_exit"]))
        self.sums = values if self.sums is None else self.sums + values
        self.micro_batches = self.micro_batches + 1
        self.exit_layers = output["exit_layers"]
        self.targets = num_items_in_batch
        # DDP averages gradients over processes, while `targets` counts the tokens of all of them.
        return output["loss"] / self.targets * self.accelerator.num_processes

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A checkpoint's state has the value of the run that wrote it
        state.save_steps = args.save_steps
        self.started = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.phase = "training"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Sums up the step, and decides what follows it. (Trainer's own callback, called before,
        decides on checkpoints every `save_steps`.)
        """
        interrupted = torch.tensor(
            [float(self.interruption.signal is not None)], device=self.sums.device
        )
        # A signal that one process got interrupts all of them.
        sums = self.accelerator.reduce(torch.cat((interrupted, self.sums)), reduction="sum")
        signals, self.tokens, *per_exit = sums.tolist()
        targets = float(self.targets)
        losses = [loss / targets for loss in per_exit]
        self.exit_losses = dict(zip(self.exit_layers, losses, strict=True))
        self.sums = None
        self.micro_batches = 0

        is_last = state.global_step >= state.max_steps
        every = self.plan.eval_steps
        control.should_log = True
        control.should_evaluate = every > 0 and (is_last or state.global_step % every == 0)
        if signals and not is_last:
            control.should_save = True
            control.should_training_stop = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the exits' losses to Trainer's log of a step, and reports the step."""
        if "grad_norm" in logs:  # else the log of a validation, or of the whole run
            self._report_step(logs["loss"], logs["grad_norm"], logs["learning_rate"])
            logs |= {f"exit_{layer}_loss": loss for layer, loss in self.exit_losses.items()}
        super().log(logs, start_time)

    def _report_step(self, loss: float, gradient_norm: float, learning_rate: float) -> None:
        losses = progress.StepLosses(self.state.global_step, loss, self.exit_losses)
        self._refuse_divergence(losses, gradient_norm)
        self.history.add(losses)
        now = time.perf_counter()
        tokens_per_second = self.tokens / (now - self.started)
        self.started = now
        self.on_step(self.history.report(self.state.max_steps, learning_rate, tokens_per_second))

    def _refuse_divergence(self, losses: progress.StepLosses, gradient_norm: float) -> None:
        """Raises TrainingError for values that are not finite, and a loss that explodes."""
        for what, value in (("loss", losses.loss), ("norm of the gradient", gradient_norm)):
            if not math.isfinite(value):
                raise self._failure(f"the {what} of step {losses.step} is {value}")
        first = self.history.steps[0].final if self.history.steps else losses.final
        guessing = math.log(self.model.backend.spec.vocab)
        if losses.final > _EXPLODED * max(guessing, first):
            raise self._failure(
                f"the loss exploded at step {losses.step}: {losses.final:.1f} in the last layer, "
                f"first {first:.1f}"
            )

    def _failure(self, what: str) -> TrainingError:
        saved = progress.newest_first(self.checkpoints)
        if not saved:
            return TrainingError(
                f"{what}; no checkpoint was written before it (`save_steps` N). Try a lower `lr`"
            )
        told = f"{what}; the last good checkpoint is {saved[0]}"
        if not self.is_fsdp_enabled:  # shards are no model
            told += f": start from it with `model` {saved[0]} and a lower `lr`"
        return TrainingError(told)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measures loss and agreement of every exit on the held-out rows, for history, log and
        trackers; in each process.
        """
        module: Any = self.accelerator.unwrap_model(self.model).eval()
        step = RunStep(self.state.global_step, self.state.max_steps)
        batches = DataLoader(
            self.eval_dataset, self.args.train_batch_size, collate_fn=self.data_collator
        )
        losses: Any = 0
        agreeing: Any = 0
        targets: Any = 0
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in batches:
                del batch["lengths"]
                batch = {name: value.to(self.args.device) for name, value in batch.items()}
                output = module(**batch, step=step)
                exits = output["exit_layers"]
                losses = losses + output["per_exit"].float()
                agreeing = agreeing + output["agreeing"]
                targets = targets + (batch["labels"] != IGNORED).sum()
        module.train()
        count = float(targets)
        means = [loss / count for loss in losses.tolist()]
        agreement = [right / count for right in agreeing.tolist()]
        loss_by_exit = dict(zip(exits, means, strict=True))
        # Without the last layer, which agrees with itself
        shares = dict(zip(exits, agreement, strict=False))
        self.history.add_validation(loss_by_exit, shares)
        metrics = {f"eval_exit_{layer}_loss": loss for layer, loss in loss_by_exit.items()}
        metrics |= {f"eval_exit_{layer}_agreement": share for layer, share in shares.items()}
        metrics["eval_loss"] = loss_by_exit[max(loss_by_exit)]
        self.log(dict(metrics))  # a copy, because `log` adds keys
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Begins a checkpoint with the module's own files."""
        self.phase = "saving"
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            progress.begin_checkpoint(folder, self.fixed_settings, self.history)
            if not self.is_fsdp_enabled:  # shards are written with the optimizer's
                self.accelerator.unwrap_model(self.model).save(folder)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.phase = "training"
        if process_index() == 0 and self.most_checkpoints:
            older = progress.checkpoints(self.checkpoints)[self.most_checkpoints :]
            progress.discard(self.checkpoints, older)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if not self.is_fsdp_enabled:  # shards are read with the optimizer's
            self.accelerator.unwrap_model(model or self.model).load(Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            write_shard(self.model, self.optimizer, self.lr_scheduler, Path(output_dir))
            # The file that Trainer writes last means that the checkpoint is complete
            self.accelerator.wait_for_everyone()
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_fsdp_enabled and checkpoint is not None:
            read_shard(self.model, self.optimizer, self.lr_scheduler, Path(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)


class Optimizers(Optimizer):
    """Optimizers of different parameters as one, which is what Trainer schedules, saves and loads.

    The parts share its groups and its state, so that `state_dict` has the state of all of them.
    """

    def __init__(self, *parts: Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts
        self._share()

    def _share(self) -> None:
        """Gives each part its own of these groups, and the common state."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = list(islice(groups, len(part.param_groups)))
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()


def trackers(report_to: str) -> list[str]:
    """The names in `report_to`. Raises ConfigError when a tracker is unknown or its package is not
    installed.
    """
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    alone = names[0] if names in (["all"], ["none"]) else names
    try:
        for tracker in get_reporting_integration_callbacks(alone):
            tracker()
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(f"`report_to` {report_to}: {error}") from error
    return names


def training_arguments(job: "Job") -> TrainingArguments:
    """Trainer's arguments for a run. Raises ConfigError for `training_arguments` that transformers
    refuses.
    """
    plan = job.plan
    config = plan.config
    schedulers = {"constant": "constant_with_warmup"}
    given: dict[str, Any] = dict(
        output_dir=str(progress.checkpoints_folder(config.output)),
        max_steps=plan.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lr,
        lr_scheduler_type=schedulers.get(config.scheduler, config.scheduler),
        warmup_steps=round(config.warmup * plan.steps),
        weight_decay=config.weight_decay,
        adam_beta1=_BETAS[0],
        adam_beta2=_BETAS[1],
        seed=config.seed,
        bf16=plan.precision.autocast,
        use_cpu=plan.device == "cpu",
        num_train_epochs=1,  # the rows contain all epochs
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        ddp_find_unused_parameters=_may_leave_out_weights(plan),
        dataloader_pin_memory=plan.device.startswith("cuda"),
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=progress.KEPT_CHECKPOINTS,
        accelerator_config={
            # Each process reads a stream, whose batches have different lengths
            "dispatch_batches": False,
            # Otherwise FSDP would keep whole gradients between the micro-batches of a step.
            "gradient_accumulation_kwargs": {"sync_each_batch": True} if config.fsdp else None,
        },
        logging_strategy="no",  # on_step_end logs every step
        logging_nan_inf_filter=False,
        report_to=trackers(config.report_to),
        disable_tqdm=True,
    )
    try:
        arguments = TrainingArguments(**given | (config.training_arguments or {}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`training_arguments`: {first_line(error)}") from None
    # With several GPUs in one process Trainer would split each batch by DataParallel. Ours are
    # started by torchrun, one process per GPU.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _may_leave_out_weights(plan: "RunPlan") -> bool:
    """True if a backward pass may not reach all weights: exit blocks of exits that are off, or
    experts that no token chose. (A layer without rows and an exit that is off leave none out.)
    """
    if not isinstance(plan.spec, ModelSpec):
        return True
    recipe = plan.recipe
    return recipe is not None and recipe.exit_reader != "none" and recipe.curriculum != "all"
