"""What a model would have said after every layer, for each token that it generates: the figure 2 of the LayerSkip paper."""

from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig
from ...decoding import decode


@dataclass(frozen=True)
class LayerPrediction:
    """The most probable next token after a layer, and its probability there."""

    token: str
    probability: float


@dataclass(frozen=True)
class TokenTrace:
    """One generated token. `settled` is the first layer from which on every prediction is this token: 1..L."""

    token: str
    settled: int
    predictions: tuple[LayerPrediction, ...]  # after layer 1, 2, ..., L


@dataclass(frozen=True)
class Inspection:
    """A prompt, and how its greedy answer came about layer by layer."""

    model: str
    prompt: str
    num_layers: int
    tokens: tuple[TokenTrace, ...]

    @property
    def mean_layers(self) -> float:
        """Layers a token would have needed on the average, if one had known where to stop."""
        return mean(one.settled for one in self.tokens)

    def document(self) -> dict[str, Any]:
        return asdict(self) | {"mean_layers": self.mean_layers}


@torch.inference_mode()
def inspect(loaded: Decoder, prompt: str, max_new_tokens: int, raw: bool = False) -> Inspection:
    """Decodes greedily with all layers, then reads every layer through the shared head in one pass over prompt and answer.

    Raises ConfigError when the prompt is empty or does not fit the context.
    """
    model = loaded.backend
    prompt_ids = loaded.encode_prompt(prompt, raw)
    setting = DecodingConfig("autoregressive", max_new_tokens=max_new_tokens)
    answer = [token.id for step in decode(model, prompt_ids, setting, loaded.eos_ids) for token in step]
    ids = [*prompt_ids, *answer]
    positions = torch.arange(len(ids) - 1)[None]
    hidden, cache = model.embed(torch.tensor([ids[:-1]], device=model.device)), model.new_cache(1, len(ids))
    best: list[list[int]] = []  # (L, T)
    shares: list[list[float]] = []
    for layer in range(model.num_layers):
        hidden = model.run_layers(hidden, layer, layer + 1, positions, cache)
        found = model.unembed(hidden[0, len(prompt_ids) - 1 :]).float().softmax(-1).max(-1)
        best.append(found.indices.tolist())
        shares.append(found.values.tolist())
    traces = []
    for place in range(len(answer)):
        chosen = [layer[place] for layer in best]
        predictions = [LayerPrediction(_text(loaded, token), shares[layer][place]) for layer, token in enumerate(chosen)]
        traces.append(TokenTrace(_text(loaded, answer[place]), settled_layer(chosen), tuple(predictions)))
    return Inspection(loaded.name, prompt, model.num_layers, tuple(traces))


def settled_layer(chosen: list[int]) -> int:
    """The first layer, counted from 1, from which on every layer chooses what the last one does."""
    wrong = [layer for layer, token in enumerate(chosen, start=1) if token != chosen[-1]]
    return wrong[-1] + 1 if wrong else 1


def _text(loaded: Decoder, token: int) -> str:
    """A token as it stands in the text; a special one by its name."""
    return loaded.detokenize([token]) or str(loaded.tokenizer.convert_ids_to_tokens(token))
