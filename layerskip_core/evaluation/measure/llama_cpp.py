"""llama.cpp as a baseline: its server, in this process, on a GGUF file of the model (package xllamacpp)."""

import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.gguf import GgufFile
from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig
from ...decoding import DecodeStats, Stopping, StopScanner, step_counts
from ...errors import ConfigError, LayerSkipError
from ..outputs import Output
from ..results import Step

NAME = "llama.cpp"
_MOST_CONTEXT = 8192  # tokens: a larger cache takes memory that no task here needs


class LlamaCpp:
    """Greedy decoding of one prompt at a time, without drafts. It gets token ids, so the file's tokenizer is not used."""

    def __init__(self, loaded: Decoder, gguf: str) -> None:
        """Starts the server on this file, with as many threads as this process has.

        Raises ConfigError if the package is missing, the file is missing, llama.cpp cannot read it, or it has other layers or
        tokens, and CheckpointError for a damaged file.
        """
        xllamacpp, layers, tokens = _package(), loaded.backend.num_layers, loaded.backend.vocab_size
        if not Path(gguf).is_file():
            raise ConfigError(f"`gguf` must be a file; there is none at {gguf}", "gguf")
        file = GgufFile(Path(gguf))
        if (file.layers, file.tokens) != (layers, tokens):
            raise ConfigError(
                f"`gguf` must be a file of {loaded.name}, with {layers} layers and {tokens} tokens; {gguf} has {file.layers} "
                f"layers and {file.tokens} tokens",
                "gguf",
            )
        self._context = min(loaded.backend.max_positions, _MOST_CONTEXT)
        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel = gguf, self._context, 1
        settings.warmup = settings.fit_params = False
        settings.verbosity = settings.cache_ram_mib = 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
        try:
            self.server = xllamacpp.Server(settings)
        except Exception as error:  # the package raises RuntimeError and others
            raise ConfigError(f"`gguf` {gguf} must be a file that llama.cpp reads: {error}", "gguf") from error

    def __call__(self, loaded: Decoder, prompts: list[list[int]], setting: DecodingConfig) -> list[Output]:
        """Raises LayerSkipError when a prompt does not fit, or llama.cpp fails."""
        return [self._answer(loaded, ids, setting) for ids in prompts]

    def _answer(self, loaded: Decoder, prompt_ids: list[int], setting: DecodingConfig) -> Output:
        """The first step is the prefill, by llama.cpp's own timing; all other tokens are a second one."""
        room = self._context - len(prompt_ids)
        if room < 1:
            raise LayerSkipError(f"the prompt must be at most {self._context - 1} tokens for {NAME}, got {len(prompt_ids)}")
        scanner = StopScanner(
            Stopping(loaded.ends(setting.stop), setting.stop, setting.max_new_tokens), room, loaded.detokenize
        )
        request = {
            "prompt": prompt_ids, "max_tokens": scanner.room, "temperature": 0, "samplers": ["temperature"],
            "stop": list(setting.stop), "cache_prompt": False, "return_tokens": True, "verbose": True,
        }  # fmt: skip
        started = time.perf_counter()
        answer = self.server.handle_completions(request)
        seconds = time.perf_counter() - started
        if "error" in answer:
            raise LayerSkipError(f"{NAME}: {answer['error'].get('message', answer['error'])}")
        found = answer["__verbose"]
        count, reason = scanner.cut(found["tokens"])
        prefill = min(found["timings"]["prompt_ms"] / 1000, seconds)
        steps = (Step(1, prefill), Step(count - 1, seconds - prefill)) if count > 1 else (Step(count, seconds),)
        stats = DecodeStats(sequences=1, prompt_tokens=len(prompt_ids), prefill_seconds=prefill, total_seconds=seconds)
        stats += replace(step_counts(0, 0, count), verify_seconds=seconds - prefill)
        return Output(tuple(found["tokens"][:count]), "", steps, stats, reason)


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
