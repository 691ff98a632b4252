"""Perplexity of references and of plain text through every exit, each from one teacher-forced pass."""

from collections.abc import Iterable, Iterator, Sequence

import torch

from ..checkpoint.folder import quiet_transformers
from ..checkpoint.loaded import Decoder
from ..data import Example, spread
from ..losses import summed_losses
from ..model.backend import Backend, states_at_exits
from ..prompting import PromptTemplate, encode_prompt
from .metrics import Scores

_WINDOW_TOKENS = 512
_MOST_NATS = 700  # per token; exp of more is no finite number

Losses = tuple[int, dict[int, float]]
"""The number of a text's reference tokens, and their cross-entropy in nats, summed, by exit. Exits that only draft lack it."""


def scores_by_exit(losses: Iterable[Losses]) -> dict[int, Scores]:
    """The perplexity through each exit, where it is finite. Texts without tokens do not count."""
    counted = [(tokens, nats) for tokens, nats in losses if tokens]
    total = sum(tokens for tokens, _ in counted)
    found = {}
    for exit_layer in counted[0][1] if counted else ():
        values = tuple(nats[exit_layer] for _, nats in counted)
        if sum(values) / total < _MOST_NATS:
            found[exit_layer] = Scores(values, tuple(tokens for tokens, _ in counted))
    return found


def reference_losses(loaded: Decoder, example: Example, exit_layers: Sequence[int]) -> Losses:
    """The losses of the reference and its EOS after the prompt. The prompt's own tokens do not count.

    A row longer than the context is cut there, as in training.
    """
    tokenizer = loaded.tokenizer
    prompt = loaded.encode_prompt(example.prompt)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    reference = list(tokenizer(example.completion, add_special_tokens=False)["input_ids"]) + end
    return _losses(loaded.backend, prompt, reference, exit_layers)


def text_losses(loaded: Decoder, text: str, windows: int, exit_layers: Sequence[int]) -> Iterator[Losses]:
    """The losses of `windows` windows, evenly spaced over the text, or (0) of the whole text.

    Windows do not overlap; each has 512 tokens, or as many as the context holds, and the last one of a whole text what is left.
    A window starts with the tokens that the tokenizer puts before every text. If there are none, the window's first token does
    not count.
    """
    tokenizer = loaded.tokenizer
    with quiet_transformers():  # else transformers warns that the text is longer than the context
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    start = encode_prompt(tokenizer, PromptTemplate(), "")
    size = min(_WINDOW_TOKENS, loaded.backend.spec.context - len(start))
    for offset in spread(range(0, max(len(ids) - size, 0) + 1 if windows else len(ids), size), windows):
        yield _losses(loaded.backend, start, ids[offset : offset + size], exit_layers)


@torch.inference_mode()
def _losses(model: Backend, prompt: list[int], reference: list[int], exit_layers: Sequence[int]) -> Losses:
    ids = (prompt + reference)[: model.spec.context]
    first = max(len(prompt), 1)  # no token predicts the very first one
    targets = torch.tensor(ids[first:], device=model.device)
    if not len(targets):
        return 0, {}
    tokens = torch.tensor([ids[:-1]], device=model.device)
    positions = torch.arange(len(ids) - 1)[None]
    through = states_at_exits(model, tokens, positions, model.new_cache(1, len(ids)), exit_layers)
    return len(targets), {
        exit_layer: float(summed_losses(head, [states[0, first - 1 :]], targets, model.spec.vocab, [(1.0, 0.0)])[0])
        for exit_layer, states, head in through
    }
