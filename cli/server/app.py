"""The web application: routes, the API key, limits, and the life of a request."""

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from layerskip_core.checkpoint.loaded import Decoder
from layerskip_core.config.decoding import GUIDES, RequestOptions, ServeConfig, changed
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import DecodeStats, check_prompt
from layerskip_core.errors import CheckpointError, LayerSkipError
from layerskip_core.prompting import (
    CHAT,
    RAW,
    Tokenizer,
    chat_template,
    encode_conversation,
    render_chat,
    special_ids,
)
from layerskip_core.serving import Embedding, Update
from layerskip_core.serving import Request as Job
from layerskip_core.serving.thread import DecodingThread, Updates

from ..console import narrate, tell_error
from .answers import Document, ResponseDocument, Vectors, usage_of
from .bodies import (
    ApiError,
    Asked,
    Family,
    Prompt,
    api_error,
    demand,
    invalid,
    parsed,
    request_of,
    text_of,
)
from .tools import Calls, Tools, as_texts, format_of, format_of_answers, grammar

Result = TypeVar("Result")

_BODY_SECONDS = 30.0  # for a body to arrive
_STARTED = int(time.time())
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)  # bounds of histograms
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
]
# The rest of a body that is too long or too slow is not read: the connection cannot be used again.
_CLOSE = {"Connection": "close"}
_RETRY = {"Retry-After": "1"}
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: _RETRY, 503: _RETRY, 408: _CLOSE, 413: _CLOSE}


class Metrics:
    """Counts for Prometheus. `requests`: by endpoint and outcome (finished, cancelled, refused,
    failed).
    """

    def __init__(self, engine: DecodingThread) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, buckets=_SECONDS, registry=self.registry)
        self.requests = counter(
            "layerskip_requests", "Requests by how they ended", ("endpoint", "outcome")
        )
        self._tokens = counter(
            "layerskip_tokens",
            "Tokens of prompts, generated, drafted, and accepted drafts",
            ("kind",),
        )
        self.first_token = histogram(
            "layerskip_time_to_first_token_seconds", "From the request to its first token"
        )
        self.seconds = histogram("layerskip_request_seconds", "From the request to its last token")
        gauge("layerskip_answers_running", "Answers being decoded").set_function(
            lambda: engine.running
        )
        waiting = gauge("layerskip_answers_waiting", "Answers that wait to be decoded")
        waiting.set_function(lambda: max(engine.held - engine.running, 0))

    def decoded(self, stats: DecodeStats) -> None:
        """Counts an answer that ended or was cancelled."""
        counts = {"prompt": stats.prompt_tokens, "generated": stats.new_tokens}
        for kind, count in {**counts, "drafted": stats.drafted, "accepted": stats.accepted}.items():
            self._tokens.labels(kind).inc(count)


