"""Train a drafter for a model that stays as it is."""

from layerskip_core.config.training import DrafterConfig

from ..options import command
from ..training import ConfigFile, DryRun, TrainingThreads, run_training


@command
def train_drafter(
    settings: DrafterConfig,
    dry_run: DryRun = False,
    threads: TrainingThreads = 0,
    config: ConfigFile = None,
) -> None:
    """Train a drafter for a model, in minutes, on the model's own answers. The model stays as it
    is, byte for byte.

    By default the drafter has the EAGLE-3 layout, which vLLM, SGLang and llama.cpp also read.
    --exits trains a block at each exit instead; --start-from shipped continues the checkpoint's own
    drafter.

    Example: layerskip train-drafter --model my-model --output my-model --data rows.jsonl
    """
    run_training(settings, dry_run, threads)
