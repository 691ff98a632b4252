"""What a model says after its layers: perplexities through every exit, each from one teacher-forced pass, and the prediction
after every layer for each generated token: figure 2 of the LayerSkip paper."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.folder import quiet_transformers
from ..checkpoint.loaded import Decoder
from ..config.decoding import DecodingConfig
from ..data import Example, spread
from ..decoding import decode
from ..losses import summed_losses
from ..model.backend import Backend
from ..model.cache import KVCache
from ..model.exit_blocks import features_of
from ..prompting import RAW
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
    with quiet_transformers():  # else transformers warns that the text is longer than the context
        ids = list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
    start = loaded.with_template(RAW, None).encode_prompt("")
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
        exit_layer: float(summed_losses(head, states[0, first - 1 :], targets, model.spec.vocab)[0])
        for exit_layer, states, head in through
    }


def states_at_exits(
    model: Backend, tokens: Tensor, positions: Tensor, cache: KVCache, exit_layers: Iterable[int]
) -> Iterator[tuple[int, Tensor, Callable[[Tensor], Tensor]]]:
    """(exit, states (B, T, D) for its head, head) of tokens (B, T), in one pass. Exits that only draft are left out."""
    hidden = model.embed(tokens)
    for start, stop in pairwise([0, *sorted(set(exit_layers))]):
        hidden = model.run_layers(hidden, start, stop, positions, cache)
        block = model.exit_blocks.get(stop)
        if block is None:
            yield stop, hidden, model.unembed
        elif block.stands_alone:
            yield stop, model.run_layers(hidden, block.layer, block.layer + 1, positions, cache), block.head


@dataclass(frozen=True)
class LayerPrediction:
    """The most probable next token after a layer, and its probability there."""

    token: str
    probability: float


@dataclass(frozen=True)
class TokenTrace:
    """One generated token. `settled` (1..L) is the first layer from which on every layer predicts this token."""

    token: str
    settled: int
    predictions: tuple[LayerPrediction, ...]  # after layer 1, 2, ..., L
    blocks: dict[int, LayerPrediction] = field(default_factory=dict)  # of the exit blocks, by exit


@dataclass(frozen=True)
class Inspection:
    """A prompt and its greedy answer, with the predictions of every layer."""

    model: str
    prompt: str
    num_layers: int
    tokens: tuple[TokenTrace, ...]

    @property
    def mean_layers(self) -> float:
        """Mean of `settled`: the layers per token that a perfect exit rule would need."""
        return mean(token.settled for token in self.tokens)

    def document(self) -> dict[str, Any]:
        """The inspection as plain values, for JSON."""
        return asdict(self) | {"mean_layers": self.mean_layers}


@torch.inference_mode()
def inspect(loaded: Decoder, prompt: str, max_new_tokens: int) -> Inspection:
    """Decodes greedily with all layers, then applies the shared head after every layer, in one pass over prompt and answer.

    Raises ConfigError when the prompt is empty or does not fit the context.
    """
    model = loaded.backend
    prompt_ids = loaded.encode_prompt(prompt)
    config = DecodingConfig("autoregressive", max_new_tokens=max_new_tokens)
    answer = [token for [step] in decode(model, prompt_ids, config, loaded.eos_ids) for token in step.ids]
    ids = [*prompt_ids, *answer]
    positions = torch.arange(len(ids) - 1)[None]
    hidden, cache = model.embed(torch.tensor([ids[:-1]], device=model.device)), model.new_cache(1, len(ids))
    first, states, by_layer = len(prompt_ids) - 1, {}, []
    for layer in range(1, model.num_layers + 1):
        hidden = states[layer] = model.run_layers(hidden, layer - 1, layer, positions, cache)
        by_layer.append(_most_probable(model.unembed(hidden[0, first:])))
    features, by_block = features_of(model.normed(hidden)), {}
    for exit_layer, block in model.exit_blocks.items():
        entered = block.enter(states[exit_layer], features)
        through = model.run_layers(entered, block.layer, block.layer + 1, positions, cache)
        by_block[exit_layer] = _most_probable(block.head(through[0, first:]))

    def text(token: int) -> str:
        return loaded.detokenize([token]) or str(loaded.tokenizer.convert_ids_to_tokens(token))  # special ones have a name

    traces = []
    for index, token in enumerate(answer):
        chosen = [choices[index] for choices in by_layer]
        predictions = tuple(LayerPrediction(text(choice), share) for choice, share in chosen)
        of_blocks = {exit_layer: choices[index] for exit_layer, choices in by_block.items()}
        blocks = {exit_layer: LayerPrediction(text(choice), share) for exit_layer, (choice, share) in of_blocks.items()}
        traces.append(TokenTrace(text(token), settled_layer([choice for choice, _ in chosen]), predictions, blocks))
    return Inspection(loaded.name, prompt, model.num_layers, tuple(traces))


def _most_probable(logits: Tensor) -> list[tuple[int, float]]:
    """The most probable token at each position of (T, V), and its probability."""
    highest = logits.float().softmax(-1).max(-1)
    return list(zip(highest.indices.tolist(), highest.values.tolist(), strict=True))


def settled_layer(chosen: list[int]) -> int:
    """The first layer, counted from 1, from which on every layer makes the last layer's choice."""
    wrong = [layer for layer, token in enumerate(chosen, start=1) if token != chosen[-1]]
    return wrong[-1] + 1 if wrong else 1
