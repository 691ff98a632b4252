"""Streaming: what is shown is always a beginning of the whole text, cut at a character."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from layerskip_core.checkpoint.open import for_decoding
from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import dialogue
from layerskip_core.decoding.dialogue import TextStream
from layerskip_core.decoding.output import OutputText, step_counts
from layerskip_core.decoding.row import RowStep
from layerskip_core.language_model import LanguageModel

EOS = 256


def bytes_to_text(ids):
    return bytes(ids).decode(errors="replace")


class Scripted:
    """A decoding that verifies the given bytes, a chunk a step. All but the last of a chunk are
    accepted drafts.
    """

    def __init__(self, chunks, reason, stop):
        self._chunks = chunks
        self._reason = reason
        self.rows = [
            SimpleNamespace(text=OutputText(bytes_to_text, frozenset({EOS}), stop), error=None)
        ]
        self.finish_reason = None

    def __iter__(self):
        for number, chunk in enumerate(self._chunks, start=1):
            self.finish_reason = self._reason if number == len(self._chunks) else None
            accepted = len(chunk) - 1
            yield [
                RowStep(
                    0, list(chunk), self.finish_reason, step_counts(accepted, accepted, len(chunk))
                )
            ]


def scripted(monkeypatch, chunks, reason, stop):
    monkeypatch.setattr(dialogue, "decode", lambda *_, **__: Scripted(chunks, reason, stop))
    loaded = SimpleNamespace(
        backend=None, ends_of=lambda _: frozenset({EOS}), detokenize=bytes_to_text
    )
    return TextStream(loaded, [1], DecodingConfig("autoregressive", stop=stop))


@pytest.mark.parametrize(
    "chunks, reason, stop, runs",
    [
        (
            [b"ab", b"c", [*b"de", EOS]],
            "eos",
            (),
            [[("a", True), ("b", False)], [("c", False)], [("de", True)]],
        ),
        ([b"ab", [EOS]], "eos", (), [[("a", True), ("b", False)], []]),
        ([b"a\xc3", b"\xa9bc"], "length", (), [[("a", True)], [("\xe9b", True), ("c", False)]]),
        # The target's token completes it
        ([b"xa\xc3", b"\xa9"], "length", (), [[("xa", True)], [("\xe9", False)]]),
        ([b"x\xc3"], "length", (), [[("x", True), ("\ufffd", False)]]),
        ([b"a", b"\xc3", b"\xa9"], "length", (), [[("a", False)], [], [("\xe9", False)]]),
        (
            [b"one\n", b"x", b"\n"],
            "length",
            ("\n\n",),
            [[("one", True)], [("\nx", False)], [("\n", False)]],
        ),
        (
            [b"one\n", b"x\n", b"\n"],
            "stop",
            ("\n\n",),
            [[("one", True)], [("\n", False), ("x", True)], []],
        ),
        (
            [b"on\n", b"xyz"],
            "length",
            ("\nxa",),
            [[("on", True)], [("\n", False), ("xy", True), ("z", False)]],
        ),
        ([b"a#b", b";c"], "stop", (";", "#"), [[("a", True)], []]),
    ],
)
def test_pieces_of_an_answer_and_what_of_them_was_drafted(monkeypatch, chunks, reason, stop, runs):
    answer = scripted(monkeypatch, chunks, reason, stop)
    assert [[tuple(run) for run in step] for step in answer.segments()] == runs
    pieces = ["".join(run for run, _ in step) for step in runs]
    assert (answer.text, answer.finish_reason) == ("".join(pieces), reason)
    # No empty one
    assert list(scripted(monkeypatch, chunks, reason, stop)) == [piece for piece in pieces if piece]


def test_a_stop_string_that_is_a_special_token_stops_as_a_token():
    loaded = for_decoding("embedded")
    (end,) = loaded.eos_ids
    name = loaded.tokenizer.convert_ids_to_tokens(end)
    ended = TextStream(loaded, "wake me up at 7", DecodingConfig("autoregressive")).finish()
    assert ended.finish_reason == "eos"
    for strategy, exit_layer in (("autoregressive", None), ("self-speculative", 8)):
        config = DecodingConfig(strategy, exit_layer, stop=("never", name))
        answer = TextStream(
            replace(loaded, eos_ids=frozenset()), "wake me up at 7", config
        ).finish()
        assert (answer.text, answer.finish_reason) == (ended.text, "eos")
    model = LanguageModel(replace(loaded, eos_ids=frozenset()), PackingConfig())
    (answer,) = model.generate_batch(
        ["wake me up at 7"], strategy="self-speculative", exit_layer=8, stop=("never", name)
    )
    assert answer.text == ended.text
