import json

import pytest

from layerskip_core.config import DataConfig
from layerskip_core.data import load_examples
from layerskip_core.training.vocabulary import train_tokenizer


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


def test_it_is_deterministic(examples, tokenizer):
    assert train_tokenizer(examples, 300).get_vocab() == tokenizer.get_vocab()


def test_few_examples_give_fewer_entries(examples):
    assert 259 < len(train_tokenizer(examples[:1], 2000)) < 500
