"""The training loop: transformers' Trainer around a module, of which it overrides five public methods."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from ...errors import ConfigError
from ...interruption import Interruption
from ...losses import IGNORED
from ..progress import RunState, StepReport, validation_log
from ..recipe.module import Moment
from ..rows.encoded_data import StreamedRows
from .checkpoints import checkpoints_folder
from .run_callback import RunCallback
from .schedule import Schedule
from .transformers_internals import ResumingTrainer, TrainedModule, use_one_gpu

_BETAS = (0.9, 0.95)


class RunTrainer(ResumingTrainer):
    """Gives the module its place in the run, and divides the summed loss by the target tokens of the whole optimizer step.

    (A token mean per micro-batch would be off by the accumulation factor.)
    """

    control: Any
    lr_scheduler: Any

    def __init__(self, module: TrainedModule, schedule: Schedule, **keywords: Any) -> None:
        self.sharded_layers = schedule.sharded_layers
        super().__init__(model=module, **keywords)
        self.remove_callback(PrinterCallback)  # it writes to stdout
        self.run = RunState()
        self._schedule = schedule

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Trainer's own for a run of one phase."""
        if self.lr_scheduler is None and self._schedule.phases > 1:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self._schedule.lr_share)
        return super().create_scheduler(num_training_steps, optimizer)

    def get_train_dataloader(self) -> Any:
        """Trainer's own, which divides the rows among the processes; a stream has been divided."""
        if not isinstance(self.train_dataset, StreamedRows):
            return super().get_train_dataloader()
        pinned = self.args.dataloader_pin_memory
        return DataLoader(self.train_dataset, self.args.train_batch_size, collate_fn=self.data_collator, pin_memory=pinned)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        # Processes take the batches of a step in turns.
        number = self.run.sums.micro_batches * self.args.world_size + self.args.process_index
        moment = Moment(self.state.global_step, self.state.max_steps, number * self.args.train_batch_size)
        batch, tokens = _without_lengths(inputs)
        output = model(**batch, moment=moment)
        targets = _targets(inputs) if num_items_in_batch is None else num_items_in_batch
        self.run.sums.add(output, tokens, targets)
        # DDP averages gradients over processes, while `targets` counts the tokens of all of them.
        loss = output["loss"] / targets * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss of every exit over the held-out rows, into the log and to the trackers."""
        inner: Any = self.accelerator.unwrap_model(self.model)
        inner.eval()
        exits: tuple[int, ...] = inner.measured_exits
        sums = torch.zeros(2 * len(exits) + 1, device=self.args.device)
        rows, processes = len(self.eval_dataset), self.args.world_size
        own_rows = range(self.args.process_index, rows, processes)
        size = self.args.train_batch_size
        with torch.no_grad(), self.compute_loss_context_manager():
            for at in range(0, -(-rows // processes), size):  # as many in every process, because FSDP gathers in each
                own = own_rows[at : at + size]
                collated = self.data_collator([self.eval_dataset[row] for row in own or (0,)])
                batch = _without_lengths({name: value.to(self.args.device) for name, value in collated.items()})[0]
                if not own:
                    batch["labels"].fill_(IGNORED)
                output = inner(**batch, moment=Moment(self.state.global_step, self.state.max_steps))
                sums[-1] += _targets(batch)
                sums[: len(exits)] += output["per_exit"]
                if "agreeing" in output:
                    sums[len(exits) : -1] += output["agreeing"]
        inner.train()
        *parts, targets = self.accelerator.reduce(sums, reduction="sum").tolist()
        losses, agreement = (
            {layer: part / targets for layer, part in zip(exits, half, strict=True)}
            for half in (parts[: len(exits)], parts[len(exits) :])
        )
        metrics = validation_log(losses, agreement if "agreeing" in output else {})
        self.log(dict(metrics))  # which adds to it
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes what the module keeps, such as an ordinary transformers or peft checkpoint, and no pickled arguments.

        Trainer calls it first when it writes a checkpoint.
        """
        self.run.phase = "saving"
        if self.args.should_save and not self.is_fsdp_enabled:  # shards are written with the optimizer's
            self.accelerator.unwrap_model(self.model).save(Path(output_dir or self.args.output_dir))


def make_trainer(
    module: TrainedModule,
    schedule: Schedule,
    rows: Any,
    held_out: Any,
    collator: Callable[[list[Any]], dict[str, Tensor]],
    on_step: Callable[[StepReport], None],
    interruption: Interruption,
) -> RunTrainer:
    """A Trainer for the optimizer steps of a schedule over `rows`, a data set in the order of the run."""
    trainer = RunTrainer(
        module,
        schedule,
        args=_arguments(schedule),
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=collator,
    )
    folder = checkpoints_folder(schedule.output)
    callback = RunCallback(trainer, trainer.run, on_step, interruption, schedule.eval_steps, folder, schedule.sealed)
    trainer.add_callback(callback)
    return trainer


def require_trackers(report_to: str) -> None:
    """Raises ConfigError when a tracker of `report_to` is unknown or its package is not installed."""
    names = _trackers(report_to)
    try:
        for tracker in get_reporting_integration_callbacks(names[0] if names in (["all"], ["none"]) else names):
            tracker()
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(f"`report_to` {report_to}: {error}") from error


def _trackers(report_to: str) -> list[str]:
    return [name.strip() for name in report_to.split(",") if name.strip()]


def _arguments(schedule: Schedule) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(checkpoints_folder(schedule.output)),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch_size,
        gradient_accumulation_steps=schedule.accumulation,
        learning_rate=schedule.lr,
        lr_scheduler_type="cosine",
        warmup_steps=schedule.warmup_steps,
        weight_decay=schedule.weight_decay,
        adam_beta1=_BETAS[0],
        adam_beta2=_BETAS[1],
        max_grad_norm=0.0,  # RunCallback clips
        seed=schedule.seed,
        bf16=schedule.autocast,
        use_cpu=schedule.device == "cpu",
        num_train_epochs=1,  # OrderedRows makes one epoch of all passes
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # a layer without rows and an exit that is off leave no parameter unused
        dataloader_pin_memory=schedule.device.startswith("cuda"),
        save_strategy="steps" if schedule.save_steps else "no",
        save_steps=schedule.save_steps or 500,
        # Otherwise FSDP would keep whole gradients between the micro-batches of a step.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}} if schedule.sharded_layers else None,
        logging_strategy="no",  # RunCallback logs every step
        report_to=_trackers(schedule.report_to),
        disable_tqdm=True,
    )
    use_one_gpu(arguments)
    return arguments


def _without_lengths(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
    """(what a module takes of a batch, the batch's tokens without padding, as a scalar)."""
    batch = dict(inputs)
    return batch, batch.pop("lengths").sum()


def _targets(inputs: Mapping[str, Tensor]) -> Tensor:
    return (inputs["labels"] != IGNORED).sum()
