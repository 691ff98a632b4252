"""Grammars and added tokens: a literal is matched as such a token and as text, and no answer ends
without a match unnoticed.
"""

import json
import re

import pytest
import torch
from added_tokens import ADDED, few_letters, styled_tokenizer

from layerskip_core.config.model import PackingConfig
from layerskip_core.errors import LayerSkipError
from layerskip_core.language_model import LanguageModel
from layerskip_core.serving import Dispatcher, Request

pytest.importorskip("llguidance", reason="needs the extra grammar")
grammar = pytest.importorskip("layerskip_core.grammar")


def guide_of(tokenizer, kind, text):
    return grammar.guide(
        (kind, text), tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id})
    ).matcher()


def random_answer(tokenizer, matcher, seed):
    """Random permitted tokens, up to the EOS."""
    generator = torch.Generator().manual_seed(seed)
    output = []
    while tokenizer.eos_token_id not in output:
        scores = torch.rand(len(tokenizer), generator=generator)
        scores[torch.from_numpy(matcher.forbidden(output, ())[: len(scores)])] = -1
        output.append(int(scores.argmax()))
    return output


def spelled(tokenizer, text):
    """The ids of a text without added tokens: character by character."""
    return [
        token
        for each in text
        for token in tokenizer(each, add_special_tokens=False)["input_ids"][-1:]
    ]


LITERALS = [(style, text) for style, tokens in ADDED.items() for text in tokens]


@pytest.mark.parametrize("style, literal", LITERALS)
@pytest.mark.parametrize("kind", ["grammar", "regex", "choice", "schema"])
def test_an_answer_matches_a_literal_that_is_an_added_token(style, literal, kind):
    tokenizer = styled_tokenizer(style)
    quoted = json.dumps(literal)
    escaped = re.escape(literal)
    regex = f"{escaped}\\n[a-z]{{3,9}}\\n{escaped}"
    asked = {
        "grammar": f'start: {quoted} "\\n" /[a-z]{{3,9}}/ "\\n" {quoted}',
        "regex": regex,
        "choice": json.dumps([f"{literal}\nabc\n{literal}", f"{literal}\nabcd\n{literal}"]),
        "schema": json.dumps({"const": f"{literal} abc {literal}"}),
    }[kind]
    regex = re.escape(json.dumps(f"{literal} abc {literal}")) if kind == "schema" else regex
    matcher = guide_of(tokenizer, kind, asked)
    token = tokenizer.convert_tokens_to_ids(literal)
    for seed in range(5):
        *output, end = random_answer(tokenizer, matcher, seed)
        assert re.fullmatch(regex, tokenizer.decode(output, skip_special_tokens=True))
        assert matcher.mismatch([*output, end]) is None
        # Forced text has the token, as the model was trained to write it, unless such tokens have
        # no text.
        assert (token in output) == (not ADDED[style][literal])


@pytest.mark.parametrize("style, literal", LITERALS)
def test_a_literal_is_matched_as_token_and_as_text(style, literal):
    tokenizer = styled_tokenizer(style)
    matcher = guide_of(tokenizer, "grammar", f"start: {json.dumps(literal)} /x/")
    token = tokenizer.convert_tokens_to_ids(literal)
    end = tokenizer.eos_token_id
    as_text = [*spelled(tokenizer, literal), *spelled(tokenizer, "x"), end]
    assert matcher.permitted([], as_text) == len(as_text)
    as_token = [token, *spelled(tokenizer, "x"), end]
    assert matcher.permitted([], as_token) == (0 if ADDED[style][literal] else len(as_token))


@pytest.mark.parametrize("style, literal", [pair for pair in LITERALS if pair[1].startswith("<")])
def test_a_name_in_angle_brackets_is_the_token_alone(style, literal):
    """llguidance's syntax for special tokens; strings, regular expressions and comments stay as
    they are.
    """
    tokenizer = styled_tokenizer(style)
    token = tokenizer.convert_tokens_to_ids(literal)
    end = tokenizer.eos_token_id
    by_name = f'start: {literal} "<x>" /<[ab]>/ %json {{"const": "{literal}"}} // {literal} "'
    for lark in (by_name, by_name.replace(f"start: {literal}", f"start: <[{token}]>")):
        matcher = guide_of(tokenizer, "grammar", lark)
        rest = [*spelled(tokenizer, f'<x><a>"{literal}"'), end]
        assert matcher.permitted([], [token, *rest]) == 1 + len(rest)
        assert matcher.permitted([], [*spelled(tokenizer, literal), *rest]) == 0


