"""finetune from start to end: plan, train, save."""

import itertools
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.adapters import adapters_of
from ..checkpoint.info import CheckpointInfo
from ..checkpoint.load import blank, for_training
from ..checkpoint.loaded import Trainable
from ..checkpoint.model_files import RUN_FILES
from ..checkpoint.placement import pick_device, pick_dtype
from ..checkpoint.quiet import quiet_transformers
from ..checkpoint.save import output_lock, refuse_overwrite, save_checkpoint
from ..checkpoint.transformers_read import stored_dtype
from ..config.data import DataConfig
from ..config.training import FinetuneConfig
from ..data.examples import PARSING_TEMPLATE, Conversation, Example, Row, is_parsing, load_rows, stream_rows
from ..errors import CheckpointError, ConfigError, LayerSkipError, TrainingInterrupted
from ..model.draft_vocabulary import ORDER_FILE
from ..prompting.chat import require_chat_template
from ..prompting.template import CHAT, RAW, resolve_template
from ..storage.reading import first_line
from ..storage.writing import run_staging
from .attention import use_fp32_attention
from .checkpoints import (
    ResumePoint,
    checkpoints_folder,
    discard_after,
    has_checkpoints,
    last_checkpoint,
    newest_whole,
    require_own,
)
from .encoding import EncodedData, Encoder, encode_rows, encode_stream
from .interruption import Interruption
from .loss_plot import loss_plot
from .module import RecipeModule
from .plan import COMMANDS_STEPS, TrainingPlan, in_json, make_plan, rows_per_step, run_settings
from .presets import learning_rate, recipe_preset, sequence_length
from .progress import LossHistory, StepReport
from .tokenizer import token_order, token_order_json, train_tokenizer
from .trainer import RecipeTrainer, make_trainer


