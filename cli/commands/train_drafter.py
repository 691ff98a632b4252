"""Train what drafts for a model that stays as it is."""

from layerskip_core.config.training import DrafterConfig

from ..options import command
from .finetune import ConfigFile, DryRun, TrainingThreads, run_training


@command
def train_drafter(
    settings: DrafterConfig, dry_run: DryRun = False, threads: TrainingThreads = 0, config: ConfigFile = None
) -> None:
    """Train what drafts for a model, which stays as it is, byte for byte: in minutes, on its own answers.

    By default a drafter in the EAGLE-3 layout, which vLLM, SGLang and llama.cpp read too; with --exits a block at each exit;
    with --start-from shipped the checkpoint's own, on.

    Example: layerskip train-drafter --model my-model --output my-model --data rows.jsonl
    """
    run_training(settings, dry_run, threads)
