"""The course of every run of training, from its settings to the saved model.

`prepare` reads the model and the rows and resolves a RunPlan; it writes nothing. `execute` trains
and saves. What a run reads, trains on and saves: finetune_run.py, drafter_run.py.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from ..checkpoint.folder import quiet_transformers
from ..checkpoint.loaded import pick_device
from ..checkpoint.locate import EMBEDDED
from ..config.training import DrafterConfig, TrainingConfig
from ..errors import TrainingInterrupted, require
from ..files import hold
from ..interruption import Interruption
from .drafter_run import DrafterJob, prepare_drafter
from .finetune_run import FinetuneJob, prepare_finetune
from .plan import Job, RunResult
from .progress import StepReport, checkpoints_folder, discard_after, resume_point
from .sharding import check_sharding, process_index

# Options of glibc's mallopt
_MMAP_MAX = -4
_TRIM_THRESHOLD = -1


def prepare(config: TrainingConfig, dry: bool = False) -> FinetuneJob | DrafterJob:
    """Reads the model and the rows of `config`, and plans its run. Writes nothing. Raises
    LayerSkipError for anything that would make the run fail.

    `dry`: the plan of a `finetune` is for reading only, and no weights are loaded.
    """
    require(
        config.output not in EMBEDDED, "output", "a name that no embedded model has", config.output
    )
    device = own_device(pick_device(config.device))
    if config.report_to:
        from .trainer import trackers  # imports transformers' Trainer, which a plan does not need

        trackers(config.report_to)
    checkpoint = resume_point(config)
    job: FinetuneJob | DrafterJob
    if isinstance(config, DrafterConfig):
        job = prepare_drafter(config, device, checkpoint)
    else:
        check_sharding(config, device)
        job = prepare_finetune(config, device, checkpoint, dry)
    if config.training_arguments:
        from .trainer import training_arguments

        training_arguments(job)
    return job


def execute(
    job: Job,
    on_step: Callable[[StepReport], None] = lambda _: None,
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
) -> RunResult:
    """Trains to the end, and writes the result to the config's `output`.

    `on_progress` gets (stage, done, total) of work before the training, such as "answers". Raises
    CheckpointError, TrainingError for a loss that is not finite or explodes, TrainingInterrupted,
    and LockedError; a caller may hold the lock already.
    """
    from .trainer import RunTrainer  # imports transformers' Trainer, which a plan does not need

    config = job.plan.config
    _keep_memory()
    with run_lock(config.output), Interruption() as interruption, quiet_transformers():

        def report(stage: str, done: int, total: int, begun: int = 0) -> None:
            if interruption.signal is not None:
                raise TrainingInterrupted(
                    f"interrupted after {done} of {total} {stage}, which are kept",
                    interruption.signal,
                    0,
                )
            on_progress(stage, done + begun, total)

        baseline = job.measure_before(report)
        rows, held_out = job.data_sets(report)
        history = RunTrainer(job, rows, held_out, on_step, interruption).run()
        result = job.save(history, baseline)
        if process_index() == 0:
            discard_after(checkpoints_folder(config.output), None)
    return result


def run_lock(output: str) -> AbstractContextManager[None]:
    """The lock of `output` for a whole run; under torchrun the first process holds it for all."""
    return hold(output, "a training") if process_index() == 0 else nullcontext()


def own_device(device: torch.device) -> torch.device:
    """The device without its index. For `cuda`, selects the GPU of this process under torchrun."""
    number = int(os.environ.get("LOCAL_RANK", "0"))
    # Trainer uses the first visible GPU
    seen = f"{device.type}, of the GPUs that CUDA_VISIBLE_DEVICES={device.index} leaves"
    require(not device.index, "device", seen, device)
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        needed = f"cuda with at least {number + 1} GPUs here, one per process of torchrun"
        require(number < gpus, "device", needed, gpus)
        torch.cuda.set_device(number)
    return torch.device(device.type)


def _keep_memory() -> None:
    """Makes glibc keep the memory that a step frees: clearing new pages takes 5 to 10% of a step on
    a CPU.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another C library has none
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
