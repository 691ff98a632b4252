"""`layerskip chat`: over a pipe, and in a pseudo-terminal as a person uses it."""

import os
import pty
import re
import select
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from chatml import talking_model
from command_line import Result, fails, run, start
from conftest import edit_json

from cli import console
from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding.dialogue import Dialogue, TextStream
from layerskip_core.errors import ConfigError, ContextError

PLAIN = DecodingConfig("autoregressive", max_new_tokens=20)
MESSAGES = ("remind me", "start the system", "and <|im_end|> again")
CONTEXT = 512
LONG = "word " * 200


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return talking_model(tmp_path_factory.mktemp("chat"), CONTEXT)


@pytest.fixture(scope="module")
def loaded(model):
    return for_decoding(model, "cpu", "fp32")


@pytest.fixture
def chat(model):
    def command(*arguments, **keywords):
        return run(f"chat --model {model} --max-new-tokens 20 --dtype fp32", *arguments, **keywords)

    return command


@pytest.fixture(scope="module")
def conversation(loaded):
    """The answers to messages, each from the whole text of the conversation so far, by plain
    decoding.
    """

    def answers(*messages, system=None):
        model = loaded.with_template(None, system)
        turns = []
        for message in messages:
            stream = TextStream(model, model.encode_prompt(message, turns), PLAIN)
            turns.append((message, "".join(stream)))
        return [answer for _, answer in turns]

    return answers


def lines(*texts):
    return "".join(text + "\n" for text in texts)


# --- over a pipe
# --------------------------------------------------------------------------------------------------------


def test_every_line_is_a_turn_of_one_conversation(chat, conversation):
    expected = conversation(*MESSAGES)
    assert chat(stdin=lines(*MESSAGES)) == Result(0, lines(*expected), "")
    assert expected[1] != conversation(MESSAGES[1])[0]  # it depends on the turn before
    assert chat(stdin=f"\n{MESSAGES[0]}\r\n  \n{MESSAGES[1]}") == Result(
        0, lines(*expected[:2]), ""
    )  # empty lines are none
    brief = chat("--system", "Be brief.", stdin=lines(*MESSAGES[:2]))
    assert (
        brief.out == lines(*conversation(*MESSAGES[:2], system="Be brief.")) != lines(*expected[:2])
    )
    assert chat() == Result(0, "", "")


def test_reset_forget_and_exit(chat, loaded, conversation):
    one, two, three = MESSAGES
    alone = conversation(two)[0]
    pair = conversation(one, two)
    assert chat(stdin=lines(one, "/reset", two)) == Result(
        0, lines(pair[0], alone), "a new conversation\n"
    )
    forgotten = chat(stdin=lines(one, two, "/forget", three, "/exit", one))
    after = "".join(TextStream(loaded, loaded.encode_prompt(three, [(two, pair[1])]), PLAIN))
    assert forgotten == Result(0, lines(*pair, after), "1 turn left\n")


def test_it_samples_as_the_model_s_maker_says(loaded, tmp_path, model, conversation):
    """Flags win one by one; `generate` is greedy."""
    folder = shutil.copytree(model, tmp_path / "sampled")
    edit_json(
        folder / "generation_config.json",
        do_sample=True,
        temperature=2.0,
        top_k=9,
        repetition_penalty=1.5,
    )
    flags = f"--model {folder} --max-new-tokens 20 --dtype fp32 --strategy autoregressive"
    ids = loaded.encode_prompt(MESSAGES[0])
    for more, changes in (
        ((), {"temperature": 2.0, "top_k": 9}),
        (("--top-k 3 --seed 4",), {"temperature": 2.0, "top_k": 3, "seed": 4}),
        (("--temperature 0",), {}),
    ):
        said = run("chat", flags, *more, stdin=lines(MESSAGES[0]))
        sampled = TextStream(loaded, ids, replace(PLAIN, repetition_penalty=1.5, **changes))
        assert (said.out, said.err) == (
            lines(sampled.finish().text),
            "generation_config.json: temperature 2, repetition_penalty 1.5, top_k 9, "
            "unless a flag or a request says otherwise; --temperature 0 is greedy\n",
        )
    assert run("generate", flags, stdin=MESSAGES[0]) == Result(
        0, conversation(MESSAGES[0])[0] + "\n", ""
    )


def test_a_slash_begins_a_command_and_two_a_message(chat, conversation):
    result = chat(stdin=lines("//etc", "/etc", "/stats now", "go"))
    assert (result.code, result.out) == (1, lines(*conversation("/etc", "go")))
    needed = "error: line {}: needed a message or a command, found '{}'; /help lists the commands"
    assert result.err.splitlines() == [needed.format(2, "/etc"), needed.format(3, "/stats now")]
    shown = chat(stdin="/help\n").err
    assert all(
        f"\n{name} " in "\n" + shown for name in ("/reset", "/forget", "/stats", "/help", "/exit")
    )


