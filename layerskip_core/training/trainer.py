"""The training loop: transformers' Trainer around a module, and what happens around its steps.

Trainer's public interface does not suffice: `_load_from_checkpoint`, `_save_optimizer_and_scheduler` and
`_load_optimizer_and_scheduler` are overridden, and `_n_gpu` is set. Nothing else in training/ touches its private names; if a
new version of transformers changes these, tests/training/test_resume.py fails.
"""

import math
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from ..errors import CheckpointError, ConfigError, LayerSkipError, TrainingError, TrainingInterrupted, first_line
from ..files import run_staging
from ..interruption import Interruption
from ..losses import IGNORED
from ..model import ModelSpec
from .data import StreamedRows, collate
from .progress import LossHistory, StepLosses, StepReport, checkpoints_folder, discard_after, newest_first, publish
from .recipe import RunStep
from .sharding import process_index, read_shard, use_fsdp, write_shard

if TYPE_CHECKING:
    from .plan import Plan

_BETAS = (0.9, 0.95)
_EXPLODED = 2.0  # times the loss of knowing nothing, ln V, and times the run's first loss


class RunTrainer(Trainer, TrainerCallback):  # type: ignore[misc]
    """Trains a module through a run, and is told of the steps as its own callback.

    It gives the module its step in the run, and divides the summed loss by the target tokens of the whole optimizer step. (A
    token mean per micro-batch would be off by the accumulation factor.) Its checkpoints hold what the module keeps; under FSDP2
    a checkpoint has a file of each process.

    Raises TrainingError for a gradient that is not finite, before the optimizer applies it, and for a loss that explodes.
    """

    control: Any
    lr_scheduler: Any

    def __init__(
        self,
        plan: "Plan",
        rows: Any,
        held_out: Any,
        history: LossHistory,
        on_step: Callable[[StepReport], None],
        interruption: Interruption,
    ) -> None:
        """Trains for the optimizer steps of a plan over `rows`, a data set in the order of the run."""
        self.plan, self.history, self.on_step, self.interruption = plan, history, on_step, interruption
        self.checkpoints = checkpoints_folder(plan.config.output)
        self.phase: Literal["loading", "training", "saving"] = "loading"  # to explain errors
        self.sums: Any = None  # of loss and tokens of a step, and of its exits; on the device
        self.micro_batches, self.exit_layers = 0, tuple[int, ...]()
        self.targets: Tensor | int = 1  # of a step, over all micro-batches and processes
        self.learning_rate = self.grad_norm = self.started = 0.0
        super().__init__(plan.module, training_arguments(plan), collate, train_dataset=rows, eval_dataset=held_out)
        self.remove_callback(PrinterCallback)  # it writes to stdout
        self.add_callback(self)

    def run(self) -> None:
        """Trains to the end, or raises what stopped it."""
        folder, resume, is_first = self.checkpoints, self.plan.resume, process_index() == 0
        if is_first:  # what an earlier run left there must never be what a later `resume` finds
            discard_after(folder, 0 if resume is None else resume.step)
        try:
            self.train(resume_from_checkpoint=None if resume is None else str(resume.folder))
            self.accelerator.wait_for_everyone()  # each looks into the staging folder at its end
        except LayerSkipError:
            raise
        except Exception as error:  # safetensors, torch and pickle raise many kinds for a full disk or a bad file
            raise self._explained(error) from error
        finally:
            if is_first:
                shutil.rmtree(run_staging(folder), ignore_errors=True)
                with suppress(OSError):
                    folder.rmdir()  # Trainer makes it even for a run that writes no checkpoints
        step, steps = self.state.global_step, self.plan.steps
        if step < steps:
            saved = f"interrupted after step {step} of {steps}; saved {newest_first(folder)[0]}"
            raise TrainingInterrupted(saved, self.interruption.signal or 0, step)

    def _explained(self, error: Exception) -> Exception:
        """An error of the libraries as one for the user, if it came while a checkpoint was read or written."""
        folder, resume, step = self.checkpoints, self.plan.resume, self.state.global_step
        if self.phase == "loading" and resume is not None:
            return CheckpointError(f"cannot resume from {resume.folder}: {first_line(error)}")
        if self.phase != "saving":
            return error
        kept = "".join(f"; {last} before it is whole: go on from it with `resume`" for last in newest_first(folder)[:1])
        free = f"{shutil.disk_usage(folder).free / 2**20:.0f} MB are free there"
        return CheckpointError(f"cannot write the checkpoint of step {step} to {folder}: {first_line(error)} ({free}){kept}")

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.plan.config.fsdp:
            use_fsdp(self.accelerator, self.plan.module.backend.layers)
            self.is_fsdp_enabled = True

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Trainer's AdamW, and Muon for the matrices that the module gives it."""
        adamw, config = super().create_optimizer(model), self.plan.config
        groups = list(self.model.muon(config.lr))
        chosen = {id(weight) for weights, _, _ in groups for weight in weights}
        for group in adamw.param_groups:
            group["params"] = [weight for weight in group["params"] if id(weight) not in chosen]
        others = (Muon(weights, lr, config.weight_decay, adjust_lr_fn=adjustment) for weights, lr, adjustment in groups)
        self.optimizer = Optimizers(adamw, *others) if groups else adamw
        self.lr_scheduler = LambdaLR(self.optimizer, self.plan.lr_share)  # in place of the one that Trainer would make
        return self.optimizer

    def get_train_dataloader(self) -> Any:
        """Trainer's own, which divides the rows among the processes; a stream has been divided."""
        if not isinstance(self.train_dataset, StreamedRows):
            return super().get_train_dataloader()
        pinned = self.args.dataloader_pin_memory
        return DataLoader(self.train_dataset, self.args.train_batch_size, collate_fn=self.data_collator, pin_memory=pinned)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # Processes take the batches of a step in turns.
        number = self.micro_batches * self.args.world_size + self.args.process_index
        step = RunStep(self.state.global_step, self.state.max_steps, number * self.args.train_batch_size)
        tokens = inputs.pop("lengths").sum()
        output = model(**inputs, step=step)
        loss = output["loss"].detach()
        values = torch.cat((torch.stack((loss, tokens.to(loss.dtype))), output["per_exit"]))
        self.sums = values if self.sums is None else self.sums + values
        self.micro_batches, self.exit_layers = self.micro_batches + 1, output["exit_layers"]
        self.targets = (inputs["labels"] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        # DDP averages gradients over processes, while `targets` counts the tokens of all of them.
        scaled = output["loss"] / self.targets * self.accelerator.num_processes
        return (scaled, output) if return_outputs else scaled

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss of every exit over the held-out rows, into the history, the log and the trackers."""
        inner: Any = self.accelerator.unwrap_model(self.model).eval()
        sums: Any = 0
        rows, processes, size = len(self.eval_dataset), self.args.world_size, self.args.train_batch_size
        own_rows = range(self.args.process_index, rows, processes)
        with torch.no_grad(), self.compute_loss_context_manager():
            for at in range(0, -(-rows // processes), size):  # as many in every process, because FSDP gathers in each
                own = own_rows[at : at + size]
                collated = self.data_collator([self.eval_dataset[row] for row in own or (0,)])
                del collated["lengths"]
                batch = {name: value.to(self.args.device) for name, value in collated.items()}
                if not own:
                    batch["labels"].fill_(IGNORED)
                output = inner(**batch, step=RunStep(self.state.global_step, self.state.max_steps))
                exits, targets = output["exit_layers"], (batch["labels"] != IGNORED).sum()[None]
                sums = sums + torch.cat((output["per_exit"].float(), output["agreeing"], targets))
        inner.train()
        *parts, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        shares = [part / count for part in parts]
        losses, agreement = dict(zip(exits, shares, strict=False)), dict(zip(exits, shares[len(exits) :], strict=True))
        self.history.add(replace(self.history.steps.pop(), validation=losses, agreement=agreement))
        metrics = {f"eval_exit_{layer}_loss": loss for layer, loss in losses.items()}
        metrics |= {f"eval_exit_{layer}_agreement": share for layer, share in agreement.items()}
        metrics["eval_loss"] = losses[max(losses)]
        self.log(dict(metrics))  # which adds to it
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.started = time.perf_counter()  # validation does not count in the speed of the next step
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes what the module keeps, such as an ordinary transformers or peft checkpoint, and no pickled arguments.

        Trainer calls it first when it writes a checkpoint.
        """
        self.phase = "saving"
        if self.args.should_save and not self.is_fsdp_enabled:  # shards are written with the optimizer's
            self.accelerator.unwrap_model(self.model).save(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:  # otherwise they are read with the optimizer's state
            self.accelerator.unwrap_model(model or self.model).load(Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            write_shard(self.model, self.optimizer, self.lr_scheduler, Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_fsdp_enabled and checkpoint is not None:
            read_shard(self.model, self.optimizer, self.lr_scheduler, Path(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.save_steps = args.save_steps  # a checkpoint brings those of the run that wrote it
        # From now on Trainer writes checkpoints into a staging folder; on_save moves them. Trackers have already set up their
        # files in the run's own folder, because this callback is the last one.
        args.output_dir = str(run_staging(self.checkpoints))
        self.started = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.phase = "training"

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Clips the gradient in place of Trainer (`max_grad_norm` is 0), which does not show its norm to callbacks in time."""
        norm = self.accelerator.clip_grad_norm_(model.parameters(), self.plan.config.max_grad_norm)
        self.grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        self.learning_rate = float(self.lr_scheduler.get_last_lr()[0])  # on_step_end comes after the scheduler has moved on
        if not math.isfinite(self.grad_norm):
            loss = float(self.sums[0])
            what, value = ("norm of the gradient", self.grad_norm) if math.isfinite(loss) else ("loss", loss)
            raise self._failure(f"the {what} of step {state.global_step + 1} is {value}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        history = self.history
        signalled = torch.tensor([float(self.interruption.signal is not None)], device=self.sums.device)
        # Over all processes: whether a signal asks any of them to stop, the loss, the tokens, and the losses of exits.
        sums = self.accelerator.reduce(torch.cat((signalled, self.sums)), reduction="sum").tolist()
        self.sums, self.micro_batches, targets = None, 0, float(self.targets)
        stops, loss, tokens, *per_exit = sums
        exits = {layer: part / targets for layer, part in zip(self.exit_layers, per_exit, strict=True)}
        losses = StepLosses(state.global_step, loss / targets, exits)
        first = (history.steps or [losses])[0].final
        if not losses.final <= _EXPLODED * max(math.log(self.model.backend.spec.vocab), first):  # NaN is not either
            value = f"{losses.final:.1f} in the last layer, first {first:.1f}"
            raise self._failure(f"the loss exploded at step {losses.step}: {value}")
        history.add(losses)
        log = {"loss": losses.loss, "grad_norm": self.grad_norm, "learning_rate": self.learning_rate}
        self.log(log | {f"exit_{layer}_loss": loss for layer, loss in losses.exits.items()})
        now = time.perf_counter()
        elapsed, self.started = now - self.started, now
        self.on_step(history.report(state.max_steps, self.learning_rate, tokens / elapsed))
        last = state.global_step >= state.max_steps
        if stops and not last:
            control.should_save = control.should_training_stop = True
        every = self.plan.eval_steps
        control.should_evaluate = every > 0 and (last or state.global_step % every == 0)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One process seals the checkpoint and moves it into place, when all have written their part."""
        self.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            publish(written, self.checkpoints, self.plan.sealed, self.history)
        self.phase = "training"
        self.started = time.perf_counter()

    def _failure(self, what: str) -> TrainingError:
        saved = newest_first(self.checkpoints)
        if not saved:
            return TrainingError(f"{what}; no checkpoint was written before it (`save_steps` N). Try a lower `lr`")
        again = "" if self.is_fsdp_enabled else f": start from it with `model` {saved[0]} and a lower `lr`"
        return TrainingError(f"{what}; the last good checkpoint is {saved[0]}{again}")


class Optimizers(Optimizer):
    """Optimizers of different parameters as one."""

    def __init__(self, *parts: Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts
        self._share()

    def _share(self) -> None:
        """Groups and state of each part are some of these."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups, part.state = list(islice(groups, len(part.param_groups))), self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()


def trackers(report_to: str) -> list[str]:
    """The names in `report_to`. Raises ConfigError when a tracker is unknown or its package is not installed."""
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    try:
        for tracker in get_reporting_integration_callbacks(names[0] if names in (["all"], ["none"]) else names):
            tracker()
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(f"`report_to` {report_to}: {error}") from error
    return names


def training_arguments(plan: "Plan") -> TrainingArguments:
    """Raises ConfigError for further arguments that transformers refuses."""
    config, recipe = plan.config, plan.recipe
    # A backward pass may leave out readers of exits that are off, and experts that no token chose. (A layer without rows and an
    # exit that is off leave no parameter unused.)
    rests = recipe is not None and recipe.exit_reader != "none" and recipe.curriculum != "all"
    unused = rests or not isinstance(plan.module.backend.spec, ModelSpec)
    given: dict[str, Any] = dict(
        output_dir=str(checkpoints_folder(config.output)),
        max_steps=plan.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=_BETAS[0],
        adam_beta2=_BETAS[1],
        max_grad_norm=0.0,  # on_pre_optimizer_step clips
        seed=config.seed,
        bf16=plan.autocast,
        use_cpu=plan.device == "cpu",
        num_train_epochs=1,  # the rows of the run have all passes
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        ddp_find_unused_parameters=unused,
        dataloader_pin_memory=plan.device.startswith("cuda"),
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        # Otherwise FSDP would keep whole gradients between the micro-batches of a step.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}} if plan.config.fsdp else None,
        logging_strategy="no",  # on_step_end logs every step
        report_to=trackers(config.report_to),
        disable_tqdm=True,
    )
    try:
        arguments = TrainingArguments(**given | (config.training_arguments or {}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`training_arguments`: {first_line(error)}") from None
    if arguments.n_gpu > 1:  # else Trainer splits each batch over all GPUs by DataParallel; torchrun starts a process per GPU
        arguments._n_gpu = 1
    return arguments
