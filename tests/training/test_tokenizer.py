import json

import pytest

from layerskip_core.config.model import DataConfig
from layerskip_core.data import Example, load_examples
from layerskip_core.prompting import PromptTemplate
from layerskip_core.training import data as vocabulary
from layerskip_core.training.data import encode_rows, encode_stream, token_order
from layerskip_core.training.encoding import Encoder, train_tokenizer


@pytest.fixture(scope="module")
def examples():
    return load_examples(DataConfig(limit=300))


@pytest.fixture(scope="module")
def tokenizer(examples):
    return train_tokenizer(examples, 300)


def test_it_has_the_size_asked_for_and_the_special_tokens_first(tokenizer):
    assert len(tokenizer) == 300
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|pad|>", "<|bos|>", "<|eos|>"]


def test_text_comes_back_unchanged(tokenizer, examples):
    texts = [examples[0].completion, "  two  spaces\n\ttab", "naïve café 東京 🙂", "[IN:X a ] 's"]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert not {0, 1, 2} & set(ids)  # no special token is added


def test_merges_come_from_the_examples(tokenizer, examples):
    """ "[IN:" opens every parse, so it is among the first merges; "zq" never occurs."""
    assert len(tokenizer("[IN:")["input_ids"]) < 4
    assert len(tokenizer("zq")["input_ids"]) == 2
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    assert len(data["model"]["merges"]) == 300 - 256 - 3


def test_few_examples_give_fewer_entries(examples):
    assert 259 < len(train_tokenizer(examples[:1], 2000)) < 500


@pytest.mark.parametrize("size", [260, 2**62])
@pytest.mark.parametrize("text", ["\0", "<|eos|>", "a" * 300_000])
def test_any_text_and_any_size(size, text):
    """The trainer makes room for all entries at once, and takes a minute for a word of so many letters."""
    assert 259 <= len(train_tokenizer([Example("", text)], size)) < 300


def test_tokens_in_the_order_of_their_frequency(tokenizer, tmp_path, monkeypatch):
    """Of targets alone: the q's of the prompt do not count. `ab` may be one token, so letters stand apart."""
    encoder = Encoder(tokenizer, PromptTemplate("{prompt}"), 64)
    z, y, end = (tokenizer.convert_tokens_to_ids(name) for name in ("z", "y", "<|eos|>"))
    rows = [Example("qqqqqqqq", "zzz"), Example("qqqqqqqq", "zy")]  # z four times, the end twice, y once
    order = token_order(encode_rows(rows, encoder), 300)
    assert order[:3] == [z, end, y]
    assert order[3:] == [token for token in range(300) if token not in (z, end, y)]
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "q", "completion": "zzz"}\n{"prompt": "q", "completion": "zy"}\n')
    assert token_order(encode_stream(DataConfig(str(file)), encoder, 0), 300) == order
    monkeypatch.setattr(vocabulary, "_COUNTED_TOKENS", 1)
    assert token_order(encode_stream(DataConfig(str(file)), encoder, 0), 300)[0] == z  # of one row alone
    monkeypatch.setattr(vocabulary, "_COUNTED", 2)
    spread = [Example("q", "z"), Example("q", "y"), Example("q", "zz"), Example("q", "y")]  # of these the first and the third
    assert token_order(encode_rows(spread, encoder), 300)[:2] == [z, end]
