"""Perplexity of references and of plain text through every exit, each from one teacher-forced pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from ..checkpoint.loaded import Decoder
from ..checkpoint.transformers_read import quiet_transformers
from ..data.examples import Example
from ..losses import summed_losses
from ..model.backend import Backend
from ..prompting import RAW
from .metrics import Scores

_WINDOW_TOKENS = 512


@dataclass(frozen=True)
class ReferenceLosses:
    """Cross-entropy in nats, summed over the reference tokens of each text, by exit; and how many tokens each text has.

    Texts without tokens are left out, and so are exits that can only draft.
    """

    tokens: tuple[int, ...] = ()
    summed: dict[int, tuple[float, ...]] = field(default_factory=dict)

    def __add__(self, other: "ReferenceLosses") -> "ReferenceLosses":
        layers = self.summed | other.summed
        summed = {layer: (*self.summed.get(layer, ()), *other.summed.get(layer, ())) for layer in layers}
        return ReferenceLosses((*self.tokens, *other.tokens), summed)

    def scores(self, exit_layer: int) -> Scores | None:
        """The perplexity; None when there are no tokens or the value is not finite, and for an exit that can only draft."""
        nats, tokens = self.summed.get(exit_layer, ()), sum(self.tokens)
        return Scores(nats, self.tokens) if nats and sum(nats) / tokens < 700 else None

    def perplexity(self, exit_layer: int) -> float | None:
        """exp of the mean, if there are `scores`."""
        scores = self.scores(exit_layer)
        return None if scores is None else scores.mean


def reference_losses(loaded: Decoder, example: Example, exit_layers: Sequence[int]) -> ReferenceLosses:
    """The losses of the reference and its EOS after the prompt. The prompt's own tokens do not count.

    A row longer than the context is cut there, as in training.
    """
    tokenizer = loaded.tokenizer
    prompt = loaded.encode_prompt(example.prompt)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    reference = list(tokenizer(example.completion, add_special_tokens=False)["input_ids"]) + end
    return _losses(loaded.backend, prompt, reference, exit_layers)


def text_losses(loaded: Decoder, text: str, windows: int, exit_layers: Sequence[int]) -> Iterator[ReferenceLosses]:
    """The losses of `windows` windows, evenly spaced over the text, or (0) of the whole text.

    Windows do not overlap; each has 512 tokens, or as many as the context holds, and the last one of a whole text what is left.
    A window starts with the tokens
    that the tokenizer puts before every text. If there are none, the window's first token does not count.
    """
    with quiet_transformers():  # else transformers warns that the text is longer than the context
        ids = list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
    start = loaded.with_template(RAW, None).encode_prompt("")
    size = min(_WINDOW_TOKENS, loaded.backend.max_positions - len(start))
    offsets = range(0, max(len(ids) - size, 0) + 1 if windows else len(ids), size)
    count = min(windows or len(offsets), len(offsets))
    for number in range(count):
        offset = offsets[number * len(offsets) // count]
        yield _losses(loaded.backend, start, ids[offset : offset + size], exit_layers)


@torch.inference_mode()
def _losses(model: Backend, prompt: list[int], reference: list[int], exit_layers: Sequence[int]) -> ReferenceLosses:
    ids = (prompt + reference)[: model.max_positions]
    first = max(len(prompt), 1)  # no token predicts the very first one
    targets = torch.tensor(ids[first:], device=model.device)
    if not len(targets):
        return ReferenceLosses()
    tokens = torch.tensor([ids[:-1]], device=model.device)
    positions = torch.arange(len(ids) - 1)[None]
    hidden, cache, summed = model.embed(tokens), model.new_cache(1, len(ids)), dict[int, tuple[float, ...]]()
    for start, stop in pairwise([0, *sorted(set(exit_layers))]):
        hidden = model.run_layers(hidden, start, stop, positions, cache)
        block = model.exit_blocks.get(stop)
        if block is not None and not block.stands_alone:
            continue
        scored = hidden if block is None else model.run_layers(hidden, block.layer, block.layer + 1, positions, cache)
        head = model.unembed if block is None else block.head
        summed[stop] = (float(summed_losses(head, scored[0, first - 1 :], targets, model.vocab_size)[0]),)
    return ReferenceLosses((len(targets),), summed)
