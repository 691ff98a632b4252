import itertools
import random
import re
from collections import Counter

import pytest

from layerskip_core.data.examples import Example
from layerskip_core.embedded import commands
from layerskip_core.training.encoding import train_tokenizer

# Slots that the grammar fills from closed lists, which all splits share.
CLOSED_SLOTS = {
    *("AMOUNT", "ATTRIBUTE_EVENT", "CATEGORY_LOCATION", "CONTACT_RELATED", "METHOD_SHARE", "METHOD_TIMER", "METHOD_TRAVEL"),
    *("MUSIC_PROVIDER_NAME", "MUSIC_TYPE", "NAME_APP", "ORDINAL", "PERSON_REMINDED", "ROAD_CONDITION", "TAG_MESSAGE"),
    *("TYPE_CONTENT", "TYPE_REACTION", "TYPE_RSVP", "UNIT_DISTANCE", "WEATHER_ATTRIBUTE", "WEATHER_TEMPERATURE_UNIT"),
}
# Calendar words stand in closed lists besides being values of open rules.
CLOSED_CALENDAR = re.compile(
    r"(an )?(hour|dai|week|night|month|year)ly|((every|each) )?(mon|tues|wednes|thurs|fri|satur|sun)days?"
)


def labels_of(rows):
    return {label for row in rows for label in re.findall(r"\[((?:IN|SL):[A-Z_]+)", row.parse)}


def leaf_slots(row):
    """(label, words) of every slot that holds words only."""
    return set(re.findall(r"\[SL:([A-Z_]+) ([^\[\]]*) \]", row.parse))


def chains(row):
    """Label paths from the root to every intent: (IN:A,), (IN:A, SL:B, IN:C), ..."""
    path, intents = [], set()
    for token in row.parse.split():
        if token.startswith("["):
            path.append(token[1:])
            if token.startswith("[IN:"):
                intents.add(tuple(path))
        elif token == "]":
            path.pop()
    assert not path
    return intents


def novelties(row):
    """The chains of a row, and which of them occur together."""
    paths = chains(row)
    return paths | {frozenset(pair) for pair in itertools.combinations(paths, 2)}


class Recording(commands.Grammar):
    """Notes the values of open rules, and the skeleton of each row."""

    def __init__(self, split, count):
        vars(self).update(vars(commands.load_grammar()))
        self.values, self.skeletons = set(), set()
        for index in range(count):
            self.row(split, random.Random(f"recorded:{split}:{index}"))
            self.skeletons.add(self.filled)

    def _open(self, *arguments):
        value = super()._open(*arguments)
        self.values.add(value)
        return value

    def _filled(self, tokens, *rest):
        text = super()._filled(tokens, *rest)
        self.filled = " ".join(tokens)  # at last those of the whole row
        return text


@pytest.fixture(scope="module")
def recorded():
    return Recording("train", 4000)


@pytest.fixture(scope="module")
def drawn():
    grammar = commands.load_grammar()
    return [grammar.row("train", random.Random(f"0:train:{index}")) for index in range(20_000)]


@pytest.fixture(scope="module")
def train(drawn):
    return list({row.utterance: row for row in drawn}.values())


@pytest.fixture(scope="module")
def listed():
    """Every word and reference that the grammar writes out."""
    alternatives = [alternative for rule in commands.load_grammar().rules.values() for alternative in rule.alternatives]
    return {piece for alternative in alternatives for piece in alternative.pieces}


def test_the_grammar_has_every_rule_that_it_names(listed):
    assert {piece[1:-1] for piece in listed if piece.startswith("{")} <= commands.load_grammar().rules.keys()


def test_a_malformed_grammar_is_refused_with_its_line():
    with pytest.raises(ValueError, match=r"d\.txt:3: "):
        commands.Grammar({"d": "== a\nword\n== a"})
    with pytest.raises(ValueError, match=r"d\.txt:1: "):
        commands.Grammar({"d": "word"})


def test_rows_are_a_function_of_split_and_seed():
    first = list(commands.rows("train", 50, seed=3))
    assert first == list(commands.rows("train", 50, seed=3))
    assert first[:20] == list(commands.rows("train", 20, seed=3))
    assert not {row.utterance for row in first} & {row.utterance for row in commands.rows("train", 50, seed=4)}


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be one of"):
        next(commands.rows("dev", 1))


