"""The target: the layers that verify drafts and choose tokens, a fixed number or as many as a token needs; and their caches."""

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from ..config.decoding import DecodingConfig
from ..model.backend import Backend, Submodel, joined, states_at
from ..model.cache import KVCache
from ..model.exit_blocks import DraftBlock, target_block
from ..model.pages import PagedCache, TokenRows
from .drafters import Draft
from .graphs import Recorder
from .output import Row, TokenLogprobs, logprobs_of

_SCORED = 64  # tokens of a prompt whose logits are in memory at once


class TargetOutput(NamedTuple):
    """One pass of the target over T tokens of each row."""

    logits: Tensor | None  # (B, T, V)
    layers: int  # that gave them
    choices: Tensor | None = None  # (B, T), the most probable tokens, instead of logits if nothing else needs these
    states: Tensor | None = None  # (B, T, D), of a prompt's tokens, for `head`


class FixedTarget:
    """Layers 0..E-1 for every token; E = L is the whole model. The exit's block follows if it has one.

    Attributes:
        decodes_like_prefill: whether decoding writes the same KV entries as prefilling the same tokens.
        writes: which layers and exit blocks have KV entries, to be compared.
        rerun: how many of the tokens that have KV entries the pass over a prompt needs again.
        exit_cache: of the blocks that draft; None without.
        head: hidden states (..., D) to logits (..., V).
        recorder: records the passes over drafts, if it is set.
    """

    decodes_like_prefill = True
    recorder: Recorder | None = None

    def __init__(self, model: Backend, config: DecodingConfig) -> None:
        """Raises ConfigError for an exit that can only draft."""
        self._model, self._layers, self._block = model, model.num_layers, None
        if config.strategy == "early-exit":
            assert config.exit_layer is not None
            self._layers, self._block = config.exit_layer, target_block(model.exit_blocks, config.exit_layer)
        self.head = model.unembed if self._block is None else self._block.head
        exits: dict[str, Collection[int | None]] = {"self-speculative": (config.exit_layer,), "adaptive": config.exits}
        drafting = exits.get(config.strategy, ())
        blocks: dict[int, DraftBlock] = {
            exit_layer: block for exit_layer, block in model.exit_blocks.items() if exit_layer in drafting
        }
        if model.eagle3 is not None and config.strategy in ("adaptive", "eagle3"):
            blocks[0] = model.eagle3
        self.exit_cache = ExitBlockCache(model, blocks) if blocks else None
        self._taps = self.exit_cache.taps if self.exit_cache else ()
        self.writes: Hashable = self._layers, self._block is not None, tuple(blocks)
        self.rerun = int(self.exit_cache is not None and self.exit_cache.is_fed)
        reads_logits = config.temperature > 0 or config.changes_logits or config.logprobs is not None
        self._only_chooses = not (reads_logits or self._block)

    def fill(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> None:
        """Writes the KV entries of a part of a prompt (1, T) that is not its end."""
        self._run(tokens, {0: self._model.embed(tokens)}, positions, cache)
        if self.exit_cache is not None:
            self.exit_cache.go_on([tokens.shape[1] - 1])

    def prefill(self, tokens: Tensor, last: Tensor, positions: Tensor, cache: KVCache) -> TargetOutput:
        """Logits (B, 1, V) after each of the prompts (B, T), whose last tokens have the indices `last` (B,).

        The cache already has the KV entries before `positions`.
        """
        states = self._run(tokens, {0: self._model.embed(tokens)}, positions, cache)
        return TargetOutput(self.head(_at(states, last)), self._layers, states=states)

    def prompt_logprobs(self, row: Row, output: TargetOutput, index: int) -> list[TokenLogprobs]:
        """Of a row's prompt, by the states of its prefill; the logits of so many places at once."""
        assert output.states is not None and row.config.logprobs is not None
        told: list[TokenLogprobs] = []
        for start in range(0, row.prompt_tokens - 1, _SCORED):
            ids = row.ids[start + 1 : min(start + 1 + _SCORED, row.prompt_tokens)]
            logits = self.head(output.states[index : index + 1, start : start + len(ids)])[0]
            told += logprobs_of(logits, ids, row.config.logprobs)
        return told

    def verify(self, draft: Draft, positions: Tensor, cache: KVCache) -> TargetOutput:
        """Logits (B, K+1, V), or choices, after each of the draft's tokens at `positions` (B, K+1)."""
        recorder, stops = self.recorder, tuple(draft.exit_states)
        if recorder is None:
            padded = draft.tokens.numel() - len(draft.counts) > sum(draft.counts)
            if padded and self._model.ragged and not (self.exit_cache and self.exit_cache.is_fed):
                return self._ragged_pass(draft, positions, cache)
            return self._pass(draft.tokens, draft.exit_states, positions, cache)

        def work(tokens: Tensor, places: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            logits = self._pass(tokens, dict(zip(stops, states, strict=True)), places, cache).logits
            assert logits is not None  # backends whose passes are recorded have no chooser
            return (logits,)

        (logits,) = recorder.run(("pass", self.writes, stops), work, draft.tokens, positions, *draft.exit_states.values())
        return TargetOutput(logits, self._layers)

    def _ragged_pass(self, draft: Draft, positions: Tensor, cache: KVCache) -> TargetOutput:
        """A pass without the draft's padding: each token is a row of its own. In its output, padding is 0."""
        assert isinstance(cache, PagedCache)
        counts = torch.tensor(draft.counts) + 1
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        columns = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]

        def flat(padded: Tensor) -> Tensor:
            return padded[rows, columns][:, None]

        states = self._completed(draft.tokens, draft.exit_states, positions, cache)
        states = {stop: flat(reached) for stop, reached in states.items()}
        output = self._pass(flat(draft.tokens), states, flat(positions), TokenRows(cache, counts.tolist()))

        def padded(flat: Tensor | None) -> Tensor | None:
            if flat is None:
                return None
            return flat.new_zeros(*draft.tokens.shape, *flat.shape[2:]).index_put_((rows, columns), flat[:, 0])

        return TargetOutput(padded(output.logits), output.layers, padded(output.choices))

    def _completed(
        self, tokens: Tensor, states: Mapping[int, Tensor], positions: Tensor, cache: KVCache
    ) -> Mapping[int, Tensor]:
        """The exit states of all tokens (B, T), if there are any: the last token may lack its own."""
        if not states or (known := states[max(states)].shape[1]) == tokens.shape[1]:
            return states
        last = states_at(self._model, self._model.embed(tokens[:, known:]), sorted(states), positions[:, known:], cache)
        return joined((states, last))

    def _pass(self, tokens: Tensor, states: Mapping[int, Tensor], positions: Tensor, cache: KVCache) -> TargetOutput:
        """One pass over tokens (B, T), from their exit states on; the last token may lack its state."""
        states = self._completed(tokens, states, positions, cache)
        if self._only_chooses and self._model.chooser is not None:
            states = self._with_embedding(tokens, states)
            start = max(states, default=0)
            found = self._model.chooser(
                tokens, states.get(start), start, self._layers, self._stops_after(start), positions, cache
            )
            if found is not None:
                choices, reached = found
                self._write({**states, **reached}, positions, cache)
                return TargetOutput(None, self._layers, choices)
        hidden = self._run(tokens, states or {0: self._model.embed(tokens)}, positions, cache)
        return TargetOutput(self.head(hidden), self._layers)

    def _with_embedding(self, tokens: Tensor, states: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        """The states, with the embedding if a drafter reads it."""
        return {0: self._model.embed(tokens), **states} if 0 in self._taps and 0 not in states else states

    def _stops_after(self, start: int) -> tuple[int, ...]:
        """After which layers above `start` blocks read states."""
        return (*(tap for tap in self._taps if tap > start), self._layers) if self.exit_cache else ()

    def _write(self, states: Mapping[int, Tensor], positions: Tensor, cache: KVCache) -> None:
        if self.exit_cache is not None:
            self.exit_cache.write(states, states[self._layers], positions, cache)

    def _run(self, tokens: Tensor, states: Mapping[int, Tensor], positions: Tensor, cache: KVCache) -> Tensor:
        """The layers after the highest of the `states` of tokens (B, T), and the exit's block."""
        start, states = max(states), self._with_embedding(tokens, states)
        stops = self._stops_after(start) or (self._layers,)
        states = {**states, **states_at(self._model, states[start], stops, positions, cache, start)}
        hidden = states[self._layers]
        self._write(states, positions, cache)
        if self._block is not None:
            hidden = self._model.run_layers(hidden, self._block.layer, self._block.layer + 1, positions, cache)
        return hidden


class CalmTarget:
    """Each token leaves at the first exit whose most probable token has more than a probability.

    Confident Adaptive Language Modeling (CALM), Schuster et al., NeurIPS 2022, with the exit's softmax as its confidence. Later
    tokens attend, also in the layers above E, to a token that left at exit E. Its KV entries there are computed from its state
    at E (state propagation), but only when a later token needs them first: those of several tokens are then one pass.

    For one prompt, without drafts. The prompt runs through all layers, and its last token decides as every other. Exits are
    tested with the head that drafts, which may score the most frequent tokens only; the token is chosen from all. Where an exit
    has a block, the block decides.
    """

    decodes_like_prefill = False  # a prompt runs through all layers
    exit_cache, recorder, rerun = None, None, 0

    def __init__(self, model: Backend, config: DecodingConfig) -> None:
        """Raises ConfigError for an exit that can only draft."""
        self._model, self._draft_side, self._confidence = model, model.draft_sides[None], config.exit_confidence
        self._spans = tuple(pairwise((0, *sorted(set(config.exits)), model.num_layers)))
        self._blocks = {stop: target_block(model.exit_blocks, stop) for _, stop in self._spans}
        self.writes: Hashable = self._spans
        self._begin = 0  # position of the first token after the prompt
        self._left: list[Tensor] = []  # the state (1, 1, D) that each token after the prompt left with
        self._written = [0] * len(self._spans)  # by span: how many of these tokens have KV entries there

    def fill(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> None:
        for _ in self._through_all(tokens, positions, cache):
            pass

    def prefill(self, tokens: Tensor, last: Tensor, positions: Tensor, cache: KVCache) -> TargetOutput:
        chosen = None
        for stop, scored in self._through_all(tokens, positions, cache):
            chosen = chosen or self._leaving(_at(scored, last), stop)
        self._begin = int(positions[0, -1]) + 1
        assert chosen is not None
        return chosen

    def verify(self, draft: Draft, positions: Tensor, cache: KVCache) -> TargetOutput:
        count = int(positions[0, 0]) - self._begin  # of the tokens between the prompt and this one
        hidden, chosen = self._model.embed(draft.tokens), None
        for span, (start, stop) in enumerate(self._spans):
            if (written := self._written[span]) < count:  # some tokens left below this span
                places = torch.arange(self._begin + written, self._begin + count)[None]
                left = torch.cat(self._left[written:count], dim=1)
                self._model.write_kv(left, start, stop, places, cache)
                if (block := self._blocks[stop]) is not None:
                    self._model.write_kv(left, block.layer, block.layer + 1, places, cache)
            hidden = self._model.run_layers(hidden, start, stop, positions, cache)
            self._written[span] = count + 1
            chosen = self._leaving(self._through_block(hidden, stop, positions, cache), stop)
            if chosen is not None:
                break
        assert chosen is not None
        self._left.append(hidden)
        return chosen

    def _through_all(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Iterator[tuple[int, Tensor]]:
        """Each exit and L, with the states after it."""
        hidden = self._model.embed(tokens)
        for start, stop in self._spans:
            hidden = self._model.run_layers(hidden, start, stop, positions, cache)
            yield stop, self._through_block(hidden, stop, positions, cache)

    def _through_block(self, hidden: Tensor, layers: int, positions: Tensor, cache: KVCache) -> Tensor:
        """The states after `layers` layers, and after the block of that exit if it has one."""
        block = self._blocks[layers]
        return hidden if block is None else self._model.run_layers(hidden, block.layer, block.layer + 1, positions, cache)

    def _leaving(self, hidden: Tensor, layers: int) -> TargetOutput | None:
        """The logits (1, 1, V) after `layers` layers, and perhaps a block, if a token leaves with them."""
        block = self._blocks[layers]
        if layers < self._model.num_layers:
            head, few = self._draft_side.head(Submodel(layers, block=block and self._draft_side.exit_blocks[layers]))
            if float((logits := head(hidden)).float().softmax(-1).amax()) <= self._confidence:
                return None
            if few is None:
                return TargetOutput(logits, layers)
        return TargetOutput(self._model.unembed(hidden) if block is None else block.head(hidden), layers)


def _at(hidden: Tensor, indices: Tensor) -> Tensor:
    """The hidden states (B, 1, D) of one token of each row, at `indices` (B,)."""
    return hidden[torch.arange(len(hidden), device=hidden.device), indices][:, None]


class ExitBlockCache:
    """The KV entries of blocks that draft: after each pass of the target they are written from its own states.

    A pass has stops at `taps` on its way, and one `write` at its end. What blocks read of the token before is left by one pass
    to the next, if any `is_fed`.
    """

    def __init__(self, model: Backend, blocks: Mapping[int, DraftBlock]) -> None:
        """`blocks`: by the exits at which their drafts start."""
        self._model, self._blocks = model, blocks
        self.taps = tuple(sorted({tap for block in blocks.values() for tap in block.taps}))
        self.is_fed = any(block.is_fed for block in blocks.values())
        self.features: dict[int, Tensor] = {}  # by exit, (B, 1, D): of the token before each row's newest
        self._of_pass: dict[int, Tensor] = {}  # by exit, (B, T, D): of the tokens of the last pass

    def write(self, states: Mapping[int, Tensor], finals: Tensor, positions: Tensor, cache: KVCache) -> None:
        """Writes the blocks' KV entries of the tokens at `positions` (B, T).

        `states` are those after each of `taps`, `finals` those after the last layer, (B, T, D). After a cached prefix, the
        first token is rerun only to get the second token's feature: its own KV entries are there.
        """
        for exit_layer, block in self._blocks.items():
            own, places, before = {tap: states[tap] for tap in block.taps}, positions, None
            features = block.features(self._model, states, finals)
            if features is not None:
                known = self.features.get(exit_layer)
                if known is None and not block.starts_later and int(positions[0, 0]) == 0:
                    known = torch.zeros_like(features[:, :1])
                if known is None:
                    own, places = {tap: state[:, 1:] for tap, state in own.items()}, positions[:, 1:]
                before = features[:, :-1] if known is None else torch.cat((known, features[:, :-1]), dim=1)
                self._of_pass[exit_layer] = features
            if places.numel():
                block.write(self._model, own, before, places, cache)

    def go_on(self, last: Sequence[int]) -> None:
        """After a pass. `last`: by row, the index in it of the token before the newest."""
        if self.is_fed:
            self.features = {
                exit_layer: torch.stack([of_row[place] for of_row, place in zip(found, last, strict=True)])[:, None]
                for exit_layer, found in self._of_pass.items()
            }

    def keep_rows(self, rows: Sequence[int]) -> None:
        self.features = {exit_layer: found[list(rows)] for exit_layer, found in self.features.items()}

    def join(self, other: "ExitBlockCache") -> None:
        """Adds the rows of another after its own, between two passes."""
        self.features = {exit_layer: torch.cat((own, other.features[exit_layer])) for exit_layer, own in self.features.items()}


Target = FixedTarget | CalmTarget


def target_of(model: Backend, config: DecodingConfig) -> Target:
    """Raises ConfigError for an exit that can only draft."""
    by_token = config.strategy == "early-exit" and config.exit_confidence
    return CalmTarget(model, config) if by_token else FixedTarget(model, config)


class Prefixes:
    """KV entries of texts in bounded memory: a prompt starts at its first difference from the most similar one.

    Texts that were not used for the longest time are dropped. With a batch-invariant backend outputs have the bits that they
    have after a whole prefill. PyTorch's kernels give a token that was decoded alone other last bits than in a prompt, so
    outputs can differ there where two tokens are almost equally likely. A backend with exact weights promises that they never
    do: for it nothing is kept.
    """

    def __init__(self, most_bytes: float, most_texts: float = inf, least: int = 64) -> None:
        """`least`: tokens of a common beginning that are worth a prefill apart from others, and of a text that is kept."""
        self._most_bytes, self._most_texts, self._least = most_bytes, most_texts, least
        self._texts: list[_KeptText] = []  # the last used one is the last

    @property
    def bytes(self) -> int:
        """That the texts take; what they share counts once."""
        return sum({address: size for text in self._texts for address, size in text.cache.memory.items()}.values())

    def known(self, model: Backend, target: Target, prompt: Sequence[int]) -> int:
        """How many of the prompt's first tokens need no pass."""
        return self._best(model, target, prompt)[0]

    def begin(self, model: Backend, target: Target, prompt: Sequence[int], end: int) -> tuple[KVCache, int]:
        """A cache of one row for positions before `end`, and how many of the prompt's first tokens need no pass."""
        known, text = self._best(model, target, prompt)
        if text is None:
            return model.new_cache(1, end), 0
        self._texts.remove(text)
        self._texts.append(text)
        # A drafter's own entry of a token that is rerun stays.
        return text.cache.branch([0], [known], [known + target.rerun] if target.rerun else None, end), known

    def drop(self) -> bool:
        """Forgets the text that was not used for the longest time. Returns False if there is none."""
        return bool(self._texts) and self._texts.pop(0) is not None

    def keep(self, model: Backend, target: Target, ids: Sequence[int], cache: KVCache, row: int) -> None:
        """Keeps the KV entries of a text, which the row of a cache has, if they are worth it."""
        common = {text: _common(text.ids, ids) for text in self._texts if text.made_for == (model, target.writes)}
        if not self._most_bytes or model.exact or len(ids) - max(common.values(), default=0) < self._least:
            return
        while cache.free_pages < 1 and self.drop():  # of which the branch needs one
            pass
        if cache.free_pages < 1:
            return
        kept = _KeptText((model, target.writes), list(ids), cache.branch([row], [len(ids)]))
        self._texts = [text for text in self._texts if common.get(text) != len(text.ids)]  # what the new text begins with
        self._texts.append(kept)
        while len(self._texts) > self._most_texts or self.bytes > self._most_bytes:
            self.drop()

    def _best(self, model: Backend, target: Target, prompt: Sequence[int]) -> "tuple[int, _KeptText | None]":
        def is_usable(text: _KeptText) -> bool:
            if text.made_for != (model, target.writes) or text.cache.rolls_back:
                return text.made_for == (model, target.writes)
            # A recurrent state is the one after the last token: a prompt goes on from there, or begins anew.
            return not target.rerun and len(text.ids) == _common(text.ids, prompt) < len(prompt)

        text = max(filter(is_usable, self._texts), key=lambda text: _common(text.ids, prompt), default=None)
        if text is None:
            return 0, None
        known = min(_common(text.ids, prompt), len(prompt) - 1) - target.rerun
        return (known, text) if known >= self._least else (0, None)


@dataclass(eq=False)
class _KeptText:
    """A text of Prefixes, and a cache of one row with its KV entries: of the layers and blocks that a target writes."""

    made_for: tuple[Backend, Hashable]
    ids: list[int]
    cache: KVCache


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens with which both begin."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # lists are compared fast, tokens one by one are not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
