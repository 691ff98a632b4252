"""finetune from start to end: plan, train, save."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

from ..checkpoint import (
    CheckpointInfo,
    LoadedModel,
    load_blank,
    load_checkpoint,
    pick_device,
    pick_dtype,
    quiet_transformers,
    refuse_overwrite,
    save_checkpoint,
    stored_dtype,
)
from ..config import FinetuneConfig
from ..data import PARSING_TEMPLATE, EncodedData, encode_examples, is_parsing, load_examples
from ..errors import ConfigError, TrainingInterrupted
from .checkpoints import ResumePoint, checkpoints_folder, discard_after, has_checkpoints, last_checkpoint, newest_whole
from .interruption import Interruption
from .loss_plot import loss_plot
from .module import RecipeModule
from .plan import COMMANDS_STEPS, TrainingPlan, make_plan, rows_per_step, run_settings
from .presets import learning_rate
from .progress import LossHistory, StepReport
from .trainer import RecipeTrainer, make_trainer
from .vocabulary import train_tokenizer


@dataclass
class FinetuneJob:
    """A planned run: `plan` says what it will do, `run` does it."""

    config: FinetuneConfig
    loaded: LoadedModel
    data: EncodedData
    template: str | None
    plan: TrainingPlan
    save_dtype: torch.dtype
    autocast: bool
    resume: ResumePoint | None = None

    @quiet_transformers()
    def run(self, on_step: Callable[[StepReport], None]) -> CheckpointInfo:
        """Trains, then writes the checkpoint to `config.output`; the last losses per exit are in the info it returns.

        Raises:
            CheckpointError: a checkpoint cannot be read or written.
            TrainingError: the loss is not finite, or explodes.
            TrainingInterrupted: by Ctrl-C or SIGTERM; the run was saved and can be resumed.
        """
        config = self.config
        scratch = config.regime == "scratch"
        model = _with_lora(self.loaded.model, config) if config.lora_rank else self.loaded.model
        module = RecipeModule(model, config.recipe, config.seed, scratch, config.gradient_checkpointing)
        with Interruption() as interruption:
            trainer = make_trainer(
                module,
                self.loaded.tokenizer,
                self.data,
                config,
                run_settings(config, self.plan),
                on_step,
                interruption,
                torch.device(self.plan.device),
                self.autocast,
            )
            self._train(trainer, interruption)
            trained = model.merge_and_unload() if config.lora_rank and not config.lora_keep else model
            info = CheckpointInfo(prompt_template=self.template, details=self._details(trainer.history))
            if trainer.is_world_process_zero():
                files = {"losses.jsonl": trainer.history.to_jsonl().encode(), "losses.png": loss_plot(trainer.history)}
                save_checkpoint(trained, self.loaded.tokenizer, info, config.output, self.save_dtype, files)
        return info

    def _train(self, trainer: RecipeTrainer, interruption: Interruption) -> None:
        """Trains to the end, or raises what stopped it."""
        folder = checkpoints_folder(self.config.output)
        if trainer.is_world_process_zero():
            # What an earlier run left there must never be what a later --resume finds.
            if self.resume is None:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                discard_after(folder, self.resume.step)
        trainer.train(resume_from_checkpoint=None if self.resume is None else str(self.resume.folder))
        step = trainer.state.global_step
        if step < self.plan.steps:
            raise TrainingInterrupted(
                f"interrupted after step {step} of {self.plan.steps}; saved {last_checkpoint(folder)}",
                interruption.signal or 0,
                step,
            )

    def _details(self, history: LossHistory) -> dict[str, Any]:
        return {
            "base_model": self.config.model,
            "config": asdict(self.config),
            "steps": self.plan.steps,
            "rows": self.plan.rows,
            "final_losses": {str(layer): loss for layer, loss in history.latest.items()},
            "versions": {name: version(name) for name in ("layerskip", "torch", "transformers")},
        }


def prepare(config: FinetuneConfig) -> FinetuneJob:
    """Loads model and data and plans the run; nothing is written.

    Raises LayerSkipError for whatever would make the run fail.
    """
    refuse_overwrite(config.output, config.overwrite)
    resume = _resume_point(config)
    device = pick_device(config.device)
    loaded, data, template = _model_and_data(config)
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    if config.lr is None:
        config = replace(config, lr=learning_rate(config.regime, parameters))
    autocast = pick_dtype(config.dtype, device, parameters) == torch.bfloat16
    plan = make_plan(config, loaded, data, str(device), autocast)
    if resume is not None:
        _require_same_run(resume.settings, run_settings(config, plan))
        notes = (*(f"{fault}; it is not used" for fault in resume.damaged), f"going on from {resume.folder}")
        plan = replace(plan, resumed_step=resume.step, notes=notes)
    return FinetuneJob(config, loaded, data, template, plan, stored_dtype(config.model), autocast, resume)


def _model_and_data(config: FinetuneConfig) -> tuple[LoadedModel, EncodedData, str | None]:
    wanted = config.data
    if wanted.name == "commands" and not wanted.limit:
        # The generator has no end: a run draws as many rows as it will see, so that none repeats.
        wanted = replace(wanted, limit=(config.steps or COMMANDS_STEPS) * rows_per_step(config))
    examples = load_examples(wanted)
    if config.regime == "scratch":
        tokenizer = None if config.vocab_size is None else train_tokenizer(examples, config.vocab_size)
        loaded = load_blank(config.model, config.seed, tokenizer, config.trust_remote_code)
    else:
        loaded = load_checkpoint(config.model, "cpu", "fp32", config.trust_remote_code)
    template = _template(config, loaded)
    if config.max_length > loaded.depth.max_positions:
        raise ConfigError(
            f"--max-length must be at most the model's context of {loaded.depth.max_positions} tokens, got {config.max_length}"
        )
    return loaded, encode_examples(examples, loaded.tokenizer, template, config.max_length), template


def _template(config: FinetuneConfig, loaded: LoadedModel) -> str | None:
    """The flag, else the parsing template for parsing data, else the checkpoint's own, else the prompt and a line end."""
    if config.prompt_template is not None:
        return config.prompt_template
    if is_parsing(config.data):
        return PARSING_TEMPLATE
    return loaded.prompt_template or PARSING_TEMPLATE


def _with_lora(model: Any, config: FinetuneConfig) -> Any:
    """Adapters on the linear layers that --lora-targets names; `all-linear` is all but the head."""
    from peft import LoraConfig, get_peft_model

    rank, targets = config.lora_rank, [name.strip() for name in config.lora_targets.split(",")]
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.model,
    )
    torch.manual_seed(config.seed)
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise ConfigError(f"--lora-targets {config.lora_targets}: {str(error).splitlines()[0]}") from error


def _resume_point(config: FinetuneConfig) -> ResumePoint | None:
    """Where --resume goes on; without it there must be no run to lose."""
    folder = checkpoints_folder(config.output)
    if config.resume:
        return newest_whole(folder)
    if has_checkpoints(folder) and not config.overwrite:
        raise ConfigError(
            f"--output {config.output} holds an unfinished run; give --resume to go on, or --overwrite to start anew"
        )
    return None


def _require_same_run(sealed: dict[str, Any], settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if sealed.get(name) != value:
            raise ConfigError(
                f"--resume: {name} was {sealed.get(name)} in the run to go on with, and is {value} now; a run is resumed with "
                "the same settings on the same data"
            )
