"""The model type `layerskip` of lm-evaluation-harness: `lm_eval --model layerskip --model_args
pretrained=DIR,exit=8`.

Requests become token ids and settings as in lm-eval's own `hf`, without the checkpoint's prompt
template.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from lm_eval.api.model import LM
from lm_eval.models.utils import Collator, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ..checkpoint.loaded import Decoder
from ..checkpoint.open import for_decoding
from ..config.decoding import MAX_NEW_TOKENS, DecodingConfig, DecodingOptions
from ..config.model import DTYPE_NAMES, DTYPES, PackingConfig, Quantization
from ..config.options import checked
from ..decoding import check_prompt, decode_batch
from ..decoding.output import before_stop
from ..errors import CheckpointError, ConfigError, require
from ..prompting import encoded, render_chat
from .likelihood import Pair, likelihoods

_AUTO_BATCH = 16
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}


class LayerSkipLM(LM):  # type: ignore[misc]
    """A checkpoint on this package's decoder. All requests are batched; `exit` applies to every
    one.
    """

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

        exit: layers that give every log-probability and token (None: all). spec: generate at full
        depth, with so many drafts through `exit` (None: the recommended exit). batch_size: auto is
        16. threads: 0 is torch's choice. max_gen_toks: the limit of answers if the task sets none.
        Raises ConfigError and CheckpointError.
        """
        super().__init__()
        dtype = DTYPE_NAMES.get(str(dtype).removeprefix("torch."), str(dtype))
        require(dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", dtype)
        if threads:
            torch.set_num_threads(int(threads))
        # The default of lm-eval is cuda:0, also on machines without a GPU
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "auto"
        packing = PackingConfig(**checked(PackingConfig, {"quantize": quantize}))
        if isinstance(pretrained, str):
            self.decoder = for_decoding(pretrained, device, dtype, packing)
        else:
            self.decoder = pretrained
        self.tokenizer = self.decoder.tokenizer
        bos = self.tokenizer.special_tokens_map.get("bos_token")
        self.eot_token_id = self.tokenizer.eos_token_id
        self._bos_token = None if bos is None else str(bos)
        size = str(batch_size).partition(":")[0]
        is_size = size == "auto" or (size.isdecimal() and int(size) > 0)
        require(is_size, "batch_size", "at least 1, or auto", batch_size)
        if size == "auto":
            self.batch_size = min(_AUTO_BATCH, max_batch_size or _AUTO_BATCH)
        else:
            self.batch_size = int(size)
        self.max_length = self.decoder.backend.spec.context
        self.max_gen_toks = int(max_gen_toks)
        strategy = "autoregressive"
        if spec is not None:
            strategy = "self-speculative"
        elif exit is not None:
            strategy = "early-exit"
        asked = {"strategy": strategy, "exit_layer": exit, "num_draft_tokens": spec}
        self.decoding = self.decoder.resolve(cast(DecodingOptions, asked), packing)
        self.depth = exit if exit is not None and spec is None else self.decoder.backend.num_layers
        self._device = self.decoder.backend.device

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Token ids, special tokens in the text included; None adds some unless it begins with BOS.
        Raises ConfigError.
        """
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self._bos_token)
        ids = encoded(
            lambda: self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]
        )
        return self.decoder.known_ids(list(ids))

    @property
    def prefix_token_id(self) -> int:
        """The BOS token, else the EOS token. Raises CheckpointError for a model without both."""
        prefix = self.tokenizer.get_vocab().get(self._bos_token or "", self.eot_token_id)
        if prefix is None:
            raise CheckpointError(
                "the model's tokenizer must have a token that begins or ends a text, to score a whole text"
            )
        return prefix

    def _pairs(self, request: Any) -> list[Pair]:
        """The pairs of a request: its context and continuation, or a whole text in windows of the
        model's context size.
        """
        if len(request.args) == 1:
            ids = self.tok_encode(*request.args)
            prefix = self.prefix_token_id
            windows = map(
                make_disjoint_window, get_rolling_token_windows(ids, prefix, self.max_length, 1)
            )
            return list(windows) or [([prefix], [])]
        context, continuation = request.args
        bare = context.rstrip()
        # Tokens begin with spaces: move the context's last ones
        continuation = context[len(bare) :] + continuation
        if bare:
            before = self.tok_encode(bare)
            return [(before, self.tok_encode(bare + continuation)[len(before) :])]
        before = [self.prefix_token_id]
        ids = self.tok_encode(continuation, add_special_tokens=False)
        return [(before, ids[1:] if ids[:1] == before else ids)]

    def score(
        self, requests: Sequence[Any], depths: Sequence[int]
    ) -> Iterator[tuple[int, dict[int, Any]]]:
        """Yields (index of a request, by depth (log-probability in nats, is greedy), or for whole
        texts the former alone).
        """
        owners: list[int] = []  # the request of each pair
        pairs: list[Pair] = []
        for place, request in enumerate(requests):
            own = self._pairs(request)
            pairs += own
            owners += [place] * len(own)
        missing = Counter(owners)
        # By request: the summed log-likelihood of its text at each depth, in nats
        totals: dict[int, dict[int, float]] = {}
        scored = likelihoods(self.decoder.backend, pairs, depths, self.batch_size)
        for number, by_depth in scored:
            place = owners[number]
            if len(requests[place].args) == 2:
                yield place, {depth: tuple(by_depth[depth]) for depth in depths}
                continue
            missing[place] -= 1
            own_totals = totals.setdefault(place, dict.fromkeys(depths, 0.0))
            for depth in depths:
                own_totals[depth] += by_depth[depth].total
            if not missing[place]:  # all windows of the text are scored
                yield place, own_totals

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """The responses of `score`, at this model's depth, to requests of one kind."""
        responses: list[Any] = [None] * len(requests)
        are_pairs = all(len(request.args) == 2 for request in requests)
        kind = "loglikelihood" if are_pairs else "loglikelihood_rolling"
        scored = self.score(requests, [self.depth])
        for place, by_depth in tqdm(scored, kind, len(requests), disable=disable_tqdm):
            responses[place] = by_depth[self.depth]
            self.cache_hook.add_partial(kind, requests[place].args, responses[place])
        return responses

    loglikelihood_rolling = loglikelihood

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request's (context, generation_kwargs). Each sampled answer has its
        own seed.
        """
        given = [request.args for request in requests]
        answers = list[str]()
        ordered = Collator(
            given, lambda args: -len(self.tok_encode(args[0])), group_by="gen_kwargs"
        )
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for batch in ordered.get_batched(n=self.batch_size):
                config = self.answering(self.decoding, batch[0][1])
                prompts = [self.prompt(context, config.max_new_tokens) for context, _ in batch]
                seeds = list(range(len(answers), len(answers) + len(batch)))
                ends = self.decoder.ends(config.stop)
                finished = decode_batch(
                    self.decoder.backend, prompts, config, ends, self.decoder.detokenize, seeds
                )
                for args, output in zip(batch, finished, strict=True):
                    answers.append(self.answer(output.ids, config.stop))
                    self.cache_hook.add_partial("generate_until", args, answers[-1])
                    bar.update()
        ordered_answers: list[str] = ordered.get_original(answers)
        return ordered_answers

    def answering(
        self, config: DecodingConfig, asked: Mapping[str, Any], limit: int | None = None
    ) -> DecodingConfig:
        """`config` with a request's `generation_kwargs`; `limit` replaces their max_gen_toks.
        Raises ConfigError.
        """
        given = normalize_gen_kwargs(dict(asked), self.max_gen_toks)
        stop = tuple(filter(None, (*given.pop("until"), *config.stop)))
        changes: dict[str, Any] = {
            "stop": stop,
            "max_new_tokens": limit or given["max_gen_toks"],
            "temperature": 0.0,
        }
        del given["max_gen_toks"]
        temperature = given.pop("temperature", 1.0)
        top_k = given.pop("top_k", 0)
        top_p = given.pop("top_p", 1.0)
        if given.pop("do_sample"):
            changes |= {
                "temperature": float(temperature),
                "top_k": int(top_k or 0),
                "top_p": float(top_p or 1.0),
            }
        for name, value in given.items():
            if _NEUTRAL.get(name) != value:
                known = "until, max_gen_toks, do_sample, temperature, top_k or top_p"
                raise ConfigError(f"generation_kwargs must be {known}, got {name}={value!r:.60}")
        return replace(config, **changes)

    def prompt(self, context: str, max_new_tokens: int) -> list[int]:
        """The token ids of a context, cut at the start to leave room for the answer."""
        room = self.max_length - max_new_tokens
        require(
            room > 0,
            "max_gen_toks",
            f"below {self.max_length}, the model's context",
            max_new_tokens,
        )
        ids = self.tok_encode(context)[-room:]
        check_prompt(ids, self.decoder.backend)
        return ids

    def answer(self, ids: Sequence[int], stop: Sequence[str]) -> str:
        """The text of an answer, up to its stop string."""
        ends = self.decoder.ends(stop)
        return before_stop(
            self.decoder.detokenize([token for token in ids if token not in ends]), stop
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages in the chat template, without system messages if it refuses them. Raises as
        `render_chat`.
        """
        try:
            text = render_chat(self.tokenizer, chat_history, add_generation_prompt)
        except CheckpointError:
            spoken = [message for message in chat_history if message["role"] != "system"]
            text = render_chat(self.tokenizer, spoken, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template, for lm-eval's records."""
        return str(self.tokenizer.chat_template) if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return self.decoder.name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """The description of the model in lm-eval's results."""
        backend = self.decoder.backend
        return {
            "model_num_parameters": backend.spec.parameters,
            "model_dtype": str(backend.dtype),
            "layerskip_implementation": backend.implementation,
            "layerskip_depth": self.depth,
            "layerskip_strategy": self.decoding.strategy,
        }
