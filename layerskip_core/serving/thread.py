"""A thread that decodes requests, for callers in other threads."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue

from ..checkpoint.loaded import Decoder
from ..decoding import Prefixes
from ..decoding.drafters.lookup import EarlierAnswers
from ..decoding.prefixes import NO_PREFIXES
from .dispatcher import Dispatcher
from .embedding import Embedding
from .requests import QueueFull, Request, Stopped, Update


class Updates:
    """Hands updates of numbered requests to the event loop in which it was created."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue = asyncio.Queue[tuple[int, Update]]()

    def deliver(self, number: int, update: Update) -> None:
        """May be called in any thread."""
        with suppress(RuntimeError):  # the event loop is closed: no one waits
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (number, update))

    async def all(self, count: int) -> AsyncIterator[tuple[int, Update]]:
        """Yields (number, update) until `count` requests had their last update."""
        while count:
            number, update = await self._queue.get()
            count -= update.is_last
            yield number, update


class DecodingThread:
    """Decodes requests in a thread of its own. `submit`, `cancel` and `stop` are for any thread."""

    def __init__(
        self,
        decoder: Decoder,
        batch_size: int,
        queue_size: int,
        earlier: EarlierAnswers | None = None,
        prefixes: Prefixes = NO_PREFIXES,
    ) -> None:
        """`batch_size`: most requests decoded together. `queue_size`: most requests that wait.
        `earlier` and `prefixes`: as in Dispatcher.
        """
        self.num_reserved = 0  # places of requests that wait or are being decoded
        self.running = 0  # requests being decoded
        self.is_stopped = False  # or has failed: it takes no more requests
        self._dispatcher = Dispatcher(decoder, batch_size, earlier, prefixes)
        self._capacity = batch_size + queue_size
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="layerskip-decoding", daemon=True)
        self._thread.start()

    def hold(self, requests: int) -> None:
        """Reserves places for requests that will be submitted, before any work is done for them.

        Raises QueueFull if not all of them have one, and Stopped after `stop`.
        """
        with self._lock:
            self._require_running()
            if self.num_reserved + requests > self._capacity:
                raise QueueFull(
                    f"{self.num_reserved} requests wait or are being answered, and this server holds {self._capacity}"
                )
            self.num_reserved += requests

    def release(self, requests: int) -> None:
        """Frees places of requests that have ended or will not be submitted."""
        with self._lock:
            self.num_reserved -= requests

    def submit(self, *requests: Request | Embedding) -> None:
        """Takes requests whose places are reserved. After `stop` takes none, and raises Stopped."""
        with self._lock:
            self._require_running()
            for request in requests:
                self._commands.put(partial(self._dispatcher.add, request))

    def cancel(self, request: Request | Embedding) -> None:
        """Cancels a request after the current step; a finished one is left as it is."""
        self._commands.put(partial(self._cancel, request))

    def stop(self) -> None:
        """Ends all requests with the error Stopped, and waits for the thread."""
        with self._lock:
            self.is_stopped = True
        self._commands.put(lambda: None)  # wakes the thread
        self._thread.join()

    def _cancel(self, request: Request | Embedding) -> None:
        if self._dispatcher.cancel(request):
            self.release(1)

    def _run(self) -> None:
        dispatcher = self._dispatcher
        reason = Stopped("the server is shutting down")
        try:
            while not self.is_stopped:
                self._run_commands(wait=not dispatcher.held)
                self.release(len(dispatcher.step()))
                self.running = dispatcher.running
        except BaseException:  # a fault of the dispatcher: no caller may wait forever
            reason = Stopped("the server has failed and must be started again")
            with self._lock:
                self.is_stopped = True
            raise  # the traceback goes to stderr
        finally:
            self._run_commands(wait=False)
            self.release(len(dispatcher.fail_all(reason)))
            self.running = 0

    def _run_commands(self, wait: bool) -> None:
        """Runs queued commands. `wait`: for a first one, because there is nothing to decode."""
        try:
            while True:
                self._commands.get(block=wait)()
                wait = False
        except Empty:
            pass

    def _require_running(self) -> None:
        if self.is_stopped:
            raise Stopped("the server answers nothing any more")
