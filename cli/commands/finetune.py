"""Convert a checkpoint by the LayerSkip recipe, or train it without."""

from layerskip_core.config.training import FinetuneConfig

from ..options import command
from ..training import ConfigFile, DryRun, TrainingThreads, run_training


@command
def finetune(
    settings: FinetuneConfig,
    dry_run: DryRun = False,
    threads: TrainingThreads = 0,
    config: ConfigFile = None,
) -> None:
    """Convert a checkpoint by the LayerSkip recipe: layer dropout, and an early-exit loss through
    the shared head.

    --recipe auto trains a few exits, each with a block, and reports at the end how fast they draft
    on this machine and how much quality the training cost. The paper's own recipes are finetune,
    continual, scratch and code; --recipe none is ordinary training. To train a drafter and leave
    the model as it is: layerskip train-drafter.

    Example: layerskip finetune --model HuggingFaceTB/SmolLM2-135M --data rows.jsonl --output
    my-model --save-steps 200
    """
    run_training(settings, dry_run, threads)
