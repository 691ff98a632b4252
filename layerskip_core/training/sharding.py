"""The processes that torchrun started, and FSDP2 over them: a file per process in each checkpoint,
a whole model at the end.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..config.training import FinetuneConfig
from ..errors import require
from ..model.weights import copy_into

_SHARD = "shard-{}.pt"


def world_size() -> int:
    """The processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_index() -> int:
    """The rank of this process."""
    return int(os.environ.get("RANK", "0"))


def check_sharding(config: FinetuneConfig, device: torch.device) -> None:
    """Raises ConfigError for `fsdp` with one process or without CUDA or CPU, and for FSDP by
    `accelerate launch`.
    """
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower()
    require(launched == "false", "accelerate's use_fsdp", "false; give `fsdp` instead", launched)
    if config.fsdp:
        processes = world_size()
        require(
            processes > 1,
            "fsdp",
            "used under torchrun with at least 2 processes (--nproc-per-node)",
            processes,
        )
        require(
            device.type in ("cuda", "cpu"), "fsdp", "used on GPUs (`device` cuda) or on cpu", device
        )


def use_fsdp(accelerator: Any, layers: Iterable[nn.Module]) -> None:
    """Makes an Accelerator shard modules from now on, each of the `layers` alone, the rest as one
    unit.

    Gradients are summed in fp32. accelerate accepts the plugin only on GPUs and silently runs DDP
    on a CPU; set on its state, the plugin works on both.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    compute = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        transformer_cls_names_to_wrap=list(dict.fromkeys(type(layer).__name__ for layer in layers)),
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=torch.float32
        ),
        state_dict_type="SHARDED_STATE_DICT",
        cpu_offload=False,
        activation_checkpointing=False,
        cpu_ram_efficient_loading=False,
    )
    accelerator.state.distributed_type = DistributedType.FSDP


def write_shard(
    module: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, folder: Path
) -> None:
    """Writes this process's shards of trained weights and optimizer. (torch.distributed.checkpoint
    would unpickle.)
    """
    reshard(module)
    folder.mkdir(parents=True, exist_ok=True)
    states = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save(
        {"weights": dict(_trained(module)), **states}, folder / _SHARD.format(process_index())
    )


def read_shard(
    module: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, folder: Path
) -> None:
    """Loads what `write_shard` wrote, in a run of as many processes."""
    stored = torch.load(folder / _SHARD.format(process_index()), weights_only=True)
    copy_into(dict(_trained(module)), stored["weights"])
    optimizer.load_state_dict(stored["optimizer"])
    scheduler.load_state_dict(stored["scheduler"])


def gather_whole(module: nn.Module, keep: bool) -> None:
    """Replaces shards by whole weights on the CPU (`keep`) or by empty ones. Ends a training; all
    processes call it.
    """
    reshard(module)
    gathered: dict[Tensor, nn.Parameter] = {}
    for owner in list(module.modules()):
        if isinstance(owner, FSDPModule):
            # torch's fully_shard has derived a class from FSDPModule and the module's own
            owner.__class__ = type(owner).__bases__[1]
            owner._forward_pre_hooks.clear()  # these hooks gather weights
            owner._forward_hooks.clear()
        for name, weight in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if not isinstance(weight, DTensor):
                continue
            if weight not in gathered:
                whole = weight.full_tensor().detach()
                gathered[weight] = nn.Parameter(
                    whole.cpu() if keep else torch.empty(0), requires_grad=False
                )
            setattr(owner, name, gathered[weight])
    module.cpu()  # its buffers, too


def reshard(module: nn.Module) -> None:
    """Frees whole weights left by a forward without a backward; parameters are shards again."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in module.named_parameters() if weight.requires_grad)
