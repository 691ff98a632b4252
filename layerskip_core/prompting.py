"""From a prompt to token ids: templates, chat templates, and special tokens in users' texts."""

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar

from .errors import CheckpointError, ConfigError, LayerSkipError, require

if TYPE_CHECKING:
    import jinja2
    import tokenizers

CHAT = "chat"  # the tokenizer's chat template
RAW = "raw"  # nothing is added, and the text of special tokens in a prompt becomes tokens
_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
PLACE = "{prompt}"  # the prompt's place in a template that is a text

Result = TypeVar("Result")


class Tokenizer:
    """Text to token ids and back by the tokenizers library alone. transformers' tokenizers have the
    same methods.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        special_tokens_map: Mapping[str, str],
        chat_template: Any,
    ) -> None:
        """`special_tokens_map`: texts by names such as `eos_token`. `chat_template`: a text,
        several by name, or None.
        """
        self.backend_tokenizer = backend
        self.backend_tokenizer.no_padding()
        self.backend_tokenizer.no_truncation()
        self.special_tokens_map = dict(special_tokens_map)
        self.chat_template = chat_template
        ids = {name: backend.token_to_id(text) for name, text in special_tokens_map.items()}
        self.eos_token_id = ids.get("eos_token")
        self.pad_token_id = ids.get("pad_token")

    @classmethod
    def in_folder(cls, folder: str | Path, settings: Mapping[str, Any]) -> Self:
        """`folder` has tokenizer.json and perhaps a chat template; `settings`:
        tokenizer_config.json.
        """
        import tokenizers

        special = {}
        for name in _NAMED_TOKENS:
            token = settings.get(name)
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                special[name] = token
        template = settings.get("chat_template")  # a text, or several by name
        file = Path(folder) / "chat_template.jinja"
        if file.is_file():
            template = file.read_text(encoding="utf-8")
        backend = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        return cls(backend, special, template)

    def __call__(self, text: str | list[str], *, add_special_tokens: bool = True) -> dict[str, Any]:
        """`input_ids` of a text, or a list of them for several texts."""
        how = {"add_special_tokens": add_special_tokens}
        if isinstance(text, str):
            return {"input_ids": self.backend_tokenizer.encode(text, **how).ids}
        encoded = self.backend_tokenizer.encode_batch(text, **how)
        return {"input_ids": [encoding.ids for encoding in encoded]}

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def vocab_size(self) -> int:
        """Tokens without the added ones."""
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=False))

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """The added tokens by id, each with `content` and `special`."""
        return dict(self.backend_tokenizer.get_added_tokens_decoder())

    def decode(
        self,
        token_ids: list[int],
        skip_special_tokens: bool = False,
        *,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        assert not clean_up_tokenization_spaces, "only transformers cleans up"
        return str(
            self.backend_tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        )

    def get_vocab(self) -> dict[str, int]:
        return dict(self.backend_tokenizer.get_vocab(with_added_tokens=True))

    def convert_ids_to_tokens(self, ids: int) -> str:
        """A token's text in the vocabulary."""
        return str(self.backend_tokenizer.id_to_token(ids))


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of special tokens, which have no text in an answer, by their names."""
    return {
        str(token.content): token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }


@dataclass(frozen=True)
class PromptTemplate:
    """A resolved template: `chat`, `raw` or a text with {prompt} in it. `system`: for `chat`
    only.
    """

    text: str = RAW
    system: str | None = None

    @property
    def name(self) -> str:
        """For statistics and reports: `chat`, `chat with a system message`, `raw`, or the text in
        quotes.
        """
        if self.text == CHAT and self.system is not None:
            return f"{CHAT} with a system message"
        return self.text if self.text in (CHAT, RAW) else repr(self.text)


def resolve_template(
    requested: str | None, system: str | None, stored: PromptTemplate | None, tokenizer: Tokenizer
) -> PromptTemplate:
    """The requested template, else the checkpoint's (`stored`), else the tokenizer's chat template,
    else `raw`.

    `system` replaces the stored system message. Raises ConfigError for `chat` without a chat
    template, and for a system message in another template.
    """
    if requested == CHAT:
        require_chat_template(tokenizer)
    if requested:
        template = PromptTemplate(requested)
    elif stored is not None:
        template = stored
    else:
        template = PromptTemplate(CHAT if tokenizer.chat_template else RAW)
    if system is None:
        return template
    require(
        template.text == CHAT,
        "system",
        "given with the chat template only",
        f"the template {template.name}",
    )
    return PromptTemplate(CHAT, system)


def require_chat_template(tokenizer: Tokenizer) -> None:
    """Raises ConfigError for a tokenizer without one."""
    if not tokenizer.chat_template:
        raise ConfigError("a chat template was asked for, but the model's tokenizer has none")


def chat_template(tokenizer: Tokenizer, with_tools: bool = False) -> Any:
    """The text of a tokenizer's chat template, or of the one with tools; None if it has none."""
    template = tokenizer.chat_template
    if isinstance(template, list):  # how tokenizer_config.json stores several
        template = {entry["name"]: entry["template"] for entry in template}
    if not isinstance(template, dict):
        return template
    if with_tools and template.get("tool_use"):
        return template["tool_use"]
    return template.get("default")


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Any],
    add_generation_prompt: bool,
    tools: Sequence[Any] | None = None,
) -> str:
    """The text of a conversation, as `apply_chat_template` renders it. Raises ConfigError, and
    CheckpointError if it fails.
    """
    require_chat_template(tokenizer)
    values: dict[str, Any] = {}
    for name, token in tokenizer.special_tokens_map.items():
        if not isinstance(token, list):
            values[name] = str(token)
    values |= {"messages": messages, "tools": tools, "documents": None}
    try:
        return _compiled(chat_template(tokenizer, bool(tools))).render(
            values, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:
        raise CheckpointError(
            f"the model's chat template cannot be used: {type(error).__name__}: {error}"
        ) from None


@lru_cache(maxsize=4)
def _compiled(template: str) -> "jinja2.Template":
    """A template in the environment of transformers' `apply_chat_template`. It can neither run code
    nor touch files.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text in training data; the text itself stays as
        it is.
        """

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def encode_prompt(
    tokenizer: Tokenizer,
    template: PromptTemplate,
    prompt: str,
    turns: Sequence[tuple[str, str]] = (),
) -> list[int]:
    """Token ids of a prompt in its template, with the tokenizer's special tokens at the start and
    none at the end.

    Only the template's special tokens become tokens; in the prompt and the system message they stay
    text. In the raw template those of the prompt become tokens. `turns`: earlier prompts with their
    answers, for the chat template only; special tokens in them stay text too. Raises ConfigError
    for a prompt that is not valid Unicode and for `chat` without such a template, CheckpointError
    if the template or the tokenizer fails.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # an argument can hold any bytes
        raise ConfigError(
            f"the prompt must be valid Unicode, got {prompt[error.start]!r} in it"
        ) from None
    if template.text == CHAT:
        messages = []
        if template.system is not None:
            messages.append({"role": "system", "content": template.system})
        for earlier, answer in turns:
            messages.append({"role": "user", "content": earlier})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": prompt})
        return encode_conversation(tokenizer, messages)
    text = prompt
    special = None
    if template.text != RAW:
        text = template.text.replace(PLACE, prompt)
        special = special_text(tokenizer, prompt)
    # The prompt may also complete a special token that the template begins
    if special is not None and special.found(text) != special.found(template.text):
        renamed = special.renamed(template.text).replace(PLACE, prompt)
        ids = special.encode(renamed, add_special_tokens=True).ids
    else:
        ids = list(encoded(lambda: tokenizer(text)["input_ids"]))
    while ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers append it to every text
        ids.pop()
    return ids


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
) -> list[int]:
    """Token ids of messages, up to the assistant's next turn; their special tokens stay text.
    Raises as `render_chat`.
    """
    texts: list[str] = []
    _mapped([messages, tools], texts.append)
    special = special_text(tokenizer, *texts)
    if special is None or not any(map(special.found, texts)):
        text = render_chat(tokenizer, messages, True, tools)
        return list(encoded(lambda: tokenizer(text, add_special_tokens=False)["input_ids"]))
    messages, tools = _mapped([messages, tools], special.masked)
    text = special.renamed(render_chat(tokenizer, messages, True, tools))
    return list(special.encode(text, add_special_tokens=False).ids)


def _mapped(value: Any, change: Callable[[str], Any]) -> Any:
    """A copy of `value` with every text in its lists and objects changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _mapped(each, change) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(each, change) for each in value]
    return value