@dataclass
class FinetuneJob:
    """A planned run: `plan` says what it will do, `run` does it."""

    config: FinetuneConfig
    loaded: Trainable
    data: EncodedData
    held_out: EncodedData | None
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
            LockedError: another process writes to the folder.
        """
        with run_lock(self.config.output):
            return self._run(on_step)

    def _run(self, on_step: Callable[[StepReport], None]) -> CheckpointInfo:
        config = self.config
        assert config.recipe is not None
        scratch = config.regime == "scratch"
        if self.autocast and self.plan.device == "cpu":
            use_fp32_attention(self.loaded.model)
        model = _with_lora(self.loaded.model, config) if config.lora_rank else self.loaded.model
        module = RecipeModule(model, config.recipe, config.seed, scratch, config.gradient_checkpointing)
        order = token_order(
            self.data, module.backend.vocab_size
        )  # now: a stream that cannot be read must not cost a trained model
        with Interruption() as interruption:
            trainer = make_trainer(
                module,
                self.loaded.tokenizer,
                self.data,
                self.held_out,
                config,
                run_settings(config, self.plan),
                on_step,
                interruption,
                torch.device(self.plan.device),
                self.autocast,
            )
            self._train(trainer, interruption)
            trained = model.merge_and_unload() if config.lora_rank and not config.lora_keep else model
            history = LossHistory.of_log(trainer.state.log_history)
            info = CheckpointInfo(prompt_template=self.template, details=self._details(history))
            if trainer.is_world_process_zero():
                files = {
                    "losses.jsonl": history.to_jsonl().encode(),
                    "losses.png": loss_plot(history),
                    ORDER_FILE: token_order_json(order),
                }
                save_checkpoint(trained, self.loaded.tokenizer, info, config.output, self.save_dtype, files)
        return info

    def _train(self, trainer: RecipeTrainer, interruption: Interruption) -> None:
        """Trains to the end, or raises what stopped it."""
        folder = checkpoints_folder(self.config.output)
        if trainer.is_world_process_zero():
            # What an earlier run left there must never be what a later `resume` finds.
            discard_after(folder, 0 if self.resume is None else self.resume.step)
        try:
            trainer.train(resume_from_checkpoint=None if self.resume is None else str(self.resume.folder))
        except LayerSkipError:
            raise
        except Exception as error:  # safetensors, torch and pickle raise many kinds for a full disk or a bad file
            raise self._explained(error, trainer) from error
        finally:
            if trainer.is_world_process_zero():
                shutil.rmtree(run_staging(folder), ignore_errors=True)
                with suppress(OSError):
                    folder.rmdir()  # Trainer makes it even for a run that writes no checkpoints
        step = trainer.state.global_step
        if step < self.plan.steps:
            raise TrainingInterrupted(
                f"interrupted after step {step} of {self.plan.steps}; saved {last_checkpoint(folder)}",
                interruption.signal or 0,
                step,
            )

    def _explained(self, error: Exception, trainer: RecipeTrainer) -> Exception:
        """What stopped the run, as an error for the user where the run knows the cause."""
        if trainer.run.phase == "loading" and self.resume is not None:
            return CheckpointError(f"cannot resume from {self.resume.folder}: {first_line(error)}")
        if trainer.run.phase != "saving":
            return error
        folder = checkpoints_folder(self.config.output)
        last = last_checkpoint(folder)
        kept = "" if last is None else f"; {last} before it is whole: go on from it with `resume`"
        free = f"{shutil.disk_usage(folder).free / 2**20:.0f} MB are free there"
        step = trainer.state.global_step
        return CheckpointError(f"cannot write the checkpoint of step {step} to {folder}: {first_line(error)} ({free}){kept}")

    def _details(self, history: LossHistory) -> dict[str, Any]:
        return {
            "base_model": self.config.model,
            "config": in_json(self.config),
            "steps": self.plan.steps,
            "rows": self.plan.rows,
            "final_losses": {str(layer): loss for layer, loss in history.latest.items()},
            "validation_losses": {str(layer): loss for layer, loss in history.validated.items()},
            "versions": {name: version(name) for name in ("layerskip", "torch", "transformers")},
        }


def run_lock(output: str) -> AbstractContextManager[None]:
    """The lock of `output`, which a run holds from its plan to its end; under torchrun the first process holds it for all."""
    return output_lock(output, "layerskip finetune") if os.environ.get("RANK", "0") == "0" else nullcontext()


def prepare(config: FinetuneConfig) -> FinetuneJob:
    """Loads model and data and plans the run; nothing is written.

    Raises LayerSkipError for whatever would make the run fail.
    """
    refuse_overwrite(config.output, config.overwrite, RUN_FILES)
    _require_base_kept(config)
    resume = _resume_point(config)
    device = pick_device(config.device)
    _require_device(device)
    loaded, rows = _model_and_rows(config)
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    config = _resolved(config, parameters, loaded.backend.max_positions)
    data, held_out, encoder = _encoded(config, loaded, rows)
    autocast = _autocasts(config, device, parameters)
    plan = make_plan(config, loaded, data, str(device), autocast, encoder.pack)
    if resume is not None:
        _require_same_run(resume.settings, run_settings(config, plan))
        notes = (*(f"{fault}; it is not used" for fault in resume.damaged), f"going on from {resume.folder}")
        plan = replace(plan, resumed_step=resume.step, notes=plan.notes + notes)
    save_dtype = stored_dtype(config.model)
    return FinetuneJob(config, loaded, data, held_out, encoder.template, plan, save_dtype, autocast, resume)


def _require_base_kept(config: FinetuneConfig) -> None:
    """Raises ConfigError where an adapter would take the place of the model that it belongs to."""
    if not config.lora_keep:
        return
    adapters, below = adapters_of(config.model)
    for base in (*adapters, below):
        if Path(base).is_dir() and Path(config.output).is_dir() and os.path.samefile(base, config.output):
            raise ConfigError(f"`lora_keep`: the adapter needs its base {base}, which `output` {config.output} would replace")


def _require_device(device: torch.device) -> None:
    """Raises ConfigError for what Trainer would silently do otherwise."""
    if device.index:
        raise ConfigError(
            f"`device` {device}: training takes the first GPU that it sees; set CUDA_VISIBLE_DEVICES={device.index} in the "
            "environment and give `device` cuda"
        )
    if device.type == "cpu" and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        raise ConfigError(
            "FSDP (ACCELERATE_USE_FSDP) needs GPUs, got `device` cpu, where accelerate would run DDP without a word; start it "
            "with torchrun alone"
        )


def _autocasts(config: FinetuneConfig, device: torch.device, parameters: int) -> bool:
    """Whether to train in bf16 autocast. `auto` has it wherever a model would be loaded in bf16, and for small models too on a
    CPU that multiplies bf16 itself: there it is twice as fast.
    """
    if config.dtype == "auto" and device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return True
    return pick_dtype(config.dtype, device, parameters) == torch.bfloat16


def _model_and_rows(config: FinetuneConfig) -> tuple[Trainable, list[Row]]:
    """The model, and the rows to train on: of a stream the first one, to see what they are."""
    wanted = _training_data(config)
    rows = list(itertools.islice(stream_rows(wanted), 1)) if config.streaming else load_rows(wanted)
    if config.regime == "scratch":
        tokenizer = None if config.vocab_size is None else train_tokenizer(rows, config.vocab_size)
        return blank(config.model, config.seed, tokenizer), rows
    return for_training(config.model, "cpu", "fp32"), rows


def _training_data(config: FinetuneConfig) -> DataConfig:
    if config.data.name == "commands" and not config.data.limit:
        # The generator has no end: a run draws as many rows as it will see, so that none repeats.
        return replace(config.data, limit=(config.steps or COMMANDS_STEPS) * rows_per_step(config))
    return config.data


def _resolved(config: FinetuneConfig, parameters: int, context: int) -> FinetuneConfig:
    """With the regime's values for a model of this size in the place of what was not given."""
    if config.max_length is not None and config.max_length > context:
        raise ConfigError(f"`max_length` must be at most the model's context of {context} tokens, got {config.max_length}")
    return replace(
        config,
        recipe=config.recipe or replace(recipe_preset(config.regime, parameters), **config.recipe_changes),
        recipe_changes={},
        lr=config.lr or learning_rate(config.regime, parameters),
        max_length=config.max_length or sequence_length(config.regime, context),
    )


