"""`commands`: task-oriented semantic parsing generated from a hand-written grammar, in TOP's
bracket notation.

  utterance   remind me to call mom at 5
  parse       [IN:CREATE_REMINDER remind [SL:PERSON_REMINDED me ] to [SL:TODO call mom ] [SL:DATE_TIME at 5 ] ]

grammar/GRAMMAR.md explains the grammar. Rows are a function of (split, seed). Hashes assign the
text of every expansion of an `open` rule (a slot value: a name, a place, a time) and every skeleton
(the parse without open values) to a split. A test row takes both from the test side, so neither its
values nor its phrasing occur in training. `compositional` also takes values from the test side, and
nestings marked `!`, which no other split uses. `sealed` alone uses sealed.txt, for all phrasings
and most values; for rules without alternatives there it takes the test side.
"""

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import NamedTuple, TypeVar

SPLITS = ("train", "validation", "test", "compositional", "sealed")
_BUCKETS = 10  # of ten hash buckets, 0 is test, 1 is validation, the others are training
_MAX_TRIES = 4000
_COINED = 0.25  # share of made-up expansions of `coined` rules in training
# Share of made-up words elsewhere in values, so that the model copies words it has never seen
_COINED_ANYWHERE = 0.04
_SHORTEST_COINED = 4  # letters; shorter words (at, the, 5) tell what kind of value it is
_PIECE = re.compile(r"\(([^()]*)\)|\{([a-z_]+)\}|(\S+)")

Item = TypeVar("Item")


def _letters(line: str) -> tuple[str, ...]:
    """Parts of a made-up syllable; `-` is an empty one."""
    return tuple(part.replace("-", "") for part in line.split())


_ONSETS = _letters(
    "b c d f g h j k l m n p r s t v w x y z bl br ch cl cr dr fl gl gr ph pl pr qu sh sk sl st th tr wh -"
)
_VOWELS = _letters("a e i o u y ai au ea ee ei ia ie io oa oo ou ue")
_CODAS = _letters("- - - - b ck d g l ll m n nd ng nt ph r rd rt s sh ss st t th x z tz")


class Alternative(NamedTuple):
    """One right-hand side. A piece is a literal token, or the name of a rule in braces."""

    pieces: tuple[str, ...]
    compositional: bool = False


@dataclass
class Rule:
    """`flags`: some of open, root, coined. An inline choice `(a|b|)` is a rule without flags, named
    by its own text.
    """

    domain: str
    flags: frozenset[str] = frozenset()
    alternatives: list[Alternative] = field(default_factory=list)
    sealed: list[Alternative] = field(default_factory=list)

    def choices(self, split: str) -> list[Alternative]:
        """The alternatives that a split draws from."""
        return self.sealed if split == "sealed" and self.sealed else self.alternatives


class CommandRow(NamedTuple):
    domain: str
    utterance: str
    parse: str


