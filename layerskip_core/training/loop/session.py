"""A training loop from its first step, or from a checkpoint, to its last."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from ...checkpoint.save import output_lock
from ...errors import CheckpointError, LayerSkipError, TrainingInterrupted, first_line
from ...files import run_staging
from ...interruption import Interruption
from ..progress import StageProgress
from ..rows.step_rows import process_index
from .checkpoints import ResumePoint, checkpoints_folder, discard_after, last_checkpoint
from .trainer import RunTrainer


def train_to_end(trainer: RunTrainer, output: str, steps: int, resume: ResumePoint | None, interruption: Interruption) -> None:
    """Trains to the end, or raises what stopped it: see `FinetuneJob.run`."""
    folder = checkpoints_folder(output)
    if trainer.is_world_process_zero():
        # What an earlier run left there must never be what a later `resume` finds.
        discard_after(folder, 0 if resume is None else resume.step)
    try:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume.folder))
    except LayerSkipError:
        raise
    except Exception as error:  # safetensors, torch and pickle raise many kinds for a full disk or a bad file
        raise _explained(error, trainer, folder, resume) from error
    finally:
        if trainer.is_world_process_zero():
            shutil.rmtree(run_staging(folder), ignore_errors=True)
            with suppress(OSError):
                folder.rmdir()  # Trainer makes it even for a run that writes no checkpoints
    step = trainer.state.global_step
    if step < steps:
        raise TrainingInterrupted(
            f"interrupted after step {step} of {steps}; saved {last_checkpoint(folder)}",
            interruption.signal or 0,
            step,
        )


def stage_reporter(
    stage: str, total: int, on_progress: Callable[[StageProgress], None], interruption: Interruption
) -> Callable[[int], None]:
    """Reports what is done of a stage before the training, and ends the run after a signal."""

    def report(done: int) -> None:
        if interruption.signal is not None:
            kept = f"interrupted after {done} of {total} {stage}, which are kept"
            raise TrainingInterrupted(kept, interruption.signal, 0)
        on_progress(StageProgress(stage, done, total))

    return report


def run_lock(output: str) -> AbstractContextManager[None]:
    """The lock of `output`, which a run holds from its plan to its end; under torchrun the first process holds it for all."""
    return output_lock(output, "layerskip finetune") if process_index() == 0 else nullcontext()


def _explained(error: Exception, trainer: RunTrainer, folder: Path, resume: ResumePoint | None) -> Exception:
    """An error of the libraries as one for the user, if it came while a checkpoint was read or written."""
    if trainer.run.phase == "loading" and resume is not None:
        return CheckpointError(f"cannot resume from {resume.folder}: {first_line(error)}")
    if trainer.run.phase != "saving":
        return error
    last = last_checkpoint(folder)
    kept = "" if last is None else f"; {last} before it is whole: go on from it with `resume`"
    free = f"{shutil.disk_usage(folder).free / 2**20:.0f} MB are free there"
    step = trainer.state.global_step
    return CheckpointError(f"cannot write the checkpoint of step {step} to {folder}: {first_line(error)} ({free}){kept}")
