"""Constrained decoding: every answer matches its grammar, and drafts change nothing."""

import json
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from added_tokens import few_letters
from conftest import run_texts, tiny_model
from decodings import WIDE, native_or_skip
from evaluating import tiny_loaded
from test_loop import NEW, VOCABULARY, TableModel, random_table

from layerskip_core.config.decoding import DecodingConfig
from layerskip_core.config.model import PackingConfig
from layerskip_core.decoding import DecodingLoop, decode
from layerskip_core.decoding.drafters.lookup_drafter import LookupDrafter
from layerskip_core.decoding.target import FixedTarget
from layerskip_core.errors import ConfigError
from layerskip_core.language_model import LanguageModel

llguidance = pytest.importorskip("llguidance", reason="needs the extra grammar")
grammar = pytest.importorskip("layerskip_core.grammar")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 3},
        "kind": {"enum": ["alarm", "reminder"]},
        "hour": {"type": "integer", "minimum": 0, "maximum": 24},
        "at": {"type": "array", "items": {"enum": ["am", "pm"]}, "maxItems": 1},
    },
    "required": ["name", "kind", "hour", "at"],
    "additionalProperties": False,
}
GUIDES = {
    "schema": SCHEMA,
    "regex": r"(wake|call) me at [0-9]{1,2}(am|pm)",
    "choice": ["set an alarm", "set a reminder", "play"],
    "grammar": 'start: "wake me" (" at " /[0-9]/){1,2}',
}
DRAFTING = {
    "self-speculative": {"exit_layer": 3, "num_draft_tokens": 4},
    "adaptive": {"exits": (2, 5), "num_draft_tokens": 8},
    "lookup": {"num_draft_tokens": 8},
    "draft-and-verify": {"skip": (5,), "num_draft_tokens": 3},
}


def matches(kind, text):
    if kind == "schema":
        answer = json.loads(text)
        assert list(answer) == list(SCHEMA["properties"]) and len(answer["name"]) <= 3
        assert (
            answer["kind"] in ("alarm", "reminder")
            and 0 <= answer["hour"] <= 24
            and len(answer["at"]) <= 1
        )
        return set(answer["at"]) <= {"am", "pm"}
    return (
        text in GUIDES[kind]
        if kind == "choice"
        else bool(re.fullmatch(GUIDES.get(kind, ""), text)) or kind == "grammar"
    )


@cache
def model_of(kind):
    """The tiny model with its tokenizer; on native kernels an int8 copy drafts too, by few of the
    tokens.
    """
    decoder = tiny_loaded()
    if kind == "native":
        model = tiny_model("llama", torch.float32, vocab_size=300, **WIDE)
        backend = native_or_skip(model, PackingConfig(draft_weights=("int8",), draft_vocab=250))
        decoder = replace(decoder, backend=backend)
    return decoder


def reference(decoder, ids, asked, limit):
    """Greedy, one token after the other, with a matcher of its own."""
    tokenizer = llguidance.LLTokenizer(
        decoder.tokenizer.backend_tokenizer.to_str(), n_vocab=300, eos_token=sorted(decoder.eos_ids)
    )
    matcher = llguidance.LLMatcher(tokenizer, asked, log_level=0)
    assert not matcher.get_error()
    output = []
    backend = decoder.backend
    while len(output) < limit and not decoder.eos_ids.intersection(output):
        text = ids + output
        hidden = run_texts(backend, backend.embed(torch.tensor([text])), 0, backend.num_layers)
        scores = backend.unembed(hidden)[0, -1].detach().double()
        bits = torch.tensor(list(matcher.compute_bitmask()))
        permitted = ((bits[:, None] >> torch.arange(8)) & 1).flatten()[:300]
        output.append(int(scores.masked_fill(permitted == 0, -torch.inf).argmax()))
        matcher.consume_token(output[-1])
    return output


@pytest.mark.parametrize(
    "kernels, kind", [("generic", "schema"), *(("native", kind) for kind in GUIDES)]
)
def test_greedy_drafts_change_nothing_and_no_forbidden_one_is_verified(kernels, kind, monkeypatch):
    decoder = model_of(kernels)
    asked = GUIDES[kind]
    ids = decoder.encode_prompt("wake me at 7")
    options = {kind: asked, "max_new_tokens": 70}
    plain = decoder.resolve({"strategy": "autoregressive", **options})
    if kind == "schema":
        overrides = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        own = llguidance.LLMatcher.grammar_from_json_schema(SCHEMA, overrides=overrides)
    elif kind == "regex":
        own = llguidance.LLMatcher.grammar_from_regex(asked)
    else:
        own = asked if kind == "grammar" else "start: " + " | ".join(f'"{text}"' for text in asked)
    expected = reference(decoder, ids, own, 70)
    verified = []
    honest = FixedTarget.run_drafts

    def watched(self, tokens, *inputs):
        verified.append(tokens[1:].tolist())
        return honest(self, tokens, *inputs)

    monkeypatch.setattr(FixedTarget, "run_drafts", watched)
    for strategy, drafting in {"autoregressive": {}, **DRAFTING}.items():
        verified.clear()
        decoding = decode(
            decoder.backend,
            ids,
            replace(plain, strategy=strategy, **drafting),
            decoder.eos_ids,
            decoder.detokenize,
        )
        found = []
        matcher = plain.guide.matcher()
        for [step] in decoding:
            if found:
                drafts = verified[-1]
                assert matcher.permitted(found, drafts) == len(drafts), strategy
            found += step.ids
        assert found == expected, strategy
        if strategy != "autoregressive":
            steps = decoding.stats.steps_by_drafter
            assert decoding.stats.accepted > 0 and (strategy == "adaptive" or steps["grammar"] > 0)
    assert decoding.finish_reason == "eos" and matches(kind, decoder.detokenize(found[:-1]))


