"""The model type `layerskip` of lm-evaluation-harness: `lm_eval --model layerskip --model_args pretrained=DIR,exit=8`."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.api.model import LM
from tqdm import tqdm

from ..checkpoint.loaded import Decoder
from ..checkpoint.open import for_decoding
from ..config.checks import require, require_exit_layer
from ..config.decoding import MAX_NEW_TOKENS, DecodingConfig, DecodingOptions
from ..config.machine import DTYPES
from ..config.options import checked
from ..config.packing import PackingConfig, Quantization
from ..decoding import check_prompt, decode_batch
from ..model.exit_blocks import target_block
from ..prompting import require_chat_template
from .likelihood import likelihoods
from .text import AnswerSettings, HarnessText, answer_settings

_AUTO_BATCH = 16
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}  # lm-eval's usual names
Item = TypeVar("Item")


class LayerSkipLM(LM):  # type: ignore[misc]
    """A checkpoint on this package's decoder. All requests are batched; `exit` counts in every one of them."""

    def __init__(
        self,
        pretrained: str | Decoder,
        exit: int | None = None,
        spec: int | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        threads: int = 0,
        quantize: Quantization | None = None,
        max_gen_toks: int = MAX_NEW_TOKENS,
    ) -> None:
        """`pretrained`: an embedded name, a folder, a GGUF file, a hub id, or a model in memory.

        exit: how many layers give every log-probability and every token; None: all.
        spec: generate at full depth, by drafts of this many tokens through `exit`, or the exit that the checkpoint recommends.
            The output is that of full depth.
        dtype: auto, fp32 or bf16. quantize: int8 or int4 weights.
        batch_size: requests that are computed together; auto: 16.
        threads: of the CPU; 0: torch's choice.
        max_gen_toks: the limit of answers whose task has none.

        Raises ConfigError and CheckpointError for settings and models that do not go together.
        """
        super().__init__()
        dtype = _DTYPES.get(str(dtype).removeprefix("torch."), str(dtype))
        require(dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", dtype)
        if threads:
            torch.set_num_threads(int(threads))
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):  # lm-eval's default is cuda:0
            device = "auto"
        packing = PackingConfig(**checked(PackingConfig, {"quantize": quantize}))
        self.decoder = for_decoding(pretrained, device, dtype, packing) if isinstance(pretrained, str) else pretrained
        size = str(batch_size).partition(":")[0]
        require(size == "auto" or (size.isdecimal() and int(size) > 0), "batch_size", "at least 1, or auto", batch_size)
        self.batch_size = min(_AUTO_BATCH, max_batch_size or _AUTO_BATCH) if size == "auto" else int(size)
        self.text = HarnessText(self.decoder)
        self.max_length, self.max_gen_toks = self.decoder.backend.max_positions, int(max_gen_toks)
        self.decoding = self._decoding(exit, spec, packing)
        self.depth = exit if exit is not None and spec is None else self.decoder.backend.num_layers
        self._device = self.decoder.backend.device

    def _decoding(self, exit_layer: int | None, spec: int | None, packing: PackingConfig) -> DecodingConfig:
        layers = self.decoder.backend.num_layers
        if exit_layer is not None:
            require_exit_layer(exit_layer, layers, may_be_last=spec is None, field="exit")
            if spec is None:
                target_block(self.decoder.backend.exit_blocks, exit_layer)
        drafting = None if exit_layer is None else "early-exit"
        strategy = "self-speculative" if spec is not None else drafting or "autoregressive"
        options: DecodingOptions = {"strategy": strategy}
        if exit_layer is not None:
            options["exit_layer"] = exit_layer
        if spec is not None:
            options["num_draft_tokens"] = spec
        return self.decoder.resolve(options, packing)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether it is the greedy continuation) of each request's (context, continuation)."""
        pairs = [self.text.pair(*request.args) for request in requests]
        found: list[Any] = [None] * len(pairs)
        scored = likelihoods(self.decoder.backend, pairs, [self.depth], self.batch_size)
        for place, by_exit in tqdm(scored, "loglikelihood", len(pairs), disable=disable_tqdm):
            found[place] = tuple(by_exit[self.depth])
            self.cache_hook.add_partial("loglikelihood", requests[place].args, found[place])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability in nats of each whole text."""
        windows = [(place, pair) for place, request in enumerate(requests) for pair in self.text.windows(request.args[0])]
        totals = [0.0] * len(requests)
        scored = likelihoods(self.decoder.backend, [pair for _, pair in windows], [self.depth], self.batch_size)
        for window, by_exit in tqdm(scored, "loglikelihood_rolling", len(windows), disable=disable_tqdm):
            totals[windows[window][0]] += by_exit[self.depth].total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request's (context, generation_kwargs)."""
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for settings, places in self.by_settings([request.args[1] for request in requests]):
                prompts = {place: self.prompt(requests[place].args[0], settings) for place in places}
                for batch in _in_batches(sorted(places, key=lambda place: -len(prompts[place])), self.batch_size):
                    answered = self._answered([prompts[place] for place in batch], settings, batch)
                    for place, ids in zip(batch, answered, strict=True):
                        answers[place] = self.answer(ids, settings)
                        self.cache_hook.add_partial("generate_until", requests[place].args, answers[place])
                        bar.update()
        return answers

    def by_settings(self, asked: Sequence[dict[str, Any]]) -> list[tuple[AnswerSettings, list[int]]]:
        """The places of requests, by what their `generation_kwargs` mean."""
        groups: dict[AnswerSettings, list[int]] = {}
        for place, kwargs in enumerate(asked):
            groups.setdefault(answer_settings(kwargs, self.max_gen_toks), []).append(place)
        return list(groups.items())

    def prompt(self, context: str, settings: AnswerSettings) -> list[int]:
        """The token ids of a context, or as many of the last ones as leave room for the answer."""
        room = self.max_length - settings.max_new_tokens
        require(room > 0, "max_gen_toks", f"below {self.max_length}, the model's context", settings.max_new_tokens)
        ids = self.text.ids(context)[-room:]
        check_prompt(ids, self.max_length)
        return ids

    def answer(self, ids: Sequence[int], settings: AnswerSettings) -> str:
        """The text of an answer, up to its stop string."""
        ends = self.decoder.ends(settings.stop)
        return settings.cut(self.decoder.detokenize([token for token in ids if token not in ends]))

    def _answered(self, prompts: list[list[int]], settings: AnswerSettings, seeds: Sequence[int]) -> list[list[int]]:
        """The ids of the answers. Sampled ones have the given seeds."""
        ends = self.decoder.ends(settings.stop)
        finished = decode_batch(
            self.decoder.backend, prompts, settings.of(self.decoding), ends, self.decoder.detokenize, list(seeds)
        )
        return [output.ids for output in sorted(finished, key=lambda output: output.row)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.text.conversation(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template, for lm-eval's records."""
        if not chat_template:
            return None
        require_chat_template(self.decoder.tokenizer)
        return str(self.decoder.tokenizer.chat_template)

    @property
    def tokenizer_name(self) -> str:
        return self.decoder.name.replace("/", "__")

    @property
    def eot_token_id(self) -> int | None:
        return self.text.end_id

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes about the model into its results."""
        backend = self.decoder.backend
        return {
            "model_num_parameters": backend.spec.parameters,
            "model_dtype": str(backend.dtype),
            "layerskip_implementation": backend.implementation,
            "layerskip_depth": self.depth,
            "layerskip_strategy": self.decoding.strategy,
        }


def _in_batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))
