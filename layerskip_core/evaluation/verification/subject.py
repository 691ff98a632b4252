"""The model under test in one setup: its prompts, what plain decoding answers, and how another answer is compared with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig
from ...config.packing import Quantization
from ...decoding import PrefixCache, decode, decode_batch
from ..measure.comparison import NEAR_TIE, first_difference
from .results import CheckResult, Mismatch, Promise, is_kept

Ids = list[int]


@dataclass(frozen=True)
class Prompts:
    """Token ids of prompts; the first ones are those of `texts`."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]

    def half(self) -> "Prompts":
        """Every second one, of both kinds."""
        return Prompts(self.texts[::2], (*self.ids[: len(self.texts) : 2], *self.ids[len(self.texts) :: 2]))


class Subject:
    """A model on some kernels in some precision."""

    def __init__(
        self,
        names: tuple[str, str],
        loaded: Decoder,
        prompts: Prompts,
        max_new_tokens: int,
        seed: int,
        rounding: torch.dtype,
    ) -> None:
        """`names`: of kernels and precision. `rounding`: the dtype whose near-ties count."""
        self.names, self.loaded, self.prompts, self.seed = names, loaded, prompts, seed
        self.max_new_tokens, self._near = max_new_tokens, NEAR_TIE[rounding]
        self.plain = DecodingConfig("autoregressive", max_new_tokens=max_new_tokens)

    @property
    def promise(self) -> Promise:
        """Of the tokens of any two ways to decode greedily."""
        return "tokens" if self.loaded.backend.batch_invariant else "near-ties"

    @property
    def copies(self) -> tuple[Quantization, ...]:
        return tuple(kind for kind in self.loaded.backend.draft_sides if kind is not None)

    @cached_property
    def expected(self) -> list[Ids]:
        """Plain greedy outputs, each prompt alone."""
        return [self.alone(list(prompt), self.plain) for prompt in self.prompts.ids]

    @cached_property
    def texts(self) -> list[Ids]:
        """Prompts with their outputs."""
        return [[*prompt, *output] for prompt, output in zip(self.prompts.ids, self.expected, strict=True)]

    def alone(
        self, prompt: Ids, config: DecodingConfig, prefix: PrefixCache | None = None, loaded: Decoder | None = None
    ) -> Ids:
        """The output of one prompt by itself. `loaded`: another model of the same setup."""
        model = loaded or self.loaded
        decoding = decode(model.backend, prompt, config, model.eos_ids, model.detokenize, prefix=prefix)
        return [token.id for tokens in decoding for token in tokens]

    def together(self, prompts: Sequence[Ids], config: DecodingConfig, seeds: Sequence[int] | None = None) -> list[Ids]:
        """The outputs of prompts in one batch."""
        finished = decode_batch(self.loaded.backend, prompts, config, self.loaded.eos_ids, self.loaded.detokenize, seeds)
        return [output.ids for output in sorted(finished, key=lambda output: output.row)]

    def logits(self, tokens: Tensor, sizes: Sequence[int] = ()) -> Tensor:
        """Of rows of tokens (B, T), (B, T, V), in one pass or in passes of these `sizes`."""
        model = self.loaded.backend
        cache, start, pieces = model.new_cache(len(tokens), tokens.shape[1]), 0, []
        with torch.inference_mode():
            for size in sizes or (tokens.shape[1],):
                part = tokens[:, start : start + size].to(model.device)
                positions = torch.arange(start, start + part.shape[1]).expand(len(tokens), -1)
                pieces.append(model.unembed(model.run_layers(model.embed(part), 0, model.num_layers, positions, cache)))
                start += size
        return torch.cat(pieces, 1)

    def compared(
        self,
        check: str,
        setting: str,
        outputs: Sequence[Ids],
        expected: Sequence[Ids] | None = None,
        prompts: Sequence[Ids] | None = None,
        promise: Promise | None = None,
        note: str = "",
    ) -> CheckResult:
        """Outputs against those that were `expected` of the same prompts, by default the plain ones."""
        expected = self.expected if expected is None else expected
        starts = [list(ids) for ids in self.prompts.ids] if prompts is None else list(prompts)
        places = [(number, *pair) for number, pair in enumerate(zip(outputs, expected, strict=True))]
        mismatches = [
            self.mismatch(number, starts[number], found, wanted) for number, found, wanted in places if found != wanted
        ]
        return self.result(check, setting, promise or self.promise, len(places), sum(map(len, expected)), mismatches, note=note)

    def mismatch(self, number: int, prompt: Ids, found: Ids, wanted: Ids) -> Mismatch:
        """Of a prompt's output, at its first wrong token."""
        position = first_difference(found, wanted)
        assert position is not None
        tokens = [ids[position] if position < len(ids) else None for ids in (wanted, found)]
        return self.place(
            number, position, tokens[0], tokens[1], lambda: self.logits(torch.tensor([prompt + wanted[:position]]))[0, -1]
        )

    def place(
        self, number: int, position: int, wanted: int | None, found: int | None, logits: Callable[[], Tensor]
    ) -> Mismatch:
        """`logits`: (V,) that both tokens are judged by."""
        gap = None
        if wanted is not None and found is not None:
            scores = logits().double()
            gap = float(scores[wanted] - scores[found])
        text = tuple("" if token is None else self.loaded.detokenize([token]) for token in (wanted, found))
        return Mismatch(number, position, wanted, found, gap, gap is not None and abs(gap) <= self._near, (text[0], text[1]))

    def result(
        self,
        check: str,
        setting: str,
        promise: Promise,
        prompts: int,
        tokens: int,
        mismatches: Sequence[Mismatch] = (),
        deviation: float | None = None,
        p_value: float | None = None,
        note: str = "",
    ) -> CheckResult:
        identical = prompts - len({place.prompt for place in mismatches})
        kept = is_kept(promise, mismatches, deviation, p_value)
        implementation = self.loaded.backend.implementation
        return CheckResult(
            *(check, setting, *self.names, implementation, promise, prompts, identical, tokens, kept, tuple(mismatches)),
            *(deviation, p_value, note),
        )
