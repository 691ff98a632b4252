"""The web application: routes, the API key, limits, and the life of a request."""

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from layerskip_core.checkpoint.loaded import Decoder
from layerskip_core.config.decoding import ServeConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import DecodeStats
from layerskip_core.errors import LayerSkipError
from layerskip_core.serving import Embedding, Update
from layerskip_core.serving import Request as Job
from layerskip_core.serving.thread import DecodingThread, Updates

from ..console import print_error
from .answers import (
    ChatChoice,
    CompletionChoice,
    Document,
    EmbeddingDocument,
    ResponseDocument,
    Texts,
    usage_of,
)
from .bodies import (
    AnswerRequest,
    ApiError,
    EmbeddingRequest,
    Endpoint,
    api_error,
    invalid,
    parse_body,
    read_request,
    require_model,
    tokenize_prompt,
)
from .encoding import PromptEncoder

_BODY_SECONDS = 30.0  # for a body to arrive
_STARTED = int(time.time())
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)  # seconds
_STREAM_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
    ],
}
# The rest of a body that is too long or too slow is not read: the connection cannot be used again.
_CLOSE = {"Connection": "close"}
_RETRY = {"Retry-After": "1"}
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: _RETRY, 503: _RETRY, 408: _CLOSE, 413: _CLOSE}

Jobs = Sequence[Job | Embedding]
AnswerDocument = Document | ResponseDocument | EmbeddingDocument


