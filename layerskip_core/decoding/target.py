"""The target: layers that verify drafts and choose tokens, a fixed number or as many as a token
needs; and kept prefixes.
"""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..config.decoding import DecodingConfig
from ..model.backend import Backend, DraftBlock, Submodel, TokenPass, states_at
from ..model.cache import KVCache, Places, States, joined, on_device
from ..model.noise import Noise
from ..model.spec import ModelSpec
from .graphs import GraphRecorder

if TYPE_CHECKING:
    from .drafters import Draft

# Most tokens of a row that wait for the KV entries of blocks. Their states take memory, and where
# all layers have a window, a row keeps at least so many more positions than the window.
_MOST_WAITING = 64


class TargetOutput(NamedTuple):
    """One pass of the target over N tokens, of which S are scored."""

    logits: Tensor | None  # (S, V)
    layers: int  # how many layers gave them
    # (S,), the most probable tokens, in place of logits that nothing else reads
    choices: Tensor | None = None
    states: Tensor | None = None  # (N, D), the input of `head`, of a prefill


class FixedTarget:
    """Layers 0..E-1 for every token; E = L is the whole model. The exit's block follows if it has
    one.
    """

    # Whether decoding writes the same KV entries as prefilling the same tokens
    decodes_like_prefill = True

    def __init__(self, model: Backend, config: DecodingConfig) -> None:
        self._model = model
        self._layers = model.num_layers
        self._block = None
        if config.strategy == "early-exit":
            assert config.exit_layer is not None
            self._layers = config.exit_layer
            self._block = model.exit_blocks.get(config.exit_layer)
        # Hidden states (..., D) to logits (..., V)
        self.head = model.unembed if self._block is None else self._block.head
        exits: dict[str, Collection[int | None]] = {
            "self-speculative": (config.exit_layer,),
            "adaptive": config.exits,
        }
        drafting = exits.get(config.strategy, ())
        known = model.exit_blocks.items()
        blocks: dict[int | str, DraftBlock] = {
            exit_layer: block for exit_layer, block in known if exit_layer in drafting
        }
        blocks |= {
            name: block
            for name, block in model.drafters.items()
            if config.strategy in ("adaptive", name)
        }
        self.exit_cache = ExitBlockCache(model, blocks) if blocks else None  # of blocks that draft
        # Which layers and blocks write KV entries; how many tokens of a cached prefix a prefill
        # reruns.
        self.writes: Hashable = self._layers, self._block is not None, tuple(blocks)
        self.rerun = int(any(block.needs_feature for block in blocks.values()))
        self.records = model.recordable and not self.rerun  # whether its passes can be recorded
        # Layers that all tokens run; later ones write no KV entries
        self._writing = self._layers
        spec = model.spec
        if (
            isinstance(spec, ModelSpec)
            and spec.sizes
            and not (any(block.taps for block in blocks.values()) or self._block)
        ):
            self._writing = spec.attending[-1] + 1

    def fill(
        self, tokens: Tensor, places: Places, scored: list[int], whole: bool = False
    ) -> TargetOutput:
        """A pass over N tokens, pieces of prompts among them: logits (S, V) after the tokens at the
        indices `scored`.

        These are the last of their rows. `whole`: the states of all tokens are needed.
        """
        if self._writing < self._layers and not whole:
            hidden = self._model.embed(tokens)
            writing = self._writing
            logits = None
            hidden = self._model.run_layers(hidden, 0, writing, places)
            if scored:
                counts = [
                    sum(first <= place < end for place in scored)
                    for first, end in pairwise(places.bounds)
                ]
                ends = places.moved(
                    0, [count - own for count, own in zip(places.counts, counts, strict=True)]
                )
                index = on_device(scored, hidden)
                hidden[index] = finals = self._model.run_layers(
                    hidden[index], writing, self._layers, ends
                )
                logits = self.head(finals)
            # Of blocks without KV entries, which read states of scored tokens only
            if self.exit_cache is not None:
                self.exit_cache.record({}, hidden, places)
            return TargetOutput(logits, self._layers)
        states, _ = self._run(tokens, {}, places, chooses=False)
        return TargetOutput(
            self.head(states[on_device(scored, states)]) if scored else None,
            self._layers,
            states=states,
        )

    def verify(
        self,
        draft: "Draft",
        places: Places,
        recorder: GraphRecorder | None = None,
        noise: Noise | None = None,
        reads_logits: bool = True,
    ) -> TargetOutput:
        """Choices after each of the draft's tokens, or logits (N, V) if something else reads them.

        `recorder`: of such passes, if they are recorded. `noise`: of choices.
        """
        chooses = not reads_logits and self._block is None
        if recorder is None:
            return self._pass(draft.tokens, draft.exit_states, places, chooses, noise)
        # A recorded pass writes the entries of its own tokens, so no earlier ones may wait
        if self.exit_cache is not None:
            self.exit_cache.write(places.cache, places.starts)
        stops = tuple(draft.exit_states)
        inputs = (draft.tokens, *draft.exit_states.values())
        positions, index, kept = places.padded(places.counts, recorder.slots)
        if is_padded := index.numel() > len(draft.tokens):
            index, kept = (
                part.flatten().to(draft.tokens.device, non_blocking=True) for part in (index, kept)
            )
            inputs = tuple(part[index] for part in inputs)

        def work(positions: Tensor, tokens: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            recorded = Places(places.cache, (), (), recorded=positions)
            output = self._pass(tokens, dict(zip(stops, states, strict=True)), recorded, chooses)
            return tuple(part for part in (output.logits, output.choices) if part is not None)

        (found,) = recorder.run(("pass", self.writes, chooses, stops), work, positions, *inputs)
        if is_padded:
            found = found[kept]
        if chooses:
            return TargetOutput(None, self._layers, found)
        return TargetOutput(found, self._layers)

    def _pass(
        self,
        tokens: Tensor,
        states: Mapping[int, Tensor],
        places: Places,
        chooses: bool,
        noise: Noise | None = None,
    ) -> TargetOutput:
        hidden, choices = self._run(tokens, states, places, chooses, noise)
        return TargetOutput(self.head(hidden) if choices is None else None, self._layers, choices)

    def _run(
        self,
        tokens: Tensor,
        states: Mapping[int, Tensor],
        places: Places,
        chooses: bool,
        noise: Noise | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs tokens (N,) from their highest exit states; returns what the head reads and, if it
        `chooses`, tokens (N,).
        """
        start = max(states, default=0)
        blocks = self.exit_cache
        choices = None
        kept = (
            () if blocks is None else (*(tap for tap in blocks.taps if tap > start), self._layers)
        )
        if 0 not in states and (
            (start == 0 and not chooses) or (blocks is not None and 0 in blocks.taps)
        ):
            states = {0: self._model.embed(tokens), **states}
        if chooses:
            step = TokenPass(tokens, places, self._layers, start, states.get(start), kept, noise)
            choices, reached = self._model.choose(step)
        else:
            reached = states_at(self._model, states[start], kept or (self._layers,), places, start)
        hidden = reached.get(self._layers, tokens)  # unused after a choice without blocks
        if blocks is not None:
            blocks.record({**states, **reached}, hidden, places)
        if self._block is not None:
            hidden = self._model.run_layers(
                hidden, self._block.layer, self._block.layer + 1, places
            )
        return hidden, choices


class CalmTarget:
    """Each token leaves at the first exit whose top probability exceeds `exit_confidence`.

    Confident Adaptive Language Modeling (CALM), Schuster et al., NeurIPS 2022, with the exit's
    softmax as its confidence. Later tokens attend, also in the layers above E, to a token that left
    at exit E. Its KV entries there are computed from its state at E (state propagation), lazily:
    once a later token needs them, for several tokens in one pass.

    For one prompt, without drafts. The prompt runs through all layers, and its last token leaves as
    every other. Exits are tested with the draft head, which may score the most frequent tokens
    only; the full head chooses the token. Where an exit has a block, the block decides.
    """

    decodes_like_prefill = False  # a prompt runs through all layers
    exit_cache = None
    records = False
    rerun = 0

    def __init__(self, model: Backend, config: DecodingConfig) -> None:
        self._model = model
        self._draft_side = model.draft_sides[None]
        self._confidence = config.exit_confidence
        self._spans = tuple(pairwise((0, *sorted(set(config.exits)), model.num_layers)))
        self._blocks = {stop: model.exit_blocks.get(stop) for _, stop in self._spans}
        self.writes: Hashable = self._spans
        self._begin = 0  # position of the first token after the prompt
        self._left = list[Tensor]()  # the states (1, D) with which tokens after the prompt left
        self._written = list[int]()  # by span: how many of these tokens have KV entries there

    def fill(
        self, tokens: Tensor, places: Places, scored: list[int], whole: bool = False
    ) -> TargetOutput:
        chosen = None
        hidden = self._model.embed(tokens)
        self._begin = places.end
        # A row that was preempted is decoded once more, in a new cache
        self._left = []
        self._written = [0] * len(self._spans)
        for start, stop in self._spans:
            hidden = self._model.run_layers(hidden, start, stop, places)
            after = self._through_block(hidden, stop, places)
            if scored:
                chosen = chosen or self._leaving(after[on_device(scored, after)], stop)
        return chosen or TargetOutput(None, self._model.num_layers)

    def verify(
        self,
        draft: "Draft",
        places: Places,
        recorder: GraphRecorder | None = None,
        noise: Noise | None = None,
        reads_logits: bool = True,
    ) -> TargetOutput:
        count = places.starts[0] - self._begin  # of the tokens between the prompt and this one
        hidden = self._model.embed(draft.tokens)
        chosen = None
        for span, (start, stop) in enumerate(self._spans):
            if (written := self._written[span]) < count:  # some tokens left below this span
                left = torch.cat(self._left[written:count])
                earlier = places.cache.span(self._begin + written, places.starts[0])
                self._model.write_kv(left, start, stop, earlier)
                if (block := self._blocks[stop]) is not None:
                    self._model.write_kv(left, block.layer, block.layer + 1, earlier)
            hidden = self._model.run_layers(hidden, start, stop, places)
            self._written[span] = count + 1
            chosen = self._leaving(self._through_block(hidden, stop, places), stop)
            if chosen is not None:
                break
        assert chosen is not None
        self._left.append(hidden)
        return chosen

    def _through_block(self, hidden: Tensor, layers: int, places: Places) -> Tensor:
        """The states after `layers` layers, and after the block of that exit if it has one."""
        block = self._blocks[layers]
        return (
            hidden
            if block is None
            else self._model.run_layers(hidden, block.layer, block.layer + 1, places)
        )

    def _leaving(self, hidden: Tensor, layers: int) -> TargetOutput | None:
        """The output after `layers` layers (and the exit's block) if the token leaves there, else
        None.
        """
        block = self._blocks[layers]
        if layers < self._model.num_layers:
            head, few = self._draft_side.head(
                Submodel(layers, block=block and self._draft_side.exit_blocks[layers])
            )
            if float((logits := head(hidden)).float().softmax(-1).amax()) <= self._confidence:
                return None
            if few is None:
                return TargetOutput(logits, layers)
        return TargetOutput(
            self._model.unembed(hidden) if block is None else block.head(hidden), layers
        )


class ExitBlockCache:
    """Writes the KV entries of blocks that draft, from the target's own states, before a block
    drafts.

    Between drafts the states of committed tokens wait in the cache's `unwritten`, so a block that
    does not draft costs no pass, and rejected drafts are never written. A block that
    `needs_feature` of the previous token finds that of the last written token in the cache's
    `features`.
    """

    def __init__(self, model: Backend, blocks: Mapping[int | str, DraftBlock]) -> None:
        """`blocks`: by the exits at which their drafts start, or the names of drafters."""
        self._model = model
        self._blocks = blocks
        self.taps = tuple(sorted({tap for block in blocks.values() for tap in block.taps}))
        self._of_pass: States | None = None  # of all N tokens of the last pass

    def record(self, states: Mapping[int, Tensor], finals: Tensor, places: Places) -> None:
        """Takes the states of a pass: those after each of `taps`, and `finals` after the last
        layer, (N, D).
        """
        of_taps = {tap: states[tap] for tap in self.taps if tap in states}
        # The pass is a CUDA graph, whose states the next replay overwrites
        if places.recorded is not None:
            self._write_all(States(of_taps, finals), places)
        else:
            self._of_pass = States(of_taps, finals)

    def commit(
        self, cache: KVCache, bounds: Sequence[int], counts: Sequence[int], filled: Sequence[int]
    ) -> None:
        """Keeps the states of the first `counts[row]` tokens of each row in the last pass, where
        they begin at `bounds[row]`.

        `filled`: by row, how many tokens have KV entries of the target, these included.
        """
        if self._of_pass is None:
            return
        for unwritten, first, count in zip(cache.unwritten, bounds, counts, strict=False):
            if count:
                unwritten.append(self._of_pass.part(first, first + count))
        self._of_pass = None
        if max(cache.num_unwritten) >= _MOST_WAITING:
            self.write(cache, filled)

    def write(self, cache: KVCache, filled: Sequence[int]) -> None:
        """Writes the KV entries of all waiting tokens in one pass. `filled`: as for `commit`."""
        counts = cache.num_unwritten
        if not any(counts):
            return
        waiting = joined([part for unwritten in cache.unwritten for part in unwritten])
        starts = [stop - count for stop, count in zip(filled, counts, strict=True)]
        places = Places(cache, starts, counts)
        self._write_all(waiting, places)
        for unwritten in cache.unwritten:
            unwritten.clear()

    def _write_all(self, waiting: States, places: Places) -> None:
        for name, block in self._blocks.items():
            features = block.features(self._model, waiting.taps, waiting.finals)
            own = {tap: waiting.taps[tap] for tap in block.taps}
            if features is None:
                block.write(self._model, own, None, places)
            else:
                self._write_fed(name, block, own, features, places)

    def _write_fed(
        self,
        name: int | str,
        block: DraftBlock,
        own: dict[int, Tensor],
        features: Tensor,
        places: Places,
    ) -> None:
        """Writes the entries of a block that reads the previous token's feature, and keeps that of
        each row's last token.

        Without a feature of the token before, a row's first token gets no entry: it is the first of
        its text, or, after a cached prefix, was rerun only for its feature, and has its entry
        already.
        """
        of_rows = places.cache.features
        before = features.roll(1, 0)
        skipped = [0] * len(places.counts)
        for row, (first, count) in enumerate(zip(places.bounds, places.counts, strict=False)):
            if not count:
                continue
            known = of_rows[row].get(name)
            if known is None:
                skipped[row] = 1
            else:
                before[first] = known
            of_rows[row][name] = features[first + count - 1]
        if any(skipped):
            ends = zip(pairwise(places.bounds), skipped, strict=True)
            kept = [index for (first, end), less in ends for index in range(first + less, end)]
            if not kept:
                return
            index = on_device(kept, before)
            own = {tap: state[index] for tap, state in own.items()}
            before = before[index]
            places = places.moved(0, skipped)
        block.write(self._model, own, before, places)


Target = FixedTarget | CalmTarget


def target_of(model: Backend, config: DecodingConfig) -> Target:
    by_token = config.strategy == "early-exit" and config.exit_confidence
    return CalmTarget(model, config) if by_token else FixedTarget(model, config)


class Prefixes:
    """Prefix cache: KV entries of texts in bounded memory. A prompt is prefilled from the end of
    its longest kept prefix.

    The least recently used texts are dropped first. With a batch-invariant backend outputs are
    bitwise equal to those after a full prefill. PyTorch's kernels round a token differently in a
    prompt than decoded alone, so outputs can differ there where two tokens are almost equally
    likely. A backend with exact weights promises that they never do: for it nothing is kept.
    """

    def __init__(self, most_bytes: float, most_texts: float = inf, least: int = 64) -> None:
        """`least`: tokens that a kept prefix must save to be used, and that a text must add to the
        kept ones to be kept.
        """
        self._most_bytes = most_bytes
        self._most_texts = most_texts
        self._least = least
        self._texts: list[_KeptText] = []  # the least recently used first

    @property
    def bytes(self) -> int:
        """Memory of all texts; shared pages count once."""
        return sum(
            {
                address: size for text in self._texts for address, size in text.cache.memory.items()
            }.values()
        )

    def begin(
        self, model: Backend, target: Target, prompt: Sequence[int], end: int
    ) -> tuple[KVCache, int]:
        """A cache of one row for positions before `end`, and how many of the prompt's first tokens
        need no pass.
        """
        best = None
        most = 0
        for text in self._texts:
            known = min(_common(text.ids, prompt), len(prompt) - 1) - target.rerun
            if text.written_by == (model, target.writes) and known >= max(
                text.first, self._least, most + 1
            ):
                best = text
                most = known
        if best is None:
            return model.new_cache(1, end), 0
        self._texts.remove(best)
        self._texts.append(best)
        if not self._has_room(model, best.cache):
            return model.new_cache(1, end), 0
        # A drafter's own KV entry of a rerun token stays.
        return best.cache.branch(
            [0], [most], [most + target.rerun] if target.rerun else None, end
        ), most

    def branch_point(
        self, model: Backend, target: Target, prompt: Sequence[int], known: int
    ) -> int:
        """Length of the longest prefix shared with a kept text, if `least` tokens longer than the
        reusable `known`; else 0.
        """
        texts = (text for text in self._texts if text.written_by == (model, target.writes))
        common = max((_common(text.ids, prompt) for text in texts), default=0)
        return common if common - known >= self._least else 0

    def would_share(
        self, model: Backend, ids: Sequence[int], others: Sequence[Sequence[int]]
    ) -> bool:
        """True if one of `others`, once kept, will save this text at least `least` more tokens than
        the kept ones.
        """
        if not others or not self._keeps_texts_of(model):
            return False
        known = max((_common(text.ids, ids) for text in self._texts), default=0)
        return any(_common(other, ids) - known >= self._least for other in others)

    def drop(self, model: Backend | None = None) -> bool:
        """Drops the least recently used text, of a `model` if given: only its texts have pages of
        its pool.

        Returns False if there is none.
        """
        for text in self._texts:
            if model is None or text.written_by[0] is model:
                self._texts.remove(text)
                return True
        return False

    def _keeps_texts_of(self, model: Backend) -> bool:
        return self._most_bytes > 0 and not model.exact

    def _has_room(self, model: Backend, cache: KVCache) -> bool:
        """Whether there is memory for a branch of a cache of `model`, after dropping its texts if
        need be.
        """
        while cache.free_pages() < cache.branch_pages:
            if not self.drop(model):
                return False
        return True

    def keep(
        self, model: Backend, target: Target, ids: Sequence[int], cache: KVCache, row: int
    ) -> None:
        """Keeps the KV entries of a text, from a row of a cache, if it adds `least` tokens to the
        kept ones.
        """
        if not self._keeps_texts_of(model):
            return
        common = {
            text: _common(text.ids, ids)
            for text in self._texts
            if text.written_by == (model, target.writes)
        }
        if (
            len(ids)
            - max((count for text, count in common.items() if count >= text.first), default=0)
            < self._least
        ):
            return
        if not self._has_room(model, cache):
            return
        # A recurrent state is that of the end
        first = min(cache.first(row), len(ids))
        branch = cache.branch([row], [len(ids)])
        # Kept texts that are prefixes of the new one go.
        self._texts = [
            text
            for text in self._texts
            if common.get(text) != len(text.ids) or len(text.ids) < first
        ]
        self._texts.append(_KeptText((model, target.writes), list(ids), branch, first))
        while len(self._texts) > self._most_texts or self.bytes > self._most_bytes:
            self.drop()


NO_PREFIXES = Prefixes(0)  # keeps nothing


@dataclass(eq=False)
class _KeptText:
    """A text of Prefixes, and a cache of one row with its KV entries: of the layers and blocks that
    a target writes.
    """

    written_by: tuple[Backend, Hashable]
    ids: list[int]
    cache: KVCache
    first: int  # first position from which a prompt can continue


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common prefix."""
    low = 0
    high = min(len(one), len(other))
    while low < high:  # bisection, because comparing slices is fast and a loop over tokens is not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
