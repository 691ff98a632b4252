"""Training: `prepare` loads and plans a run, and writes nothing; the job that it returns trains, and saves the result.

What is trained (trained.py) is a choice: a whole model, under the recipe or without it, or exit blocks of a frozen one. A model
that is trained without the recipe gets its drafter by a second job, that of `prepare_following`.
"""

import ctypes
import gc
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..checkpoint.folder import quiet_transformers
from ..checkpoint.info import AWAITS_DRAFTER, CheckpointInfo, holds_model, read_info
from ..checkpoint.loaded import pick_device
from ..checkpoint.locate import EMBEDDED
from ..checkpoint.save import settle
from ..config.training import FinetuneConfig
from ..errors import CheckpointError, ConfigError, LayerSkipError, TrainingInterrupted, first_line, require
from ..files import hold, run_staging
from ..interruption import Interruption
from .checkpoints import LOSSES, ResumePoint, checkpoints_folder, discard_after, newest_first, newest_whole, require_own
from .plan import Plan
from .progress import LossHistory, StepReport
from .sharding import process_index, resolve_sharding, world_size
from .trained import FrozenModel, WholeModel
from .trainer import RunTrainer, trackers

_MMAP_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -4, -3, -1  # of glibc's mallopt


@dataclass(frozen=True)
class Job:
    """A planned run, made by `prepare`: `plan` says what it will do, `run` does it."""

    trained: WholeModel | FrozenModel
    resume: ResumePoint | None = None

    @property
    def plan(self) -> Plan:
        return self.trained.plan

    def run(
        self, on_step: Callable[[StepReport], None], on_progress: Callable[[str, int, int], None] = lambda *_: None
    ) -> CheckpointInfo:
        """Train to the end and write the result to the config's `output`.

        Args:
            on_step: called after each optimizer step; an exception of it ends the run.
            on_progress: called with a stage before the training, such as "answers", and how many of how many are done.

        Returns:
            The info of the saved model, with the last losses of every exit, or how each block was trained.

        Raises:
            CheckpointError: a checkpoint cannot be read or written.
            TrainingError: the loss is not finite, or explodes.
            TrainingInterrupted: by Ctrl-C or SIGTERM; the run was saved and can be resumed.
            LockedError: another process writes to the folder.
        """
        plan, trained = self.plan, self.trained
        with run_lock(plan.config.output), Interruption() as interruption, quiet_transformers(), _kept_memory():

            def progress(stage: str, total: int, done: int) -> None:
                if interruption.signal is not None:
                    kept = f"interrupted after {done} of {total} {stage}, which are kept"
                    raise TrainingInterrupted(kept, interruption.signal, 0)
                on_progress(stage, done, total)

            history = LossHistory() if self.resume is None else LossHistory.read(self.resume.folder / LOSSES)
            trainer = RunTrainer(trained.module, plan, *trained.rows(progress), history, on_step, interruption)
            self._train(trainer, interruption)
            first = trainer.is_world_process_zero()
            info, faults = trained.save(history, first)
            if first:
                discard_after(checkpoints_folder(plan.config.output), 0)
            if interruption.signal is not None and plan.following is not None:
                waits = f"interrupted before the drafter is trained; saved {plan.config.output}"
                raise TrainingInterrupted(waits, interruption.signal, plan.total_steps)
        for fault in faults:
            warnings.warn(fault, stacklevel=2)
        return info

    def _train(self, trainer: RunTrainer, interruption: Interruption) -> None:
        """Trains to the end, or raises what stopped it."""
        folder, resume, steps = checkpoints_folder(self.plan.config.output), self.resume, self.plan.total_steps
        if trainer.is_world_process_zero():
            # What an earlier run left there must never be what a later `resume` finds.
            discard_after(folder, 0 if resume is None else resume.step)
        try:
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume.folder))
            trainer.accelerator.wait_for_everyone()  # each looks into the staging folder at its end
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
            saved = f"interrupted after step {step} of {steps}; saved {newest_first(folder)[0]}"
            raise TrainingInterrupted(saved, interruption.signal or 0, step)


def prepare(config: FinetuneConfig) -> Job:
    """The job that `config` asks for. Raises LayerSkipError for whatever would make the run fail."""
    require(config.output not in EMBEDDED, "output", "a name that no embedded model has", config.output)
    device = own_device(pick_device(config.device))
    trackers(config.report_to)
    config = resolve_sharding(_not_done(config), device)
    resume = _resume_point(config)
    return Job((FrozenModel if config.exit_blocks.frozen else WholeModel)(config, device, resume), resume)


