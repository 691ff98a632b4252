"""A run that trains a model, or adapters on it, under the recipe: its plan, its rows and the model that it saves."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.beside import fingerprint
from ..checkpoint.importing import stored_dtype
from ..checkpoint.info import CheckpointInfo
from ..checkpoint.loaded import Trainable
from ..checkpoint.locate import adapters_of
from ..checkpoint.open import blank, for_training
from ..checkpoint.save import RUN_FILES, refuse_overwrite, save_checkpoint
from ..config.training import FinetuneConfig
from ..errors import ConfigError, first_line, require
from ..files import require_disk
from ..model.drafting import ORDER_FILE
from .answers import plan_replay
from .checkpoints import KEPT, ResumePoint, checkpoints_folder
from .data import (
    StreamedRows,
    data_rows,
    encode_rows,
    encode_stream,
    epochs,
    make_encoder,
    ordered_rows,
    read_rows,
    rows_per_step,
    run_steps,
    token_order,
    with_replay,
)
from .encoding import Encoder, train_tokenizer
from .module import RecipeModule, adapted_layers, anchor_of, use_fp32_attention, with_lora
from .plan import Plan, make_plan, timed
from .progress import LossHistory, loss_plot
from .recipe import learning_rate, mean_exits, resolve_recipe
from .sharding import gather_whole

_PACKED = "documents are packed into whole rows; attention stays within a document"
_STREAMED = "streaming: `resume` reads past the rows already seen, and is exact only if they come in the same order again"


class WholeModel:
    """A run that `prepare` has loaded and planned."""

    def __init__(self, config: FinetuneConfig, device: torch.device, resume: ResumePoint | None) -> None:
        _require_output(config)
        copy = config.retention.anchor_weights
        require(copy != "int8" or device.type == "cpu", "anchor_weights", "bf16 if `device` is not cpu", copy)
        rows, held_out = read_rows(config)
        if config.regime == "scratch":
            tokenizer = None if config.vocab_size is None else train_tokenizer(rows, config.vocab_size)
            self.trainable = blank(config.model, config.seed, tokenizer)
        else:
            self.trainable = for_training(config.model, "cpu", "fp32")
        self.dtype = stored_dtype(config.model)  # of the saved weights
        encoder = make_encoder(config, self.trainable, rows)
        self.template = encoder.template
        self.data = encode_stream(config.data, encoder, config.seed) if config.streaming else encode_rows(rows, encoder)
        self.held_out = None if config.validation is None else encode_rows(held_out, encoder)
        self.plan = self._planned(config, device, encoder, resume)
        _require_disk(self.plan, self.dtype)
        self.module = _module(self.plan, self.trainable)
        seen = self.data.seen
        longest = sorted(seen, key=lambda row: -len(row["input_ids"]))[: config.batch_size]
        self.plan = timed(self.plan, self.module, longest, self.data.tokens / len(seen))
        self.order = token_order(self.data, self.trainable.backend.spec.vocab)

    def _planned(self, config: FinetuneConfig, device: torch.device, encoder: Encoder, resume: ResumePoint | None) -> Plan:
        spec, data, kept = self.trainable.backend.spec, self.data, config.retention
        recipe = resolve_recipe(config.recipe, config.regime, spec.parameters, spec.layers, spec.vocab)
        steps, original, replay = run_steps(config, len(data.seen)), None, None
        if kept.anchor or kept.replay or config.lora_rank:
            original = fingerprint(spec, self.trainable.model.get_parameter)
            replay = plan_replay(config, original, data, encoder, str(device), steps) if kept.replay else None
        resolved = asdict(recipe) | {"original": original, "tokens": data.tokens, "data_digest": data.digest}
        if replay is not None:
            resolved |= {"replay_tokens": replay.how.tokens, "replayed": replay.journal.name}
        return make_plan(
            config,
            device,
            spec,
            resume,
            resolved,
            notes=(_PACKED,) * encoder.pack + (_STREAMED,) * config.streaming,
            lr=config.lr or learning_rate(config.regime, spec.parameters),
            max_length=encoder.max_length,
            steps=steps,
            rows=None if config.streaming else len(data.seen),
            held_out=0 if self.held_out is None else len(self.held_out.seen),
            tokens=data.tokens,
            truncated=sum(row["truncated"] for row in data.seen),
            left_out=data.left_out,
            recipe=recipe,
            exits_per_step=mean_exits(recipe, steps, spec.layers),
            adapted_layers=adapted_layers(config, recipe, spec.layers),
            replay=replay,
        )

    def rows(self, stage: Callable[[str, int], Callable[[int], None]]) -> tuple[Any, Any]:
        """(the rows of the run in their order, the held-out rows).

        Batches have rows of similar length, with those of a replay among them; a stream is taken as it comes.
        """
        rows, plan, held_out = self.data.rows, self.plan, None if self.held_out is None else self.held_out.rows
        if isinstance(rows, StreamedRows):
            return rows, held_out
        lengths = [len(row["input_ids"]) for row in rows]
        ordered = ordered_rows(lengths, data_rows(plan.config), plan.steps, plan.config.seed, rows.__getitem__)
        if plan.replay is None:
            return ordered, held_out
        texts = plan.replay.texts(stage("replay texts", len(plan.replay.starts)))
        return with_replay(ordered, texts, plan.replay.rows, rows_per_step(plan.config)), held_out

    def save(self, history: LossHistory, first: bool) -> tuple[CheckpointInfo, list[str]]:
        """Writes the model in the `first` process. Returns its info with the last losses of every exit, and warnings."""
        plan, config, warnings = self.plan, self.plan.config, []
        if config.fsdp:
            gather_whole(self.module, keep=first)
        details = {
            "base_model": config.model,
            "config": _resolved(plan),
            "steps": plan.steps,
            "rows": plan.rows,
            "final_losses": {str(layer): loss for layer, loss in history.latest.items()},
            "validation_losses": {str(layer): loss for layer, loss in history.validated.items()},
            "validation_rows": None if self.held_out is None else self.held_out.digest,
            "versions": {name: version(name) for name in ("layerskip", "torch", "transformers")},
        }
        info = CheckpointInfo(prompt_template=self.template.text, system=self.template.system, details=details)
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


def _resolved(plan: Plan) -> dict[str, Any]:
    """The fields of a config, with the run's values in place of None, as they are read back from JSON."""
    config, replay = plan.config, plan.replay
    assert plan.recipe is not None
    found = asdict(config) | {"recipe": asdict(plan.recipe), "lr": plan.lr, "max_length": plan.max_length}
    found["epochs"] = epochs(config)
    if replay is not None:
        found["retention"]["replay_tokens"] = replay.how.tokens
    fields: dict[str, Any] = json.loads(json.dumps(found))
    return fields


def _require_output(config: FinetuneConfig) -> None:
    """Raises ConfigError for an output that must not be replaced, such as the model that a kept adapter belongs to."""
    refuse_overwrite(config.output, config.overwrite, RUN_FILES)
    if not config.lora_keep:
        return
    adapters, below = adapters_of(config.model)
    for base in (*adapters, below):
        if Path(base).is_dir() and Path(config.output).is_dir() and os.path.samefile(base, config.output):
            raise ConfigError(f"`lora_keep`: the adapter needs its base {base}, which `output` {config.output} would replace")


def _require_disk(plan: Plan, dtype: torch.dtype) -> None:
    """Raises CheckpointError where the saved model and the checkpoints, of weights and two moments in fp32, do not fit.

    There is one checkpoint more than are kept, while it is written. With LoRA they are small.
    """
    every = 0 if plan.config.lora_rank else plan.config.save_steps
    checkpoints = min(KEPT + 1, plan.steps // every) if every else 0
    needed = plan.parameters * (dtype.itemsize + 12 * checkpoints)
    require_disk(checkpoints_folder(plan.config.output), needed, "the model and the checkpoints of its run")
