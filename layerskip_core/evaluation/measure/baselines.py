"""What self-speculation has to beat: transformers' own decoders at the same settings, and this engine without its reuse."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from ...checkpoint.load import for_training
from ...checkpoint.loaded import Decoder, Trainable
from ...checkpoint.quiet import quiet_transformers
from ...config.decoding import DecodingConfig
from ...config.evaluation import BenchConfig
from ...decoding import DecodeStats, StopReason, decode
from ...decoding.loop import step_counts
from ...decoding.stopping import Stopping, StopScanner
from ...errors import ConfigError, LayerSkipError
from ...model import GenericBackend
from ..outputs import Step, Timed
from .runner import Peer, timed

_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class WithoutReuse:
    """Self-speculation whose verifier recomputes the layers below the exit instead of taking over the drafts' exit states."""

    exit_layer: int
    num_draft_tokens: int
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    strategy: str = "no-reuse"

    def run(self, loaded: Decoder, prompt_ids: list[int]) -> Timed:
        drafts, limit = self.num_draft_tokens, self.max_new_tokens
        config = DecodingConfig("self-speculative", self.exit_layer, drafts, limit, stop=self.stop)
        return timed(decode(loaded.backend, prompt_ids, config, loaded.eos_ids, loaded.detokenize, reuse_exit_states=False))

    def run_together(self, loaded: Decoder, prompts: list[list[int]]) -> list[Timed]:
        return [self.run(loaded, prompt) for prompt in prompts]


@dataclass(frozen=True)
class Generate:
    """transformers' greedy `generate`, with what `options` adds to its generation config, or an assistant model to draft.

    Drafting is held to `num_draft_tokens` a round: by default transformers changes the number from round to round, and stops
    a draft below a confidence of 0.4.
    """

    strategy: str
    model: Any
    max_new_tokens: int
    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    stop: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    assistant: Any = None

    def run(self, loaded: Decoder, prompt_ids: list[int]) -> Timed:
        """Raises LayerSkipError when the prompt does not fit, or transformers fails."""
        room = loaded.backend.max_positions - len(prompt_ids)
        if room < 1:
            raise ConfigError(f"the prompt must be at most {loaded.backend.max_positions - 1} tokens, got {len(prompt_ids)}")
        scanner = self._scanner(loaded, prompt_ids)
        ids = torch.tensor([prompt_ids], device=self.model.device)
        watch = _Watch(self.model, len(prompt_ids), scanner)
        with watch, suppress(_StopString):
            self._generate(loaded, ids, torch.ones_like(ids), scanner.room, streamer=watch, assistant_model=self.assistant)
        return watch.timed()

    def run_together(self, loaded: Decoder, prompts: list[list[int]]) -> list[Timed]:
        """One batch, padded on the left, where nothing drafts: transformers drafts for one prompt only."""
        if self.assistant is not None or self.options:
            return [self.run(loaded, prompt) for prompt in prompts]
        longest, pad = max(map(len, prompts)), _pad(loaded)
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=ids.device)
        ends = _Ends([self._scanner(loaded, prompt) for prompt in prompts])
        self._generate(loaded, ids, mask, max(scanner.room for scanner in ends.scanners), stopping_criteria=[ends])
        return [
            Timed(tuple(found), (), step_counts(0, 0, len(found), sequences=1, prompt_tokens=len(prompt)), scanner.reason)
            for prompt, found, scanner in zip(prompts, ends.ids, ends.scanners, strict=True)
        ]

    def _scanner(self, loaded: Decoder, prompt_ids: list[int]) -> StopScanner:
        room = loaded.backend.max_positions - len(prompt_ids)
        return StopScanner(Stopping(loaded.eos_ids, self.stop, self.max_new_tokens), room, loaded.detokenize)

    def _generate(self, loaded: Decoder, ids: torch.Tensor, mask: torch.Tensor, max_new_tokens: int, **how: Any) -> None:
        """Greedy, from ids (B, T) with their mask. Raises LayerSkipError when transformers fails."""
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(loaded.eos_ids) or None,
            pad_token_id=_pad(loaded),
            num_assistant_tokens=self.num_draft_tokens or 1,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
            **self.options,
        )
        try:
            with (
                quiet_transformers(),
                _own_settings(self.model, config),
                _own_settings(self.assistant or self.model, config),
            ):
                self.model.generate(ids, generation_config=config, attention_mask=mask, **how)
        except (torch.OutOfMemoryError, KeyboardInterrupt, _StopString):
            raise
        except Exception as error:  # whatever transformers raises is this prompt's failure, not the end of the run
            raise LayerSkipError(f"transformers ({self.strategy}): {error or type(error).__name__}") from error


