"""Streaming: what is shown is always a beginning of the whole text, cut at a character."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip_core.checkpoint.load import for_training
from layerskip_core.checkpoint.loaded import decoder_of
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.decoding import Token, decode, text
from layerskip_core.decoding.text import TextStream, _IncrementalText
from layerskip_core.errors import ConfigError

EOS = 256
SPECIAL = -1
WORDS = ["▁", "▁a", "b", "▁▁", "c▁"]


def bytes_to_text(ids):
    """A byte-level tokenizer: an id is a byte."""
    return bytes(ids).decode(errors="replace")


def pieces_to_text(ids):
    """As SentencePiece: special ids have no text, and the first space of a text is left out."""
    return "".join(WORDS[i] for i in ids if i != SPECIAL).replace("▁", " ").removeprefix(" ")


def stream(chunks, detokenize):
    """The text after each chunk, and after the end."""
    decoder = _IncrementalText(detokenize)
    return [decoder.add(list(chunk), finished=False) for chunk in chunks] + [decoder.add([], finished=True)]


def test_a_character_waits_for_its_last_byte():
    house, euro = "🏠".encode(), "€".encode()
    chunks = [b"a", house[:1], house[1:3], house[3:] + euro[:2], euro[2:], b"z"]
    assert stream(chunks, bytes_to_text) == ["a", "a", "a", "a", "a🏠€", "a🏠€z", "a🏠€z"]


def test_bytes_that_are_no_character_come_with_what_follows():
    assert stream([b"a", b"\xff", b"b"], bytes_to_text) == ["a", "a", "a\ufffdb", "a\ufffdb"]
    assert stream([b"a", b"\xe2\x82"], bytes_to_text) == ["a", "a", "a\ufffd"]  # the end: nothing follows


def test_the_space_before_a_word_survives_ids_without_text():
    assert stream([[1], [SPECIAL], [SPECIAL], [1], [2]], pieces_to_text) == ["a", "a", "a", "a a", "a ab", "a ab"]


CHARACTERS = st.lists(st.sampled_from(["é".encode(), "€".encode(), "🏠".encode(), b"a", b"\xff", b"\xe2"]))


@given(CHARACTERS.map(b"".join), st.data())
def test_byte_streams_add_up_and_never_end_in_half_a_character(content, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)))))
    chunks = [content[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    *shown, whole = stream(chunks, bytes_to_text)
    assert whole == bytes_to_text(content)
    assert all(whole.startswith(part) and not part.endswith("\ufffd") for part in shown)


@given(st.lists(st.lists(st.integers(SPECIAL, len(WORDS) - 1))))
def test_word_streams_add_up(chunks):
    shown = stream(chunks, pieces_to_text)
    assert shown[-1] == pieces_to_text([token for chunk in chunks for token in chunk])
    assert all(after.startswith(before) for before, after in pairwise(shown))


class Scripted:
    """A decoding that verifies the given bytes, a chunk a step. All but the last of a chunk are accepted drafts."""

    def __init__(self, chunks, reason):
        self._chunks, self._reason = chunks, reason
        self.finish_reason = None

    def __iter__(self):
        for number, chunk in enumerate(self._chunks, start=1):
            self.finish_reason = self._reason if number == len(self._chunks) else None
            yield [Token(token, place < len(chunk)) for place, token in enumerate(chunk, start=1)]


def scripted(monkeypatch, chunks, reason, stop):
    monkeypatch.setattr(text, "decode", lambda *_, **__: Scripted(chunks, reason))
    loaded = SimpleNamespace(backend=None, eos_ids=frozenset({EOS}), detokenize=bytes_to_text)
    return TextStream(loaded, [1], DecodingConfig("autoregressive", stop=stop))


@pytest.mark.parametrize(
    ("chunks", "reason", "stop", "pieces"),
    [
        ([b"ab", b"c", [*b"d", EOS]], "eos", (), ["ab", "c", "d"]),
        ([b"ab", [EOS]], "eos", (), ["ab"]),  # no empty piece
        ([b"a", "é".encode()[:1], "é".encode()[1:]], "length", (), ["a", "é"]),
        ([b"a", "é".encode()[:1]], "length", (), ["a", "\ufffd"]),
        ([b"one\n", b"\ntwo"], "stop", ("\n\n",), ["one"]),
        ([b"one\n", b"x", b"\n"], "length", ("\n\n",), ["one", "\nx", "\n"]),  # it could have been a stop string
        ([b"a#", b"b;c"], "stop", (";", "#"), ["a"]),
    ],
)
def test_pieces_of_an_answer(monkeypatch, chunks, reason, stop, pieces):
    answer = scripted(monkeypatch, chunks, reason, stop)
    assert list(answer) == pieces
    assert (answer.text, answer.finish_reason) == ("".join(pieces), reason)


@pytest.mark.parametrize(
    ("chunks", "reason", "stop", "runs"),
    [
        ([b"ab", b"c", [*b"de", EOS]], "eos", (), [[("a", True), ("b", False)], [("c", False)], [("de", True)]]),
        ([b"ab", [EOS]], "eos", (), [[("a", True), ("b", False)], []]),
        ([b"a\xc3", b"\xa9bc"], "length", (), [[("a", True)], [("\xe9b", True), ("c", False)]]),
        ([b"xa\xc3", b"\xa9"], "length", (), [[("xa", True)], [("\xe9", False)]]),  # the target's token completes it
        ([b"x\xc3"], "length", (), [[("x", True), ("\ufffd", False)]]),
        ([b"one\n", b"x\n", b"\n"], "stop", ("\n\n",), [[("one", True)], [("\n", False), ("x", True)], []]),
        ([b"on\n", b"xyz"], "length", ("\nxa",), [[("on", True)], [("\n", False), ("xy", True), ("z", False)]]),
        ([b"a#b", b";c"], "stop", (";", "#"), [[("a", True)], []]),
    ],
)
def test_runs_say_what_was_drafted(monkeypatch, chunks, reason, stop, runs):
    answer = scripted(monkeypatch, chunks, reason, stop)
    assert [[tuple(run) for run in step] for step in answer.runs()] == runs
    assert answer.text == "".join(run for step in runs for run, _ in step)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return decoder_of(for_training(checkpoint, "cpu", "fp32"))


def test_an_answer_is_the_text_of_its_tokens(loaded):
    config = DecodingConfig("self-speculative", exit_layer=4, num_draft_tokens=5, max_new_tokens=60)
    tokens = [token.id for step in decode(loaded.backend, loaded.encode_prompt("wake me up"), config) for token in step]
    answer = TextStream(loaded, "wake me up", config)
    pieces = list(answer)
    assert "".join(pieces) == answer.text == loaded.detokenize(tokens)
    assert len(pieces) > 1 and answer.stats.new_tokens == len(tokens) == 60
    assert answer.stats.accepted > 0


def test_a_prompt_that_is_no_unicode(loaded):
    with pytest.raises(ConfigError, match=r"the prompt must be valid Unicode, got '\\ud800' in it"):
        TextStream(loaded, "wake \ud800 up", DecodingConfig("autoregressive"))
