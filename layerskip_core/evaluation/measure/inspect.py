"""Records the prediction after every layer for each generated token: figure 2 of the LayerSkip paper."""

import torch

from ...checkpoint.loaded import Decoder
from ...config.decoding import DecodingConfig
from ...decoding import decode
from ..inspection import Inspection, LayerPrediction, TokenTrace


@torch.inference_mode()
def inspect(loaded: Decoder, prompt: str, max_new_tokens: int) -> Inspection:
    """Decodes greedily with all layers, then applies the shared head after every layer, in one pass over prompt and answer.

    Raises ConfigError when the prompt is empty or does not fit the context.
    """
    model = loaded.backend
    prompt_ids = loaded.encode_prompt(prompt)
    config = DecodingConfig("autoregressive", max_new_tokens=max_new_tokens)
    answer = [token.id for step in decode(model, prompt_ids, config, loaded.eos_ids) for token in step]
    ids = [*prompt_ids, *answer]
    positions = torch.arange(len(ids) - 1)[None]
    hidden, cache = model.embed(torch.tensor([ids[:-1]], device=model.device)), model.new_cache(1, len(ids))
    best: list[list[int]] = []  # (L, T)
    probabilities: list[list[float]] = []  # (L, T)
    for layer in range(model.num_layers):
        hidden = model.run_layers(hidden, layer, layer + 1, positions, cache)
        highest = model.unembed(hidden[0, len(prompt_ids) - 1 :]).float().softmax(-1).max(-1)
        best.append(highest.indices.tolist())
        probabilities.append(highest.values.tolist())
    traces = []
    for index, token in enumerate(answer):
        chosen = [by_position[index] for by_position in best]
        predictions = [
            LayerPrediction(_text(loaded, choice), probabilities[layer][index]) for layer, choice in enumerate(chosen)
        ]
        traces.append(TokenTrace(_text(loaded, token), settled_layer(chosen), tuple(predictions)))
    return Inspection(loaded.name, prompt, model.num_layers, tuple(traces))


def settled_layer(chosen: list[int]) -> int:
    """The first layer, counted from 1, from which on every layer makes the last layer's choice."""
    wrong = [layer for layer, token in enumerate(chosen, start=1) if token != chosen[-1]]
    return wrong[-1] + 1 if wrong else 1


def _text(loaded: Decoder, token: int) -> str:
    """A token's text; the name of a special token."""
    return loaded.detokenize([token]) or str(loaded.tokenizer.convert_ids_to_tokens(token))
