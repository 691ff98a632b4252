"""The prediction after every layer, and of every exit block, for each generated token: figure 2 of the LayerSkip paper."""

from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any

import torch

from ..checkpoint.loaded import Decoder
from ..config.decoding import DecodingConfig
from ..decoding import decode
from ..model.backend import states_at
from ..model.exit_blocks import features_of


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
    embedded, cache = model.embed(torch.tensor([ids[:-1]], device=model.device)), model.new_cache(1, len(ids))
    states = states_at(model, embedded, range(1, model.num_layers + 1), positions, cache)
    first = len(prompt_ids) - 1
    by_layer = [_most_probable(model.unembed(hidden[0, first:])) for hidden in states.values()]
    features, by_block = features_of(model.normed(states[model.num_layers])), {}
    for exit_layer, block in model.exit_blocks.items():
        entered = block.enter(states[exit_layer], features)
        through = model.run_layers(entered, block.layer, block.layer + 1, positions, cache)
        by_block[exit_layer] = _most_probable(block.head(through[0, first:]))

    def text(token: int) -> str:
        return loaded.detokenize([token]) or str(loaded.tokenizer.convert_ids_to_tokens(token))  # special ones have a name

    def said(choice: tuple[int, float]) -> LayerPrediction:
        return LayerPrediction(text(choice[0]), choice[1])

    traces = []
    for index, token in enumerate(answer):
        chosen = [choices[index] for choices in by_layer]
        blocks = {exit_layer: said(choices[index]) for exit_layer, choices in by_block.items()}
        settled = settled_layer([choice for choice, _ in chosen])
        traces.append(TokenTrace(text(token), settled, tuple(map(said, chosen)), blocks))
    return Inspection(loaded.name, prompt, model.num_layers, tuple(traces))


def _most_probable(logits: torch.Tensor) -> list[tuple[int, float]]:
    """The most probable token at each position of (T, V), and its probability."""
    highest = logits.float().softmax(-1).max(-1)
    return list(zip(highest.indices.tolist(), highest.values.tolist(), strict=True))


def settled_layer(chosen: list[int]) -> int:
    """The first layer, counted from 1, from which on every layer makes the last layer's choice."""
    wrong = [layer for layer, token in enumerate(chosen, start=1) if token != chosen[-1]]
    return wrong[-1] + 1 if wrong else 1