def test_answers_of_a_batch_have_their_own_grammars_and_validate():
    model = LanguageModel(model_of("native"), PackingConfig())
    for temperature in (0.0, 1.5):
        for kind, asked in GUIDES.items():
            options = {kind: asked, "temperature": temperature, "seed": 3, "max_new_tokens": 80}
            answers = model.generate_batch(
                ["wake me at 7", "play some jazz", "remind me"], **options
            )
            assert [answer.finish_reason for answer in answers] == ["eos"] * 3
            assert all(matches(kind, answer.text) for answer in answers)
            if not temperature:
                assert (
                    answers[1].ids
                    == model.generate("play some jazz", strategy="autoregressive", **options).ids
                )
    cut = model.generate("wake me at 7", schema=SCHEMA, max_new_tokens=9)
    assert cut.finish_reason == "length" and cut.stats.new_tokens == 9


def test_drafts_change_no_sample_of_what_the_grammar_permits():
    """With tokens that the grammar forbids among the drafts of an exit."""
    named = few_letters().tokenizer
    guide = grammar.guide(("regex", "((ab|ba|c|aa)d?){9}"), named, VOCABULARY, frozenset({4}))
    table = random_table(2)
    plain = DecodingConfig(
        "autoregressive", max_new_tokens=NEW, temperature=1.0, guided=("regex", ""), guide=guide
    )
    drafting = replace(plain, strategy="self-speculative", exit_layer=1, num_draft_tokens=3)
    outputs = []
    for config in (plain, drafting, replace(drafting, strategy="lookup")):
        loop = DecodingLoop(TableModel(table), [[3]] * 200, config, seeds=range(200))
        list(loop)
        outputs.append([row.output for row in loop.rows])
        if config is drafting:
            assert loop.stats.steps_by_drafter["grammar"] > 0
    assert outputs[0] == outputs[1] == outputs[2] and len({*map(tuple, outputs[0])}) > 20
    assert all(guide.matcher().permitted([], ids) == len(ids) for ids in outputs[0])


@pytest.mark.parametrize(
    "options, field, message",
    [
        ({"schema": {"type": "strange"}}, "schema", "cannot be compiled: "),
        ({"regex": "(a"}, "regex", "cannot be compiled: "),
        ({"grammar": 'start: "a" ('}, "grammar", "cannot be compiled: "),
        ({"regex": "a", "choice": ["b"]}, "choice", "left out with `regex`"),
        ({"regex": "a", "min_tokens": 3}, "min_tokens", "left out with `regex`"),
        ({"schema": {}, "ignore_eos": True}, "ignore_eos", "left out with `schema`"),
    ],
)
def test_wrong_grammars(options, field, message):
    with pytest.raises(ConfigError, match=message) as caught:
        tiny_loaded().resolve(options)
    assert caught.value.field == field


@pytest.mark.parametrize("options", [{"strategy": "lookup"}, {"strategy": "adaptive", "exits": ()}])
def test_lookups_draft_as_far_as_the_grammar_permits(options, monkeypatch):
    """Greedy output repeats itself until the grammar ends the repetition."""
    decoder = model_of("generic")
    ids = decoder.encode_prompt("wake me at 7")
    plain = decoder.resolve(
        {"strategy": "autoregressive", "regex": "[ab]{25}c[ab]{4}", "max_new_tokens": 40}
    )
    expected = [
        token
        for [step] in decode(decoder.backend, ids, plain, decoder.eos_ids)
        for token in step.ids
    ]
    looked_up = []
    honest = LookupDrafter.draft

    def watched(self, given, limits):
        draft = honest(self, given, limits)
        if draft.source == "lookup":
            looked_up.append(draft.tokens[1:].tolist())
        return draft

    monkeypatch.setattr(LookupDrafter, "draft", watched)
    found = []
    matcher = plain.guide.matcher()
    decoding = decode(
        decoder.backend, ids, replace(plain, num_draft_tokens=16, **options), decoder.eos_ids
    )
    for [step] in decoding:
        drafts = looked_up.pop() if looked_up else []
        assert matcher.permitted(found, drafts) == len(drafts)
        found += step.ids
    assert found == expected and decoding.finish_reason == "eos"
    assert decoding.stats.steps_by_drafter["lookup"] > 0 and decoding.stats.accepted > 5
    with pytest.raises(
        ConfigError, match="`regex` must be used with a model that has an EOS token"
    ):
        replace(tiny_loaded(), eos_ids=frozenset()).resolve({"regex": "a"})