def test_stats_say_what_was_reused(chat, loaded, conversation):
    first, second = conversation(*MESSAGES[:2])
    prompts = [
        len(loaded.encode_prompt(MESSAGES[0])),
        len(loaded.encode_prompt(MESSAGES[1], [(MESSAGES[0], first)])),
    ]
    result = chat("--stats", stdin=lines("/stats", *MESSAGES[:2], "/stats"))
    assert (result.code, result.out) == (0, lines(first, second))
    told = re.findall(
        r"20 tokens, .*; prompt: (\d+) tokens, (\d+) of them reused; context: (\d+) of 512 tokens",
        result.err,
    )
    counts = [tuple(map(int, line)) for line in told]
    assert [(prompt, used) for prompt, _, used in counts] == [
        (count, count + 20) for count in (*prompts, prompts[1])
    ]
    assert counts[0][1] == 0 and prompts[0] <= counts[1][1] < prompts[1]
    assert result.err.startswith("no answer yet\n")
    assert re.search(
        r"\n2 answers: 40 tokens, [\d.]+ tokens/s; drafted \d+, accepted \d+ \([\d.]+%\) in .*\n$",
        result.err,
    )


def test_without_a_chat_template_every_message_is_a_prompt_of_its_own(checkpoint):
    flags = f"--model {checkpoint} --max-new-tokens 20 --dtype fp32"
    stdin = lines("wake me up", "play jazz")
    result = run("chat", flags, stdin=stdin)
    assert result.out == run("generate --lines", flags, stdin=stdin).out
    assert (result.code, result.err) == (
        0,
        r"'{prompt}\n' is no chat template: every message is a prompt of its own" + "\n",
    )


def test_what_does_not_fit_is_refused_and_nothing_is_left_out(model, chat, conversation):
    """The answer before has no limit and fills the context: no room for the next message until the
    oldest turn is left out.
    """
    one, two, _ = MESSAGES
    result = run(f"chat --model {model} --dtype fp32", stdin=lines(one, two, "/reset", two))
    assert result.code == 1
    full, refused, reset, again = result.err.splitlines()
    room = "; /forget leaves out the oldest turn, /reset all turns"
    assert (
        full
        == again
        == "the answer ends here because the model's context of 512 tokens is full" + room
    )
    assert reset == "a new conversation"
    assert re.fullmatch(
        r"error: line 2: the conversation with this message must be at most 511 tokens, got \d+ "
        rf"\(the model's context is 512 tokens\){room}",
        refused,
    )
    too_long = chat(stdin=lines(LONG, one))
    assert (too_long.code, too_long.out) == (1, lines(conversation(one)[0]))
    assert re.fullmatch(
        r"error: line 1: the prompt must be at most 511 tokens, got \d+ \(.*\)\n", too_long.err
    )


def test_wrong_flags_are_one_error_before_the_first_answer(model, checkpoint):
    fails(
        "--exit must be in 1..5, got 9 (model has 6 layers)",
        f"chat --model {model} --exit 9",
        stdin="hi\n",
    )
    fails(
        r"--system must be given with the chat template only, got the template '{prompt}\n'",
        f"chat --model {checkpoint} --system",
        "Be brief.",
        stdin="hi\n",
    )
    refused = run(f"chat --model {model}", stdin=b"\xff\n")
    assert refused == Result(
        1, "", "error: line 1: the prompt must be valid Unicode, got '\\udcff' in it\n"
    )
    assert run("chat", "hello").code == 2


def test_colours_are_for_terminals(chat, conversation, monkeypatch):
    expected = lines(*conversation(*MESSAGES[:2]))
    assert chat("--show-drafts", stdin=lines(*MESSAGES[:2])).out == expected
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    monkeypatch.setenv("TERM", "xterm-256color")
    for colour, code in (("", "32"), ("1", "4")):
        monkeypatch.setenv("NO_COLOR", colour)
        shown = chat("--show-drafts", stdin=lines(*MESSAGES[:2])).out
        marked = re.compile(rf"\x1b\[{code}m(.*?)\x1b\[0m", re.DOTALL)
        assert marked.sub(r"\1", shown) == expected and marked.search(shown)
        assert chat(stdin=lines(*MESSAGES[:2])).out == expected


# --- in a terminal
# ------------------------------------------------------------------------------------------------------


