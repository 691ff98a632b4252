"""The engine's thread: what is submitted is answered, or told why not, and nothing is left."""

import threading

import pytest
from evaluating import tiny_loaded

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding.dialogue import TextStream
from layerskip_core.serving import Request, Stopped
from layerskip_core.serving.thread import DecodingThread

CONFIG = DecodingConfig("self-speculative", 2, 4, max_new_tokens=12)
LONG = DecodingConfig("autoregressive", max_new_tokens=100)


class Client:
    def __init__(self, prompt, config=CONFIG, gate=None):
        """`gate`: the thread waits for it at the first update, so that the answer is not over."""
        self.prompt = prompt
        self.gate = gate
        self.updates = []
        self.came = threading.Event()
        self.done = threading.Event()
        self.request = Request(tiny_loaded().encode_prompt(prompt), config, self.take)

    def take(self, update):
        self.updates.append(update)
        self.came.set()
        if self.gate is not None:
            assert self.gate.wait(60)
        if update.is_last:
            self.done.set()

    @property
    def text(self):
        assert self.done.wait(60)
        return "".join(update.text for update in self.updates)


@pytest.fixture
def engine():
    engine = DecodingThread(tiny_loaded(), batch_size=3, queue_size=5)
    yield engine
    engine.stop()


def wait_until_empty(engine):
    for _ in range(3000):
        if engine.num_reserved == 0:
            return
        engine._thread.join(0.02)
    raise AssertionError(f"{engine.num_reserved} requests are left")


def settle(engine):
    """After a later request was answered, the thread has seen all that came before."""
    assert submitted(engine, Client("last")).text
    wait_until_empty(engine)


def submitted(engine, client):
    engine.hold(1)
    engine.submit(client.request)
    return client


def test_requests_of_several_threads_are_answered(engine):
    clients = [Client(f"wake me at {hour}") for hour in range(8)]
    threads = [threading.Thread(target=submitted, args=(engine, client)) for client in clients]
    for thread in threads:
        thread.start()
    for client in clients:
        stream = TextStream(tiny_loaded(), client.prompt, CONFIG)
        assert client.text == "".join(stream)
        assert client.request.stats.accepted == stream.stats.accepted
    settle(engine)
    assert engine.num_reserved == engine.running == 0


def test_what_is_given_up_makes_room_and_at_the_end_everyone_is_told(engine):
    gate = threading.Event()
    clients = [submitted(engine, Client("set an alarm", LONG, gate)) for _ in range(8)]
    assert clients[0].came.wait(60)
    for client in clients:
        engine.cancel(client.request)
        engine.cancel(client.request)  # once more changes nothing
    gate.set()
    wait_until_empty(engine)
    assert not any(client.done.is_set() for client in clients)
    assert submitted(engine, Client("play jazz")).text
    engine = DecodingThread(tiny_loaded(), batch_size=1, queue_size=5)
    gate.clear()
    clients = [submitted(engine, Client("set an alarm", LONG, gate)) for _ in range(3)]
    assert clients[0].came.wait(60)
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    while not engine.is_stopped:
        stopping.join(0.02)
    gate.set()
    stopping.join()
    assert all(isinstance(client.updates[-1].error, Stopped) for client in clients)
    assert engine.num_reserved == 0 and not engine._thread.is_alive()
    with pytest.raises(Stopped):
        engine.hold(1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_scheduler_leaves_nobody_waiting(monkeypatch):
    engine = DecodingThread(tiny_loaded(), batch_size=1, queue_size=5)
    gate = threading.Event()
    clients = [submitted(engine, Client("set an alarm", LONG, gate)) for _ in range(2)]
    assert clients[0].came.wait(60) and not engine.is_stopped
    monkeypatch.setattr(engine._dispatcher, "step", lambda: 1 / 0)
    gate.set()
    engine._thread.join(60)
    assert engine.is_stopped and engine.num_reserved == 0
    assert all(
        str(client.updates[-1].error) == "the server has failed and must be started again"
        for client in clients
    )
    with pytest.raises(Stopped):
        engine.hold(1)
