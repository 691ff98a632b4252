"""The baselines: transformers' decoders at the same settings, our self-speculation without exit-state reuse, llama.cpp."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from ...checkpoint.loaded import Decoder, Trainable
from ...checkpoint.open import for_training
from ...checkpoint.transformers_read import quiet_transformers
from ...config.decoding import DecodingConfig
from ...config.evaluation import TRANSFORMERS_BASELINES, BenchConfig
from ...decoding import DecodeStats, Stopping, StopReason, StopScanner, decode, step_counts
from ...errors import ConfigError, LayerSkipError
from ...model import TransformersBackend
from ..outputs import Output
from ..results import Step
from .llama_cpp import NAME, llama_cpp
from .runs import Baseline, decode_timed

_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class WithoutReuse:
    """Self-speculation whose verifier recomputes the layers below the exit instead of reusing the drafts' exit states."""

    decoding: DecodingConfig
    strategy: str = "no-reuse"

    @property
    def exit_layer(self) -> int | None:
        return self.decoding.exit_layer

    @property
    def num_draft_tokens(self) -> int:
        return self.decoding.num_draft_tokens

    @property
    def max_new_tokens(self) -> int:
        return self.decoding.max_new_tokens

    def limited(self, max_new_tokens: int) -> "WithoutReuse":
        return replace(self, decoding=replace(self.decoding, max_new_tokens=max_new_tokens))

    def run(self, loaded: Decoder, prompt_ids: list[int]) -> Output:
        ends = loaded.ends(self.decoding.stop)
        decoding = decode(loaded.backend, prompt_ids, self.decoding, ends, loaded.detokenize, reuse_exit_states=False)
        return decode_timed(decoding)

    def run_batch(self, loaded: Decoder, prompts: list[list[int]]) -> list[Output]:
        return [self.run(loaded, prompt) for prompt in prompts]


@dataclass(frozen=True)
class TransformersGenerate:
    """transformers' greedy `generate`, with extra `options` of its generation config, or with an assistant model that drafts.

    Every round drafts `num_draft_tokens`: by default transformers changes the number between rounds, and stops a draft below
    a confidence of 0.4.
    """

    strategy: str
    model: Any
    max_new_tokens: int
    exit_layer: int | None = None
    num_draft_tokens: int | None = None
    stop: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    assistant: Any = None

    def limited(self, max_new_tokens: int) -> "TransformersGenerate":
        return replace(self, max_new_tokens=max_new_tokens)

    def run(self, loaded: Decoder, prompt_ids: list[int]) -> Output:
        """Raises LayerSkipError when the prompt does not fit, or transformers fails."""
        room = loaded.backend.max_positions - len(prompt_ids)
        if room < 1:
            raise ConfigError(f"the prompt must be at most {loaded.backend.max_positions - 1} tokens, got {len(prompt_ids)}")
        scanner = self._scanner(loaded, prompt_ids)
        ids = torch.tensor([prompt_ids], device=self.model.device)
        timer = StepTimer(self.model, len(prompt_ids), scanner)
        with timer, suppress(StopString):
            self._generate(loaded, ids, torch.ones_like(ids), scanner.room, streamer=timer, assistant_model=self.assistant)
        return timer.output()

    def run_batch(self, loaded: Decoder, prompts: list[list[int]]) -> list[Output]:
        """One batch, padded on the left, unless the method drafts: transformers drafts for a single prompt only."""
        if self.assistant is not None or self.options:
            return [self.run(loaded, prompt) for prompt in prompts]
        longest, pad = max(map(len, prompts)), _pad(loaded)
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=ids.device)
        rows = StopRows([self._scanner(loaded, prompt) for prompt in prompts])
        self._generate(loaded, ids, mask, max(scanner.room for scanner in rows.scanners), stopping_criteria=[rows])
        return [
            Output(tuple(new), "", (), DecodeStats(1, len(prompt)) + step_counts(0, 0, len(new)), scanner.reason)
            for prompt, new, scanner in zip(prompts, rows.ids, rows.scanners, strict=True)
        ]

    def _scanner(self, loaded: Decoder, prompt_ids: list[int]) -> StopScanner:
        room = loaded.backend.max_positions - len(prompt_ids)
        return StopScanner(Stopping(loaded.ends(self.stop), self.stop, self.max_new_tokens), room, loaded.detokenize)

    def _generate(self, loaded: Decoder, ids: torch.Tensor, mask: torch.Tensor, max_new_tokens: int, **keywords: Any) -> None:
        """Greedy, from ids (B, T) and their mask. Raises LayerSkipError when transformers fails."""
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(loaded.ends(self.stop)) or None,
            pad_token_id=_pad(loaded),
            num_assistant_tokens=self.num_draft_tokens or 1,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
            **self.options,
        )
        try:
            with (
                quiet_transformers(),
                _generation_config(self.model, config),
                _generation_config(self.assistant or self.model, config),
            ):
                self.model.generate(ids, generation_config=config, attention_mask=mask, **keywords)
        except (torch.OutOfMemoryError, KeyboardInterrupt, StopString):
            raise
        except Exception as error:  # any error of transformers fails this prompt, not the run
            raise LayerSkipError(f"transformers ({self.strategy}): {error or type(error).__name__}") from error


