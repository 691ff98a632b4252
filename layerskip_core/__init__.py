"""LayerSkip: train early exits into a causal language model, and decode with them by
self-speculation.

    from layerskip_core import load

    model = load("embedded")
    print(model.generate("remind me to call mom at 5", exit_layer=8, num_draft_tokens=6).text)
    for piece in model.stream("play some jazz"):
        print(piece, end="", flush=True)

Nothing is imported before it is used: `load` imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decoding import Answer
    from .decoding.dialogue import Dialogue, TextStream
    from .language_model import LanguageModel, load

__all__ = ["Answer", "Dialogue", "LanguageModel", "TextStream", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = {
        "Answer": "decoding",
        "Dialogue": "decoding.dialogue",
        "TextStream": "decoding.dialogue",
    }
    return getattr(import_module(f".{module.get(name, 'language_model')}", __name__), name)
