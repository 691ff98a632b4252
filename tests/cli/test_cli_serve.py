"""`layerskip serve` as a command: it starts with the embedded model, and ends cleanly."""

import re
import shutil
import signal
import socket
import sys

import pytest
from command_line import ENVIRONMENT, fails, finish, refused, run, start
from conftest import edit_json

from layerskip_core.config.decoding import UNLIMITED
from layerskip_core.errors import LayerSkipError

NEEDED = ("openai", "prometheus_client", "starlette", "uvicorn")


@pytest.fixture
def extras():
    for name in NEEDED:
        pytest.importorskip(name, reason="needs the extras dev and serve")


@pytest.mark.parametrize(
    "number, flags, key, source",
    [
        (signal.SIGINT, (), "secret", "LAYERSKIP_API_KEY"),
        (signal.SIGTERM, ("--api-key secret",), "other", "--api-key"),
    ],
)
def test_it_answers_until_a_signal_and_finishes_what_it_began(extras, number, flags, key, source):
    import openai

    process = start(
        "serve --port 0 --threads 1", *flags, env={**ENVIRONMENT, "LAYERSKIP_API_KEY": key}
    )
    line = process.stderr.readline()
    assert line.startswith("embedded at http://127.0.0.1:") and line.endswith(
        f"with the key of {source}; Ctrl-C stops it\n"
    )
    client = openai.OpenAI(
        base_url=re.search(r"http://[\d.:]+/v1", line)[0], api_key="secret", max_retries=0
    )
    text = (
        client.completions.create(model="embedded", prompt="set an alarm for 7 am").choices[0].text
    )
    assert text.startswith("[IN:CREATE_ALARM ")
    messages = [{"role": "user", "content": "set an alarm for 7 am"}]
    stream = iter(client.chat.completions.create(model="embedded", messages=messages, stream=True))
    first = next(stream).choices[0].delta.content
    process.send_signal(number)
    assert first + "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
    client.close()
    assert (finish(process).code, finish(process).out) == (0, "")


def test_an_address_that_cannot_be_used(extras):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        fails(
            f"--host 127.0.0.1 with --port {port} cannot be used: Address already in use",
            f"serve --port {port}",
        )


def test_wrong_settings(extras, monkeypatch):
    fails("--port must be a whole number in 0..65535, got 70000", "serve --port 70000")
    fails(
        "--api-key must be a text of valid Unicode that is not empty, got an empty one",
        "serve --api-key",
        "",
    )
    monkeypatch.setenv("LAYERSKIP_API_KEY", "")
    fails("LAYERSKIP_API_KEY must be a text that is not empty, got an empty one", "serve")


@pytest.mark.parametrize("flags, kept", [((), 0), (("--remember 100",), 21)])
def test_answers_are_not_remembered_unless_asked(extras, monkeypatch, flags, kept):
    """Other clients could tell from the times of their own."""

    def engine(decoder, batch_size, queue_size, earlier, prefixes):
        earlier.add(range(20), 5)
        assert len(earlier) == kept
        raise LayerSkipError("far enough")

    monkeypatch.setattr("layerskip_core.serving.thread.DecodingThread", engine)
    fails("far enough", "serve --port 0", *flags)


def test_a_bound_on_memory_that_nothing_keeps_is_refused(extras, checkpoint, monkeypatch):
    monkeypatch.setattr("layerskip_core.checkpoint.plan.can_run_native", lambda *_: False)
    given = f"--model {checkpoint} --kv-memory 100"
    refused(
        "--kv-memory must be left out: nothing bounds the KV entries of ", "serve --port 0", given
    )


def test_requests_are_sampled_as_the_model_s_maker_says_unless_a_flag_does(
    extras, monkeypatch, checkpoint, tmp_path
):
    folder = shutil.copytree(checkpoint, tmp_path / "sampled")
    edit_json(folder / "generation_config.json", do_sample=True, temperature=0.6, top_k=40)

    def service(decoder, packing, config, *_):
        assert config.decoding == {"temperature": 0.6, "top_k": 3, "max_new_tokens": UNLIMITED}
        raise LayerSkipError("far enough")

    monkeypatch.setattr("cli.server.app.Service", service)
    said = run(f"serve --port 0 --model {folder} --top-k 3").err
    assert said.startswith("generation_config.json: temperature 0.6, top_k 40, ") and said.endswith(
        "error: far enough\n"
    )


def test_without_the_extra_it_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    fails(
        "serve needs the extra `serve`, whose package uvicorn is missing: pip install 'layerskip[serve]'",
        "serve",
    )
