"""The training loop: a thin subclass of transformers' Trainer around RecipeModule."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..config import FinetuneConfig
from ..data import Collator, EncodedData
from ..errors import CheckpointError
from .module import Moment, RecipeModule

_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. Losses are means over target tokens, in nats; `exit_losses` holds the latest of every exit so far."""

    step: int
    total_steps: int
    loss: float
    final_loss: float
    exit_losses: dict[int, float]
    learning_rate: float
    tokens_per_second: float


@dataclass
class _StepSums:
    """Sums over the micro-batches of one optimizer step, kept on the device: reading them would wait for it."""

    loss: Tensor | None = None
    per_exit: Tensor | None = None
    exit_layers: tuple[int, ...] = ()
    tokens: int = 0
    micro_batches: int = 0

    def add(self, output: dict[str, Any], tokens: int) -> None:
        loss, per_exit = output["loss"].detach(), output["per_exit"]
        self.loss = loss if self.loss is None else self.loss + loss
        self.per_exit = per_exit if self.per_exit is None else self.per_exit + per_exit
        self.exit_layers = output["exit_layers"]
        self.tokens += tokens
        self.micro_batches += 1


@dataclass
class _Progress:
    """What StepReports are made of."""

    on_step: Callable[[StepReport], None]
    sums: _StepSums = field(default_factory=_StepSums)
    exit_losses: dict[int, float] = field(default_factory=dict)
    targets: Tensor | int = 1
    started: float = field(default_factory=time.perf_counter)


class RecipeTrainer(Trainer):  # type: ignore[misc]
    """Gives the module its place in the run, and divides the summed loss by the target tokens of the whole optimizer step.

    (A token mean per micro-batch would be off by the accumulation factor.)
    """

    def __init__(self, module: RecipeModule, tokenizer: Any, on_step: Callable[[StepReport], None], **keywords: Any) -> None:
        super().__init__(model=module, **keywords)
        self.remove_callback(PrinterCallback)  # it writes to stdout
        self.add_callback(_ReportCallback(self))
        self.model_accepts_loss_kwargs = True  # makes Trainer count the targets of the whole step
        self.tokenizer_to_save = tokenizer
        self.progress = _Progress(on_step)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        sums = self.progress.sums
        moment = Moment(self.state.global_step, self.state.max_steps, sums.micro_batches)
        output = model(**inputs, moment=moment)
        targets = (inputs["labels"] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        self.progress.targets = targets
        sums.add(output, inputs["input_ids"].numel())
        # DDP averages gradients over ranks, while `targets` counts the tokens of all of them.
        loss = output["loss"] / targets * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def report(self, learning_rate: float) -> None:
        """Hands the step that just ended to the listener."""
        progress, now = self.progress, time.perf_counter()
        sums, progress.sums = progress.sums, _StepSums()
        if sums.loss is None or sums.per_exit is None:
            return
        targets = float(progress.targets) / self.accelerator.num_processes
        per_exit = (sums.per_exit / targets).tolist()
        progress.exit_losses.update(zip(sums.exit_layers, per_exit, strict=True))
        elapsed, progress.started = now - progress.started, now
        progress.on_step(
            StepReport(
                step=self.state.global_step,
                total_steps=self.state.max_steps,
                loss=float(sums.loss) / targets,
                final_loss=per_exit[-1],
                exit_losses=dict(sorted(progress.exit_losses.items())),
                learning_rate=learning_rate,
                tokens_per_second=sums.tokens * self.accelerator.num_processes / elapsed,
            )
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Writes the model inside the module, as an ordinary transformers or peft checkpoint, and no pickled arguments."""
        folder = output_dir or self.args.output_dir
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).model.save_pretrained(folder)
        self.tokenizer_to_save.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        inner: Any = self.accelerator.unwrap_model(model or self.model).model
        super()._load_from_checkpoint(resume_from_checkpoint, model=inner)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuses a checkpoint that lacks weights, where Trainer only warns; tied weights are stored once."""
        inner: Any = self.accelerator.unwrap_model(self.model).model
        missing = set(load_result.missing_keys) - set(inner.all_tied_weights_keys)
        if missing:
            raise CheckpointError(f"the checkpoint to resume from is incomplete: it lacks {', '.join(sorted(missing))}")


class _ReportCallback(TrainerCallback):  # type: ignore[misc]
    def __init__(self, trainer: RecipeTrainer) -> None:
        self._trainer = trainer
        self._learning_rate = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.progress.started = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any) -> None:
        self._learning_rate = float(lr_scheduler.get_last_lr()[0])  # on_step_end comes after the scheduler has moved on

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.report(self._learning_rate)


def make_trainer(
    module: RecipeModule,
    tokenizer: Any,
    data: EncodedData,
    config: FinetuneConfig,
    steps: int,
    on_step: Callable[[StepReport], None],
    device: torch.device,
    autocast: bool,
) -> RecipeTrainer:
    """A Trainer for `steps` optimizer steps over encoded rows, batches of similar length, checkpoints beside the output."""
    arguments = TrainingArguments(
        output_dir=str(checkpoints_folder(config.output)),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup * steps),
        weight_decay=config.weight_decay,
        adam_beta1=_BETAS[0],
        adam_beta2=_BETAS[1],
        max_grad_norm=1.0,
        seed=config.seed,
        bf16=autocast,
        use_cpu=device.type == "cpu",
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # a layer without rows and an exit that is off leave no parameter unused
        dataloader_pin_memory=device.type == "cuda",
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return RecipeTrainer(module, tokenizer, on_step, args=arguments, train_dataset=data.rows, data_collator=Collator(pad or 0))


def checkpoints_folder(output: str) -> Path:
    """Where a run keeps what it can be resumed from."""
    return Path(output) / "checkpoints"