def test_ctrl_c_at_any_moment_leaves_a_working_conversation(
    model, loaded, conversation, monkeypatch
):
    """Pressed twice within a pass, which breaks it off: nothing that it wrote is used."""
    typed = iter([*MESSAGES[:1], "lost", MESSAGES[1]])
    ask = Dialogue.ask
    asked = []

    def broken_off(dialogue, message):
        stream = ask(dialogue, message)
        asked.append(message)
        if message == "lost":
            raise KeyboardInterrupt
        return stream

    def typed_line(prompt):
        assert prompt == "> "
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(Dialogue, "ask", broken_off)
    monkeypatch.setattr(console, "is_terminal", lambda: True)
    monkeypatch.setattr(console, "typed_line", typed_line)
    result = run(f"chat --model {model} --max-new-tokens 20 --dtype fp32")
    assert (result.code, result.out, asked) == (
        0,
        lines(*conversation(*MESSAGES[:2])),
        [MESSAGES[0], "lost", MESSAGES[1]],
    )
    assert (
        "\nstopped\n" in result.err
        and result.err.count("the answer ends here because of --max-new-tokens 20\n") == 2
    )


class Terminal:
    """A pseudo-terminal with a command in it."""

    def __init__(self, *arguments, **environment):
        self._fd, inner = pty.openpty()
        self.process = start(
            *arguments, stdin=inner, stdout=inner, stderr=inner, start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm-256color", **environment},
        )  # fmt: skip
        os.close(inner)
        self._unread = ""

    def read_until(self, text):
        deadline = time.monotonic() + 120
        while text not in self._unread:
            assert time.monotonic() < deadline, self._unread
            if select.select([self._fd], [], [], 1)[0]:
                try:
                    self._unread += os.read(self._fd, 65536).decode(errors="replace")
                except OSError:  # Linux's end of a terminal
                    break
        shown, found, self._unread = self._unread.partition(text)
        return shown + found

    def wait_until_asleep(self):
        """A signal between the prompt and readline's wait for keys would be seen with the next key
        only.
        """
        status = Path(f"/proc/{self.process.pid}/stat")
        while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "S":
            time.sleep(0.01)

    def type(self, text):
        os.write(self._fd, text.encode())


def test_a_person_talks_stops_an_answer_and_leaves(tmp_path_factory, monkeypatch):
    """Of 100,000 tokens, so that Ctrl-C always comes in time."""
    model = talking_model(tmp_path_factory.mktemp("long"), 200_000)
    terminal = Terminal("chat --model", model, "--show-drafts --max-new-tokens 100000 --threads 1")
    greeting = terminal.read_until("> ")
    assert "accepted drafts are green\r\n" in greeting and "prompt template: chat\r\n" in greeting
    terminal.type("r\xe9veil\n")
    terminal.read_until("\x1b[32m")
    terminal.process.send_signal(2)
    assert "\r\nstopped\r\n" in terminal.read_until("> ")
    terminal.type("/stats\n")
    told = terminal.read_until("> ")
    assert re.search(r"last answer: \d+ tokens, .* of 200000 tokens\r\n1 answer: ", told)
    assert int(re.search(r"last answer: (\d+)", told)[1]) < 100_000
    terminal.wait_until_asleep()
    terminal.process.send_signal(2)  # at the prompt
    assert "/exit or Ctrl-D leaves" in terminal.read_until("> ")
    terminal.type("/nope\n")
    assert "error: needed a message or a command, found '/nope'" in terminal.read_until("> ")
    terminal.type("\x04")
    assert terminal.process.wait(60) == 0


# --- without a command line
# ---------------------------------------------------------------------------------------------


def test_an_answer_that_was_left_is_a_turn_as_far_as_it_came(loaded):
    dialogue = Dialogue(loaded, replace(PLAIN, strategy="self-speculative", exit_layer=3))
    dialogue.ask("never begun")
    assert dialogue.turns == ()
    stream = dialogue.ask("go")
    left = iter(stream)
    piece = next(left)
    assert dialogue.turns == (("go", piece),)
    following = dialogue.ask("on")
    pieces = iter(following)
    first = next(pieces)
    more = next(left)  # the older answer goes on beside the newer one
    expected = TextStream(loaded, loaded.encode_prompt("on", [("go", piece)]), PLAIN)
    assert first + "".join(pieces) == "".join(expected)
    assert piece + more + "".join(left) == "".join(TextStream(loaded, "go", PLAIN))
    assert following.decoding.reused_tokens >= len(loaded.encode_prompt("go"))
    with pytest.raises(ContextError):
        dialogue.ask(LONG)
    with pytest.raises(ConfigError, match="valid Unicode"):
        dialogue.ask("\ud800")
    assert dialogue.turns == (("go", piece), ("on", following.text))
    dialogue.forget(1)
    assert dialogue.turns == (("on", following.text),)
    dialogue.forget()
    assert dialogue.turns == ()
