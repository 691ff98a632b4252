"""Baselines of a benchmark: transformers' decoders, llama.cpp, ours without reuse of exit states."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from ...checkpoint.folder import quiet_transformers
from ...checkpoint.gguf_read import GgufFile
from ...checkpoint.loaded import Decoder, Trainable
from ...checkpoint.open import for_training
from ...config.decoding import DecodingConfig
from ...config.evaluation import BenchConfig, with_transformers
from ...config.model import DTYPE_NAMES
from ...decoding.output import DecodeStats, StopScanner, step_counts
from ...errors import ConfigError, LayerSkipError
from ...model import TransformersBackend
from ..results import Output, Step
from .measuring import BaselineDecoder, own_output

_MOST_CONTEXT = 8192  # tokens of llama.cpp's KV cache: more would waste memory on every task here


def load_baselines(
    loaded: Decoder, config: BenchConfig, speculative: DecodingConfig
) -> dict[str, BaselineDecoder]:
    """The config's baselines by name, with exit and draft length of `speculative`. Raises
    ConfigError and CheckpointError.
    """

    backend = loaded.backend

    def transformers_model(name: str) -> Trainable:
        dtype = DTYPE_NAMES.get(str(backend.dtype).removeprefix("torch."), "auto")
        return for_training(name, str(backend.device), dtype)

    model = None
    vocabulary: dict[str, int] = {}
    if isinstance(backend, TransformersBackend):
        model = backend.model
        vocabulary = loaded.tokenizer.get_vocab()
    elif with_transformers(config.baselines):
        # The weights once more: ours are repacked
        target = transformers_model(loaded.name)
        model = target.model
        vocabulary = target.tokenizer.get_vocab()

    def assistant_model() -> BaselineDecoder:
        draft = transformers_model(config.packing.draft_model or "")
        if draft.tokenizer.get_vocab() != vocabulary:
            raise ConfigError(
                f"`draft_model` must have the tokenizer of {loaded.name}; {draft.name} has another"
            )
        return transformers_generate(model, assistant=draft.model)

    def early_exit() -> BaselineDecoder:
        require_early_exit(model)
        return transformers_generate(model, {"assistant_early_exit": speculative.exit_layer})

    lookup = {"prompt_lookup_num_tokens": speculative.num_draft_tokens}
    makers: dict[str, Callable[[], BaselineDecoder]] = {
        "no-reuse": lambda: without_reuse,
        "llama.cpp": lambda: llama_cpp(loaded, config.gguf or ""),
        "llama.cpp-lookup": lambda: llama_cpp(loaded, config.gguf or "", lookups=True),
        "transformers": lambda: transformers_generate(model),
        "assistant-early-exit": early_exit,
        "prompt-lookup": lambda: transformers_generate(model, lookup),
        "assistant-model": assistant_model,
    }
    return {name: makers[name]() for name in config.baselines}


def without_reuse(loaded: Decoder, prompt_ids: list[int], setting: DecodingConfig) -> Output:
    """Self-speculation whose verifier recomputes the layers below the exit instead of reusing the
    drafts' exit states.
    """
    return own_output(
        loaded, prompt_ids, replace(setting, strategy="self-speculative"), reuse_exit_states=False
    )


def transformers_generate(
    model: Any, options: Mapping[str, Any] | None = None, assistant: Any = None
) -> BaselineDecoder:
    """transformers' greedy `generate`, with `options` of its generation config, or with an
    assistant that drafts.
    """
    # Their own generation configs could set penalties or sampling
    models = [each for each in (model, assistant) if each is not None]

    def generate(loaded: Decoder, prompt_ids: list[int], setting: DecodingConfig) -> Output:
        """Raises LayerSkipError when transformers fails."""
        ends = loaded.ends(setting.stop)
        most = loaded.backend.spec.context - len(prompt_ids)
        scanner = StopScanner(ends, setting.stop, setting.max_new_tokens, most, loaded.detokenize)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=scanner.num_tokens_left,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(loaded.eos_ids, default=0),
            num_assistant_tokens=setting.num_draft_tokens,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
            **(options or {}),
        )
        ids = torch.tensor([prompt_ids], device=model.device)
        timer = StepTimer(model, len(prompt_ids), scanner)
        keywords = {
            "attention_mask": torch.ones_like(ids),
            "streamer": timer,
            "assistant_model": assistant,
        }
        own_configs = [each.generation_config for each in models]
        try:
            for each in models:
                each.generation_config = config
            with quiet_transformers(), timer, suppress(StopString):
                model.generate(ids, generation_config=config, **keywords)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any error of transformers fails this prompt, not the run
            reason = error or type(error).__name__
            raise LayerSkipError(f"transformers ({setting.strategy}): {reason}") from error
        finally:
            for each, own in zip(models, own_configs, strict=True):
                each.generation_config = own
        return Output(tuple(timer.ids), "", tuple(timer.steps), timer.stats, scanner.reason)

    return generate


@torch.inference_mode()
def require_early_exit(model: Any) -> None:
    """Raises ConfigError unless a smaller `num_hidden_layers`, transformers' early exit, makes the
    model run fewer layers.
    """
    layers = model.config.num_hidden_layers
    ids = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    try:
        model.config.num_hidden_layers = 1
        states = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    finally:
        model.config.num_hidden_layers = layers
    if len(states) != 2:  # embedding and output of the layer
        raise ConfigError(
            "`baselines` assistant-early-exit: transformers ignores the early exit of "
            f"{model.config.model_type} models; leave that baseline out"
        )


class StopString(Exception):
    """Raised in `generate` by its streamer: transformers' own handling of stop strings misses those
    inside a round.
    """


class StepTimer(BaseStreamer):  # type: ignore[misc]
    """Times `generate`'s steps as its streamer; counts drafts by a hook: a pass of all layers over
    K+1 tokens verifies K.
    """

    def __init__(self, model: Any, prompt_tokens: int, scanner: StopScanner) -> None:
        self.ids: list[int] = []
        self.steps: list[Step] = []
        self.stats = DecodeStats(sequences=1, prompt_tokens=prompt_tokens)
        self._model = model
        self._num_layers = int(model.config.num_hidden_layers)
        self._scanner = scanner
        self._prompt_seen = False
        self._drafted = 0
        self._started = 0.0

    def __enter__(self) -> "StepTimer":
        self._hook = self._model.register_forward_pre_hook(self._before, with_kwargs=True)
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        # A failed early-exit draft leaves it at the exit
        self._model.config.num_hidden_layers = self._num_layers

    def put(self, value: torch.Tensor) -> None:
        """Receives the prompt first, then the tokens of each step, on the CPU."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        seconds = time.perf_counter() - self._started
        tokens = value.flatten().tolist()
        count, reason = self._scanner.cut(tokens)
        counts = step_counts(self._drafted, min(len(tokens) - 1, self._drafted), count)
        self.stats += replace(counts, total_seconds=seconds)
        self.steps.append(Step(count, seconds))
        self.ids += tokens[:count]
        if reason == "stop":
            raise StopString
        self._started = time.perf_counter()

    def end(self) -> None:
        """Called by `generate` after the last token."""

    def _before(self, _: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Counts the drafts of a pass through all layers: its tokens, but for the newest one or,
        in the first pass, the prompt.
        """
        if self._model.config.num_hidden_layers != self._num_layers:
            return  # the early exit drafts
        ids = keywords["input_ids"] if "input_ids" in keywords else args[0]
        others = 1 if self.steps else self.stats.prompt_tokens
        self._drafted = ids.shape[1] - others


def llama_cpp(loaded: Decoder, gguf: str, lookups: bool = False) -> BaselineDecoder:
    """llama.cpp on a GGUF file: greedy, on as many threads as torch, without drafts or with its
    lookups (`ngram-simple`). Raises ConfigError and CheckpointError.
    """
    context = min(loaded.backend.spec.context, _MOST_CONTEXT)
    server = _llama_server(loaded, gguf, context, lookups)

    def complete(loaded: Decoder, prompt_ids: list[int], setting: DecodingConfig) -> Output:
        """The first step is the prefill, timed by llama.cpp; all other tokens are one second
        step.
        """
        most = context - len(prompt_ids)
        if most < 1:
            raise LayerSkipError(
                f"the prompt must be at most {context - 1} tokens for llama.cpp, "
                f"got {len(prompt_ids)}"
            )
        ends = loaded.ends(setting.stop)
        scanner = StopScanner(ends, setting.stop, setting.max_new_tokens, most, loaded.detokenize)
        request = {
            "prompt": prompt_ids,
            "max_tokens": scanner.num_tokens_left,
            "temperature": 0,
            "samplers": ["temperature"],
            "stop": list(setting.stop),
            "cache_prompt": False,
            "return_tokens": True,
            "verbose": True,
        }
        started = time.perf_counter()
        answer = server.handle_completions(request)
        seconds = time.perf_counter() - started
        if "error" in answer:
            raise LayerSkipError(f"llama.cpp: {answer['error'].get('message', answer['error'])}")
        verbose = answer["__verbose"]
        count, reason = scanner.cut(verbose["tokens"])
        prefill = min(verbose["timings"]["prompt_ms"] / 1000, seconds)
        steps = [Step(count, seconds)]
        if count > 1:
            steps = [Step(1, prefill), Step(count - 1, seconds - prefill)]
        stats = replace(
            step_counts(0, 0, count),
            sequences=1,
            prompt_tokens=len(prompt_ids),
            total_seconds=seconds,
        )
        return Output(tuple(verbose["tokens"][:count]), "", tuple(steps), stats, reason)

    return complete


def _llama_server(loaded: Decoder, gguf: str, context: int, lookups: bool) -> Any:
    """llama.cpp's server, in this process, with the file of the same model."""
    try:
        import xllamacpp
    except ImportError:
        raise ConfigError(
            "`baselines` llama.cpp needs the package xllamacpp: pip install 'layerskip[llama-cpp]'",
            "baselines",
        ) from None
    if not Path(gguf).is_file():
        raise ConfigError(f"`gguf` must be a file; there is none at {gguf}", "gguf")
    spec = loaded.backend.spec
    file = GgufFile(Path(gguf))
    if (file.layers, file.tokens) != (spec.layers, spec.vocab):
        raise ConfigError(
            f"`gguf` must be a file of {loaded.name}, with {spec.layers} layers and {spec.vocab} "
            f"tokens; {gguf} has {file.layers} layers and {file.tokens} tokens",
            "gguf",
        )
    settings = xllamacpp.CommonParams()
    settings.model.path = gguf
    settings.n_ctx = context
    settings.n_parallel = 1
    settings.warmup = False
    settings.fit_params = False
    settings.verbosity = 0
    settings.cache_ram_mib = 0
    settings.cpuparams.n_threads = torch.get_num_threads()
    settings.cpuparams_batch.n_threads = torch.get_num_threads()
    if lookups:
        types = xllamacpp.common_speculative_type
        settings.speculative.types = [types.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
    try:
        return xllamacpp.Server(settings)
    except Exception as error:  # the package raises RuntimeError and others
        raise ConfigError(
            f"`gguf` {gguf} must be a file that llama.cpp reads: {error}", "gguf"
        ) from error


def describe_llama_cpp() -> str:
    """Version and instruction sets of this build of llama.cpp."""
    import xllamacpp

    features = []
    for part in xllamacpp.get_system_info().split("|"):
        name, _, value = part.partition("=")
        if value.strip() == "1":
            features.append(name.strip().removeprefix("CPU : "))
    return f"xllamacpp {version('xllamacpp')} ({' '.join(features)})"