def _pad(loaded: Decoder) -> int:
    return min(loaded.eos_ids, default=0)


def load_baselines(loaded: Decoder, config: BenchConfig, speculative: DecodingConfig) -> list[Baseline]:
    """The config's baselines, with the exit, draft length and limits of a `speculative` decoding.

    Not draft-and-verify, which is a DecodingConfig. transformers' decoders run on transformers' own layers. If `loaded` has
    repacked weights, the model is read again for them.

    Raises:
        ConfigError: the draft model has another tokenizer, transformers ignores an early exit of this architecture, or
            llama.cpp is missing or cannot run the file.
        CheckpointError: a model cannot be read.
    """
    exit_layer, drafts = speculative.exit_layer, speculative.num_draft_tokens
    limit, stop = speculative.max_new_tokens, speculative.stop

    def transformers_model(name: str) -> Trainable:
        device, dtype = str(loaded.backend.device), _DTYPE_NAMES.get(loaded.backend.dtype, "auto")
        return for_training(name, device, dtype)

    def make(name: str) -> Baseline:
        if name == "no-reuse":
            return WithoutReuse(speculative)
        if name == NAME:
            return llama_cpp(loaded, config.gguf or "", limit, stop)
        if name == "assistant-early-exit":
            require_early_exit(model)
            return TransformersGenerate(name, model, limit, exit_layer, drafts, stop, {"assistant_early_exit": exit_layer})
        if name == "prompt-lookup":
            return TransformersGenerate(name, model, limit, None, drafts, stop, {"prompt_lookup_num_tokens": drafts})
        if name == "draft-model":
            return TransformersGenerate(
                name, model, limit, None, drafts, stop, assistant=_draft_model(config.draft_model or "")
            )
        return TransformersGenerate(name, model, limit, stop=stop)

    def _draft_model(name: str) -> Any:
        draft = transformers_model(name)
        if draft.tokenizer.get_vocab() != vocabulary:
            raise ConfigError(f"`draft_model` must have the tokenizer of {loaded.name}; {name} has another")
        return draft.model

    model, vocabulary = None, {}
    if isinstance(loaded.backend, TransformersBackend):
        model, vocabulary = loaded.backend.model, loaded.tokenizer.get_vocab()
    elif any(name in TRANSFORMERS_BASELINES for name in config.baselines):
        target = transformers_model(loaded.name)
        model, vocabulary = target.model, target.tokenizer.get_vocab()
    return [make(name) for name in config.baselines if name != "draft-and-verify"]


@torch.inference_mode()
def require_early_exit(model: Any) -> None:
    """Raises ConfigError unless a smaller `num_hidden_layers` makes this model run fewer layers.

    transformers implements early exit by lowering that number. Some architectures do not read it, and ignore the exit.
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
def _generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Sets `config` as the model's own for the duration.

    Otherwise transformers fills gaps with the checkpoint's recommendations (penalties, sampling). It also reads the number of
    drafts from the drafting model's own config, not from the one that `generate` is given.
    """
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before


class StopString(Exception):
    """Raised in `generate` by its streamer: transformers' own handling of stop strings misses those inside a round."""


class StopRows(StoppingCriteria):  # type: ignore[misc]
    """Ends each row of a batch where our own decoding ends it, and collects its tokens up to there."""

    def __init__(self, scanners: list[StopScanner]) -> None:
        self.scanners = scanners
        self.ids: list[list[int]] = [[] for _ in scanners]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        for ids, scanner, token in zip(self.ids, self.scanners, input_ids[:, -1].tolist(), strict=True):
            if scanner.reason is None:
                scanner.cut([token])
                ids.append(token)
        return torch.tensor([scanner.reason is not None for scanner in self.scanners], device=input_ids.device)


class StepTimer(BaseStreamer):  # type: ignore[misc]
    """Counts and times the steps of `generate`: as its streamer, and through hooks around the target's forward passes.

    A pass over K+1 tokens after those known so far verifies K drafts. A pass with fewer layers is an early-exit draft. The
    output ends where the scanner ends our own decoding.
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

    def __enter__(self) -> "StepTimer":
        self._hooks = [
            self._model.register_forward_pre_hook(self._before, with_kwargs=True),
            self._model.register_forward_hook(self._after),
        ]
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._model.config.num_hidden_layers = self._num_layers  # a failed early-exit draft leaves it at the exit

    def put(self, value: torch.Tensor) -> None:
        """Receives the prompt first, then the tokens of each step, on the CPU."""
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
            raise StopString
        self._started = time.perf_counter()

    def end(self) -> None:
        """Called by `generate` after the last token."""

    def output(self) -> Output:
        return Output(tuple(self._ids), "", tuple(self._steps), sum(self._stats, DecodeStats()), self._finish_reason)

    def _before(self, _: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self._model.config.num_hidden_layers == self._num_layers:
            rows = (keywords["input_ids"] if "input_ids" in keywords else args[0]).shape[1]
            self._drafted = rows - (1 if self._steps else self._prompt_tokens)
            self._target_started = time.perf_counter()

    def _after(self, *_: Any) -> None:
        if self._model.config.num_hidden_layers == self._num_layers:
            self._target_ended = time.perf_counter()
