"""A model that answers prompts: what `layerskip_core.load` gives a program or a notebook."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypedDict, Unpack

from .checkpoint.loaded import Decoder
from .checkpoint.open import for_decoding
from .config.checks import require
from .config.decoding import DecodingConfig, DecodingSettings
from .config.machine import DType
from .config.packing import PackingConfig, Quantization
from .decoding.dialogue import Dialogue
from .decoding.text import Answer, TextStream, answer_together
from .errors import LayerSkipError


class DecodingOptions(TypedDict, total=False):
    """How to decode. The checkpoint decides what is left out of the first three; the others are greedy, 256 tokens, no stop."""

    strategy: str  # one of config.decoding.strategies()
    exit_layer: int  # a count of layers: 1..L-1, or L for an early exit and for drafts by all layers of a low-bit copy
    num_draft_tokens: int  # per round
    policy: str  # instead of these: settings that a sweep saved with the model, exact or fast
    max_new_tokens: int
    draft_confidence: float  # a round stops drafting below this probability
    lookup: int  # first draft what followed an earlier occurrence of at least this many last tokens; 0: do not
    skip: Sequence[int]  # draft with all layers but these, by number from 1
    exit_confidence: float  # early exit: each token leaves at the first exit whose best token is more probable
    exits: Sequence[int]  # that exit_confidence chooses among; left out: the trained ones
    stop: str | Sequence[str]  # texts that end the answer, and are not part of it
    temperature: float  # 0 is greedy
    top_k: int  # sample from the k most probable tokens; 0: from all
    top_p: float  # sample from the fewest most probable tokens that make up this probability; 1: from all
    seed: int  # of what is drawn; 0 unless given


class LanguageModel:
    """A model in memory, ready to decode. Not for two threads at once."""

    def __init__(self, decoder: Decoder, packing: PackingConfig) -> None:
        self.decoder = decoder
        self._packing = packing

    def generate(self, prompt: str, **options: Unpack[DecodingOptions]) -> Answer:
        """The whole answer to a prompt.

        Raises ConfigError for a prompt or an option that does not suit the model, TypeError for an unknown option,
        CheckpointError for a chat template that fails.
        """
        return self.stream(prompt, **options).finish()

    def stream(self, prompt: str, **options: Unpack[DecodingOptions]) -> TextStream:
        """Iterates over the pieces of an answer as they are verified. Raises as `generate` does."""
        return TextStream(self.decoder, prompt, self._resolved(options))

    def generate_batch(self, prompts: Sequence[str], **options: Unpack[DecodingOptions]) -> list[Answer]:
        """Answers to several prompts, decoded together. Raises as `generate` does, for the first prompt that does not fit."""
        answers, _ = answer_together(self.decoder, prompts, self._resolved(options))
        if errors := [answer for answer in answers if isinstance(answer, LayerSkipError)]:
            raise errors[0]
        return [answer for answer in answers if isinstance(answer, Answer)]

    def dialogue(self, *, system: str | None = None, **options: Unpack[DecodingOptions]) -> Dialogue:
        """A conversation, of which every answer sees the turns before it and computes only what is new.

            talk = model.dialogue(system="Answer briefly.")
            print(talk.ask("Who wrote Emma?").finish().text)
            for piece in talk.ask("And when?"):
                print(piece, end="")

        `talk.turns` are the messages with their answers, `talk.forget(1)` leaves out the oldest and `talk.forget()` all.
        `system`: instead of the message given to `load`. Without a chat template each message is a prompt of its own
        (`talk.has_turns` is False). Several conversations can take turns, but not at once.

        Raises ConfigError for a system message without a chat template, and for options as `generate` does.
        """
        decoder = self.decoder
        if system is not None:
            decoder = decoder.with_template(decoder.template.text, system)
        return Dialogue(decoder, self._resolved(options))

    def _resolved(self, options: DecodingOptions) -> DecodingConfig:
        return self.decoder.resolve(decoding_settings(options), self._packing)


def load(
    name: str = "embedded",
    *,
    device: str = "auto",
    dtype: DType = "auto",
    template: str | None = None,
    system: str | None = None,
    quantize: Quantization | None = None,
    draft_weights: Quantization | None = None,
    draft_head: Quantization | None = None,
    draft_vocab: int = 0,
    exact: bool = False,
) -> LanguageModel:
    """Loads a model to decode with: an embedded name, a folder, a GGUF file or a hub id.

    `template`: `chat`, `raw` or a text with {prompt} in it, instead of the checkpoint's own. `system`: a system message, for a
    chat template. The others are fields of PackingConfig. On a small model one thread is the fastest: torch.set_num_threads(1).

    Raises:
        CheckpointError: the model is not there, is damaged, or has an unsupported architecture.
        ConfigError: a setting is out of its range or does not suit the model or this machine.
    """
    copies = () if draft_weights is None else (draft_weights,)
    packing = PackingConfig(quantize, copies, draft_head=draft_head, draft_vocab=draft_vocab, exact=exact, adaptive=True)
    decoder = for_decoding(name, device, dtype, packing, policies=None).with_template(template, system)
    for note in decoder.notes:
        warnings.warn(note, stacklevel=2)
    return LanguageModel(decoder, packing)


def decoding_settings(options: Mapping[str, Any]) -> DecodingSettings:
    """Options as the settings that they are fields of; None is as if it were left out.

    Raises TypeError for an unknown one, ConfigError for its value.
    """
    kinds: dict[str, Any] = DecodingOptions.__annotations__
    for name in options:
        if name not in kinds:
            raise TypeError(f"unknown decoding option {name!r}; known: {', '.join(kinds)}")
    given = {name: _checked(name, kinds[name], value) for name, value in options.items() if value is not None}
    return DecodingSettings().changed(**given)


def _checked(name: str, kind: Any, value: Any) -> Any:
    """A value of this type, or of one like it, such as a number of NumPy; a tuple for a sequence. Raises ConfigError."""
    if kind in (int, float):
        number, needed = (Integral, "a whole number") if kind is int else (Real, "a number")
        require(isinstance(value, number) and not isinstance(value, bool), name, needed, repr(value))
        return kind(value)
    if kind is str:
        require(isinstance(value, str), name, "a text", repr(value))
        return value
    if isinstance(value, str) and name == "stop":
        return value
    item, needed = (str, "a text or several") if name == "stop" else (int, "a sequence of whole numbers")
    require(isinstance(value, Iterable) and not isinstance(value, str), name, needed, repr(value))
    return tuple(_checked(name, item, entry) for entry in value)
