"""Prompts and tools as token ids and grammars, in one thread: tokenizers are not thread-safe."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from typing import Any, TypeVar

from layerskip_core.checkpoint.loaded import Decoder
from layerskip_core.config.decoding import GUIDES, DecodingConfig, RequestOptions, changed
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import check_prompt
from layerskip_core.errors import CheckpointError
from layerskip_core.prompting import (
    CHAT,
    RAW,
    Tokenizer,
    chat_template,
    encode_conversation,
    render_chat,
    special_ids,
)
from layerskip_core.serving import Request, Update

from .bodies import AnswerRequest, Conversation, Prompt, invalid
from .tools import Calls, Tools, as_texts, format_of, format_of_answers, grammar

Result = TypeVar("Result")


class PromptEncoder:
    """All methods but `run` are for the encoding thread; `run` calls them there."""

    def __init__(self, decoder: Decoder, packing: PackingConfig) -> None:
        # The engine decodes with the tokenizer, so encoding has a copy.
        self._decoder = decoder = replace(decoder, tokenizer=deepcopy(decoder.tokenizer))
        self._packing = packing
        self._raw = decoder.with_template(RAW, None)
        self._has_chat_template = decoder.template.text == CHAT
        self._thread = ThreadPoolExecutor(1, "layerskip-encoding")
        self._call_format = None
        self._special: dict[str, int] = {}
        # True for chat templates without tools: tools, calls and results become texts.
        self._tools_are_texts = False
        self._describing_role = "system"
        if self._has_chat_template:
            self._call_format = format_of(chat_template(decoder.tokenizer, with_tools=True) or "")
            self._special = special_ids(decoder.tokenizer)
            if self._call_format is None:
                self._call_format = "hermes"
                self._special = {}
                self._tools_are_texts = True
                self._describing_role = _describing_role(decoder.tokenizer)

    async def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Calls `work` in the encoding thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def ids(self, prompt: Prompt, tools: Tools | None = None) -> list[int]:
        """Token ids of a prompt to answer. Chat templates are applied to conversations only, other
        templates to texts too. Raises ApiError and LayerSkipError.
        """
        decoder = self._decoder
        if isinstance(prompt, tuple):
            ids = self._conversation_ids(prompt, tools)
        elif self._has_chat_template:
            ids = self.raw_ids(prompt)
        else:
            ids = _ids(decoder, prompt)
        check_prompt(ids, decoder.backend)
        return ids

    def raw_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a text without a template."""
        return _ids(self._raw, prompt)

    def texts(self, jobs: Sequence[Request], updates: Iterable[Update]) -> dict[int, str]:
        """The texts, by id, of tokens with log probabilities."""
        # An echoed prompt's first token is listed too.
        ids = {job.ids[0] for job in jobs}
        for update in updates:
            for one in (*update.prompt_logprobs, *update.logprobs):
                ids.add(one.id)
                ids.update(token for token, _ in one.top)
        return {token: self._decoder.token_text(token) for token in ids}

    def echo(self, prompt: Prompt) -> str:
        """A prompt's text."""
        if isinstance(prompt, list):
            return str(self._decoder.tokenizer.decode(prompt))
        return str(prompt)

    def configs(self, request: AnswerRequest) -> list[DecodingConfig]:
        """How to decode each answer, with compiled grammars. Raises ApiError and ConfigError."""
        options = request.options
        tools = request.tools
        if tools is not None:
            if self._call_format is None:
                raise invalid("tools need a chat template, and this model has none", "tools")
            # A model that learned no format of calls keeps to one by a grammar alone.
            is_free = options[0].keys().isdisjoint(GUIDES)
            if tools.required or (self._tools_are_texts and is_free):
                calls = RequestOptions(grammar=grammar(self._call_format, tools, self._special))
                options = [changed(each, calls) for each in options]
        return [self._decoder.resolve(each, self._packing) for each in options]

    def calls(self, tools: Tools | None) -> Calls:
        """Finds the calls in an answer."""
        return Calls(format_of_answers(self._call_format, self._special), tools)

    def _conversation_ids(self, messages: Conversation, tools: Tools | None) -> list[int]:
        decoder = self._decoder
        if not self._has_chat_template:
            if len(messages) > 1 or messages[0]["role"] != "user":
                message = (
                    "this model has no chat template: messages must be one message of the user"
                )
                raise invalid(message, "messages")
            return decoder.encode_prompt(messages[0]["content"])
        system = decoder.template.system
        if system is not None and messages[0]["role"] != "system":
            messages = ({"role": "system", "content": system}, *messages)
        has_calls = any(each["role"] == "tool" or "tool_calls" in each for each in messages)
        if self._tools_are_texts and (tools is not None or has_calls):
            texts = as_texts(messages, tools, self._describing_role)
            return decoder.known_ids(encode_conversation(decoder.tokenizer, texts, None))
        described = None if tools is None else tools.described
        return decoder.known_ids(encode_conversation(decoder.tokenizer, messages, described))


def _ids(decoder: Decoder, prompt: Prompt) -> list[int]:
    """Token ids of a text; those that a request gives are checked."""
    if isinstance(prompt, list):
        return decoder.known_ids(prompt)
    return decoder.encode_prompt(str(prompt))


def _describing_role(tokenizer: Tokenizer) -> str:
    """The role that can describe tools: `user` where the chat template refuses or drops system
    messages.
    """
    mark = "?!"
    messages = [{"role": "system", "content": mark}, {"role": "user", "content": "a"}]
    with suppress(CheckpointError):
        if mark in render_chat(tokenizer, messages, True):
            return "system"
    return "user"
