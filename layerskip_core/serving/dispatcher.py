"""The dispatcher: requests become rows of the scheduler, and the rows' steps become updates."""

from collections import deque
from collections.abc import Iterable
from traceback import clear_frames

from ..checkpoint.loaded import Decoder
from ..decoding import Prefixes, Scheduler, check_prompt, new_row
from ..decoding.drafters.lookup import EarlierAnswers
from ..decoding.prefixes import NO_PREFIXES
from ..decoding.row import Row, RowStep
from .embedding import Embedding
from .requests import Request, Update


class Dispatcher:
    """Decodes at most `batch_size` requests at once; others wait in order of arrival. For one
    thread.

    Embeddings do not count towards `batch_size`: each step runs one pass of the oldest.
    """

    def __init__(
        self,
        decoder: Decoder,
        batch_size: int,
        earlier: EarlierAnswers | None = None,
        prefixes: Prefixes = NO_PREFIXES,
        prefill_tokens: int = 256,
    ) -> None:
        """`earlier`: answers for the lookups of all requests; each new answer is added.

        `prefixes`: kept KV entries of texts that prompts may begin with; each request's are added.
        `prefill_tokens`: prompt tokens per step, and an embedding's tokens per pass. 256 fill the
        kernels.
        """
        self._decoder = decoder
        self._prefill_tokens = prefill_tokens
        self._scheduler = Scheduler(
            decoder.backend,
            max_rows=batch_size,
            max_prefill_tokens=prefill_tokens,
            prefixes=prefixes,
            earlier=earlier,
            free_elsewhere=self._free_embedding,
        )
        self._requests: dict[Row, Request] = {}  # of the scheduler's rows
        self._embeddings: deque[Embedding] = deque()
        # Requests that ended before a step: their prompts do not fit
        self._refused: list[Request | Embedding] = []

    @property
    def running(self) -> int:
        """How many requests are being decoded."""
        return len(self._scheduler.running)

    @property
    def held(self) -> int:
        """How many requests wait, are being decoded or ended since the last step, embeddings
        included.
        """
        return len(self._requests) + len(self._embeddings) + len(self._refused)

    def add(self, request: Request | Embedding) -> None:
        try:
            self._add(request)
        except BaseException as error:  # a panic of llguidance's matcher is not an Exception
            self._refused += _failed([request], error)

    def _add(self, request: Request | Embedding) -> None:
        decoder = self._decoder
        if isinstance(request, Embedding):
            check_prompt(request.ids, decoder.backend, "the input")
            self._embeddings.append(request)
            return
        ends = decoder.ends_of(request.config)
        row = new_row(decoder.backend, request.ids, request.config, ends, decoder.detokenize)
        request.row = row
        self._requests[row] = request
        self._scheduler.add(row)

    def cancel(self, request: Request | Embedding) -> bool:
        """Cancels a request: it gets no further update. Returns False if it has ended already."""
        if isinstance(request, Embedding):
            if request not in self._embeddings:
                return False
            self._embeddings.remove(request)
            request.give_back()
            return True
        if request.row is None or request.row not in self._requests:
            return False
        del self._requests[request.row]
        return self._scheduler.remove(request.row)

    def step(self) -> list[Request | Embedding]:
        """A pass of the oldest embedding, and a step of all rows. Returns the finished requests.

        An exception in a pass ends the requests of this pass, which get it as an update, and no
        others.
        """
        ended = self._refused
        self._refused = []
        # Until an embedding has memory for its text, no request may take it
        is_blocked = False
        if self._embeddings:
            is_blocked = not self._scheduler.has_free_pages(len(self._embeddings[0].ids))
            if not is_blocked:
                ended += self._embed()
        for step in self._scheduler.step(admits=not is_blocked):
            ended += self._deliver(step)
        return ended

    def fail_all(self, error: BaseException) -> list[Request | Embedding]:
        """Ends all requests with an error, and returns them."""
        requests: list[Request | Embedding] = [*self._requests.values(), *self._embeddings]
        for embedding in self._embeddings:
            embedding.give_back()
        self._scheduler.clear()
        self._requests.clear()
        self._embeddings.clear()
        ended = [*self._refused, *_failed(requests, error)]
        self._refused = []
        return ended

    def _deliver(self, step: RowStep) -> list[Request | Embedding]:
        """Delivers the step of a row to its request. Returns the request if that was its last."""
        request = self._requests[step.row]
        try:
            update = request.update(step)
        except BaseException as error:  # a panic of the tokenizers library is not an Exception
            self._scheduler.remove(step.row)
            update = Update("", error=error)
        if not update.is_last:
            request.deliver(update)
            return []
        del self._requests[step.row]
        request.deliver(update)
        return [request]

    def _embed(self) -> list[Request | Embedding]:
        """A pass of the first embedding. Returns it if that was the last."""
        first = self._embeddings[0]
        try:
            update = first.run(self._decoder.backend, self._prefill_tokens)
        except BaseException as error:
            self._embeddings.popleft()
            first.give_back()
            return _failed([first], error)
        if not update.is_last:
            return []
        first.deliver(update)
        return [self._embeddings.popleft()]

    def _free_embedding(self) -> bool:
        """Frees the memory of an unfinished embedding. Returns False if there is none."""
        return bool(self._embeddings) and self._embeddings[0].give_back()


def _failed(
    requests: Iterable[Request | Embedding], error: BaseException
) -> list[Request | Embedding]:
    """Delivers an error to requests, as their last update, and returns them."""
    failed = list(requests)
    # Their variables hold KV entries, for as long as a client holds the error
    clear_frames(error.__traceback__)
    for request in failed:
        request.deliver(Update("", error=error))
    return failed
