"""A run that trains a model, or adapters on it, under the recipe: its plan, its rows and the model that it saves."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

from ..checkpoint.beside import fingerprint
from ..checkpoint.info import CheckpointInfo
from ..checkpoint.loaded import Trainable
from ..checkpoint.open import blank, for_training
from ..checkpoint.save import refuse_overwrite, save_checkpoint
from ..checkpoint.swap import RUN_FILES
from ..checkpoint.transformers_read import stored_dtype
from ..config.checks import require
from ..config.training import FinetuneConfig
from ..data.examples import Row, load_rows
from ..errors import first_line
from ..files import require_disk
from ..model.draft_vocabulary import ORDER_FILE
from ..prompting import PromptTemplate
from .anchor import anchor_of
from .answers import Replay, plan_replay
from .checkpoints import KEPT, ResumePoint, checkpoints_folder
from .data import (
    COMMANDS_STEPS,
    Collator,
    EncodedData,
    OrderedRows,
    ReplayedRows,
    data_rows,
    encode_rows,
    encode_stream,
    is_endless,
    make_encoder,
    rows_per_step,
    run_order,
    token_order,
    training_rows,
    validation_data,
)
from .encoding import Encoder, train_tokenizer
from .layers import use_fp32_attention
from .module import RecipeModule, adapted_layers, require_base_kept, with_lora
from .plan import Plan, autocasts, dtype_name, repeated, resumed_notes, timed_step, tokens_per_row
from .progress import LossHistory, loss_plot
from .recipe import Recipe, learning_rate, mean_exits, resolve_recipe
from .sharding import gather_whole, world_size

_PACKED = "documents are packed into whole rows; attention stays within a document"
_STREAMED = "streaming: `resume` reads past the rows already seen, and is exact only if they come in the same order again"

# May differ between a run and its resumption: none of it changes the steps that follow.
_FREE = {
    "model",
    "data",
    "output",
    "resume",
    "overwrite",
    "save_steps",
    "validation",
    "validation_samples",
    "eval_steps",
    "report_to",
    "epochs",
    "device",
    "exit_blocks",  # of a run of the recipe always the default
}


@dataclass(frozen=True)
class WholeModel:
    """What `prepare` has loaded."""

    plan: Plan
    trainable: Trainable
    module: RecipeModule
    data: EncodedData
    held_out: EncodedData | None
    template: PromptTemplate
    collate: Collator
    order: list[int]  # of the tokens, by their frequency
    dtype: torch.dtype  # of the saved weights

    @property
    def sharded_layers(self) -> tuple[str, ...]:
        """The classes of the layers that FSDP shards one by one; none: it is not used."""
        layers = self.module.backend.layers if self.plan.config.fsdp else ()
        return tuple(dict.fromkeys(type(layer).__name__ for layer in layers))

    def rows(self, stage: Callable[[str, int], Callable[[int], None]]) -> tuple[Any, Any]:
        """(the rows of the run in their order, the held-out rows).

        Batches have rows of similar length, with those of a replay among them; a stream is taken as it comes.
        """
        rows, plan, held_out = self.data.rows, self.plan, None if self.held_out is None else self.held_out.rows
        if self.data.streamed:
            return rows, held_out
        ordered = OrderedRows(rows, run_order(rows["length"][:], data_rows(plan.config), plan.steps, plan.config.seed))
        if plan.replay is None:
            return ordered, held_out
        texts = plan.replay.texts(stage("replay texts", len(plan.replay.starts)))
        return ReplayedRows(ordered, texts, plan.replay.rows, rows_per_step(plan.config)), held_out

    def save(self, history: LossHistory, first: bool) -> tuple[CheckpointInfo, list[str]]:
        """Writes the model in the `first` process. Returns its info with the last losses of every exit, and warnings."""
        config, warnings = self.plan.config, []
        if config.fsdp:
            gather_whole(self.module, keep=first)
        info = CheckpointInfo(prompt_template=self.template.text, system=self.template.system, details=self._details(history))
        if first:
            model = self.module.model
            trained = model.merge_and_unload() if config.lora_rank and not config.lora_keep else model
            files = {
                "losses.jsonl": history.to_jsonl().encode(),
                ORDER_FILE: json.dumps(self.order, separators=(",", ":")).encode(),
            }
            try:
                files["losses.png"] = loss_plot(history)
            except Exception as error:  # matplotlib's settings are the user's; a picture is not worth a training
                warnings.append(f"losses.png was not drawn: {first_line(error)}")
            save_checkpoint(trained, self.trainable.tokenizer, info, config.output, self.dtype, files)
        return info, warnings

    def _details(self, history: LossHistory) -> dict[str, Any]:
        plan = self.plan
        assert plan.recipe is not None
        return {
            "base_model": plan.config.model,
            "config": _resolved(plan.config, plan.recipe, plan.lr, plan.max_length, plan.replay),
            "steps": plan.steps,
            "rows": plan.rows,
            "final_losses": {str(layer): loss for layer, loss in history.latest.items()},
            "validation_losses": {str(layer): loss for layer, loss in history.validated.items()},
            "validation_rows": None if self.held_out is None else self.held_out.digest,
            "versions": {name: version(name) for name in ("layerskip", "torch", "transformers")},
        }


def load_whole_model(config: FinetuneConfig, device: torch.device, resume: ResumePoint | None) -> WholeModel:
    """Loads model and data, and plans the run."""
    refuse_overwrite(config.output, config.overwrite, RUN_FILES)
    require_base_kept(config)
    anchored = config.retention.anchor_weights
    require(anchored != "int8" or device.type == "cpu", "anchor_weights", "bf16 if `device` is not cpu", anchored)
    rows = training_rows(config)
    trainable = _model(config, rows)
    spec, tokenizer = trainable.backend.spec, trainable.tokenizer
    encoder = make_encoder(config, trainable, rows, tokens_per_row(config, trainable.backend.max_positions))
    data = encode_stream(config.data, encoder, config.seed) if config.streaming else encode_rows(rows, encoder)
    held_out = None
    if config.validation is not None:
        held_out = encode_rows(load_rows(validation_data(config, config.validation)), encoder)
    plan = _plan(config, trainable, encoder, data, device, resume)
    dtype = stored_dtype(config.model)
    _require_disk(plan, dtype)
    module = _module(plan, trainable)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    collate, step = Collator(pad or 0), None
    if not config.fsdp:
        batch = collate(repeated(data.longest, config.batch_size))
        tokens = config.batch_size * config.accumulation * data.tokens / data.count
        step = timed_step(module, batch, device, plan.autocast, plan.steps, tokens)
    trained = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
    plan = replace(plan, trained=trained, step=step, held_out=0 if held_out is None else held_out.count)
    order = token_order(data, spec.vocab)
    return WholeModel(plan, trainable, module, data, held_out, encoder.template, collate, order, dtype)


def _plan(
    config: FinetuneConfig,
    trainable: Trainable,
    encoder: Encoder,
    data: EncodedData,
    device: torch.device,
    resume: ResumePoint | None,
) -> Plan:
    """All but what the module decides."""
    spec, kept, asked = trainable.backend.spec, config.retention, config.recipe
    rotates = asked.rotation is None and asked.curriculum in (None, "rotational")
    if rotates and resume is not None and resume.settings["rotation"]:
        asked = replace(asked, rotation=resume.settings["rotation"])  # the rule of its default may have changed
    recipe = resolve_recipe(asked, config.regime, spec.parameters, spec.layers, spec.vocab)
    lr, steps = config.lr or learning_rate(config.regime, spec.parameters), _steps(config, data)
    original = replay = None
    if kept.anchor or kept.replay or config.lora_rank:
        original = fingerprint(spec, trainable.model.get_parameter)
        replay = plan_replay(config, original, data, encoder, str(device), steps) if kept.replay else None
    autocast, rows = autocasts(config, device, spec.parameters), None if data.streamed else data.count
    resolved = _resolved(config, recipe, lr, encoder.max_length, replay)
    sealed = {name: value for name, value in resolved.items() if name not in _FREE}
    sealed |= sealed.pop("recipe") | sealed.pop("retention")
    sealed |= {
        "steps": steps, "rows": rows, "tokens": data.tokens, "dtype": dtype_name(autocast), "processes": world_size(),
        "original": original, "data_digest": data.digest, "replayed": None if replay is None else replay.journal.name,
    }  # fmt: skip
    return Plan(
        config=config,
        device=str(device),
        autocast=autocast,
        lr=lr,
        max_length=encoder.max_length,
        steps=steps,
        rows=rows,
        tokens=data.tokens,
        truncated=data.truncated,
        left_out=data.left_out,
        parameters=spec.parameters,
        num_layers=spec.layers,
        sealed=sealed,
        recipe=recipe,
        exits_per_step=mean_exits(recipe, steps, spec.layers),
        adapted_layers=adapted_layers(config, recipe, spec.layers),
        replay=replay,
        notes=(_PACKED,) * encoder.pack + (_STREAMED,) * data.streamed + resumed_notes(resume, sealed),
    )


def _module(plan: Plan, trainable: Trainable) -> RecipeModule:
    config, model = plan.config, trainable.model
    assert plan.recipe is not None
    if plan.autocast and plan.device == "cpu":
        use_fp32_attention(model)
    if config.lora_rank:
        model = with_lora(model, config, plan.adapted_layers)
    scratch = config.regime == "scratch"
    module = RecipeModule(model, plan.recipe, config.seed, scratch, config.gradient_checkpointing, trainable.tokenizer)
    module.anchor = anchor_of(config, model, module.backend, plan.device)
    return module


def _model(config: FinetuneConfig, rows: list[Row]) -> Trainable:
    if config.regime == "scratch":
        tokenizer = None if config.vocab_size is None else train_tokenizer(rows, config.vocab_size)
        return blank(config.model, config.seed, tokenizer)
    return for_training(config.model, "cpu", "fp32")


def _steps(config: FinetuneConfig, data: EncodedData) -> int:
    """Optimizer steps. An epoch sees each row of the data once; rows of a replay come on top."""
    if config.steps is not None:
        return config.steps
    if is_endless(config.data):
        return COMMANDS_STEPS
    return max(1, math.ceil(data.count / data_rows(config) * (config.epochs or 1.0)))


def _resolved(config: FinetuneConfig, recipe: Recipe, lr: float, max_length: int, replay: Replay | None) -> dict[str, Any]:
    """The fields of a config, with the run's values in place of None, as they are read back from JSON."""
    found: dict[str, Any] = {"recipe": asdict(recipe), "lr": lr, "max_length": max_length}
    if replay is not None:
        found["retention"] = asdict(replace(config.retention, replay_tokens=replay.how.tokens))
    fields: dict[str, Any] = json.loads(json.dumps(asdict(config) | {"epochs": config.epochs or 1.0} | found))
    return fields


def _require_disk(plan: Plan, dtype: torch.dtype) -> None:
    """Raises CheckpointError where the saved model and the checkpoints, of weights and two moments in fp32, do not fit.

    There is one checkpoint more than are kept, while it is written. With LoRA they are small.
    """
    every = 0 if plan.config.lora_rank else plan.config.save_steps
    checkpoints = min(KEPT + 1, plan.steps // every) if every else 0
    needed = plan.parameters * (dtype.itemsize + 12 * checkpoints)
    require_disk(checkpoints_folder(plan.config.output), needed, "the model and the checkpoints of its run")