class Service:
    """One model behind the API."""

    def __init__(
        self,
        decoder: Decoder,
        packing: PackingConfig,
        config: ServeConfig,
        engine: DecodingThread,
        name: str,
        key: str | None,
    ) -> None:
        """`name`: of the model in the API. `key`: the API key; None if none is needed."""
        # Tokenizers are not thread-safe: the engine decodes with its own, and one other thread
        # encodes with this copy.
        self._decoder = decoder = replace(decoder, tokenizer=deepcopy(decoder.tokenizer))
        self._plain = decoder.with_template(RAW, None)
        self._raw = self._plain if decoder.template.text == CHAT else decoder
        self._encoding = ThreadPoolExecutor(1, "layerskip-encoding")
        template = (
            chat_template(decoder.tokenizer, with_tools=True)
            if decoder.template.text == CHAT
            else None
        )
        known = format_of(template or "")
        # Tools, calls and results are texts
        self._is_generic = template is not None and known is None
        self._format = "hermes" if self._is_generic else known
        # Tokens that may mark calls
        self._special = {} if self._is_generic else special_ids(decoder.tokenizer)
        self._teller = _teller(decoder.tokenizer) if self._is_generic else "system"
        self._narrate_once = cache(narrate)
        self._packing = packing
        self._config = config
        self._engine = engine
        self.name = name
        self._key = None if key is None else os.fsencode(key)
        self._listed = {"id": name, "object": "model", "created": _STARTED, "owned_by": "layerskip"}
        self.metrics = Metrics(engine)

    def app(self) -> Starlette:
        routes = [
            Route("/v1/completions", _Endpoint(self, "completions"), methods=["POST"]),
            Route("/v1/chat/completions", _Endpoint(self, "chat"), methods=["POST"]),
            Route("/v1/responses", _Endpoint(self, "responses"), methods=["POST"]),
            Route("/v1/embeddings", _Endpoint(self, "embeddings"), methods=["POST"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._models),
            Route("/metrics", self._metrics),
            Route("/health", self._health),
        ]
        handlers = dict.fromkeys((HTTPException, ApiError, LayerSkipError, 500), _refusal)
        app = Starlette(routes=routes, exception_handlers=handlers)
        # Redirects go to the address in the client's Host header
        app.router.redirect_slashes = False
        return app

    def authorize(self, request: Request) -> None:
        """Raises ApiError without the API key."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
        if self._key is not None and not secrets.compare_digest(given, self._key):
            raise invalid("the API key is missing or wrong", code="invalid_api_key", status=401)

    async def body(self, request: Request) -> bytes:
        """Raises ApiError for a body that is too long, too slow or of another type."""
        if (
            request.headers.get("content-type", "").partition(";")[0].strip().lower()
            != "application/json"
        ):
            raise invalid("the content type must be application/json", status=415)
        body = bytearray()
        limit = self._config.body_limit
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    demand(
                        len(body) <= limit,
                        f"the body must be at most {limit} bytes",
                        code="body_too_large",
                        status=413,
                    )
        except TimeoutError:
            raise invalid(
                f"the body did not arrive within {_BODY_SECONDS:g} seconds", status=408
            ) from None
        return bytes(body)

    async def submit(
        self, body: bytes, family: Family, deliver: Callable[[int, Update], None]
    ) -> tuple[Asked, Sequence[Job | Embedding], Document | ResponseDocument | Vectors]:
        """Reserves places in the queue, parses a body and submits its jobs; returns request, jobs
        and document builder.
        """
        engine = self._engine
        held = 1
        engine.hold(held)
        try:
            given = parsed(body)
            request = request_of(given, family, self.name, self._config)
            engine.hold(len(request.options) - held)
            held = len(request.options)
            jobs, made = await self.in_encoding(self._made, request, family, given, deliver)
            engine.submit(*jobs)
        except BaseException:
            engine.release(held)
            raise
        return request, jobs, made

    async def in_encoding(self, work: Callable[..., Result], *given: Any) -> Result:
        """Runs `work` in the only thread that uses this service's tokenizer."""
        return await asyncio.get_running_loop().run_in_executor(self._encoding, work, *given)

    def _made(
        self,
        request: Asked,
        family: Family,
        body: dict[str, Any],
        deliver: Callable[[int, Update], None],
    ) -> tuple[Sequence[Job | Embedding], Document | ResponseDocument | Vectors]:
        """Makes the jobs and their document builder, in the encoding thread."""
        decoder = self._decoder
        tools = request.tools
        options = request.options
        if family == "embeddings":
            layers = self._config.embedding_layer or decoder.backend.num_layers
            texts = [_ids(self._plain, prompt) for prompt in request.prompts]
            embeddings = [
                Embedding(ids, layers, partial(deliver, number)) for number, ids in enumerate(texts)
            ]
            return embeddings, Vectors(self.name, body.get("encoding_format") == "base64")
        if tools is not None:
            if self._format is None:
                raise invalid("tools need a chat template, and this model has none", "tools")
            if self._is_generic:
                self._narrate_once(
                    "the chat template has no tools: a text describes them, and a grammar constrains the calls"
                )
            if tools.needed or (self._is_generic and options[0].keys().isdisjoint(GUIDES)):
                calls = grammar(self._format, tools, self._special)
                options = [changed(each, RequestOptions(grammar=calls)) for each in options]
        finder = partial(Calls, format_of_answers(self._format, self._special), tools)
        prompts = [
            ids for prompt in request.prompts for ids in [self._encoded(prompt, tools)] * request.n
        ]
        jobs = list[Job]()
        for number, (ids, each) in enumerate(zip(prompts, options, strict=True)):
            config = decoder.resolve(each, self._packing)  # compiles a grammar
            jobs.append(Job(ids, config, partial(deliver, number), request.stream))
        if family == "responses":
            return jobs, ResponseDocument(self.name, jobs[0], finder, body)
        echoed = (
            str(decoder.tokenizer.decode(each) if isinstance(each, list) else each)
            for each in request.prompts
        )
        echoes = [text for text in echoed for _ in range(request.n)] if request.echo else []
        return jobs, Document(
            family == "chat", self.name, jobs, echoes, finder, request.include_usage
        )

    async def texts(
        self, jobs: Sequence[Job | Embedding], updates: Iterable[Update]
    ) -> dict[int, str]:
        """The texts, by id, of tokens with log probabilities."""
        entries = [one for update in updates for one in (*update.prompt_logprobs, *update.logprobs)]
        ids = {token for one in entries for token in (one.id, *(top for top, _ in one.top))}
        if ids:  # an echoed prompt's first token is listed too
            ids |= {job.ids[0] for job in jobs}
        return (
            await self.in_encoding(
                lambda: {token: self._decoder.token_text(token) for token in ids}
            )
            if ids
            else {}
        )

    def cancel(self, jobs: Sequence[Job | Embedding]) -> None:
        """Cancels unfinished jobs, and counts the tokens of all."""
        for job in jobs:
            self._engine.cancel(job)
            self.metrics.decoded(job.stats)

    def _encoded(self, prompt: Prompt, tools: Tools | None) -> list[int]:
        """Token ids of a prompt. Chat templates are applied to conversations only, other templates
        to texts too.
        """
        decoder = self._decoder
        if isinstance(prompt, str | list):
            ids = _ids(self._raw, prompt)
        elif decoder.template.text != CHAT:
            if len(prompt) > 1 or prompt[0]["role"] != "user":
                raise invalid(
                    "this model has no chat template: messages must be one message of the user",
                    "messages",
                )
            ids = decoder.encode_prompt(prompt[0]["content"])
        else:
            system = decoder.template.system
            described = None if tools is None else tools.described
            spoken = system is None or prompt[0]["role"] == "system"
            messages: Sequence[Any] = (
                prompt if spoken else ({"role": "system", "content": system}, *prompt)
            )
            if self._is_generic and (
                tools or any(one["role"] == "tool" or "tool_calls" in one for one in messages)
            ):
                messages = as_texts(messages, tools, self._teller)
                described = None
            ids = decoder.known_ids(encode_conversation(decoder.tokenizer, messages, described))
        check_prompt(ids, decoder.backend)
        return ids

    async def _tokenize(self, request: Request) -> Response:
        """The token ids that decoding would get for a prompt or a conversation."""
        self.authorize(request)
        body = await self.body(request)
        self._engine.hold(1)  # the encoding thread works for all requests
        try:
            prompt = text_of(parsed(body), self.name)
            ids = await self.in_encoding(self._encoded, prompt, None)
        finally:
            self._engine.release(1)
        return JSONResponse(
            {"tokens": ids, "count": len(ids), "max_model_len": self._decoder.backend.room}
        )

    async def _models(self, request: Request) -> Response:
        """The list of models, which has one entry, or the model named in the path."""
        self.authorize(request)
        name = request.path_params.get("model")
        if name is None:
            return JSONResponse({"object": "list", "data": [self._listed]})
        demand(
            name == self.name,
            f"this server has no such model, only {self.name}",
            "model",
            "model_not_found",
            404,
        )
        return JSONResponse(self._listed)

    async def _metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=_METRICS_TYPE)

    async def _health(self, request: Request) -> Response:
        stopped = self._engine.is_stopped
        return JSONResponse(
            {"status": "stopped" if stopped else "ok"}, status_code=503 if stopped else 200
        )