def _encoded(config: FinetuneConfig, loaded: Trainable, rows: list[Row]) -> tuple[EncodedData, EncodedData | None, Encoder]:
    """The rows to train on, those to validate on, and how both were encoded."""
    assert config.max_length is not None
    encoder = Encoder(loaded.tokenizer, _template(config, loaded, rows), config.max_length, _packs(config, rows))
    data = encode_stream(config.data, encoder, config.seed) if config.streaming else encode_rows(rows, encoder)
    held_out = None if config.validation is None else encode_rows(load_rows(validation_data(config)), encoder)
    return data, held_out, encoder


def validation_data(config: FinetuneConfig) -> DataConfig:
    """`validation`: other data (a named set, a file, a folder, a hub id), or else a split of `data`."""
    assert config.validation is not None
    name = config.validation
    other = name in ("commands", "topv2") or "/" in name or Path(name).exists() or Path(name).suffix != ""
    if not other and Path(config.data.name).is_file():
        raise ConfigError(f"`validation` must be other data where `data` is a file, which has no splits, got {name}")
    held_out = replace(config.data, limit=config.validation_samples, setting="validation")
    return replace(held_out, name=name, split="validation") if other else replace(held_out, split=name)


def _packs(config: FinetuneConfig, rows: list[Row]) -> bool:
    """Whether documents are packed: by default when language-model data, without prompts, meets a regime for such."""
    if config.pack is not None:
        return config.pack
    return config.regime != "finetune" and all(isinstance(row, Example) and not row.prompt for row in rows)


def _template(config: FinetuneConfig, loaded: Trainable, rows: list[Row]) -> str | None:
    """The chat template for chat; the flag, else the parsing template for parsing data, else the checkpoint's own, else prompt
    and line end.
    """
    if any(isinstance(row, Conversation) for row in rows):
        return CHAT
    if config.prompt_template is not None:
        if config.prompt_template == CHAT:
            require_chat_template(loaded.tokenizer)
        return config.prompt_template
    if is_parsing(config.data):
        return PARSING_TEMPLATE
    template = resolve_template(None, None, loaded.info.template, loaded.tokenizer).text
    return PARSING_TEMPLATE if template == RAW else template


def _with_lora(model: Any, config: FinetuneConfig) -> Any:
    """Adapters on the linear layers that `lora_targets` names; `all-linear` is all but the head."""
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
        raise ConfigError(f"`lora_targets` {config.lora_targets}: {first_line(error)}") from error


def _resume_point(config: FinetuneConfig) -> ResumePoint | None:
    """Where `resume` goes on; without it there must be no run to lose."""
    folder = checkpoints_folder(config.output)
    require_own(folder)
    if config.resume:
        return newest_whole(folder)
    if has_checkpoints(folder) and not config.overwrite:
        raise ConfigError(
            f"`output` {config.output} holds an unfinished run; give `resume` to go on, or `overwrite` to start anew"
        )
    return None


def _require_same_run(sealed: dict[str, Any], settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if sealed.get(name) != value:
            raise ConfigError(
                f"`resume`: {name} was {sealed.get(name)} in the run to go on with, and is {value} now; a run is resumed with "
                "the same settings on the same data"
            )
