"""The text of growing outputs: whole characters, and the same however the tokens come."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_bpe import text_bpe

from layerskip_core.decoding.output import OutputText

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
    output, shown = OutputText(detokenize), []
    for chunk, finished in [*((chunk, False) for chunk in chunks), ([], True)]:
        output.decode(list(chunk), finished)
        shown.append(output.decoded)
    return shown


def test_a_character_waits_for_its_last_byte():
    house, euro = "🏠".encode(), "€".encode()
    chunks = [b"a", house[:1], house[1:3], house[3:] + euro[:2], euro[2:], b"z"]
    assert stream(chunks, bytes_to_text) == ["a", "a", "a", "a🏠", "a🏠€", "a🏠€z", "a🏠€z"]


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


BYTES = [*"é€🏠".encode(), 0xFF, *b"a "]


@pytest.fixture(scope="module")
def byte_fallback():
    """As of Llama 2 and Gemma: if one byte of a run of byte tokens is wrong, the whole run becomes U+FFFD."""
    tokenizer = text_bpe()
    ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
    return lambda content: str(tokenizer.decode([ids[byte] for byte in content]))


def test_bytes_of_half_a_character_leave_the_text_before_them(byte_fallback):
    assert byte_fallback("é€".encode()[:-1]) == "\ufffd" * 4
    expected = ["", "é", "é", "é", "é\ufffd\ufffd"]
    assert stream([[byte] for byte in "é€".encode()[:-1]], byte_fallback) == expected
    assert stream(["é€".encode()[:-1]], byte_fallback)[-1] == expected[-1]


@given(content=st.lists(st.sampled_from(BYTES)), data=st.data())
def test_the_text_does_not_depend_on_how_tokens_come(byte_fallback, content, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)))))
    chunks = [content[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    shown = stream(chunks, byte_fallback)
    assert shown[-1] == stream([content], byte_fallback)[-1]
    assert all(after.startswith(before) for before, after in pairwise(shown))
