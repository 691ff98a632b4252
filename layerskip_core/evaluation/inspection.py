"""The prediction after every layer, and of every exit block, for each generated token: figure 2 of
the LayerSkip paper.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean

import torch

from ..checkpoint.loaded import Decoder
from ..config.decoding import DecodingConfig
from ..decoding import decode
from ..model.backend import states_at


@dataclass(frozen=True)
class LayerPrediction:
    """The most probable next token after a layer, and its probability there."""

    token: str
    probability: float


@dataclass(frozen=True)
class TokenTrace:
    """One generated token. `settled` (1..L) is the first layer from which on every layer predicts
    this token.
    """

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
    mean_layers: float  # mean of `settled`: layers per token with a perfect exit rule


@torch.inference_mode()
def inspect(loaded: Decoder, prompt: str, max_new_tokens: int) -> Inspection:
    """Decodes greedily with all layers, then applies the head after every layer, in one pass over
    prompt and answer.
    """
    model = loaded.backend
    prompt_ids = loaded.encode_prompt(prompt)
    config = DecodingConfig("autoregressive", max_new_tokens=max_new_tokens)
    answer = [
        token for [step] in decode(model, prompt_ids, config, loaded.eos_ids) for token in step.ids
    ]
    ids = [*prompt_ids, *answer]
    embedded = model.embed(torch.tensor(ids[:-1], device=model.device))
    places = model.new_cache(1, len(ids)).span(0, len(ids) - 1)
    states = states_at(model, embedded, range(1, model.num_layers + 1), places)
    first = len(prompt_ids) - 1

    def text(token: int) -> str:
        # Special tokens have a name
        return loaded.detokenize([token]) or str(loaded.tokenizer.convert_ids_to_tokens(token))

    def predicted(
        head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor
    ) -> list[tuple[int, LayerPrediction]]:
        """Token id and prediction at each position of the answer, from these hidden states."""
        highest = head(hidden[first:]).float().softmax(-1).max(-1)
        pairs = zip(highest.indices.tolist(), highest.values.tolist(), strict=True)
        return [(token, LayerPrediction(text(token), probability)) for token, probability in pairs]

    by_layer = [predicted(model.unembed, hidden) for hidden in states.values()]
    by_block = {
        exit_layer: predicted(block.head, block.run(model, states[exit_layer], None, places))
        for exit_layer, block in model.exit_blocks.items()
    }
    traces = []
    for index, token in enumerate(answer):
        chosen, predictions = zip(*(layer[index] for layer in by_layer), strict=True)
        blocks = {exit_layer: block[index][1] for exit_layer, block in by_block.items()}
        traces.append(TokenTrace(text(token), settled_layer(chosen), predictions, blocks))
    settled = mean(trace.settled for trace in traces)
    return Inspection(loaded.name, prompt, model.num_layers, tuple(traces), settled)


def settled_layer(chosen: Sequence[int]) -> int:
    """The first layer (from 1) from which on every layer predicts the last layer's token."""
    wrong = [layer for layer, token in enumerate(chosen, start=1) if token != chosen[-1]]
    return wrong[-1] + 1 if wrong else 1
