"""llama.cpp as a baseline: its server, in this process, on a GGUF file of the model (package xllamacpp)."""

import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.gguf import GgufFile
from ...checkpoint.loaded import Decoder
from ...decoding import DecodeStats, Stopping, StopScanner, step_counts
from ...errors import ConfigError, LayerSkipError
from ..outputs import Output
from ..results import Step

NAME = "llama.cpp"
_MOST_CONTEXT = 8192  # tokens: a larger cache takes memory that no task here needs


@dataclass(frozen=True)
class LlamaCpp:
    """Greedy decoding of one prompt at a time, without drafts. It gets token ids, so the file's tokenizer is not used."""

    server: Any
    context: int
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    strategy: str = NAME
    exit_layer: int | None = None
    num_draft_tokens: int | None = None

    def limited(self, max_new_tokens: int) -> "LlamaCpp":
        return replace(self, max_new_tokens=max_new_tokens)

    def run(self, loaded: Decoder, prompt_ids: list[int]) -> Output:
        """Raises LayerSkipError when the prompt does not fit, or llama.cpp fails.

        The first step is the prefill, by llama.cpp's own timing; all other tokens are a second one.
        """
        room = self.context - len(prompt_ids)
        if room < 1:
            raise LayerSkipError(f"the prompt must be at most {self.context - 1} tokens for {NAME}, got {len(prompt_ids)}")
        limit = min(room, self.max_new_tokens)
        request = {
            "prompt": prompt_ids, "max_tokens": limit, "temperature": 0, "samplers": ["temperature"], "stop": list(self.stop),
            "cache_prompt": False, "return_tokens": True, "verbose": True,
        }  # fmt: skip
        started = time.perf_counter()
        answer = self.server.handle_completions(request)
        seconds = time.perf_counter() - started
        if "error" in answer:
            raise LayerSkipError(f"{NAME}: {answer['error'].get('message', answer['error'])}")
        found = answer["__verbose"]
        scanner = StopScanner(Stopping(loaded.ends(self.stop), self.stop, self.max_new_tokens), room, loaded.detokenize)
        count, reason = scanner.cut(found["tokens"])
        ids = tuple(found["tokens"][:count])
        prefill = min(found["timings"]["prompt_ms"] / 1000, seconds)
        steps = (Step(1, prefill), Step(len(ids) - 1, seconds - prefill)) if len(ids) > 1 else (Step(len(ids), seconds),)
        stats = DecodeStats(sequences=1, prompt_tokens=len(prompt_ids), prefill_seconds=prefill, total_seconds=seconds)
        stats += replace(step_counts(0, 0, len(ids)), verify_seconds=seconds - prefill)
        return Output(ids, "", steps, stats, reason)

    def run_batch(self, loaded: Decoder, prompts: list[list[int]]) -> list[Output]:
        return [self.run(loaded, prompt) for prompt in prompts]


def llama_cpp(loaded: Decoder, gguf: str, max_new_tokens: int, stop: tuple[str, ...]) -> LlamaCpp:
    """The server on this file, with as many threads as this process has.

    Raises ConfigError if the package is missing, llama.cpp cannot read the file, or it has other layers or tokens, and
    CheckpointError for a damaged file.
    """
    xllamacpp = _package()
    _require_same_model(loaded, gguf)
    context = min(loaded.backend.max_positions, _MOST_CONTEXT)
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = gguf, context, 1
    settings.warmup = settings.fit_params = False
    settings.verbosity = settings.cache_ram_mib = 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    try:
        server = xllamacpp.Server(settings)
    except Exception as error:  # the package raises RuntimeError and others
        raise ConfigError(f"`gguf` {gguf} must be a file that llama.cpp reads: {error}", "gguf") from error
    return LlamaCpp(server, context, max_new_tokens, stop)


def _require_same_model(loaded: Decoder, gguf: str) -> None:
    """Raises ConfigError for a file that is missing or has other layers or tokens, CheckpointError for a damaged one."""
    if not Path(gguf).is_file():
        raise ConfigError(f"`gguf` must be a file; there is none at {gguf}", "gguf")
    file = GgufFile(Path(gguf))
    if (file.layers, file.tokens) != (loaded.backend.num_layers, loaded.backend.vocab_size):
        raise ConfigError(
            f"`gguf` must be a file of {loaded.name}, with {loaded.backend.num_layers} layers and {loaded.backend.vocab_size} "
            f"tokens; {gguf} has {file.layers} layers and {file.tokens} tokens",
            "gguf",
        )


def describe_build() -> str:
    """The version of llama.cpp and the instruction sets that this build uses on this processor."""
    features = [part.split("=")[0].strip() for part in _package().get_system_info().split("|") if "= 1" in part]
    used = " ".join(feature.removeprefix("CPU : ") for feature in features)
    return f"xllamacpp {version('xllamacpp')} ({used})"


def _package() -> Any:
    try:
        import xllamacpp
    except ImportError:
        raise ConfigError(
            "`baselines` llama.cpp needs the package xllamacpp: pip install 'layerskip[llama-cpp]'", "baselines"
        ) from None
    return xllamacpp
