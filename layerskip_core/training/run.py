"""finetune from start to end: plan, train, save."""

import math
import os
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
from ..errors import CheckpointError, ConfigError
from .curriculum import mean_exits, rotation_of
from .dropout import dropout_rates, time_scale
from .module import RecipeModule
from .presets import learning_rate
from .trainer import StepReport, checkpoints_folder, make_trainer
from .vocabulary import train_tokenizer

_COMMANDS_STEPS = 300  # of a run on `commands` without --steps: sized for five minutes on two cores


@dataclass(frozen=True)
class TrainingPlan:
    """What a run is about to do. `cost` is a step's computation as a multiple of one without the recipe; memory in MB."""

    rows: int
    tokens: int
    truncated: int
    steps: int
    parameters: int
    num_layers: int
    rotation: int | None  # R, of the rotational curriculum
    exits_per_step: float
    cost: float
    memory_mb: float
    device: str
    dtype: str


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
    resume_from: str | None = None

    @quiet_transformers()
    def run(self, on_step: Callable[[StepReport], None]) -> CheckpointInfo:
        """Trains, then writes the checkpoint to `config.output`; the last losses per exit are in the info it returns.

        Raises CheckpointError when the checkpoint cannot be written.
        """
        config = self.config
        scratch = config.regime == "scratch"
        model = _with_lora(self.loaded.model, config.lora_rank, config.seed) if config.lora_rank else self.loaded.model
        module = RecipeModule(model, config.recipe, config.seed, from_scratch=scratch)
        last: list[StepReport] = []

        def remember(report: StepReport) -> None:
            last[:] = [report]
            on_step(report)

        device = torch.device(self.plan.device)
        trainer = make_trainer(
            module, self.loaded.tokenizer, self.data, config, self.plan.steps, remember, device, self.autocast
        )
        if self.resume_from is None and trainer.is_world_process_zero():
            # What an earlier run left there must never be what a later --resume finds.
            shutil.rmtree(checkpoints_folder(config.output), ignore_errors=True)
        trainer.train(resume_from_checkpoint=self.resume_from)
        trained = model.merge_and_unload() if config.lora_rank else model
        info = CheckpointInfo(prompt_template=self.template, details=self._details(last[0] if last else None))
        if trainer.is_world_process_zero():
            save_checkpoint(trained, self.loaded.tokenizer, info, config.output, self.save_dtype)
        return info

    def _details(self, last: StepReport | None) -> dict[str, Any]:
        return {
            "base_model": self.config.model,
            "config": asdict(self.config),
            "steps": self.plan.steps,
            "rows": self.plan.rows,
            "final_losses": {} if last is None else {str(layer): loss for layer, loss in last.exit_losses.items()},
            "versions": {name: version(name) for name in ("layerskip", "torch", "transformers")},
        }


def prepare(config: FinetuneConfig) -> FinetuneJob:
    """Loads model and data and plans the run; nothing is written.

    Raises LayerSkipError for whatever would make the run fail.
    """
    refuse_overwrite(config.output, config.overwrite)
    resume_from = _resume_from(config)
    device = pick_device(config.device)
    loaded, data, template = _model_and_data(config)
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    if config.lr is None:
        config = replace(config, lr=learning_rate(config.regime, parameters))
    autocast = pick_dtype(config.dtype, device, parameters) == torch.bfloat16
    steps = _steps(config, len(data.rows))
    depth = loaded.depth
    rotational = config.recipe.curriculum == "rotational"
    exits = mean_exits(config.recipe, steps, depth.num_layers, depth.vocab_size)
    plan = TrainingPlan(
        rows=len(data.rows),
        tokens=data.tokens,
        truncated=data.truncated,
        steps=steps,
        parameters=parameters,
        num_layers=depth.num_layers,
        rotation=rotation_of(config.recipe, depth.num_layers, depth.vocab_size) if rotational else None,
        exits_per_step=exits,
        cost=_cost(loaded, config, steps, exits, data),
        memory_mb=_memory_mb(loaded, config, data),
        device=str(device),
        dtype="bf16 autocast" if autocast else "fp32",
    )
    save_dtype = stored_dtype(config.model)
    return FinetuneJob(config, loaded, data, template, plan, save_dtype, autocast, resume_from)


def _model_and_data(config: FinetuneConfig) -> tuple[LoadedModel, EncodedData, str | None]:
    wanted = config.data
    if wanted.name == "commands" and not wanted.limit:
        # The generator has no end: a run draws as many rows as it will see, so that none repeats.
        wanted = replace(wanted, limit=(config.steps or _COMMANDS_STEPS) * _rows_per_step(config))
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


def _steps(config: FinetuneConfig, rows: int) -> int:
    if config.steps is not None:
        return config.steps
    if config.data.name == "commands" and not config.data.limit:
        return _COMMANDS_STEPS
    return max(1, math.ceil(rows / _rows_per_step(config) * config.epochs))


def _rows_per_step(config: FinetuneConfig) -> int:
    """Rows of an optimizer step, over all processes that torchrun started."""
    return config.batch_size * config.accumulation * int(os.environ.get("WORLD_SIZE", "1"))


def _cost(loaded: LoadedModel, config: FinetuneConfig, steps: int, exits: float, data: EncodedData) -> float:
    """Multiply-adds of a step over those of one without the recipe: dropout saves layers, every exit adds a head.

    Training from scratch is judged by the dropout in the middle of its schedule.
    """
    depth = loaded.depth
    layers = float(sum(parameter.numel() for parameter in depth.layers.parameters()))
    head = float(depth.hidden_size * depth.vocab_size) * data.target_tokens / data.tokens
    scale = time_scale(steps // 2, steps, config.regime == "scratch") if config.recipe.p_max else 1.0
    rates = dropout_rates(config.recipe.p_max, depth.num_layers, scale)
    kept = 1 - sum(rates) / len(rates)
    return (layers * kept + head * exits) / (layers + head)


def _memory_mb(loaded: LoadedModel, config: FinetuneConfig, data: EncodedData) -> float:
    """Weights, gradients and two moments in fp32, and the activations of one batch of the longest rows: an estimate."""
    depth = loaded.depth
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    longest = int(max(data.rows["length"]))
    inner: int = getattr(depth.config, "intermediate_size", 4 * depth.hidden_size)
    activations = config.batch_size * longest * depth.num_layers * (14 * depth.hidden_size + 4 * inner)
    logits = min(config.batch_size * longest * depth.vocab_size, 1 << 24) * 3
    return float((16 * parameters + 4 * (activations + logits)) / 2**20)


def _with_lora(model: Any, rank: int, seed: int) -> Any:
    """Adapters on every linear layer but the head. The name of the head differs by family; peft's own list leaves it out."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"))


def _resume_from(config: FinetuneConfig) -> str | None:
    """The newest complete checkpoint of an interrupted run, for --resume; without it there must be none to lose.

    Trainer writes a checkpoint in place, trainer_state.json last: a folder without it was cut short.
    """
    folder = checkpoints_folder(config.output)
    complete = [file.parent for file in folder.glob("checkpoint-*/trainer_state.json")]
    if config.resume:
        if not complete:
            raise CheckpointError(f"--resume: there is no checkpoint in {folder}; a run writes them with --save-steps N")
        return str(max(complete, key=lambda checkpoint: int(checkpoint.name.removeprefix("checkpoint-"))))
    if complete and not config.overwrite:
        raise ConfigError(
            f"--output {config.output} holds an unfinished run; give --resume to go on, or --overwrite to start anew"
        )
    return None
