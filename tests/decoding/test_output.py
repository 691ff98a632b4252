"""The text of growing outputs: whole characters, the same however the tokens come; and where an
output ends.
"""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_bpe import text_bpe

from layerskip_core.decoding.output import OutputText, StopScanner

SPECIAL = -1
WORDS = ["▁", "▁a", "b", "▁▁", "c▁"]


def bytes_to_text(ids):
    return bytes(ids).decode(errors="replace")


def pieces_to_text(ids):
    """As SentencePiece: special ids have no text, and the first space of a text is left out."""
    return "".join(WORDS[i] for i in ids if i != SPECIAL).replace("▁", " ").removeprefix(" ")


def stream(chunks, detokenize):
    output = OutputText(detokenize)
    shown = []
    for chunk, finished in [*((chunk, False) for chunk in chunks), ([], True)]:
        output.decode(list(chunk), finished)
        shown.append(output.decoded)
    return shown


def test_a_character_waits_for_its_last_byte_and_a_space_for_its_word():
    house = "🏠".encode()
    euro = "€".encode()
    chunks = [b"a", house[:1], house[1:3], house[3:] + euro[:2], euro[2:], b"z"]
    assert stream(chunks, bytes_to_text) == ["a", "a", "a", "a🏠", "a🏠€", "a🏠€z", "a🏠€z"]
    assert stream([b"a", b"\xff", b"b"], bytes_to_text) == ["a", "a", "a\ufffdb", "a\ufffdb"]
    # The end: nothing follows
    assert stream([b"a", b"\xe2\x82"], bytes_to_text) == ["a", "a", "a\ufffd"]
    assert stream([[1], [SPECIAL], [SPECIAL], [1], [2]], pieces_to_text) == [
        "a",
        "a",
        "a",
        "a a",
        "a ab",
        "a ab",
    ]


@given(st.lists(st.lists(st.integers(SPECIAL, len(WORDS) - 1))))
def test_word_streams_add_up(chunks):
    shown = stream(chunks, pieces_to_text)
    assert shown[-1] == pieces_to_text([token for chunk in chunks for token in chunk])
    assert all(after.startswith(before) for before, after in pairwise(shown))


BYTES = [*"é€🏠".encode(), 0xFF, *b"a "]


@pytest.fixture(scope="module")
def byte_fallback():
    """As of Llama 2 and Gemma: if one byte of a run of byte tokens is wrong, the whole run becomes
    U+FFFD.
    """
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
    chunks = [
        content[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(content)], strict=True)
    ]
    for detokenize in (byte_fallback, bytes_to_text):
        *shown, whole = stream(chunks, detokenize)
        assert whole == stream([content], detokenize)[-1]
        assert all(after.startswith(before) for before, after in pairwise([*shown, whole]))
        assert detokenize is byte_fallback or not any(part.endswith("\ufffd") for part in shown)
    assert whole == bytes_to_text(content)


# --- where an output ends
# ---------------------------------------------------------------------------------------

EOS = 0
OTHER_EOS = 1


def letters(ids):
    """Ids 2..27 are the letters a..z, 28 is 'ab', 29 has no text, EOS ids are special and have none
    either.
    """
    return "".join({28: "ab", 29: ""}.get(i, chr(ord("a") + i - 2)) for i in ids if i > 1)


def ids_of(text: str) -> list[int]:
    return [ord(letter) - ord("a") + 2 for letter in text]


def scan(ids, stop=(), eos=(EOS, OTHER_EOS), max_new_tokens=500, context_room=500, chunk=1):
    """Tokens kept and the reason, feeding `chunk` tokens at once, as a round of accepted drafts
    would.
    """
    scanner = StopScanner(frozenset(eos), stop, max_new_tokens, context_room, letters)
    kept: list[int] = []
    for start in range(0, len(ids), chunk):
        count, reason = scanner.cut(ids[start : start + chunk])
        kept += ids[start : start + count]
        if reason is not None:
            return kept, reason
    return kept, None


CASES = {
    "nothing ends it": (ids_of("xyzxyz"), {}, (6, None)),
    "the earliest EOS id, not the first listed": ([5, OTHER_EOS, 5, EOS], {}, (2, "eos")),
    "a stop string split over tokens": (ids_of("xyabcz"), {"stop": ["abc"]}, (5, "stop")),
    "a stop string that begins inside a token": ([5, 28, 4, 5], {"stop": ["bc"]}, (3, "stop")),
    "a stop string that ends inside a token": (
        [*ids_of("x"), 28, 5],
        {"stop": ["xa"]},
        (2, "stop"),
    ),
    "a stop string before an EOS": ([*ids_of("xab"), EOS], {"stop": ["ab"]}, (3, "stop")),
    "an EOS before a stop string": ([5, EOS, *ids_of("ab")], {"stop": ["ab"]}, (2, "eos")),
    "the stop string complete first, not the first listed": (
        ids_of("xyab"),
        {"stop": ["ab", "xy"]},
        (2, "stop"),
    ),
    "tokens without text inside a stop string": (
        [*ids_of("a"), *[29] * 60, *ids_of("bx")],
        {"stop": ["ab"]},
        (62, "stop"),
    ),
    "the token count": (ids_of("xyz"), {"max_new_tokens": 2}, (2, "length")),
    "the context": (ids_of("xyz"), {"context_room": 2}, (2, "context")),
    "the token count at the context's end": (
        ids_of("xyz"),
        {"context_room": 2, "max_new_tokens": 2},
        (2, "length"),
    ),
    "an EOS as the last token allowed": ([5, EOS], {"max_new_tokens": 2}, (2, "eos")),
    "a stop string far into a long output": (
        ids_of("xyz" * 30 + "abc"),
        {"stop": ["zabc"]},
        (93, "stop"),
    ),
    "a stop string over the place where the window moves": (
        ids_of("xyz" * 113 + "q"),
        {"stop": ["xyz" * 20 + "q"]},
        (340, "stop"),
    ),
}


@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("case", CASES)
def test_the_earliest_token_that_ends_the_output_decides(case, chunk):
    ids, settings, (count, reason) = CASES[case]
    assert scan(ids, chunk=chunk, **settings) == (ids[:count], reason)


def test_a_long_output_is_not_decoded_again_and_again():
    longest = 0

    def watched(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return letters(ids)

    scanner = StopScanner(frozenset(), ("zz",), 10_000, 10_000, watched)
    assert scanner.cut(ids_of("xy" * 1000)) == (2000, None)
    assert longest < 100
    assert scanner.cut(ids_of("zz")) == (2, "stop")


def characters(ids):
    return "".join(map(chr, ids))


@pytest.mark.parametrize(
    "text, finished, shown",
    [
        ("call mom", False, "call mom"),
        ("call mom\n\nand", False, "call mom"),
        ("call mom\n\nand", True, "call mom"),
        ("call mom\n", False, "call mom"),  # may become the stop string
        ("call mom\n", True, "call mom\n"),
        ("call EN", False, "call "),
        ("EN\n\nEND", False, "EN"),  # the first in the text, not the first listed
        ("", False, ""),
    ],
)
def test_no_part_of_a_stop_string_is_shown(text, finished, shown):
    assert OutputText(characters, stop=("END", "\n\n")).add(list(map(ord, text)), finished) == shown