def prepare_following(plan: Plan) -> Job | None:
    """The job that comes after one that has run by a plan, in the same folder. Raises as `prepare` does.

    Nothing should refer to the job that has run: it keeps its model in memory.
    """
    gc.collect()  # Trainer and its callbacks refer to each other, and to the model and the optimizer's moments
    return None if plan.following is None else prepare(_anew(plan.following))


def _not_done(config: FinetuneConfig) -> FinetuneConfig:
    """The run of the two that `resume` goes on with. Without it, raises ConfigError for a model that waits for its drafter."""
    settle(config.output)
    waits, drafter = AWAITS_DRAFTER in read_info(config.output).details, config.drafter
    if not waits or drafter is None or world_size() > 1:
        return config
    if not config.resume:
        if config.overwrite:
            return config
        raise ConfigError(
            f"`output` {config.output} has a model that waits for its drafter; give `resume` to go on, or `overwrite` to start "
            "anew"
        )
    folder = checkpoints_folder(config.output)
    there = newest_whole(folder) if newest_first(folder) else None
    if there is None or there.settings["frozen"]:
        return drafter
    has_ended = there.step == there.settings["steps"]  # and was killed before it removed its checkpoints
    return _anew(drafter) if has_ended and not config.overwrite else config


def _anew(drafter: FinetuneConfig) -> FinetuneConfig:
    """Its run from the beginning."""
    return replace(drafter, resume=False, overwrite=True)


def run_lock(output: str) -> AbstractContextManager[None]:
    """The lock of `output`, which a run holds from its plan to its end; under torchrun the first process holds it for all."""
    return hold(output, "layerskip finetune") if process_index() == 0 else nullcontext()


def own_device(device: torch.device) -> torch.device:
    """The device without its number. `cuda` becomes the GPU of this process, one of torchrun's.

    Raises ConfigError if there is none for it, and for devices that Trainer would silently replace by others.
    """
    if device.index:
        raise ConfigError(
            f"`device` {device}: training takes the first GPU that it sees; set CUDA_VISIBLE_DEVICES={device.index} in the "
            "environment and give `device` cuda"
        )
    if device.type == "cuda":
        number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        require(number < gpus, "device", f"cuda with at least {number + 1} GPUs here, one per process of torchrun", gpus)
        torch.cuda.set_device(number)
    return torch.device(device.type)


@contextmanager
def _kept_memory() -> Iterator[None]:
    """glibc keeps the memory that a step frees for the next one.

    Else it returns large blocks to the kernel, which clears every page of the next ones: 5 to 10% of a step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:  # the default, and the highest values that glibc would have come to by itself
        mallopt(_MMAP_MAX, 1 << 16)
        mallopt(_MMAP_THRESHOLD, 1 << 25)
        mallopt(_TRIM_THRESHOLD, 1 << 26)


def _resume_point(config: FinetuneConfig) -> ResumePoint | None:
    """The checkpoint that `resume` goes on from; None where a run has left only texts, which are found without one.

    Without `resume`, raises ConfigError if there is a run to lose.
    """
    folder = checkpoints_folder(config.output)
    require_own(folder)
    there = newest_first(folder)
    if config.resume:
        texts = config.exit_blocks.frozen or (config.retention.replay and any(folder.glob("replay-*.jsonl")))
        return None if texts and not there else newest_whole(folder)
    if there and not config.overwrite:
        replaces = holds_model(config.output) and not config.in_place
        held, again = ("a model and an", "`resume` with `overwrite`") if replaces else ("an", "`resume`")
        raise ConfigError(
            f"`output` {config.output} holds {held} unfinished run; give {again} to go on, or `overwrite` alone to start anew"
        )
    return None


def _explained(error: Exception, trainer: RunTrainer, folder: Path, resume: ResumePoint | None) -> Exception:
    """An error of the libraries as one for the user, if it came while a checkpoint was read or written."""
    if trainer.phase == "loading" and resume is not None:
        return CheckpointError(f"cannot resume from {resume.folder}: {first_line(error)}")
    if trainer.phase != "saving":
        return error
    kept = "".join(f"; {last} before it is whole: go on from it with `resume`" for last in newest_first(folder)[:1])
    free = f"{shutil.disk_usage(folder).free / 2**20:.0f} MB are free there"
    step = trainer.state.global_step
    return CheckpointError(f"cannot write the checkpoint of step {step} to {folder}: {first_line(error)} ({free}){kept}")
