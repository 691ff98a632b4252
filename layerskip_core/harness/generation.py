"""What a request of lm-evaluation-harness says about the answer to generate."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..config.decoding import MAX_NEW_TOKENS, DecodingConfig
from ..decoding.stopping import before_stop
from ..errors import ConfigError

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first of them counts
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}


@dataclass(frozen=True)
class AnswerSettings:
    """Where an answer ends and how its tokens are chosen."""

    stop: tuple[str, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def of(self, config: DecodingConfig) -> DecodingConfig:
        """A decoding with these settings, and its own stop strings too."""
        stop = (*self.stop, *(text for text in config.stop if text not in self.stop))
        return replace(config, **vars(self) | {"stop": stop})

    def cut(self, text: str) -> str:
        return before_stop(text, self.stop)


def answer_settings(request: Mapping[str, Any], default_tokens: int = MAX_NEW_TOKENS, seed: int = 0) -> AnswerSettings:
    """The settings of a request's `generation_kwargs`.

    Raises ConfigError for a setting that this decoder does not have.
    """
    asked = dict(request)
    until = asked.pop("until", None) or []
    stop = [until] if isinstance(until, str) else list(until)
    limits = [asked.pop(name, None) for name in _LIMITS]
    limit = next((int(value) for value in limits if value is not None), default_tokens)
    temperature, drawn = asked.pop("temperature", None), asked.pop("do_sample", None)
    drawn = bool(temperature) if drawn is None else bool(drawn)
    temperature = float(1.0 if temperature is None else temperature) if drawn else 0.0
    top_k, top_p = int(asked.pop("top_k", 0) or 0), float(asked.pop("top_p", 1.0) or 1.0)
    unknown = {name: value for name, value in asked.items() if _NEUTRAL.get(name) != value}
    if unknown:
        name, value = next(iter(unknown.items()))
        raise ConfigError(
            f"generation_kwargs must be until, {_LIMITS[0]}, do_sample, temperature, top_k or top_p, got {name}={value!r:.60}"
        )
    sampling = (temperature, top_k, top_p, seed) if drawn else ()
    return AnswerSettings(tuple(string for string in stop if string), limit, *sampling)