def test_utterance_is_the_parse_without_brackets_and_brackets_balance(train):
    for row in train[:3000]:
        assert row.utterance == " ".join(re.sub(r"\[(IN|SL):[A-Z_]+|\]", " ", row.parse).split())
        assert re.fullmatch(r"(\[(IN|SL):[A-Z_]+|\]|[^\[\]\sA-Z]+)( (\[(IN|SL):[A-Z_]+|\]|[^\[\]\sA-Z]+))*", row.parse)
        assert chains(row)  # and the brackets close


def test_there_are_enough_domains_and_labels(train):
    domains = Counter(row.domain for row in train)
    assert set(domains) == {"alarms", "events", "messages", "music", "navigation", "reminders", "timers", "weather"}
    assert min(domains.values()) > 20_000 / len(domains) * 0.9
    assert len(labels_of(train)) >= 60


def test_there_are_over_a_hundred_thousand_training_rows(drawn):
    """Of n draws from N equally likely rows, n^2 / 2N repeat: 40 repeats in 20k draws is N = 5M (skew only raises N)."""
    assert len(drawn) - len({row.utterance for row in drawn}) < 40


def test_values_and_skeletons_of_test_rows_never_occur_in_training(recorded):
    for split in ("validation", "test", "compositional"):
        other = Recording(split, 300)
        assert len(other.values) > 300 and len(other.skeletons) > 200
        assert not other.values & recorded.values
        assert split == "compositional" or not other.skeletons & recorded.skeletons


def test_made_up_words_never_stand_in_a_phrasing(recorded, listed):
    """A phrasing with such a word in it would hash otherwise than the phrasing, and could be of the test side without it."""
    assert {word for skeleton in recorded.skeletons for word in skeleton.split()} <= listed


def test_made_up_words_are_in_training_rows_alone(train, listed):
    def made_up(rows):
        return [row for row in rows if set(row.utterance.split()) - listed and not re.search(r"\d", row.utterance)]

    assert 0.15 < len(made_up(train[:2000])) / 2000 < 0.5
    for split in ("validation", "test", "compositional"):
        assert made_up(commands.rows(split, 300)) == []


def test_made_up_values_have_several_words_where_real_ones_have(train, listed):
    """Whoever has met only made-up words that stand alone cuts a city of two, never seen, in half."""
    cities = {value for row in train[:5000] for label, value in leaf_slots(row) if label == "LOCATION"}
    assert any(len(words := city.split()) == 2 and listed.isdisjoint(words) for city in cities)
    relations = {value for row in train for label, value in leaf_slots(row) if label == "TYPE_RELATION"}
    assert any(relation.endswith(" in law") and relation.split()[0] not in listed for relation in relations)


def test_a_few_long_words_of_any_value_are_made_up_too(train, listed):
    """Of dates, whose rules are not `coined`; the short words stay, which tell what kind of value it is."""
    dates = [value.split() for row in train[:5000] for label, value in leaf_slots(row) if label.startswith("DATE_TIME")]
    made_up = [value for value in dates if any(word not in listed and word.isalpha() for word in value)]
    assert 0.005 < len(made_up) / len(dates) < 0.1
    with_short = [value for value in made_up if any(word in listed and len(word) < 4 for word in value)]
    assert len(with_short) > len(made_up) / 4


def test_only_closed_lists_share_slot_values_between_splits(train):
    """The same from the rows' text alone."""
    trained = {value for row in train[:5000] for _, value in leaf_slots(row)}
    tested = set().union(*(leaf_slots(row) for row in commands.rows("test", 1000)))
    shared = {(label, value) for label, value in tested if label not in CLOSED_SLOTS and value in trained}
    assert {value for _, value in shared if not CLOSED_CALENDAR.fullmatch(value)} == set()
    assert len({value for label, value in tested if label not in CLOSED_SLOTS}) > 1000


def test_compositional_rows_nest_as_training_never_does(train):
    """A chain of labels, or two chains in one row, that 20k training rows do not have, made of labels that they have."""
    trained = set().union(*(novelties(row) for row in train))
    rows = list(commands.rows("compositional", 500))
    assert all(novelties(row) - trained for row in rows)
    assert labels_of(rows) <= labels_of(train)
    assert not any(novelties(row) - trained for row in commands.rows("test", 300))


def test_outputs_are_long_enough_to_speculate_on(train):
    tokenizer = train_tokenizer([Example(row.utterance, row.parse) for row in train[:3000]], 1000)
    lengths = [len(ids) for ids in tokenizer([row.parse for row in commands.rows("test", 500)])["input_ids"]]
    assert sum(lengths) / len(lengths) >= 30
