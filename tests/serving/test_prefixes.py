"""Prompts with a common beginning: it is read once, and every request gets the answer that it gets
alone.
"""

from dataclasses import replace

import decoder_types
import decodings
import pytest
from evaluating import tiny_loaded
from test_scheduler import (
    ADAPTIVE,
    HOT,
    SPECULATIVE,
    Client,
    decoder_of,
    prompt_of,
    require_own_answers,
    run,
)

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding import Prefixes
from layerskip_core.model import TransformersBackend
from layerskip_core.serving import Dispatcher


@pytest.mark.parametrize("kind", ["native", "packed", "generic"])
def test_requests_with_a_common_beginning_get_their_own_answers(kind):
    """In company and where one is cancelled; the beginning is computed for the first of them
    only.
    """
    decoder = decoder_of(kind)
    system = prompt_of(70)
    for config in (ADAPTIVE, replace(SPECULATIVE, temperature=HOT if kind == "native" else 0.0)):
        clients = [
            Client([*system, place, 3], replace(config, max_new_tokens=9 + place, seed=place))
            for place in range(6)
        ]
        gone = Client([*system, 50], replace(config, max_new_tokens=40))
        scheduler = Dispatcher(decoder, 4, prefixes=Prefixes(1 << 30))
        for client in (clients[0], gone):
            scheduler.add(client.request)
            scheduler.step()
        assert scheduler.cancel(gone.request)
        run(scheduler, [clients[1:3], clients[3:]])
        require_own_answers(decoder, clients)
        assert [client.request.reused > 60 for client in clients] == [False] + [True] * 5


def test_recurrent_rows_that_go_on_from_a_kept_text_join_others():
    """Some wait for their first pass while others run theirs."""
    backend = TransformersBackend(decoder_types.tiny.__wrapped__("lfm2"))
    config = DecodingConfig("lookup", 0, 3, 6, ignore_eos=True)
    decoder = replace(tiny_loaded(), backend=backend)
    text = decodings.prompt_of(20)
    scheduler = Dispatcher(decoder, 4, prefixes=Prefixes(1 << 30, least=4))
    first = Client(text, replace(config, max_new_tokens=1))
    running = Client([5, 6, 7], replace(config, max_new_tokens=20))
    following = [Client([*text, *decodings.prompt_of(length)], config) for length in (4, 6, 5)]
    run(scheduler, [[first]])
    run(scheduler, [[running], [], following])
    others = [Client(client.request.ids, config) for client in following]
    prefixes = scheduler._scheduler._prefixes
    run(Dispatcher(decoder, 4, prefixes=prefixes, prefill_tokens=5), [others])
    require_own_answers(decoder, (first, running, *following, *others))
    assert {client.request.reused for client in following} == {20}


def test_answers_to_one_prompt_read_it_once():
    """Those that come together wait until it is read; a prompt with another beginning does not."""
    decoder = decoder_of("native")
    clients = [
        Client(prompt_of(100), replace(SPECULATIVE, temperature=HOT, seed=seed))
        for seed in range(3)
    ]
    scheduler = Dispatcher(decoder, 8, prefixes=Prefixes(1 << 30))
    other = Client(prompt_of(90, 3), SPECULATIVE)
    for client in (other, *clients):
        scheduler.add(client.request)
    scheduler.step()
    assert scheduler.running == 2
    run(scheduler, [])
    assert [client.request.reused for client in (other, *clients)] == [0, 0, 99, 99]
    require_own_answers(decoder, (other, *clients))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (SPECULATIVE, DecodingConfig("autoregressive")),
        (SPECULATIVE, replace(SPECULATIVE, logprobs=1, prompt_logprobs=True)),
        (replace(SPECULATIVE, logprobs=1, prompt_logprobs=True), SPECULATIVE),
    ],
    ids=["strategy", "reports its prompt", "beside one that does"],
)
def test_no_request_waits_for_a_prefix_that_it_cannot_use(first, second):
    decoder = decoder_of("native")
    scheduler = Dispatcher(decoder, 8, prefixes=Prefixes(1 << 30))
    for config in (first, second):
        scheduler.add(Client(prompt_of(100), config).request)
    scheduler.step()
    assert scheduler.running == 2
