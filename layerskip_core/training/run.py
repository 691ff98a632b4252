"""Training: `prepare` loads and plans a run, and writes nothing; the job that it returns trains, and saves the result.

Its settings say what is trained (trained.py): a model, or what drafts for one that stays as it is.
"""

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint.folder import quiet_transformers
from ..checkpoint.info import CheckpointInfo
from ..checkpoint.loaded import pick_device
from ..checkpoint.locate import EMBEDDED
from ..checkpoint.open import for_decoding
from ..checkpoint.save import claim_repository, push
from ..config.training import DrafterConfig, TrainingConfig
from ..errors import CheckpointError, ConfigError, LayerSkipError, TrainingInterrupted, first_line, require
from ..files import hold, run_staging
from ..interruption import Interruption
from .progress import LossHistory, StepReport, checkpoints_folder, discard_after, newest_first, resume_point
from .sharding import process_index, resolve_sharding
from .trained import FrozenModel, WholeModel
from .trainer import RunTrainer, trackers, training_arguments

_MMAP_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -4, -3, -1  # of glibc's mallopt


@dataclass(frozen=True)
class Verdict:
    """`accepted`: the share of its first drafts that are right on held-out rows. `speed`: about what decoding with the best
    number of `drafts` gains over plain decoding.
    """

    name: str
    accepted: float
    drafts: int
    speed: float


@dataclass(frozen=True)
class Job:
    """A planned run, made by `prepare`: `plan` says what it will do, `run` does it."""

    plan: WholeModel | FrozenModel

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
        plan, resume, repository = self.plan, self.plan.resume, self.plan.config.push_to_hub
        if repository is not None and process_index() == 0:
            claim_repository(repository)
        with run_lock(plan.config.output), Interruption() as interruption, quiet_transformers(), _kept_memory():

            def progress(stage: str, total: int, done: int) -> None:
                if interruption.signal is not None:
                    kept = f"interrupted after {done} of {total} {stage}, which are kept"
                    raise TrainingInterrupted(kept, interruption.signal, 0)
                on_progress(stage, done, total)

            history = LossHistory() if resume is None else LossHistory.read(resume.folder)
            trainer = RunTrainer(plan, *plan.data_sets(progress), history, on_step, interruption)
            self._train(trainer, interruption)
            info = plan.save(history)
            if process_index() == 0:
                discard_after(checkpoints_folder(plan.config.output), 0)
                if repository is not None:
                    push(plan.config.output, repository)
        return info

    def verdicts(self, info: CheckpointInfo) -> list[Verdict]:
        """What the exits or the drafter of the saved model give, by passes that are timed on this machine; lowest exits first.

        Of what was not measured on held-out rows there is none. Other processes of torchrun than the first have none.
        """
        config, module, measured = self.plan.config, self.plan.module, info.agreement
        known = {exit_layer: measured[name] for exit_layer, name in module.names.items() if name in measured}
        if not known or process_index() > 0:
            return []
        backend, found = for_decoding(config.output, self.plan.device, config.dtype).backend, []
        for exit_layer, share in known.items():
            speed, drafts = module.worth(backend, exit_layer, (share,)).speeds[share]
            found.append(Verdict(f"exit {exit_layer}" if exit_layer else "the drafter", share, drafts, speed))
        return found

    def _train(self, trainer: RunTrainer, interruption: Interruption) -> None:
        """Trains to the end, or raises what stopped it."""
        folder, resume, steps = checkpoints_folder(self.plan.config.output), self.plan.resume, self.plan.total_steps
        if process_index() == 0:
            # What an earlier run left there must never be what a later `resume` finds.
            discard_after(folder, 0 if resume is None else resume.step)
        try:
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume.folder))
            trainer.accelerator.wait_for_everyone()  # each looks into the staging folder at its end
        except LayerSkipError:
            raise
        except Exception as error:  # safetensors, torch and pickle raise many kinds for a full disk or a bad file
            raise _explained(error, trainer) from error
        finally:
            if process_index() == 0:
                shutil.rmtree(run_staging(folder), ignore_errors=True)
                with suppress(OSError):
                    folder.rmdir()  # Trainer makes it even for a run that writes no checkpoints
        step = trainer.state.global_step
        if step < steps:
            saved = f"interrupted after step {step} of {steps}; saved {newest_first(folder)[0]}"
            raise TrainingInterrupted(saved, interruption.signal or 0, step)


def prepare(config: TrainingConfig) -> Job:
    """The job that `config` asks for. Raises LayerSkipError for whatever would make the run fail."""
    require(config.output not in EMBEDDED, "output", "a name that no embedded model has", config.output)
    device = own_device(pick_device(config.device))
    trackers(config.report_to)
    resume = resume_point(config)
    plan: WholeModel | FrozenModel
    if isinstance(config, DrafterConfig):
        plan = FrozenModel(config, device, resume)
    else:
        plan = WholeModel(resolve_sharding(config, device), device, resume)
    if config.training_arguments:
        training_arguments(plan)
    return Job(plan)


def run_lock(output: str) -> AbstractContextManager[None]:
    """The lock of `output`, which a run holds from its plan to its end; under torchrun the first process holds it for all."""
    return hold(output, "a training") if process_index() == 0 else nullcontext()


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
    library: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(library, "mallopt", lambda option, value: 0)
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:  # the default, and the highest values that glibc would have come to by itself
        mallopt(_MMAP_MAX, 1 << 16)
        mallopt(_MMAP_THRESHOLD, 1 << 25)
        mallopt(_TRIM_THRESHOLD, 1 << 26)


def _explained(error: Exception, trainer: RunTrainer) -> Exception:
    """An error of the libraries as one for the user, if it came while a checkpoint was read or written."""
    folder, resume = trainer.checkpoints, trainer.plan.resume
    if trainer.phase == "loading" and resume is not None:
        return CheckpointError(f"cannot resume from {resume.folder}: {first_line(error)}")
    if trainer.phase != "saving":
        return error
    kept = "".join(f"; {last} before it is whole: go on from it with `resume`" for last in newest_first(folder)[:1])
    free = f"{shutil.disk_usage(folder).free / 2**20:.0f} MB are free there"
    step = trainer.state.global_step
    return CheckpointError(f"cannot write the checkpoint of step {step} to {folder}: {first_line(error)} ({free}){kept}")
