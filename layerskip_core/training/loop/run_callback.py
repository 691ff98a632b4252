"""What happens around the steps of a run: clipping, reports, validation, stopping after a signal, sealing checkpoints."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from ...errors import TrainingError
from ...files import run_staging
from ...interruption import Interruption
from ..progress import LossHistory, RunState, StepLosses, StepReport, StepSums, agreement_in, step_log, validation_in
from .checkpoints import LOSSES, last_checkpoint, publish

_MAX_NORM = 1.0  # of the gradient
_EXPLODED = 2.0  # times the loss of knowing nothing, ln V, and times the run's first loss


class RunCallback(TrainerCallback):  # type: ignore[misc]
    """Reports every step. Raises TrainingError for a gradient that is not finite, before the optimizer applies it, and for a
    loss that explodes.
    """

    def __init__(
        self,
        trainer: Trainer,
        run: RunState,
        on_step: Callable[[StepReport], None],
        interruption: Interruption,
        eval_steps: int,
        checkpoints: Path,
        settings: Mapping[str, Any],
    ) -> None:
        """`eval_steps`: steps between validations, 0 for none. `settings` are sealed into each checkpoint in `checkpoints`."""
        self._trainer = trainer
        self._run = run
        self._on_step = on_step
        self._interruption = interruption
        self._eval_steps = eval_steps
        self._checkpoints = checkpoints
        self._settings = settings
        self._history = LossHistory()
        self._learning_rate = 0.0
        self._grad_norm = 0.0
        self._started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._history = LossHistory.of_log(state.log_history)
        state.save_steps = args.save_steps  # a checkpoint brings those of the run that wrote it
        # From now on Trainer writes checkpoints into a staging folder; on_save moves them. Trackers have already set up their
        # files in the run's own folder, because this callback is the last one.
        args.output_dir = str(run_staging(self._checkpoints))
        self._started = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._run.phase = "training"

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Clips the gradient in place of Trainer (`max_grad_norm` is 0), which does not show its norm to callbacks in time."""
        norm = self._trainer.accelerator.clip_grad_norm_(model.parameters(), _MAX_NORM)
        self._grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not math.isfinite(self._grad_norm):
            loss = float(self._run.sums.loss)
            what = "norm of the gradient" if math.isfinite(loss) else "loss"
            value = self._grad_norm if math.isfinite(loss) else loss
            raise self._failure(f"the {what} of step {state.global_step + 1} is {value}")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any) -> None:
        self._learning_rate = float(lr_scheduler.get_last_lr()[0])  # on_step_end comes after the scheduler has moved on

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        sums, self._run.sums = self._run.sums, StepSums()
        losses, tokens, stops = self._reduced(sums, state.global_step)
        self._require_sane(losses)
        self._history.add(losses)
        self._trainer.log(step_log(losses, self._learning_rate, self._grad_norm))
        now = time.perf_counter()
        elapsed, self._started = now - self._started, now
        self._on_step(
            StepReport(
                step=losses.step,
                total_steps=state.max_steps,
                loss=losses.loss,
                final_loss=losses.final,
                exit_losses=self._history.latest,
                learning_rate=self._learning_rate,
                tokens_per_second=tokens / elapsed,
                validation_losses=self._history.validated,
                agreement=self._history.agreement,
                divergence=losses.divergence,
            )
        )
        last = state.global_step >= state.max_steps
        if stops and not last:
            control.should_save = control.should_training_stop = True
        control.should_evaluate = self._eval_steps > 0 and (last or state.global_step % self._eval_steps == 0)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **_: Any) -> None:
        self._history.validate(validation_in(metrics), agreement_in(metrics))
        self._started = time.perf_counter()  # validation does not count in the speed of the next step

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One process seals the checkpoint and moves it into place, when all have written their part."""
        self._trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (written / LOSSES).write_text(self._history.to_jsonl(), encoding="utf-8")
            publish(written, self._checkpoints, self._settings)
        self._run.phase = "training"
        self._started = time.perf_counter()

    def _reduced(self, sums: StepSums, step: int) -> tuple[StepLosses, float, bool]:
        """The losses and tokens of a step over all processes, and whether a signal asks any of them to stop."""
        signalled = float(self._interruption.signal is not None)
        counts = torch.stack([torch.as_tensor(count, device=sums.loss.device) for count in (sums.tokens, signalled)])
        apart = torch.zeros_like(sums.loss) if sums.divergence is None else sums.divergence
        values = torch.cat([torch.stack([sums.loss, apart]), sums.per_exit, counts])
        loss, divergence, *per_exit, tokens, stops = self._trainer.accelerator.reduce(values, reduction="sum").tolist()
        targets = float(sums.targets)
        exits = {layer: part / targets for layer, part in zip(sums.exit_layers, per_exit, strict=True)}
        anchored = None if sums.divergence is None else divergence / targets
        return StepLosses(step, loss / targets, exits, divergence=anchored), tokens, bool(stops)

    def _require_sane(self, losses: StepLosses) -> None:
        """Raises TrainingError when the last layer's loss is above what any start explains."""
        first = (self._history.steps or [losses])[0].final
        limit = _EXPLODED * max(math.log(self._trainer.model.vocab_size), first)
        if not losses.final <= limit:  # NaN is not either
            raise self._failure(
                f"the loss exploded at step {losses.step}: {losses.final:.1f} in the last layer, first {first:.1f}"
            )

    def _failure(self, what: str) -> TrainingError:
        last = last_checkpoint(self._checkpoints)
        if last is None:
            return TrainingError(f"{what}; no checkpoint was written before it (`save_steps` N). Try a lower `lr`")
        again = "" if self._trainer.is_fsdp_enabled else f": start from it with `model` {last} and a lower `lr`"
        return TrainingError(f"{what}; the last good checkpoint is {last}{again}")