def _ids(decoder: Decoder, prompt: Prompt) -> list[int]:
    """The token ids of a text; those that a request gives are checked."""
    return (
        decoder.known_ids(prompt)
        if isinstance(prompt, list)
        else decoder.encode_prompt(str(prompt))
    )


def _teller(tokenizer: Tokenizer) -> str:
    """The role that can describe tools: `system`, or `user` where the chat template refuses or
    drops system messages.
    """
    with suppress(CheckpointError):
        if "?!" in render_chat(
            tokenizer, [{"role": "system", "content": "?!"}, {"role": "user", "content": "a"}], True
        ):
            return "system"
    return "user"


class _Endpoint:
    """Answers prompts or embeds texts: an ASGI application, so that one coroutine handles a request
    to its last byte.
    """

    def __init__(self, service: Service, family: Family) -> None:
        self._service = service
        self._family = family

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome = "cancelled"  # also by the server's shutdown
        try:
            outcome = await self._answer(Request(scope, receive), receive, send)
        except (ClientDisconnect, OSError):
            pass
        except (ApiError, LayerSkipError) as error:
            refused = api_error(error).renamed(self._family)
            outcome = "refused" if refused.status < 500 else "failed"
            raise refused from None
        except Exception:
            outcome = "failed"
            raise
        finally:
            self._service.metrics.requests.labels(self._family, outcome).inc()

    async def _answer(self, request: Request, receive: Receive, send: Send) -> str:
        """Sends one document, or server-sent events from the first token on; earlier errors still
        get an HTTP status.

        Returns the outcome: a later error ends the events.
        """
        service = self._service
        started = time.monotonic()
        updates = Updates()
        service.authorize(request)
        asked, jobs, document = await service.submit(
            await service.body(request), self._family, updates.deliver
        )
        streamed = None if isinstance(document, Vectors) or not asked.stream else document
        watch = asyncio.create_task(_watch(receive, updates))
        begun = False
        answers = dict[int, Update]()
        try:
            async for number, update in updates.all(len(jobs)):
                if update.error is not None:
                    raise _reported(update.error)
                if not begun:
                    begun = True
                    self._observe(service.metrics.first_token, started)
                    if streamed is not None:
                        await send(
                            {
                                "type": "http.response.start",
                                "status": 200,
                                "headers": _STREAM_HEADERS,
                            }
                        )
                if streamed is None:
                    answers[number] = update  # the last one has all of the text
                elif update.text or update.is_last or update.logprobs:
                    await _send_part(
                        send, streamed.chunk(number, update, await service.texts(jobs, [update]))
                    )
            usage = usage_of(jobs, asked.n)
            if streamed is None:
                texts = await service.texts(jobs, answers.values())
                await JSONResponse(document.whole(answers, usage, texts))(
                    request.scope, receive, send
                )
            else:
                await _send_part(send, streamed.end(usage), is_last=True)
        except ApiError as error:
            if streamed is None or not begun:
                raise
            await _send_part(send, streamed.failure(error), is_last=True)
            return "failed"
        finally:
            watch.cancel()
            service.cancel(jobs)
        self._observe(service.metrics.seconds, started)
        return "finished"

    def _observe(self, histogram: Histogram, started: float) -> None:
        if self._family != "embeddings":  # which have no tokens
            histogram.observe(time.monotonic() - started)


async def _watch(receive: Receive, updates: Updates) -> None:
    """Reports when the client disconnects: after the body no other message arrives."""
    while (await receive())["type"] != "http.disconnect":
        pass
    updates.deliver(0, Update("", error=ClientDisconnect()))


def _reported(error: BaseException) -> BaseException:
    """The error that ends a failed request; internal ones are printed on stderr."""
    if isinstance(error, ClientDisconnect):
        return error
    if (refused := api_error(error)).status == 500:
        tell_error(error, debug=True)
    return refused


async def _send_part(send: Send, body: bytes, is_last: bool = False) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": not is_last})


async def _refusal(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # of starlette
        refused = invalid(
            f"{request.method} {request.url.path:.200}: {error.detail}", status=error.status_code
        )
        return JSONResponse(refused.document, error.status_code, error.headers)
    refused = api_error(error)
    return JSONResponse(refused.document, refused.status, _HEADERS.get(refused.status))
