"""Decoding strategies, and baselines (transformers, llama.cpp, no reuse of exit states),
interleaved on the same prompts.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from ...checkpoint.folder import quiet_transformers
from ...checkpoint.gguf_read import GgufFile
from ...checkpoint.loaded import Decoder, Trainable
from ...checkpoint.locate import files_digest
from ...checkpoint.open import for_training
from ...config.decoding import DRAFTERS, WITH_DRAFTER, DecodingConfig
from ...config.evaluation import TRANSFORMERS_BASELINES, BenchConfig
from ...config.resolution import Recommended, resolve_as
from ...decoding.output import DecodeStats, StopScanner, step_counts
from ...errors import ConfigError, LayerSkipError, require
from ...model import TransformersBackend
from ...processor import OtherLoad
from ..metrics import scores_by_exit
from ..results import Journal, Output, RunRecord, Step
from ..tasks import Task
from . import Baseline, Progress, depth_of, measure, own_output
from .cost_model import bandwidth
from .figures import environment, result_of

_MOST_CONTEXT = 8192  # tokens of llama.cpp's KV cache: more would waste memory on every task here
_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def bench(
    loaded: Decoder,
    task: Task,
    config: BenchConfig,
    folder: Path | None = None,
    resume: bool = False,
) -> Iterator[Progress | RunRecord]:
    """Yields progress, then the record. `resume` continues the journal in `folder` on the same
    files. Raises LayerSkipError.
    """
    (task, generation), layers = task.asked(config.generation), loaded.backend.num_layers
    loaded, recommended = task.prepared(loaded), loaded.recommended(config.packing)
    config = replace(config, task=task.config, generation=generation)
    settings = strategies_of(loaded, config, recommended)
    speculative = resolve_as("self-speculative", generation, recommended, layers, config.packing)
    own = {"exit_layer": speculative.exit_layer, "num_draft_tokens": speculative.num_draft_tokens}
    baselines = load_baselines(loaded, config, speculative)
    machine = environment(loaded) | (
        {"llama_cpp": describe_llama_cpp()} if "llama.cpp" in baselines else {}
    )
    load = OtherLoad()
    journal = None
    if folder is not None:
        rows = [*((example.prompt, example.completion) for example in task.examples), task.text]
        made = {
            name: machine[name]
            for name in ("versions", "device_name", "threads", "dtype", "implementation")
        }
        files = " ".join(map(files_digest, filter(None, (loaded.name, config.packing.draft_model))))
        digests = {
            "model_files": files,
            "rows": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16],
        }
        journal = Journal(folder, asdict(config) | own | digests | {"machine": made}, resume)
    depths = [depth_of(setting, layers) or layers for setting in settings]
    perplexity = scores_by_exit(task.losses(loaded, depths)) if task.text is not None else {}
    settings += [replace(speculative, strategy=name) for name in baselines]
    measured = yield from measure(
        loaded, task, settings, config, config.repeats, baselines, journal, perplexity
    )
    machine["busy_cores"] = load.busy_cores()
    full = measured[0]
    stats = sum((output.stats for output in full.answers), DecodeStats())
    # Without prefills
    decoding = [step for outputs in full.repeats for output in outputs for step in output.steps[1:]]
    if tokens := sum(step.tokens for step in decoding):
        positions = (stats.prompt_tokens + stats.new_tokens / 2) / max(stats.sequences, 1)
        machine["bandwidth"] = bandwidth(
            loaded, sum(step.seconds for step in decoding) / tokens, positions
        )
    transformers = next(
        (each for each in measured if each.setting.strategy == "transformers"), None
    )
    results = []
    for each in measured:
        by_category = {}
        for name, samples in task.categories.items():
            if any(full.answers[sample].error is None for sample in samples):
                figures = result_of(
                    each.of(samples), full.of(samples), transformers and transformers.of(samples)
                )
                by_category[name] = replace(figures, samples=len(samples))
        results.append(replace(result_of(each, full, transformers), categories=by_category))
    used = tuple(
        dict.fromkeys(setting.strategy for setting in settings if setting.strategy not in baselines)
    )
    named: dict[str, Any] = {
        "strategies": used,
        "quality_metric": task.quality_metric,
        "prompt_template": loaded.template.name,
    }
    named["has_references"] = task.against is None
    answered = task.answered([each.texts for each in measured])
    yield RunRecord(asdict(config) | own | named, machine, tuple(results), answered=answered)


def strategies_of(
    loaded: Decoder, config: BenchConfig, recommended: Recommended
) -> list[DecodingConfig]:
    """The strategies in the order of the tables; self-speculative decoding once per low-bit copy.
    Raises ConfigError.
    """
    skipping = ["draft-and-verify"] if config.generation.get("skip") else []
    chosen = {*(config.strategies or suiting_strategies(loaded, config)), *skipping}
    for name in chosen & set(WITH_DRAFTER) - loaded.backend.drafters.keys():
        require(
            False, "strategies", f"a list without {name} for a model without such a drafter", name
        )
    settings = []
    for name in ("autoregressive", "early-exit", *DRAFTERS):
        if name in chosen:
            setting = resolve_as(
                name, config.generation, recommended, loaded.backend.num_layers, config.packing
            )
            copies = (
                dict.fromkeys(config.packing.draft_weights) if name == "self-speculative" else {}
            )
            settings += [replace(setting, draft_weights=weights) for weights in copies] or [setting]
    return settings


def suiting_strategies(loaded: Decoder, config: BenchConfig) -> set[str]:
    """The default strategies: exits if trained, recommended or asked for, and low-bit copies that
    were asked for.
    """
    known = loaded.recommended(config.packing)
    asked = config.generation
    exits = bool(
        known.exits or loaded.info.exit_layer or asked.keys() & {"exit_layer", "exit_confidence"}
    )
    return {
        *("autoregressive", "lookup", "adaptive"),
        *(["early-exit"] if exits else []),
        *(["self-speculative"] if exits or config.packing.draft_weights else []),
        *loaded.backend.drafters,
        *(["draft-model"] if loaded.backend.draft_model is not None else []),
    }


def load_baselines(
    loaded: Decoder, config: BenchConfig, speculative: DecodingConfig
) -> dict[str, Baseline]:
    """The config's baselines by name, with exit and draft length of `speculative`. Raises
    ConfigError and CheckpointError.
    """

    def transformers_model(name: str) -> Trainable:
        return for_training(
            name, str(loaded.backend.device), _DTYPE_NAMES.get(loaded.backend.dtype, "auto")
        )

    baselines: dict[str, Baseline] = {}
    model = None
    vocabulary = {}
    if isinstance(loaded.backend, TransformersBackend):
        model = loaded.backend.model
        vocabulary = loaded.tokenizer.get_vocab()
    elif any(name in TRANSFORMERS_BASELINES for name in config.baselines):
        target = transformers_model(loaded.name)
        model = target.model
        vocabulary = target.tokenizer.get_vocab()
    for name in config.baselines:
        match name:
            case "no-reuse":
                baselines[name] = without_reuse
            case "llama.cpp":
                baselines[name] = llama_cpp(loaded, config.gguf or "")
            case "transformers":
                baselines[name] = transformers_generate(model)
            case "assistant-early-exit":
                require_early_exit(model)
                baselines[name] = transformers_generate(
                    model, {"assistant_early_exit": speculative.exit_layer}
                )
            case "prompt-lookup":
                baselines[name] = transformers_generate(
                    model, {"prompt_lookup_num_tokens": speculative.num_draft_tokens}
                )
            case "assistant-model":
                draft = transformers_model(config.packing.draft_model or "")
                if draft.tokenizer.get_vocab() != vocabulary:
                    raise ConfigError(
                        f"`draft_model` must have the tokenizer of {loaded.name}; {draft.name} has another"
                    )
                baselines[name] = transformers_generate(model, assistant=draft.model)
    return baselines


def without_reuse(loaded: Decoder, prompt_ids: list[int], setting: DecodingConfig) -> Output:
    """Self-speculation whose verifier recomputes the layers below the exit instead of reusing the
    drafts' exit states.
    """
    return own_output(
        loaded, prompt_ids, replace(setting, strategy="self-speculative"), reuse_exit_states=False
    )


def transformers_generate(
    model: Any, options: Mapping[str, Any] | None = None, assistant: Any = None
) -> Baseline:
    """transformers' greedy `generate`, with `options` of its generation config, or with an
    assistant that drafts.
    """
    # Their own configs could set penalties or sampling
    models = [each for each in (model, assistant) if each is not None]

    def generate(loaded: Decoder, prompt_ids: list[int], setting: DecodingConfig) -> Output:
        """Raises LayerSkipError when transformers fails."""
        ends = loaded.ends(setting.stop)
        room = loaded.backend.spec.context - len(prompt_ids)
        scanner = StopScanner(ends, setting.stop, setting.max_new_tokens, room, loaded.detokenize)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=scanner.tokens_left,
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
        before = [each.generation_config for each in models]
        try:
            for each in models:
                each.generation_config = config
            with quiet_transformers(), timer, suppress(StopString):
                model.generate(ids, generation_config=config, **keywords)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any error of transformers fails this prompt, not the run
            raise LayerSkipError(
                f"transformers ({setting.strategy}): {error or type(error).__name__}"
            ) from error
        finally:
            for each, own in zip(models, before, strict=True):
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
        reason = f"transformers ignores the early exit of {model.config.model_type} models; leave that baseline out"
        raise ConfigError(f"`baselines` assistant-early-exit: {reason}")


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
        if self._model.config.num_hidden_layers == self._num_layers:
            rows = (keywords["input_ids"] if "input_ids" in keywords else args[0]).shape[1]
            self._drafted = rows - (1 if self.steps else self.stats.prompt_tokens)


def llama_cpp(loaded: Decoder, gguf: str) -> Baseline:
    """llama.cpp on a GGUF file: greedy, without drafts, on as many threads as torch. Raises
    ConfigError and CheckpointError.
    """
    try:
        import xllamacpp
    except ImportError:
        needed = (
            "`baselines` llama.cpp needs the package xllamacpp: pip install 'layerskip[llama-cpp]'"
        )
        raise ConfigError(needed, "baselines") from None
    spec = loaded.backend.spec
    layers = spec.layers
    tokens = spec.vocab
    context = min(spec.context, _MOST_CONTEXT)
    if not Path(gguf).is_file():
        raise ConfigError(f"`gguf` must be a file; there is none at {gguf}", "gguf")
    file = GgufFile(Path(gguf))
    if (file.layers, file.tokens) != (layers, tokens):
        found = f"{gguf} has {file.layers} layers and {file.tokens} tokens"
        raise ConfigError(
            f"`gguf` must be a file of {loaded.name}, with {layers} layers and {tokens} tokens; {found}",
            "gguf",
        )
    settings = xllamacpp.CommonParams()
    settings.model.path = gguf
    settings.n_ctx = context
    settings.n_parallel = 1
    settings.warmup = settings.fit_params = False
    settings.verbosity = settings.cache_ram_mib = 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    try:
        server = xllamacpp.Server(settings)
    except Exception as error:  # the package raises RuntimeError and others
        raise ConfigError(
            f"`gguf` {gguf} must be a file that llama.cpp reads: {error}", "gguf"
        ) from error

    def complete(loaded: Decoder, prompt_ids: list[int], setting: DecodingConfig) -> Output:
        """The first step is the prefill, timed by llama.cpp; all other tokens are one second
        step.
        """
        room = context - len(prompt_ids)
        if room < 1:
            raise LayerSkipError(
                f"the prompt must be at most {context - 1} tokens for llama.cpp, got {len(prompt_ids)}"
            )
        scanner = StopScanner(
            loaded.ends(setting.stop), setting.stop, setting.max_new_tokens, room, loaded.detokenize
        )
        request = {
            "prompt": prompt_ids, "max_tokens": scanner.tokens_left, "temperature": 0, "samplers": ["temperature"],
            "stop": list(setting.stop), "cache_prompt": False, "return_tokens": True, "verbose": True,
        }  # fmt: skip
        started = time.perf_counter()
        answer = server.handle_completions(request)
        seconds = time.perf_counter() - started
        if "error" in answer:
            raise LayerSkipError(f"llama.cpp: {answer['error'].get('message', answer['error'])}")
        verbose = answer["__verbose"]
        count, reason = scanner.cut(verbose["tokens"])
        prefill = min(verbose["timings"]["prompt_ms"] / 1000, seconds)
        steps = (
            (Step(1, prefill), Step(count - 1, seconds - prefill))
            if count > 1
            else (Step(count, seconds),)
        )
        stats = replace(
            step_counts(0, 0, count),
            sequences=1,
            prompt_tokens=len(prompt_ids),
            total_seconds=seconds,
        )
        return Output(tuple(verbose["tokens"][:count]), "", steps, stats, reason)

    return complete


def describe_llama_cpp() -> str:
    """Version and instruction sets of this build of llama.cpp."""
    import xllamacpp

    features = [
        part.split("=")[0].strip()
        for part in xllamacpp.get_system_info().split("|")
        if "= 1" in part
    ]
    used = " ".join(feature.removeprefix("CPU : ") for feature in features)
    return f"xllamacpp {version('xllamacpp')} ({used})"
