"""Training: `prepare` loads and plans a run, and writes nothing; the plan that it returns trains, and saves the result."""

import os

import torch

from ..checkpoint.loaded import pick_device
from ..checkpoint.locate import EMBEDDED
from ..config.training import DrafterConfig, TrainingConfig
from ..errors import ConfigError, require
from .progress import resume_point
from .sharding import resolve_sharding
from .trained import FrozenModel, WholeModel
from .trainer import trackers, training_arguments


def prepare(config: TrainingConfig) -> WholeModel | FrozenModel:
    """The run that `config` asks for. Raises LayerSkipError for whatever would make it fail."""
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
    return plan


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
