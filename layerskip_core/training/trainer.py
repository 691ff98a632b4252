"""The training loop: a thin subclass of transformers' Trainer around RecipeModule."""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..checkpoint.save import write_model
from ..config.training import FinetuneConfig
from ..errors import CheckpointError, ConfigError, TrainingError
from ..storage.writing import new_staging
from .checkpoints import LOSSES, checkpoints_folder, last_checkpoint, publish
from .encoding import Collator, EncodedData
from .interruption import Interruption
from .module import Moment, RecipeModule
from .order import RunOrder
from .progress import LossHistory, StepLosses, StepReport, StepSums

_BETAS = (0.9, 0.95)
_VALIDATIONS = 10  # a run, unless --eval-steps says otherwise
_EXPLODED = 2.0  # times the loss of knowing nothing, ln V, and times the run's first loss


class RecipeTrainer(Trainer):  # type: ignore[misc]
    """Gives the module its place in the run, and divides the summed loss by the target tokens of the whole optimizer step.

    (A token mean per micro-batch would be off by the accumulation factor.) Checkpoints are written aside and sealed; a loss
    that is not finite or explodes raises TrainingError.
    """

    control: Any

    def __init__(
        self,
        module: RecipeModule,
        tokenizer: Any,
        settings: Mapping[str, Any],
        on_step: Callable[[StepReport], None],
        interruption: Interruption,
        eval_steps: int,
        **keywords: Any,
    ) -> None:
        """`eval_steps`: steps between validations, 0 for none. `settings`, sealed into the checkpoints, bind a resumed run."""
        super().__init__(model=module, **keywords)
        self.remove_callback(PrinterCallback)  # it writes to stdout
        self.add_callback(_StepCallback(self, eval_steps))
        self.model_accepts_loss_kwargs = True  # makes Trainer count the targets of the whole step
        self.tokenizer_to_save = tokenizer
        self.history = LossHistory()
        self._settings = settings
        self._on_step = on_step
        self._interruption = interruption
        self._sums = StepSums()
        self._staging: Path | None = None  # a folder of its own for each checkpoint, while it is written
        self._targets: Tensor | int = 1
        self.started = time.perf_counter()

    def _get_train_sampler(self, train_dataset: Any = None) -> RunOrder | None:
        if isinstance(self.train_dataset, IterableDataset):
            return None
        rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return RunOrder(self.train_dataset["length"][:], rows_per_step, self.args.max_steps, self.args.seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        moment = Moment(self.state.global_step, self.state.max_steps, self._sums.micro_batches)
        output = model(**inputs, moment=moment)
        targets = (inputs["labels"] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        self._targets = targets
        self._sums.add(output, inputs["input_ids"].numel())
        # DDP averages gradients over ranks, while `targets` counts the tokens of all of them.
        loss = output["loss"] / targets * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def finish_step(self, learning_rate: float) -> bool:
        """Hands the step that just ended to the listener; returns whether a signal asks any of the processes to stop.

        Raises TrainingError when the loss has exploded.
        """
        now = time.perf_counter()
        sums, self._sums = self._sums, StepSums()
        assert sums.loss is not None and sums.per_exit is not None
        stop = float(self._interruption.signal is not None)
        counts = torch.tensor([sums.tokens, stop], device=sums.loss.device)
        values = torch.cat([sums.loss[None], sums.per_exit, counts])
        loss, *per_exit, tokens, stops = self.accelerator.reduce(values, reduction="sum").tolist()
        targets = float(self._targets)
        exits = {layer: part / targets for layer, part in zip(sums.exit_layers, per_exit, strict=True)}
        losses = StepLosses(self.state.global_step, loss / targets, exits)
        self._require_sane(losses)
        self.history.add(losses)
        elapsed, self.started = now - self.started, now
        self._on_step(
            StepReport(
                step=losses.step,
                total_steps=self.state.max_steps,
                loss=losses.loss,
                final_loss=exits[sums.exit_layers[-1]],
                exit_losses=self.history.latest,
                learning_rate=learning_rate,
                tokens_per_second=tokens / elapsed,
                validation_losses=self.history.validated,
            )
        )
        return bool(stops) and self.state.global_step < self.state.max_steps

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss of every exit over the held-out rows, into the history and to the trackers."""
        inner: Any = self.accelerator.unwrap_model(self.model)
        inner.eval()
        sums = torch.zeros(inner.backend.num_layers + 1, device=self.args.device)
        mine = range(self.args.process_index, len(self.eval_dataset), self.args.world_size)
        size = self.args.train_batch_size
        with torch.no_grad(), self.compute_loss_context_manager():
            for at in range(0, len(mine), size):
                batch = self._prepare_inputs(self.data_collator([self.eval_dataset[row] for row in mine[at : at + size]]))
                output = inner(**batch, moment=Moment(self.state.global_step, self.state.max_steps))
                sums[:-1] += output["per_exit"]
                sums[-1] += (batch["labels"] != -100).sum()
        inner.train()
        *per_exit, targets = self.accelerator.reduce(sums, reduction="sum").tolist()
        losses = {layer: part / targets for layer, part in enumerate(per_exit, start=1)}
        self.history.validate(losses)
        metrics = {f"eval_exit_{layer}_loss": loss for layer, loss in losses.items()} | {"eval_loss": per_exit[-1] / targets}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.started = time.perf_counter()  # the next step's speed is its own
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds every exit's loss to what goes to `--report-to`."""
        if "loss" in logs and self.history.steps:
            last = self.history.steps[-1]
            logs = {**logs, "loss": last.loss, **{f"exit_{layer}_loss": loss for layer, loss in last.exits.items()}}
        super().log(logs, start_time)

    def _require_sane(self, losses: StepLosses) -> None:
        """Raises TrainingError when the last layer's loss is above what any start explains."""
        finals = [step.exits[max(step.exits)] for step in (self.history.steps[:1] or [losses])]
        final = losses.exits[max(losses.exits)]
        limit = _EXPLODED * max(math.log(self.model.backend.vocab_size), finals[0])
        if not final <= limit:  # NaN is not either
            raise self._failure(
                f"the loss exploded at step {losses.step}: {final:.1f} in the last layer, first {finals[0]:.1f}"
            )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clips, and stops before the optimizer writes gradients that are not finite into the weights."""
        norm = super()._clip_grad_norm(model)
        if norm is not None and not math.isfinite(float(norm)):
            loss = float(self._sums.loss)  # type: ignore[arg-type]
            what = "norm of the gradient" if math.isfinite(loss) else "loss"
            value = float(norm) if math.isfinite(loss) else loss
            raise self._failure(f"the {what} of step {self.state.global_step + 1} is {value}")
        return norm

    def _failure(self, what: str) -> TrainingError:
        last = last_checkpoint(Path(self.args.output_dir))
        if last is None:
            return TrainingError(f"{what}; no checkpoint was written before it (--save-steps N). Try a lower --lr")
        return TrainingError(f"{what}; the last good checkpoint is {last}: start from it with --model {last} and a lower --lr")

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint aside; one process seals it and moves it into place when all have written their part."""
        folder, step = Path(self.args.output_dir), self.state.global_step
        first = self.is_world_process_zero()
        try:
            staging = Path(broadcast_object_list([str(new_staging(folder)) if first else ""])[0])
            self._staging = staging
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if first:
                written = staging / f"checkpoint-{step}"
                (written / LOSSES).write_text(self.history.to_jsonl(), encoding="utf-8")
                publish(written, folder, self._settings)
                shutil.rmtree(staging)
        except Exception as error:  # safetensors and torch report a full disk each as an error type of its own
            if self._staging is not None:
                shutil.rmtree(self._staging, ignore_errors=True)
            last = last_checkpoint(folder)
            kept = "" if last is None else f"; {last} before it is whole: go on from it with --resume"
            reason = f"{_first_line(error)} ({shutil.disk_usage(folder).free / 2**20:.0f} MB are free there)"
            raise CheckpointError(f"cannot write the checkpoint of step {step} to {folder}: {reason}{kept}") from error
        finally:
            self._staging = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Writes the model inside the module, as an ordinary transformers or peft checkpoint, and no pickled arguments."""
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        write_model(self.accelerator.unwrap_model(self.model).model, Path(folder))
        self.tokenizer_to_save.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        inner: Any = self.accelerator.unwrap_model(model or self.model).model
        super()._load_from_checkpoint(resume_from_checkpoint, model=inner)
        self.history = LossHistory.from_jsonl(Path(resume_from_checkpoint) / LOSSES)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Nothing: the seal vouches for the weights, and tied ones, stored once, would be reported as missing."""

    # What Trainer pickled it reads with weights_only: a pickle that would run code is refused.

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(f"the optimizer's state in {checkpoint}"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(f"the random state in {checkpoint}"):
            super()._load_rng_state(checkpoint)


@contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"cannot read {what}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class _StepCallback(TrainerCallback):  # type: ignore[misc]
    def __init__(self, trainer: RecipeTrainer, eval_steps: int) -> None:
        self._trainer = trainer
        self._eval_steps = eval_steps
        self._learning_rate = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.started = time.perf_counter()
        state.save_steps = args.save_steps  # a checkpoint brings those of the run that wrote it

    def on_optimizer_step(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any) -> None:
        self._learning_rate = float(lr_scheduler.get_last_lr()[0])  # on_step_end comes after the scheduler has moved on

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._trainer.finish_step(self._learning_rate):
            control.should_save = control.should_training_stop = True
        last = state.global_step >= state.max_steps
        control.should_evaluate = self._eval_steps > 0 and (last or state.global_step % self._eval_steps == 0)


def make_trainer(
    module: RecipeModule,
    tokenizer: Any,
    data: EncodedData,
    held_out: EncodedData | None,
    config: FinetuneConfig,
    settings: Mapping[str, Any],
    on_step: Callable[[StepReport], None],
    interruption: Interruption,
    device: torch.device,
    autocast: bool,
) -> RecipeTrainer:
    """A Trainer for `settings["steps"]` optimizer steps over encoded rows, batches of similar length.

    Raises ConfigError when a `--report-to` is unknown or its package is not installed.
    """
    steps = int(settings["steps"])
    arguments = TrainingArguments(
        output_dir=str(checkpoints_folder(config.output)),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup * steps),
        weight_decay=config.weight_decay,
        adam_beta1=_BETAS[0],
        adam_beta2=_BETAS[1],
        max_grad_norm=1.0,
        seed=config.seed,
        bf16=autocast,
        use_cpu=device.type == "cpu",
        num_train_epochs=1,  # RunOrder makes one epoch of all passes
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # a layer without rows and an exit that is off leave no parameter unused
        dataloader_pin_memory=device.type == "cuda",
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        accelerator_config={"dispatch_batches": False},  # of a stream each rank reads its share: rows differ in length
        logging_strategy="steps" if config.report_to else "no",
        logging_steps=1,
        report_to=[name.strip() for name in config.report_to.split(",") if name.strip()],
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else torch's DataParallel, which knows nothing of the order; torchrun starts a process for each
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    try:
        return RecipeTrainer(
            module,
            tokenizer,
            settings,
            on_step,
            interruption,
            eval_steps=0 if held_out is None else config.eval_steps or max(1, steps // _VALIDATIONS),
            args=arguments,
            train_dataset=data.rows,
            eval_dataset=None if held_out is None else held_out.rows,
            data_collator=Collator(pad or 0),
        )
    except (RuntimeError, ValueError) as error:
        if not config.report_to:
            raise
        raise ConfigError(f"--report-to {config.report_to}: {error}") from error
