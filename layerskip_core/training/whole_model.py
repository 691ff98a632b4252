"""A run that trains a model, or adapters on it, under the recipe: its plan, its rows and the model that it saves."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from ..checkpoint.beside import fingerprint
from ..checkpoint.info import CheckpointInfo
from ..checkpoint.loaded import Trainable
from ..checkpoint.locate import adapters_of
from ..checkpoint.open import blank, for_decoding, for_training
from ..checkpoint.save import RUN_FILES, refuse_overwrite, save_checkpoint
from ..checkpoint.transformers_read import stored_dtype
from ..config.model import PackingConfig
from ..config.training import FinetuneConfig
from ..errors import ConfigError, first_line, require
from ..files import require_disk
from ..model.vocabulary import ORDER_FILE
from .answers import plan_replay
from .checkpoints import KEPT, ResumePoint, checkpoints_folder
from .data import (
    StreamedRows,
    encode_rows,
    encode_stream,
    epochs,
    make_encoder,
    ordered,
    read_rows,
    run_steps,
    token_order,
)
from .encoding import Encoder, train_tokenizer
from .module import Anchor, RecipeModule, adapted_layers, use_fp32_attention, with_lora
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
        plan = self._planned(config, device, encoder, resume)
        # Of weights and two moments in fp32; one checkpoint more than are kept, while it is written. With LoRA they are small.
        every = 0 if config.lora_rank else config.save_steps
        checkpoints = min(KEPT + 1, plan.steps // every) if every else 0
        needed = plan.parameters * (self.dtype.itemsize + 12 * checkpoints)
        require_disk(checkpoints_folder(config.output), needed, "the model and the checkpoints of its run")
        self.module = _module(plan, self.trainable)
        seen = self.data.seen
        longest = sorted(seen, key=lambda row: -len(row["input_ids"]))[: config.batch_size]
        self.plan = timed(plan, self.module, longest, self.data.tokens / len(seen))
        self.order = token_order(self.data, self.trainable.backend.spec.vocab)

    def _planned(self, config: FinetuneConfig, device: torch.device, encoder: Encoder, resume: ResumePoint | None) -> Plan:
        spec, data, kept, replay = self.trainable.backend.spec, self.data, config.retention, None
        recipe = resolve_recipe(config.recipe, config.regime, spec.parameters, spec.layers, spec.vocab)
        steps, lr = run_steps(config, len(data.seen)), config.lr or learning_rate(config.regime, spec.parameters)
        config = replace(config, lr=lr, max_length=encoder.max_length)
        facts = asdict(recipe) | {"original": None, "tokens": data.tokens, "data_digest": data.digest}
        if kept.anchor or kept.replay or config.lora_rank:
            facts["original"] = original = fingerprint(spec, self.trainable.model.get_parameter)
            if kept.replay:
                replay = plan_replay(config, original, data, encoder, str(device), steps)
                config = replace(config, retention=replace(kept, replay_tokens=replay.how.tokens))
                facts["replayed"] = replay.journal.name
        return make_plan(
            config,
            device,
            spec,
            resume,
            (_PACKED,) * encoder.pack + (_STREAMED,) * config.streaming,
            facts,
            steps=steps,
            rows=None if config.streaming else len(data.seen),
            held_out=0 if self.held_out is None else len(self.held_out.seen),
            tokens=data.tokens,
            truncated=sum(row["truncated"] for row in data.seen),
            left_out=data.left_out,
            recipe=recipe,
            exits_per_step=mean_exits(recipe, steps, spec.layers),
            adapted_layers=adapted_layers(config, recipe, spec.layers),
            answers=replay,
        )

    def rows(self, progress: Callable[[str, int, int], None]) -> tuple[Any, Any]:
        """(the rows of the run in their order, the held-out rows).

        Batches have rows of similar length, with those of a replay among them; a stream is taken as it comes.
        """
        rows: Any = self.data.rows
        plan, held_out = self.plan, None if self.held_out is None else self.held_out.rows
        if isinstance(rows, StreamedRows):
            return rows, held_out
        lengths = [len(row["input_ids"]) for row in rows]
        texts: list[list[int]] = []
        if plan.answers is not None:
            starts, packed = plan.answers.prompts, "documents" in rows[0]
            answers = plan.answers.write(partial(progress, "replay texts", len(starts)))
            texts = [start + answer for start, answer in zip(starts, answers, strict=True)]
            rows = rows + [
                {"input_ids": text, "labels": text} | ({"documents": [0] * len(text)} if packed else {}) for text in texts
            ]
        return Subset(rows, ordered(plan.config, lengths, plan.steps, len(texts))), held_out

    def save(self, history: LossHistory, first: bool) -> tuple[CheckpointInfo, list[str]]:
        """Writes the model in the `first` process. Returns its info with the last losses of every exit, and warnings."""
        plan, config, warnings = self.plan, self.plan.config, []
        assert plan.recipe is not None
        if config.fsdp:
            gather_whole(self.module, keep=first)
        details = {
            "base_model": config.model,
            # As they are read back from JSON.
            "config": json.loads(json.dumps(asdict(config) | {"recipe": asdict(plan.recipe), "epochs": epochs(config)})),
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
    module, kept = RecipeModule(model, plan.recipe, config.seed, scratch, config.gradient_checkpointing), config.retention
    module.tokenizer = trainable.tokenizer
    if kept.anchor and config.lora_rank:
        module.anchor = Anchor(kept.anchor, module.backend, model)
    elif kept.anchor:  # read again, because the training may have been resumed
        packing = PackingConfig(quantize="int8") if kept.anchor_weights == "int8" else None
        module.anchor = Anchor(kept.anchor, for_decoding(config.model, plan.device, "bf16", packing).backend)
    return module


def _require_output(config: FinetuneConfig) -> None:
    """Raises ConfigError for an output that must not be replaced, such as the model that a kept adapter belongs to."""
    refuse_overwrite(config.output, config.overwrite, RUN_FILES)
    if not config.lora_keep:
        return
    adapters, below = adapters_of(config.model)
    for base in (*adapters, below):
        if Path(base).is_dir() and Path(config.output).is_dir() and os.path.samefile(base, config.output):
            raise ConfigError(f"`lora_keep`: the adapter needs its base {base}, which `output` {config.output} would replace")
