"""The baselines: transformers' decoders at the same settings, our self-speculation without exit-state reuse, llama.cpp."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from ...checkpoint.loaded import Decoder, Trainable
from ...checkpoint.open import for_training
from ...checkpoint.transformers_read import quiet_transformers
from ...config.decoding import DecodingConfig
from ...config.evaluation import TRANSFORMERS_BASELINES, BenchConfig
from ...decoding import DecodeStats, Stopping, StopScanner, step_counts
from ...errors import ConfigError, LayerSkipError
from ...model import TransformersBackend
from ..outputs import Output
from ..results import Step
from .llama_cpp import LlamaCpp
from .measure import Baselines, own_outputs

_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def load_baselines(loaded: Decoder, config: BenchConfig, speculative: DecodingConfig) -> Baselines:
    """The config's baselines by name, except draft-and-verify, which is a strategy of ours.

    They take the exit, draft length and limits of the setting that they answer with: the `speculative` one under their name.
    transformers' decoders run on transformers' own layers; if `loaded` has repacked weights, the model is read again for them.

    Raises:
        ConfigError: the draft model has another tokenizer, transformers ignores an early exit of this architecture, or
            llama.cpp is missing or cannot run the file.
        CheckpointError: a model cannot be read.
    """

    def transformers_model(name: str) -> Trainable:
        return for_training(name, str(loaded.backend.device), _DTYPE_NAMES.get(loaded.backend.dtype, "auto"))

    found: dict[str, Any] = {}
    model, vocabulary = None, {}
    if isinstance(loaded.backend, TransformersBackend):
        model, vocabulary = loaded.backend.model, loaded.tokenizer.get_vocab()
    elif any(name in TRANSFORMERS_BASELINES for name in config.baselines):
        target = transformers_model(loaded.name)
        model, vocabulary = target.model, target.tokenizer.get_vocab()
    for name in config.baselines:
        match name:
            case "no-reuse":
                found[name] = without_reuse
            case "llama.cpp":
                found[name] = LlamaCpp(loaded, config.gguf or "")
            case "transformers":
                found[name] = TransformersGenerate(model)
            case "assistant-early-exit":
                require_early_exit(model)
                found[name] = TransformersGenerate(model, {"assistant_early_exit": speculative.exit_layer})
            case "prompt-lookup":
                found[name] = TransformersGenerate(model, {"prompt_lookup_num_tokens": speculative.num_draft_tokens})
            case "draft-model":
                draft = transformers_model(config.draft_model or "")
                if draft.tokenizer.get_vocab() != vocabulary:
                    raise ConfigError(f"`draft_model` must have the tokenizer of {loaded.name}; {draft.name} has another")
                found[name] = TransformersGenerate(model, assistant=draft.model)
    return found


def without_reuse(loaded: Decoder, prompts: list[list[int]], setting: DecodingConfig) -> list[Output]:
    """Self-speculation whose verifier recomputes the layers below the exit instead of reusing the drafts' exit states."""
    ours = replace(setting, strategy="self-speculative")
    return [output for ids in prompts for output in own_outputs(loaded, [ids], ours, reuse_exit_states=False)]


class TransformersGenerate:
    """transformers' greedy `generate`, with `options` of its generation config, or with an assistant model that drafts.

    Every round drafts the setting's `num_draft_tokens`: by default transformers changes the number between rounds, and stops a
    draft below a confidence of 0.4.
    """

    def __init__(self, model: Any, options: Mapping[str, Any] | None = None, assistant: Any = None) -> None:
        self._model, self._options, self._assistant = model, options or {}, assistant

    def __call__(self, loaded: Decoder, prompts: list[list[int]], setting: DecodingConfig) -> list[Output]:
        """One batch, padded on the left, unless transformers drafts, which it does for a single prompt only.

        Raises LayerSkipError when transformers fails.
        """
        ends, limit = loaded.ends(setting.stop), setting.max_new_tokens
        rooms = [loaded.backend.max_positions - len(ids) for ids in prompts]
        scanners = [StopScanner(Stopping(ends, setting.stop, limit), room, loaded.detokenize) for room in rooms]
        if len(prompts) > 1 and (self._options or self._assistant is not None):
            return [output for ids in prompts for output in self(loaded, [ids], setting)]
        if len(prompts) > 1:
            rows = StopRows(scanners)
            self._generate(loaded, prompts, setting, scanners, stopping_criteria=[rows])
            return [
                Output(tuple(new), "", (), DecodeStats(1, len(ids)) + step_counts(0, 0, len(new)), scanner.reason)
                for ids, new, scanner in zip(prompts, rows.ids, scanners, strict=True)
            ]
        timer = StepTimer(self._model, len(prompts[0]), scanners[0])
        with timer, suppress(StopString):
            self._generate(loaded, prompts, setting, scanners, streamer=timer, assistant_model=self._assistant)
        return [Output(tuple(timer.ids), "", tuple(timer.steps), timer.stats, scanners[0].reason)]

    def _generate(
        self,
        loaded: Decoder,
        prompts: list[list[int]],
        setting: DecodingConfig,
        scanners: list[StopScanner],
        **keywords: Any,
    ) -> None:
        longest, pad = max(map(len, prompts)), min(loaded.eos_ids, default=0)
        ids = torch.tensor([[pad] * (longest - len(each)) + each for each in prompts], device=self._model.device)
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts], device=ids.device)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max(scanner.room for scanner in scanners),
            eos_token_id=sorted(loaded.ends(setting.stop)) or None,
            pad_token_id=pad,
            num_assistant_tokens=setting.num_draft_tokens,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
            **self._options,
        )
        try:
            with ExitStack() as during:
                during.enter_context(quiet_transformers())
                for model in (self._model, self._assistant):
                    if model is not None:
                        during.enter_context(_generation_config(model, config))
                self._model.generate(ids, generation_config=config, attention_mask=mask, **keywords)
        except (torch.OutOfMemoryError, StopString):
            raise
        except Exception as error:  # any error of transformers fails this prompt, not the run
            raise LayerSkipError(f"transformers ({setting.strategy}): {error or type(error).__name__}") from error


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
        self.ids: list[int] = []
        self.steps: list[Step] = []
        self.stats = DecodeStats(sequences=1, prompt_tokens=prompt_tokens)
        self._model, self._num_layers = model, int(model.config.num_hidden_layers)
        self._scanner = scanner
        self._prompt_seen = False
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
        seconds, tokens = time.perf_counter() - self._started, value.flatten().tolist()
        count, reason = self._scanner.cut(tokens)
        phase = "verify_seconds" if self.steps else "prefill_seconds"
        drafting = self._target_started - self._started if self._drafted else 0.0
        times: dict[str, Any] = {
            phase: self._target_ended - self._target_started,
            "draft_seconds": drafting,
            "total_seconds": seconds,
        }
        self.stats += step_counts(self._drafted, min(len(tokens) - 1, self._drafted), count) + DecodeStats(**times)
        self.steps.append(Step(count, seconds))
        self.ids += tokens[:count]
        if reason == "stop":
            raise StopString
        self._started = time.perf_counter()

    def end(self) -> None:
        """Called by `generate` after the last token."""

    def _before(self, _: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self._model.config.num_hidden_layers == self._num_layers:
            rows = (keywords["input_ids"] if "input_ids" in keywords else args[0]).shape[1]
            self._drafted = rows - (1 if self.steps else self.stats.prompt_tokens)
            self._target_started = time.perf_counter()

    def _after(self, *_: Any) -> None:
        if self._model.config.num_hidden_layers == self._num_layers:
            self._target_ended = time.perf_counter()