class Metrics:
    """Counts for Prometheus. `requests`: by endpoint and outcome (finished, cancelled, refused,
    failed).
    """

    def __init__(self, engine: DecodingThread) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, buckets=_BUCKETS, registry=self.registry)
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
        running = gauge("layerskip_answers_running", "Answers being decoded")
        running.set_function(lambda: engine.running)
        waiting = gauge("layerskip_answers_waiting", "Answers that wait to be decoded")
        waiting.set_function(lambda: max(engine.num_reserved - engine.running, 0))

    def count_tokens(self, stats: DecodeStats) -> None:
        """Counts an answer that ended or was cancelled."""
        self._tokens.labels("prompt").inc(stats.prompt_tokens)
        self._tokens.labels("generated").inc(stats.new_tokens)
        self._tokens.labels("drafted").inc(stats.drafted)
        self._tokens.labels("accepted").inc(stats.accepted)


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
        self._backend = decoder.backend
        self._encoder = PromptEncoder(decoder, packing)
        self._config = config
        self._engine = engine
        self._name = name
        self._key = None if key is None else os.fsencode(key)
        self._listed = {"id": name, "object": "model", "created": _STARTED, "owned_by": "layerskip"}
        self.metrics = Metrics(engine)

    def app(self) -> Starlette:
        routes = [
            Route("/v1/completions", _EndpointApp(self, "completions"), methods=["POST"]),
            Route("/v1/chat/completions", _EndpointApp(self, "chat"), methods=["POST"]),
            Route("/v1/responses", _EndpointApp(self, "responses"), methods=["POST"]),
            Route("/v1/embeddings", _EndpointApp(self, "embeddings"), methods=["POST"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._models),
            Route("/metrics", self._metrics),
            Route("/health", self._health),
        ]
        handlers = dict.fromkeys((HTTPException, ApiError, LayerSkipError, 500), _error_response)
        app = Starlette(routes=routes, exception_handlers=handlers)
        # Redirects would go to the address in the client's Host header.
        app.router.redirect_slashes = False
        return app

    def authorize(self, request: Request) -> None:
        """Raises ApiError without the API key."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
        if self._key is not None and not secrets.compare_digest(given, self._key):
            raise invalid("the API key is missing or wrong", code="invalid_api_key", status=401)

    async def body(self, request: Request) -> bytes:
        """Raises ApiError for a body that is too long, too slow or of another type."""
        content_type = request.headers.get("content-type", "").partition(";")[0]
        # Browsers send JSON to other sites only if these permit it.
        if content_type.strip().lower() != "application/json":
            raise invalid("the content type must be application/json", status=415)
        body = bytearray()
        limit = self._config.body_limit
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        message = f"the body must be at most {limit} bytes"
                        raise invalid(message, code="body_too_large", status=413)
        except TimeoutError:
            message = f"the body did not arrive within {_BODY_SECONDS:g} seconds"
            raise invalid(message, status=408) from None
        return bytes(body)

    async def submit(
        self, content: bytes, endpoint: Endpoint, deliver: Callable[[int, Update], None]
    ) -> tuple[AnswerRequest | EmbeddingRequest, Jobs, AnswerDocument]:
        """Reserves places in the queue, parses a body and submits its jobs; returns request, jobs
        and document.
        """
        engine = self._engine
        # Before any work for it: a full queue must cost next to nothing.
        held = 1
        engine.hold(held)
        try:
            body = parse_body(content)
            request = read_request(body, endpoint, self._name, self._config)
            count = len(request.prompts) * request.n
            engine.hold(count - held)
            held = count
            jobs: Jobs
            document: AnswerDocument
            if isinstance(request, EmbeddingRequest):
                jobs = await self._encoder.run(self._embeddings, request, deliver)
                document = EmbeddingDocument(self._name, request.as_base64)
            else:
                jobs = await self._encoder.run(self._jobs, request, deliver)
                document = await self._encoder.run(self._document, request, jobs, endpoint, body)
            engine.submit(*jobs)
        except BaseException:
            engine.release(held)
            raise
        return request, jobs, document

    async def texts(self, jobs: Jobs, updates: Iterable[Update]) -> Texts:
        """The texts of tokens with log probabilities; empty without any."""
        listed = [update for update in updates if update.logprobs or update.prompt_logprobs]
        if not listed:
            return {}
        return await self._encoder.run(self._encoder.texts, jobs, listed)

    def cancel(self, jobs: Jobs) -> None:
        """Cancels unfinished jobs, and counts the tokens of all."""
        for job in jobs:
            self._engine.cancel(job)
            self.metrics.count_tokens(job.stats)

    def _embeddings(
        self, request: EmbeddingRequest, deliver: Callable[[int, Update], None]
    ) -> list[Embedding]:
        jobs = []
        for number, prompt in enumerate(request.prompts):
            ids = self._encoder.raw_ids(prompt)
            jobs.append(Embedding(ids, partial(deliver, number)))
        return jobs

    def _jobs(self, request: AnswerRequest, deliver: Callable[[int, Update], None]) -> list[Job]:
        configs = self._encoder.configs(request)
        prompts = [self._encoder.ids(prompt, request.tools) for prompt in request.prompts]
        jobs = []
        for number, config in enumerate(configs):
            ids = prompts[number // request.n]
            jobs.append(Job(ids, config, partial(deliver, number), request.stream))
        return jobs

    def _document(
        self,
        request: AnswerRequest,
        jobs: Sequence[Job],
        endpoint: Endpoint,
        body: dict[str, object],
    ) -> Document | ResponseDocument:
        encoder = self._encoder
        if endpoint == "responses":
            return ResponseDocument(self._name, jobs[0], encoder.calls(request.tools), body)
        if endpoint == "chat":
            chat = [
                ChatChoice(number, job, encoder.calls(request.tools))
                for number, job in enumerate(jobs)
            ]
            return Document(self._name, chat, request.include_usage)
        choices = []
        for number, job in enumerate(jobs):
            prompt = request.prompts[number // request.n]
            echo = encoder.echo(prompt) if request.echo else None
            choices.append(CompletionChoice(number, job, echo))
        return Document(self._name, choices, request.include_usage)

    async def _tokenize(self, request: Request) -> Response:
        """The token ids that decoding would get for a prompt or a conversation."""
        self.authorize(request)
        body = await self.body(request)
        self._engine.hold(1)  # the encoding thread works for all requests
        try:
            prompt = tokenize_prompt(parse_body(body), self._name)
            ids = await self._encoder.run(self._encoder.ids, prompt)
        finally:
            self._engine.release(1)
        return JSONResponse(
            {"tokens": ids, "count": len(ids), "max_model_len": self._backend.context_length()}
        )

    async def _models(self, request: Request) -> Response:
        """The list of models, which has one entry, or the model named in the path."""
        self.authorize(request)
        name = request.path_params.get("model")
        if name is None:
            return JSONResponse({"object": "list", "data": [self._listed]})
        require_model(name, self._name)
        return JSONResponse(self._listed)

    async def _metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=_METRICS_TYPE)

    async def _health(self, request: Request) -> Response:
        if self._engine.is_stopped:
            return JSONResponse({"status": "stopped"}, status_code=503)
        return JSONResponse({"status": "ok"})


class _EndpointApp:
    """Answers prompts or embeds texts: an ASGI application, so that one coroutine handles a request
    to its last byte.
    """

    def __init__(self, service: Service, endpoint: Endpoint) -> None:
        self._service = service
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome = "cancelled"  # also by the server's shutdown
        try:
            outcome = await self._answer(Request(scope, receive), receive, send)
        except (ClientDisconnect, OSError):
            pass
        except (ApiError, LayerSkipError) as error:
            refused = api_error(error, self._endpoint)
            outcome = "refused" if refused.status < 500 else "failed"
            raise refused from None
        except Exception:
            outcome = "failed"
            raise
        finally:
            self._service.metrics.requests.labels(self._endpoint, outcome).inc()

    async def _answer(self, request: Request, receive: Receive, send: Send) -> str:
        """Sends one document or a stream of events. Returns the outcome.

        Raises the errors of a request that has no answer yet: they still get an HTTP status.
        """
        service = self._service
        started = time.monotonic()
        updates = Updates()
        service.authorize(request)
        content = await service.body(request)
        asked, jobs, document = await service.submit(content, self._endpoint, updates.deliver)
        watch = asyncio.create_task(_watch(receive, updates))
        received = self._received(updates, len(jobs), started)
        try:
            if not asked.stream:
                answers: dict[int, Update] = {}
                async for number, update in received:
                    answers[number] = update  # the last one has all of the text
                texts = await service.texts(jobs, answers.values())
                whole = document.whole(answers, usage_of(jobs, asked.n), texts)
                await JSONResponse(whole)(request.scope, receive, send)
            else:
                assert not isinstance(document, EmbeddingDocument)
                if not await self._stream(received, jobs, asked.n, document, send):
                    return "failed"
        finally:
            watch.cancel()
            service.cancel(jobs)
        self._observe(service.metrics.seconds, started)
        return "finished"

    async def _stream(
        self,
        received: AsyncIterator[tuple[int, Update]],
        jobs: Jobs,
        n: int,
        document: Document | ResponseDocument,
        send: Send,
    ) -> bool:
        """Sends events from the first token on. Returns False if an error ended them."""
        has_begun = False
        try:
            async for number, update in received:
                if not has_begun:
                    await send(_STREAM_START)
                    has_begun = True
                if update.text or update.is_last or update.logprobs:
                    texts = await self._service.texts(jobs, [update])
                    await _send_part(send, document.chunk(number, update, texts))
            await _send_part(send, document.end(usage_of(jobs, n)), is_last=True)
        except ApiError as error:
            if not has_begun:
                raise
            await _send_part(send, document.failure(error), is_last=True)
            return False
        return True

    async def _received(
        self, updates: Updates, count: int, started: float
    ) -> AsyncIterator[tuple[int, Update]]:
        """Yields updates without errors, which are raised."""
        is_first = True
        async for number, update in updates.all(count):
            if update.error is not None:
                raise _reported(update.error, self._endpoint)
            if is_first:
                self._observe(self._service.metrics.first_token, started)
                is_first = False
            yield number, update

    def _observe(self, histogram: Histogram, started: float) -> None:
        if self._endpoint != "embeddings":  # which have no tokens
            histogram.observe(time.monotonic() - started)


async def _watch(receive: Receive, updates: Updates) -> None:
    """Reports when the client disconnects: after the body no other message arrives."""
    while (await receive())["type"] != "http.disconnect":
        pass
    updates.deliver(0, Update("", error=ClientDisconnect()))


def _reported(error: BaseException, endpoint: Endpoint) -> BaseException:
    """The error that ends a failed request; internal ones are printed on stderr."""
    if isinstance(error, ClientDisconnect):
        return error
    refused = api_error(error, endpoint)
    if refused.status == 500:
        print_error(error, debug=True)
    return refused


async def _send_part(send: Send, body: bytes, is_last: bool = False) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": not is_last})


async def _error_response(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # of starlette
        message = f"{request.method} {request.url.path:.200}: {error.detail}"
        refused = invalid(message, status=error.status_code)
        return JSONResponse(refused.document, error.status_code, error.headers)
    refused = api_error(error)
    return JSONResponse(refused.document, refused.status, _HEADERS.get(refused.status))
