"""The training loop: transformers' Trainer around RecipeModule, of which it overrides three public methods."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, TrainingArguments

from ..checkpoint.save import write_model
from ..config.training import FinetuneConfig
from ..errors import ConfigError
from ..losses import IGNORED
from .checkpoints import checkpoints_folder
from .encoded_data import Collator, EncodedData
from .interruption import Interruption
from .module import Moment, RecipeModule
from .order import OrderedRows, run_order
from .plan import TrainingPlan, rows_per_step, sealed_settings
from .progress import RunState, StepReport, validation_log
from .run_callback import RunCallback
from .transformers_internals import ResumingTrainer, use_one_gpu

_BETAS = (0.9, 0.95)
_VALIDATIONS = 10  # per run, unless `eval_steps` is given


class RecipeTrainer(ResumingTrainer):
    """Gives the module its place in the run, and divides the summed loss by the target tokens of the whole optimizer step.

    (A token mean per micro-batch would be off by the accumulation factor.)
    """

    control: Any

    def __init__(self, module: RecipeModule, tokenizer: Any, **keywords: Any) -> None:
        super().__init__(model=module, **keywords)
        self.remove_callback(PrinterCallback)  # it writes to stdout
        self.run = RunState()
        self._checkpoint_tokenizer = tokenizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        output = model(**inputs, moment=Moment(self.state.global_step, self.state.max_steps, self.run.sums.micro_batches))
        targets = _targets(inputs) if num_items_in_batch is None else num_items_in_batch
        self.run.sums.add(output, inputs["input_ids"].numel(), targets)
        # DDP averages gradients over processes, while `targets` counts the tokens of all of them.
        loss = output["loss"] / targets * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss of every exit over the held-out rows, into the log and to the trackers."""
        inner: Any = self.accelerator.unwrap_model(self.model)
        inner.eval()
        sums = torch.zeros(inner.backend.num_layers + 1, device=self.args.device)
        own_rows = range(self.args.process_index, len(self.eval_dataset), self.args.world_size)
        size = self.args.train_batch_size
        with torch.no_grad(), self.compute_loss_context_manager():
            for at in range(0, len(own_rows), size):
                rows = self.data_collator([self.eval_dataset[row] for row in own_rows[at : at + size]])
                batch = {name: value.to(self.args.device) for name, value in rows.items()}
                output = inner(**batch, moment=Moment(self.state.global_step, self.state.max_steps))
                sums[:-1] += output["per_exit"]
                sums[-1] += _targets(batch)
        inner.train()
        *per_exit, targets = self.accelerator.reduce(sums, reduction="sum").tolist()
        metrics = validation_log({layer: part / targets for layer, part in enumerate(per_exit, start=1)})
        self.log(dict(metrics))  # which adds to it
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model inside the module, as an ordinary transformers or peft checkpoint, and no pickled arguments.

        Trainer calls it first when it writes a checkpoint.
        """
        self.run.phase = "saving"
        if self.args.should_save and not self.is_fsdp_enabled:  # accelerate writes the shards with the optimizer's
            folder = Path(output_dir or self.args.output_dir)
            write_model(self.accelerator.unwrap_model(self.model).model, folder)
            self._checkpoint_tokenizer.save_pretrained(folder)


def make_trainer(
    module: RecipeModule,
    tokenizer: Any,
    data: EncodedData,
    held_out: EncodedData | None,
    config: FinetuneConfig,
    plan: TrainingPlan,
    on_step: Callable[[StepReport], None],
    interruption: Interruption,
) -> RecipeTrainer:
    """A Trainer for the optimizer steps of a plan over encoded rows, batches of similar length.

    Raises ConfigError when a `report_to` is unknown or its package is not installed.
    """
    rows = data.rows
    if not isinstance(rows, IterableDataset):
        rows = OrderedRows(rows, run_order(rows["length"][:], rows_per_step(config), plan.steps, config.seed))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    try:
        trainer = RecipeTrainer(
            module,
            tokenizer,
            args=_arguments(config, plan),
            train_dataset=rows,
            eval_dataset=None if held_out is None else held_out.rows,
            data_collator=Collator(pad or 0),
        )
    except (RuntimeError, ValueError) as error:
        if not config.report_to:
            raise
        raise ConfigError(f"`report_to` {config.report_to}: {error}") from error
    eval_steps = 0 if held_out is None else config.eval_steps or max(1, plan.steps // _VALIDATIONS)
    folder = checkpoints_folder(config.output)
    settings = sealed_settings(config, plan)
    trainer.add_callback(RunCallback(trainer, trainer.run, on_step, interruption, eval_steps, folder, settings))
    return trainer


def _arguments(config: FinetuneConfig, plan: TrainingPlan) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(checkpoints_folder(config.output)),
        max_steps=plan.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=plan.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup * plan.steps),
        weight_decay=config.weight_decay,
        adam_beta1=_BETAS[0],
        adam_beta2=_BETAS[1],
        max_grad_norm=0.0,  # RunCallback clips
        seed=config.seed,
        bf16=plan.autocast,
        use_cpu=plan.device == "cpu",
        num_train_epochs=1,  # OrderedRows makes one epoch of all passes
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # a layer without rows and an exit that is off leave no parameter unused
        dataloader_pin_memory=plan.device.startswith("cuda"),
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        accelerator_config={"dispatch_batches": False},  # of a stream each process reads its share: rows differ in length
        logging_strategy="no",  # RunCallback logs every step
        report_to=[name.strip() for name in config.report_to.split(",") if name.strip()],
        disable_tqdm=True,
    )
    use_one_gpu(arguments)
    return arguments


def _targets(inputs: Mapping[str, Tensor]) -> Tensor:
    return (inputs["labels"] != IGNORED).sum()