class _StopString(Exception):
    """Raised in `generate` by its streamer, for what transformers does about stop strings misses those within a round."""


class _Ends(StoppingCriteria):  # type: ignore[misc]
    """Ends each row of a batch where this engine's own decoding ends it, and keeps its tokens up to there."""

    def __init__(self, scanners: list[StopScanner]) -> None:
        self.scanners = scanners
        self.ids: list[list[int]] = [[] for _ in scanners]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        for found, scanner, token in zip(self.ids, self.scanners, input_ids[:, -1].tolist(), strict=True):
            if scanner.reason is None:
                scanner.cut([token])
                found.append(token)
        return torch.tensor([scanner.reason is not None for scanner in self.scanners], device=input_ids.device)


class _Watch(BaseStreamer):  # type: ignore[misc]
    """Counts and times what `generate` does: as its streamer, and through hooks around the forward passes of the target.

    A pass over K+1 rows behind the tokens known so far verifies K drafts. A pass with fewer layers is an early-exit draft. The
    output ends where the scanner says, the one that this engine's own decoding ends by.
    """

    def __init__(self, model: Any, prompt_tokens: int, scanner: StopScanner) -> None:
        self._scanner = scanner
        self._finish_reason: StopReason | None = None
        self._model = model
        self._num_layers = int(model.config.num_hidden_layers)
        self._prompt_tokens = prompt_tokens
        self._prompt_seen = False
        self._ids: list[int] = []
        self._steps: list[Step] = []
        self._stats: list[DecodeStats] = []
        self._drafted = 0
        self._started = self._target_started = self._target_ended = 0.0

    def __enter__(self) -> "_Watch":
        self._hooks = [
            self._model.register_forward_pre_hook(self._before, with_kwargs=True),
            self._model.register_forward_hook(self._after),
        ]
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._model.config.num_hidden_layers = self._num_layers  # which a failed early-exit draft leaves at the exit

    def put(self, value: torch.Tensor) -> None:
        """The prompt at first, then the tokens of each step, on the CPU."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        now = time.perf_counter()
        prefill = not self._steps
        tokens = value.flatten().tolist()
        count, self._finish_reason = self._scanner.cut(tokens)
        tokens = tokens[:count]
        accepted = min(len(value.flatten()) - 1, count, self._drafted)
        target_seconds = self._target_ended - self._target_started
        self._stats.append(
            DecodeStats(
                sequences=int(prefill),
                prompt_tokens=self._prompt_tokens if prefill else 0,
                new_tokens=len(tokens),
                drafted=self._drafted,
                accepted=accepted,
                rounds=int(self._drafted > 0),
                prefill_seconds=target_seconds if prefill else 0.0,
                draft_seconds=self._target_started - self._started if self._drafted else 0.0,
                verify_seconds=0.0 if prefill else target_seconds,
                total_seconds=now - self._started,
                tested_by_position=(1,) * min(self._drafted, len(tokens)),
                accepted_by_position=(1,) * accepted,
            )
        )
        self._steps.append(Step(len(tokens), now - self._started))
        self._ids += tokens
        if self._finish_reason == "stop":
            raise _StopString
        self._started = time.perf_counter()

    def end(self) -> None:
        """Called by `generate` behind the last token."""

    def timed(self) -> Timed:
        return Timed(tuple(self._ids), tuple(self._steps), sum(self._stats, DecodeStats()), self._finish_reason)

    def _before(self, _: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self._model.config.num_hidden_layers == self._num_layers:
            rows = (keywords["input_ids"] if "input_ids" in keywords else args[0]).shape[1]
            self._drafted = rows - (1 if self._steps else self._prompt_tokens)
            self._target_started = time.perf_counter()

    def _after(self, *_: Any) -> None:
        if self._model.config.num_hidden_layers == self._num_layers:
            self._target_ended = time.perf_counter()


def _pad(loaded: Decoder) -> int:
    return min(loaded.eos_ids, default=0)


def load_baselines(loaded: Decoder, config: BenchConfig, plain: DecodingConfig) -> list[Peer]:
    """The config's baselines, whose exit and draft length must be filled in, with the limits of the `plain` decoding.

    They run on transformers' own layers; where `loaded` has repacked the weights, they are read again.

    Raises:
        ConfigError: the draft model has another tokenizer, or transformers ignores an early exit of this architecture.
        CheckpointError: a model cannot be read.
    """
    exit_layer, drafts, limit, stop = config.exit_layer, config.num_draft_tokens, plain.max_new_tokens, plain.stop
    assert exit_layer is not None and drafts is not None

    def transformers_model(name: str) -> Trainable:
        device, dtype = str(loaded.backend.device), _DTYPE_NAMES.get(loaded.backend.dtype, "auto")
        return for_training(name, device, dtype)

    def make(name: str) -> Peer:
        if name == "no-reuse":
            return WithoutReuse(exit_layer, drafts, limit, stop)
        if name == "assistant-early-exit":
            require_early_exit(model)
            return Generate(name, model, limit, exit_layer, drafts, stop, {"assistant_early_exit": exit_layer})
        if name == "prompt-lookup":
            return Generate(name, model, limit, None, drafts, stop, {"prompt_lookup_num_tokens": drafts})
        if name == "draft-model":
            assert config.draft_model is not None
            return Generate(name, model, limit, None, drafts, stop, assistant=_draft_model(config.draft_model))
        return Generate(name, model, limit, stop=stop)

    def _draft_model(name: str) -> Any:
        draft = transformers_model(name)
        if draft.tokenizer.get_vocab() != vocabulary:
            raise ConfigError(f"`draft_model` must have the tokenizer of {loaded.name}; {name} has another")
        return draft.model

    model, vocabulary = None, {}
    if isinstance(loaded.backend, GenericBackend):
        model, vocabulary = loaded.backend.model, loaded.tokenizer.get_vocab()
    elif any(name != "no-reuse" for name in config.baselines):
        target = transformers_model(loaded.name)
        model, vocabulary = target.model, target.tokenizer.get_vocab()
    return [make(name) for name in config.baselines]


@torch.inference_mode()
def require_early_exit(model: Any) -> None:
    """Raises ConfigError unless a smaller `num_hidden_layers` really makes this model run fewer layers.

    transformers' early exit is no more than that number, and an architecture that does not slice by it ignores the exit.
    """
    layers, calls = model.config.num_hidden_layers, []
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in model.model.layers]
    try:
        model.config.num_hidden_layers = 1
        model(torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=False)
    finally:
        model.config.num_hidden_layers = layers
        for hook in hooks:
            hook.remove()
    if len(calls) != 1:
        raise ConfigError(
            f"`baselines` assistant-early-exit: transformers ignores the early exit of {model.config.model_type} models; "
            "leave that baseline out"
        )


@contextmanager
def _own_settings(model: Any, config: GenerationConfig) -> Iterator[None]:
    """`config` as the model's own for the while: what a checkpoint recommends (penalties, sampling) would fill gaps in it, and
    the number of drafts is read from the drafting model's own, not from what `generate` is given."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before