@pytest.mark.parametrize("style", ADDED)
def test_text_that_no_grammar_names_has_no_special_tokens(style):
    tokenizer = styled_tokenizer(style)
    matcher = guide_of(tokenizer, "regex", "(?s:.){3,40}")
    for seed in range(5):
        *output, end = random_answer(tokenizer, matcher, seed)
        assert end == tokenizer.eos_token_id
        assert not [
            token
            for token in output
            if ADDED[style].get(tokenizer.convert_ids_to_tokens(token), False)
        ]


UNREACHABLE = [  # no token can follow after so many tokens
    ({"regex": "ab(e|f)"}, 2),
    ({"choice": ["abcde"]}, 4),
    ({"grammar": 'start: "d" /[e-z]/'}, 1),
    ({"schema": {"type": "integer"}}, 0),
]
DRAFTING = [
    {"strategy": "autoregressive"},
    {"strategy": "self-speculative", "exit_layer": 3, "num_draft_tokens": 4},
]


@pytest.mark.parametrize("guided, tokens", UNREACHABLE)
@pytest.mark.parametrize("drafting", [*DRAFTING, {"strategy": "lookup"}])
def test_an_answer_that_no_token_can_continue_is_an_error(guided, tokens, drafting):
    model, [kind] = LanguageModel(few_letters(), PackingConfig()), guided
    counted = "1 token" if tokens == 1 else f"{tokens} tokens"
    expected = f"the answer ended after {counted} without matching `{kind}`: it permits no token of the model there"
    stream = model.stream("abcd", **guided, **drafting, max_new_tokens=12)
    with pytest.raises(LayerSkipError) as failed:
        list(stream)
    assert str(failed.value) == expected
    assert stream.finish_reason == "error" and len(stream.text) == tokens
    with pytest.raises(LayerSkipError):
        list(model.stream("abcd", **guided, **drafting, max_new_tokens=12).segments())
    # Of a batch only its own answer fails.
    options = [guided, {"regex": "[a-d]{3}"}, {}]
    scheduler = Dispatcher(model.decoder, 3)
    updates = [[], [], []]
    for received, own in zip(updates, options, strict=True):
        config = model.decoder.resolve({**own, **drafting, "max_new_tokens": 12})
        scheduler.add(Request([0, 1, 2, 3], config, received.append))
    while scheduler.held:
        scheduler.step()
    wrong, right, free = (received[-1] for received in updates)
    assert str(wrong.error) == expected
    assert (right.error, right.finish_reason) == (None, "eos")
    assert free.error is None and free.finish_reason in ("eos", "length")
    answers = model.generate_batch(["abcd", "dcba"], **guided, **drafting, max_new_tokens=12)
    assert [(answer.finish_reason, len(answer.text)) for answer in answers] == [
        ("error", tokens)
    ] * 2


@pytest.mark.parametrize("drafting", DRAFTING)
def test_a_draft_that_no_token_can_continue_is_left_again(drafting):
    """The grammar permits `a`, after which nothing fits: a rejected draft `a` must not spoil the
    answer.
    """
    decoder = few_letters()
    matcher = decoder.resolve({"regex": "ae|b{2,5}c"}).guide.matcher()
    assert matcher.permitted([], [0]) == 1
    assert matcher.forbidden([], [0])[:5].tolist() == [True] * 4 + [False]  # nothing but the EOS
    assert matcher.forbidden([], [])[:5].tolist() == [False, False, True, True, True]
    assert matcher.permitted([1], [1, 2, 4]) == 3
    assert matcher.mismatch([1, 1, 2, 4]) is None
    assert matcher.mismatch([1, 1, 2]) is None  # cut
    assert "after 1 token " in matcher.mismatch([0, 4])
    assert "after 2 tokens without matching `regex`" in matcher.mismatch([1, 1, 4])
    biased = {"regex": "ae|b{2,5}c", "logit_bias": {0: -100}, "max_new_tokens": 12}
    answer = LanguageModel(decoder, PackingConfig()).generate("abcd", **biased, **drafting)
    assert re.fullmatch("b{2,5}c", answer.text) and answer.finish_reason == "eos"
