"""An exit as a model of its own (the first layers, the exit's block if it has one, the norm and the head), and how many tokens
an engine should draft with it.
"""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from ..checkpoint.loaded import Decoder, Trainable
from ..decoding.drafters.knowledge import LinearTime, best_length
from ..errors import ConfigError
from ..model.exit_blocks import ExitBlocks
from ..model.spec import EMBEDDING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST_TOKENS = 16
_USUAL_TOKENS = 6
_BY_LAYER = ("layer_types", "no_rope_layers")  # lists in config.json with an entry for each layer


def cut_to_exit(loaded: Trainable, exit_layer: int, blocks: ExitBlocks) -> "PreTrainedModel":
    """The model of exit 1..L, to be written. It is `loaded.model` itself, which loses its other layers.

    A block becomes the layer after the exit's, of the kind of the model's last layer, and its norm the final one. Raises
    ConfigError for a block that reads the final states of the whole model.
    """
    model: Any = loaded.model
    decoder, layers = model.get_decoder(), loaded.backend.num_layers
    kept = list(range(exit_layer))
    block = next((block for block in blocks.blocks if block.exit_layer == exit_layer), None)
    if block is not None:
        if block.feature != "none":
            raise ConfigError(
                f"`exit_layer` {exit_layer} cannot be a model of its own: its exit block reads the final states of the whole "
                f"model (feature {block.feature}); needed an exit without such a block",
                "exit_layer",
            )
        kept.append(layers - 1)
        weights = blocks.weights(loaded.backend.spec, model.get_input_embeddings().weight)
        for module, prefix in ((decoder.layers[-1], f"{block.prefix}layer."), (decoder.norm, f"{block.prefix}norm.")):
            for name, parameter in module.named_parameters():
                parameter.data = weights.of(prefix + name)
    decoder.layers = type(decoder.layers)([decoder.layers[layer] for layer in kept])
    model.config = cut_config(model.config, kept)
    return loaded.model


def cut_config(config: Any, kept: Sequence[int]) -> Any:
    """A configuration with some of the layers, by their ascending places in the whole model, counted from 0."""
    values = config.to_dict()
    values["num_hidden_layers"] = len(kept)
    for name in _BY_LAYER:
        if values.get(name) is not None:
            values[name] = [values[name][layer] for layer in kept]
    if values.get("max_window_layers") is not None:  # the layers from this one on have a sliding window
        values["max_window_layers"] = sum(layer < values["max_window_layers"] for layer in kept)
    return config.__class__.from_dict(values)


def recommended_length(loaded: Decoder, exit_layer: int, layers: int) -> tuple[int, str]:
    """A number of draft tokens, and why in words. What a sweep recommended; else the best for the exit's acceptance, if known.

    The best number gives the most expected tokens per byte of weights that is read, because decoding one text is bound by
    memory. `layers`: of the draft, its block included.
    """
    info, spec = loaded.info, loaded.backend.spec
    if exit_layer == info.exit_layer and info.num_draft_tokens is not None:
        return info.num_draft_tokens, "recommended by `layerskip sweep-exits`, or with the model"
    acceptance = info.draft_profile(loaded.backend.num_layers).acceptance.get(f"exit {exit_layer}")
    if acceptance is None:
        return _USUAL_TOKENS, "the usual number; nothing is known of this exit's acceptance"
    layer, head = sum(map(prod, spec.layer_shapes.values())), prod(spec.shapes[EMBEDDING])
    share = (layers * layer + head) / (spec.layers * layer + head)
    _, tokens = best_length((acceptance, acceptance), LinearTime(0.0, share), 0, LinearTime(1.0, 0.0), 1, _MOST_TOKENS)
    why = f"the best if {acceptance:.0%} of the drafts are accepted and a draft takes {share:.0%} of the time of a full pass"
    return max(tokens, 1), why
