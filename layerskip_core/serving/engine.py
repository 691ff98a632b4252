"""A thread that decodes the requests of other threads."""

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from ..checkpoint.loaded import Decoder
from ..errors import LayerSkipError
from .scheduler import Request, Scheduler


class QueueFull(LayerSkipError):
    """As many requests as may wait are waiting."""


class Stopped(LayerSkipError):
    """The engine is stopped, and answers nothing any more."""


class Engine:
    """Decodes requests in a thread of its own. `submit`, `cancel` and `stop` are for any thread."""

    def __init__(self, decoder: Decoder, batch_size: int, queue_size: int) -> None:
        """`batch_size`: requests that are decoded at once. `queue_size`: those that may wait besides."""
        self._scheduler = Scheduler(decoder, batch_size)
        self._most = batch_size + queue_size
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._held = 0  # requests that are neither finished nor given up
        self._running = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="layerskip-engine", daemon=True)
        self._thread.start()

    @property
    def held(self) -> int:
        """How many requests wait or are being decoded."""
        return self._held

    @property
    def running(self) -> int:
        """How many of them are being decoded."""
        return self._running

    @property
    def is_stopped(self) -> bool:
        """Whether it was stopped, or failed: it takes no requests any more."""
        return self._stopping

    def hold(self, requests: int) -> None:
        """Holds places for requests that will be submitted, before any work is done for them.

        Raises QueueFull if not all of them have one, and Stopped after `stop`.
        """
        with self._lock:
            self._require_running()
            if self._held + requests > self._most:
                raise QueueFull(f"{self._held} requests wait or are being answered, and this server holds {self._most}")
            self._held += requests

    def release(self, requests: int) -> None:
        """Gives up places of requests that will not be submitted."""
        with self._lock:
            self._held -= requests

    def submit(self, *requests: Request) -> None:
        """Takes requests whose places are held. Raises Stopped after `stop`, and takes none then."""
        with self._lock:
            self._require_running()
            for request in requests:
                self._commands.put(lambda request=request: self._scheduler.add(request))  # type: ignore[misc]

    def cancel(self, request: Request) -> None:
        """Gives up a request after the step that is being computed; without effect on one that is finished."""
        self._commands.put(lambda: self.release(int(self._scheduler.cancel(request))))

    def stop(self) -> None:
        """Ends all requests with the error Stopped, and waits for the thread."""
        with self._lock:
            self._stopping = True
        self._commands.put(lambda: None)
        self._thread.join()

    def _run(self) -> None:
        scheduler, reason = self._scheduler, Stopped("the server is shutting down")
        try:
            while not self._stopping:
                self._obey(wait=scheduler.is_idle)
                self.release(len(scheduler.step()))
                self._running = scheduler.running
        except BaseException:  # a fault of the scheduler: nobody waits for an answer that will not come
            reason = Stopped("the server has failed and must be started again")
            with self._lock:
                self._stopping = True
            raise  # the traceback goes to stderr
        finally:
            self._obey(wait=False)
            self.release(len(scheduler.fail_all(reason)))
            self._running = 0

    def _obey(self, wait: bool) -> None:
        """Runs the commands that have come; waits for the first if there is nothing to decode."""
        try:
            while True:
                self._commands.get(block=wait)()
                wait = False
        except Empty:
            pass

    def _require_running(self) -> None:
        if self._stopping:
            raise Stopped("the server answers nothing any more")