def encoded(encode: Callable[[], Result]) -> Result:
    """Runs a call of a tokenizer; any error becomes a CheckpointError."""
    try:
        return encode()
    except (LayerSkipError, KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # a panic of the tokenizers library is not an Exception
        raise CheckpointError(f"the model's tokenizer cannot encode the prompt: {error}") from None


@dataclass(frozen=True)
class SpecialText:
    """The special tokens of a tokenizer, and a copy of it that knows them by secret random names.

    A prompt cannot contain these names, so the only special tokens of a `renamed` text are the
    template's. The text is encoded in one piece and splits as with the tokenizer itself.
    """

    tokenizer: "tokenizers.Tokenizer"
    names: dict[str, str]  # the tokens' secret names, by their text
    hides: bool  # whether normalisation can turn other text into a token's
    mark: str  # surrounds the number of a masked token

    def found(self, text: str) -> Sequence[str | int]:
        """The special tokens that the tokenizer would make from a text."""
        if not self.hides:
            return self._pattern.findall(text)
        special = set(map(self.tokenizer.token_to_id, self.names))
        ids = encoded(lambda: self.tokenizer.encode(text, add_special_tokens=False)).ids
        return [token for token in ids if token in special]

    def masked(self, text: str) -> str:
        """A prompt with marks in place of its special tokens, for rendering a chat template around
        it.
        """
        tokens = list(self.names)
        return self._pattern.sub(
            lambda match: f"{self.mark}{tokens.index(match[0])}{self.mark}", text
        )

    def renamed(self, text: str) -> str:
        """A template's text with secret names for its special tokens; masked ones of the prompt
        become text again.
        """
        tokens = list(self.names)
        named = self._pattern.sub(lambda match: self.names[match[0]], text)
        return re.sub(f"{self.mark}(\\d+){self.mark}", lambda match: tokens[int(match[1])], named)

    def encode(self, text: str, add_special_tokens: bool) -> "tokenizers.Encoding":
        """Encodes a `renamed` text. Raises CheckpointError."""
        return encoded(lambda: self._copy.encode(text, add_special_tokens=add_special_tokens))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Prefers the longest of several tokens at one place, as the tokenizers library does."""
        return re.compile(
            "|".join(map(re.escape, sorted(self.names, key=len, reverse=True))) or "(?!)"
        )

    @cached_property
    def _copy(self) -> "tokenizers.Tokenizer":
        """A copy of the tokenizer whose special tokens have their secret names."""
        import tokenizers

        def named(token: Any) -> Any:
            return self.names.get(token, token)

        document = json.loads(self.tokenizer.to_str())
        document["truncation"] = document["padding"] = None
        for token in document["added_tokens"]:
            token["content"] = named(token["content"])
        model = document["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {named(token): number for token, number in model["vocab"].items()}
        else:  # a Unigram model has a list of tokens with scores
            model["vocab"] = [[named(token), score] for token, score in model["vocab"]]
        if "unk_token" in model:
            model["unk_token"] = named(model["unk_token"])
        return tokenizers.Tokenizer.from_str(json.dumps(document))


def special_text(tokenizer: Tokenizer, *texts: str) -> SpecialText | None:
    """Special tokens; None for a tokenizer in Python, which cannot keep them as text (ConfigError
    for such texts).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "get_added_tokens_decoder"):
        return _special_text(tokenizer)
    for token in special_ids(tokenizer):
        if any(token in text for text in texts):
            raise ConfigError(
                f"the prompt must be without the special token {token} for this model's tokenizer, or `raw`"
            )
    return None


@lru_cache(maxsize=4)
def _special_text(tokenizer: Any) -> SpecialText:
    backend = tokenizer.backend_tokenizer
    special = [
        token
        for token in backend.get_added_tokens_decoder().values()
        if token.special and token.content
    ]
    secret = secrets.token_hex(8)
    names = {token.content: f"{secret}x{number}x" for number, token in enumerate(special)}
    hides = backend.normalizer is not None and any(token.normalized for token in special)
    return SpecialText(backend, names, hides, f"\ue000{secrets.token_hex(8)}\ue000")
