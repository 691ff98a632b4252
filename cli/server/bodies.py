"""What the body of a request asks for: prompts, and how to decode them."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

from layerskip_core.config.decoding import MAX_NEW_TOKENS, DecodingOptions, changed
from layerskip_core.config.options import checked
from layerskip_core.errors import DataError
from layerskip_core.files import SchemaError, build, parse_json

from .errors import ApiError, invalid

Turn = tuple[str, str]
Prompt = str | list[int] | tuple[Turn, ...]
"""A text, token ids, or the turns (role, text) of a conversation."""

_SEEDS = 2**32
_MOST_CHOICES = 128
_MOST_STOPS, _LONGEST_STOP = 16, 256  # each is searched for at every token, in the thread that decodes for all
_ROLES = ("system", "developer", "user", "assistant")


class StreamOptions(TypedDict, total=False):
    include_usage: bool | None


class _Body(TypedDict, total=False):
    """The keys that change an answer; null is the same as nothing."""

    model: str
    max_tokens: int | None
    max_completion_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: str | list[str] | None
    n: int | None
    stream: bool | None
    stream_options: StreamOptions | None


# Keys that would change the answer and that this server does not know, with the values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "functions": ([],),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "guided_json": (),
    "guided_regex": ("",),
    "ignore_eos": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),  # of completions, 0 asks for those of the chosen tokens
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "stop_token_ids": ([],),
    "suffix": ("",),
    "tools": ([],),
    "top_logprobs": (0,),
    "typical_p": (1,),
    "use_beam_search": (False,),
}


@dataclass(frozen=True)
class Asked:
    """One request. Each prompt has `n` answers; `seed` is None if the request names none."""

    prompts: tuple[Prompt, ...]
    settings: DecodingOptions
    n: int
    seed: int | None
    stream: bool
    include_usage: bool

    def seeded(self, number: int) -> DecodingOptions:
        """The settings of the answer with this number, whose seed is its own."""
        seed = secrets.randbelow(_SEEDS) if self.seed is None else (self.seed + number) % _SEEDS
        return {**self.settings, "seed": seed}

    @property
    def answers(self) -> int:
        """How many answers that is."""
        return self.n * len(self.prompts)


def completion_asked(body: bytes, model: str, flags: DecodingOptions, token_limit: int) -> Asked:
    """Of /v1/completions. Raises ApiError, and ConfigError for a setting outside its range."""
    document = _document(body)
    return _asked(document, _prompts(document.get("prompt")), model, flags, token_limit)


def chat_asked(body: bytes, model: str, flags: DecodingOptions, token_limit: int) -> Asked:
    """Of /v1/chat/completions. Raises as `completion_asked` does."""
    document = _document(body)
    return _asked(document, (_turns(document.get("messages")),), model, flags, token_limit)


def _document(body: bytes) -> Mapping[str, Any]:
    try:
        document = parse_json(body, "the body", DataError)
    except DataError as error:
        raise invalid(str(error)) from None
    if not isinstance(document, dict):
        raise invalid("the body must be a JSON object")
    for key, harmless in _UNSUPPORTED.items():
        value = document.get(key)
        changes_nothing = any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in harmless)
        if value is not None and not changes_nothing:
            raise invalid(f"{key} is not supported by this server", key, "unsupported_parameter")
    return document


def _asked(
    document: Mapping[str, Any], prompts: tuple[Prompt, ...], model: str, flags: DecodingOptions, token_limit: int
) -> Asked:
    known = {key: document[key] for key in _Body.__annotations__ if document.get(key) is not None}
    try:
        given = build(_Body, known, "")
    except SchemaError as error:
        raise invalid(str(error), str(error).split(":")[0].split("[")[0]) from None
    if given.get("model") != model:
        raise _no_model(given.get("model"), model)
    n = given.get("n", 1)
    if not 1 <= n * len(prompts) <= _MOST_CHOICES:
        raise invalid(f"n times the number of prompts must be in 1..{_MOST_CHOICES}, got {n * len(prompts)}", "n")
    settings = _settings(given, flags, token_limit)
    options = given.get("stream_options", {})
    return Asked(prompts, settings, n, given.get("seed"), given.get("stream", False), bool(options.get("include_usage")))


def _settings(given: Mapping[str, Any], flags: DecodingOptions, token_limit: int) -> DecodingOptions:
    """The flags with a request's own settings in their place. Raises ConfigError for a value outside its range."""
    stops = given.get("stop", ())
    if (
        len(stops := [stops] if isinstance(stops, str) else stops) > _MOST_STOPS
        or max(map(len, stops), default=0) > _LONGEST_STOP
    ):
        raise invalid(f"stop must be at most {_MOST_STOPS} texts of at most {_LONGEST_STOP} characters", "stop")
    changes = {name: given[name] for name in ("temperature", "top_p", "top_k", "stop") if name in given}
    limit = given.get("max_completion_tokens", given.get("max_tokens"))
    if limit is not None and limit > token_limit:
        raise invalid(f"max_tokens must be at most {token_limit}, the limit of this server, got {limit}", "max_tokens")
    limit = limit if limit is not None else flags.get("max_new_tokens")
    changes["max_new_tokens"] = min(token_limit, MAX_NEW_TOKENS) if limit is None else limit
    return changed(flags, cast(DecodingOptions, checked(DecodingOptions, changes)))


def _no_model(asked: str | None, model: str) -> ApiError:
    if asked is None:
        return invalid(f"model is missing; this server has {model}", "model")
    return invalid(f"the model {asked!r:.200} does not exist; this server has {model}", "model", "model_not_found", 404)


def _prompts(prompt: Any) -> tuple[Prompt, ...]:
    """One prompt or several, each a text or token ids."""
    if _is_prompt(prompt):
        return (prompt,)
    if isinstance(prompt, list) and prompt and all(map(_is_prompt, prompt)):
        return tuple(prompt)
    raise invalid("prompt must be a text, a list of token ids, or a list of several of these", "prompt")


def _is_prompt(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(type(token) is int and 0 <= token < 2**31 for token in value)
    return isinstance(value, str)


def _turns(messages: Any) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        raise invalid("messages must be a list with at least one message", "messages")
    return tuple(_turn(message, f"messages[{place}]") for place, message in enumerate(messages))


def _turn(message: Any, where: str) -> Turn:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if role not in _ROLES:
        raise invalid(f"{where}.role must be one of {', '.join(_ROLES)}", "messages")
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise invalid(f"{where}.content must be a text, or a list of parts of the type text", "messages")
    return ("system" if role == "developer" else role), content


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def only_user_turn(turns: Sequence[Turn]) -> str:
    """The text of a conversation that is one message of the user. Raises ApiError for any other: there is no chat template."""
    if len(turns) == 1 and turns[0][0] == "user":
        return turns[0][1]
    raise invalid("this model has no chat template: messages must be one message of the user", "messages")