class Grammar:
    """The rules of all domains. `files` maps domains to their texts; a last one, `sealed`, adds
    alternatives of that split.
    """

    def __init__(self, files: dict[str, str]) -> None:
        self.rules: dict[str, Rule] = {}
        for domain, text in files.items():
            for line in map(str.strip, text.splitlines()):
                if line.startswith("== "):
                    name, *flags = line[3:].split()
                    rule = self.rules.setdefault(name, Rule(domain, frozenset(flags)))
                elif line and not line.startswith("#"):
                    pieces = self._pieces(line.removeprefix("! "), domain)
                    alternatives = rule.sealed if domain == "sealed" else rule.alternatives
                    alternatives.append(Alternative(pieces, line.startswith("! ")))
        self.roots: dict[str, Rule] = {}  # by domain
        for rule in self.rules.values():
            if "root" in rule.flags:
                root = self.roots.setdefault(rule.domain, Rule(rule.domain))
                root.alternatives += rule.alternatives
                root.sealed += rule.sealed

    def _pieces(self, text: str, domain: str) -> tuple[str, ...]:
        pieces = []
        for choice, reference, literal in _PIECE.findall(text):
            if literal:
                pieces.append(literal)
                continue
            if not reference:
                reference = f"({choice})"
                options = [self._pieces(option, domain) for option in choice.split("|")]
                self.rules[reference] = Rule(domain, alternatives=list(map(Alternative, options)))
            pieces.append(f"{{{reference}}}")
        return tuple(pieces)

    def row(self, split: str, rng: random.Random) -> CommandRow:
        """Draws one row of a split. Raises ValueError if a rule has too few expansions on its
        side.
        """
        domains = sorted(self.roots)
        compositional = split == "compositional"
        for _ in range(_MAX_TRIES):
            domain = _drawn(rng, domains)
            # The draw is among root alternatives, so the weight of an intent is the number of its
            # phrasings.
            choices = self.roots[domain].choices(split)
            if not compositional:
                choices = [each for each in choices if not each.compositional]
            root = _drawn(rng, choices)
            tokens = list(self._closed(root, split, rng))
            # A compositional phrasing decides by itself, another by its hash
            is_of_split = split in ("sealed", _side(" ".join(tokens)))
            if root.compositional if compositional else is_of_split:
                parse = self._filled(tokens, split, rng).split()
                words = [token for token in parse if not token.startswith("[") and token != "]"]
                return CommandRow(domain, " ".join(words), " ".join(parse))
        raise ValueError(f"no row of split {split} in {_MAX_TRIES} tries")

    def _closed(
        self, alternative: Alternative, split: str, rng: random.Random, in_value: bool = False
    ) -> Iterator[str]:
        """Expands all but open rules (`{name}`). Training values may have made-up words; skeletons
        decide the split.
        """
        may_coin = in_value and split == "train"
        labelled = any(piece.startswith("[") for piece in alternative.pieces)
        for piece in alternative.pieces:
            rule = self.rules[piece[1:-1]] if piece.startswith("{") else None
            if rule is None or "open" in rule.flags:
                may_replace = may_coin and not labelled and len(piece) >= _SHORTEST_COINED
                if may_replace and rng.random() < _COINED_ANYWHERE:
                    yield _coined_word(rng)
                else:
                    yield piece
            elif may_coin and "coined" in rule.flags and rng.random() < _COINED:
                yield from self._made_up(rule, split, rng)
            else:
                yield from self._closed(_drawn(rng, rule.choices(split)), split, rng, in_value)

    def _open(self, name: str, split: str, rng: random.Random) -> str:
        """A value of an open rule. Its text, and that of every open value in it, belongs to the
        split or is sealed.
        """
        side = "test" if split in ("compositional", "sealed") else split
        rule = self.rules[name]
        for _ in range(_MAX_TRIES):
            if split == "train" and "coined" in rule.flags and rng.random() < _COINED:
                value = " ".join(self._made_up(rule, split, rng))
            else:
                tokens = list(
                    self._closed(_drawn(rng, rule.choices(split)), split, rng, in_value=True)
                )
                value = self._filled(tokens, split, rng)
                if len(tokens) == 1 and tokens[0].startswith("{"):
                    return value  # of another open rule, checked there
            if _side(value) == side or rule.choices(split) is rule.sealed:
                return value
        raise ValueError(f"rule {name} has no value on the {side} side: give it more alternatives")

    def _filled(self, tokens: list[str], split: str, rng: random.Random) -> str:
        """The text of tokens with values in place of open rules."""
        texts = []
        for token in tokens:
            if token.startswith("{"):
                token = self._open(token[1:-1], split, rng)
            texts.append(token)
        return " ".join(texts)

    def _made_up(self, rule: Rule, split: str, rng: random.Random) -> list[str]:
        """An expansion of a `coined` rule in made-up words; of several words the short ones stay
        (`in law`).
        """
        words = list(self._closed(_drawn(rng, rule.alternatives), split, rng))
        made_up = []
        for word in words:
            if len(words) == 1 or len(word) >= _SHORTEST_COINED:
                word = _coined_word(rng)
            made_up.append(word)
        return made_up


def rows(split: str, count: int, seed: int = 0) -> Iterator[CommandRow]:
    """`count` distinct rows, always the same for a (split, seed). Raises ValueError if the split
    has too few.
    """
    grammar = load_grammar()
    index = 0
    seen: set[str] = set()
    while len(seen) < count:
        row = grammar.row(split, random.Random(f"{seed}:{split}:{index}"))
        index += 1
        if row.utterance not in seen:
            seen.add(row.utterance)
            yield row
        elif index > 20 * count + 1000:
            raise ValueError(f"split {split} has fewer than {count} distinct rows")


@cache
def load_grammar() -> Grammar:
    """The grammar that ships with the package."""
    folder = resources.files("layerskip_core.embedded") / "grammar"
    files = [file for file in folder.iterdir() if file.name.endswith(".txt")]
    files.sort(key=lambda file: (file.name == "sealed.txt", file.name))
    return Grammar(
        {file.name.removesuffix(".txt"): file.read_text(encoding="utf-8") for file in files}
    )


def _coined_word(rng: random.Random) -> str:
    """A pronounceable word of one to three syllables, most likely without a meaning."""
    word = ""
    for _ in range(1 + _below(rng, 2) + _below(rng, 2)):
        word += _drawn(rng, _ONSETS) + _drawn(rng, _VOWELS) + _drawn(rng, _CODAS)
    return word


def _side(text: str) -> str:
    bucket = hashlib.blake2b(text.encode(), digest_size=4).digest()[0] % _BUCKETS
    return {0: "test", 1: "validation"}.get(bucket, "train")


def _drawn(rng: random.Random, items: Sequence[Item]) -> Item:
    return items[_below(rng, len(items))]


def _below(rng: random.Random, count: int) -> int:
    """A random number in 0..count-1, the same on every Python version."""
    return int(rng.random() * count)
