"""`commands`: task-oriented semantic parsing generated from a hand-written grammar, in TOP's bracket notation.

    utterance   remind me to call mom at 5
    parse       [IN:CREATE_REMINDER remind [SL:PERSON_REMINDED me ] to [SL:TODO call mom ] [SL:DATE_TIME at 5 ] ]

The grammar is in the folder `grammar`, whose GRAMMAR.md explains its format. Rows are a function of (split, seed).
`python -m layerskip_core.embedded.commands` checks the grammar, and prints its counts and sample rows.

Two hashes separate the splits. The text of every expansion of an `open` rule (a slot value: a name, a place, a time) assigns it
to one split, and so does every skeleton (the parse without its open values). A test row takes both from the test side, so
neither its values nor its phrasing occur in training. `compositional` takes values from the test side too, and nestings marked
`!` in the grammar, which no other split uses.
"""

import hashlib
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

SPLITS = ("train", "validation", "test", "compositional")
_BUCKETS = 10  # of ten hash buckets, 0 is test, 1 is validation, the others are training
_MAX_TRIES = 4000
_COINED = 0.25  # share of made-up expansions of `coined` rules in training
_COINED_ANYWHERE = 0.04  # share of made-up words elsewhere in values, so that the model copies words it has never seen
_SHORTEST_COINED = 4  # letters; shorter words (at, the, 5) tell what kind of value it is
_ONSETS, _VOWELS, _CODAS = (
    tuple(letters.replace("-", "") for letters in line.split())
    for line in (
        "b c d f g h j k l m n p r s t v w x y z bl br ch cl cr dr fl gl gr ph pl pr qu sh sk sl st th tr wh -",
        "a e i o u y ai au ea ee ei ia ie io oa oo ou ue",
        "- - - - b ck d g l ll m n nd ng nt ph r rd rt s sh ss st t th x z tz",
    )
)
_REFERENCE = re.compile(r"\{([a-z_]+)\}")
_PIECE = re.compile(r"\(([^()]*)\)|\{([a-z_]+)\}|(\S+)")


@dataclass(frozen=True)
class Alternative:
    """One right-hand side. A piece is a literal token, a rule's name in braces, or an inline choice."""

    pieces: tuple["str | Choice", ...]
    compositional: bool = False


@dataclass(frozen=True)
class Choice:
    """`(a|b|)`: an inline choice between alternatives."""

    alternatives: tuple[Alternative, ...]


@dataclass
class Rule:
    name: str
    domain: str
    open: bool = False
    root: bool = False
    coined: bool = False
    alternatives: list[Alternative] = field(default_factory=list)


@dataclass(frozen=True)
class CommandRow:
    domain: str
    utterance: str
    parse: str


@dataclass
class _Derivation:
    """Tokens of a row before its open values are filled in, and whether a compositional alternative was used."""

    tokens: list[str] = field(default_factory=list)
    compositional: bool = False


class Grammar:
    """The rules of all domains."""

    def __init__(self, files: dict[str, str]) -> None:
        self.rules: dict[str, Rule] = {}
        for domain, text in files.items():
            self._read(domain, text)
        self.roots: dict[str, list[Alternative]] = {}
        for rule in self.rules.values():
            if rule.root:
                self.roots.setdefault(rule.domain, []).extend(rule.alternatives)

    def _read(self, domain: str, text: str) -> None:
        rule: Rule | None = None
        for number, line in enumerate(text.splitlines(), start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            if line.startswith("== "):
                name, *flags = line[3:].split()
                if name in self.rules:
                    raise ValueError(f"{domain}.txt:{number}: rule {name} is defined twice")
                rule = Rule(name, domain, open="open" in flags, root="root" in flags, coined="coined" in flags)
                self.rules[name] = rule
            elif rule is None:
                raise ValueError(f"{domain}.txt:{number}: an alternative before any rule")
            else:
                compositional = line.startswith("! ")
                rule.alternatives.append(_alternative(line.removeprefix("! "), compositional))

    def check(self) -> list[str]:
        """The faults of the grammar, one line each."""
        problems = []
        for rule in self.rules.values():
            for alternative in rule.alternatives:
                text = _source(alternative)
                where = f"{rule.domain}.txt, {rule.name}: {text}"
                problems += [f"{where}: no rule {name}" for name in _REFERENCE.findall(text) if name not in self.rules]
                opening = sum(token.startswith("[") for token in text.split())
                if opening != text.split().count("]"):
                    problems.append(f"{where}: unbalanced brackets")
                if rule.root and not text.startswith("[IN:"):
                    problems.append(f"{where}: a root alternative starts with [IN:")
                if "(" in text.replace("(|", "") and re.search(r"\([^)]*[\[\]]", text):
                    problems.append(f"{where}: a bracket inside an inline choice")
                if text != text.lower() and re.search(r"(?<![:_A-Z0-9])[A-Z](?![A-Z]*[:_])", text):
                    problems.append(f"{where}: upper case outside a label")
        return problems

    def row(self, split: str, rng: random.Random) -> CommandRow:
        """Draws one row of a split.

        Raises:
            ValueError: the grammar has no row on this side of the split (a rule with too few expansions).
        """
        domains = sorted(self.roots)
        for _ in range(_MAX_TRIES):
            domain = domains[_below(rng, len(domains))]
            derivation = _Derivation()
            # The draw is among root alternatives, so the weight of an intent is the number of its phrasings.
            usable = [a for a in self.roots[domain] if split == "compositional" or not a.compositional]
            self._closed(usable[_below(rng, len(usable))], split, rng, derivation)
            skeleton = " ".join(derivation.tokens)
            if derivation.compositional != (split == "compositional"):
                continue
            if split != "compositional" and _side(skeleton) != split:
                continue
            parse = " ".join(
                self._open(token[1:-1], split, rng) if token.startswith("{") else token for token in derivation.tokens
            )
            words = [token for token in parse.split() if not token.startswith("[") and token != "]"]
            return CommandRow(domain, " ".join(words), " ".join(parse.split()))
        raise ValueError(f"no row of split {split} in {_MAX_TRIES} tries")

    def _closed(
        self, alternative: Alternative, split: str, rng: random.Random, out: _Derivation, in_value: bool = False
    ) -> None:
        """Expands all rules but open ones, which stay as `{name}`; in an open value, words may be made up."""
        out.compositional |= alternative.compositional
        coins = in_value and split == "train" and not any(_is_label(piece) for piece in alternative.pieces)
        for piece in alternative.pieces:
            if isinstance(piece, Choice):
                options = piece.alternatives
            elif piece.startswith("{") and not self.rules[piece[1:-1]].open:
                if in_value and self._coins(piece[1:-1], split, rng):
                    out.tokens += self._made_up(piece[1:-1], split, rng)
                    continue
                options = tuple(
                    a for a in self.rules[piece[1:-1]].alternatives if split == "compositional" or not a.compositional
                )
            else:
                coined = coins and len(piece) >= _SHORTEST_COINED and rng.random() < _COINED_ANYWHERE
                out.tokens.append(_coined_word(rng) if coined else piece)
                continue
            self._closed(options[_below(rng, len(options))], split, rng, out, in_value)

    def _open(self, name: str, split: str, rng: random.Random) -> str:
        """A value of an open rule. Its text, and that of every open value in it, is on the side of the split."""
        side = "test" if split == "compositional" else split
        rule = self.rules[name]
        for _ in range(_MAX_TRIES):
            if self._coins(name, split, rng):
                if _side(value := " ".join(self._made_up(name, split, rng))) == side:
                    return value
                continue
            derivation = _Derivation()
            self._closed(rule.alternatives[_below(rng, len(rule.alternatives))], split, rng, derivation, in_value=True)
            references = [token for token in derivation.tokens if token.startswith("{")]
            if references == derivation.tokens and len(references) == 1:
                return self._open(references[0][1:-1], split, rng)
            value = " ".join(
                self._open(token[1:-1], split, rng) if token.startswith("{") else token for token in derivation.tokens
            )
            if _side(value) == side:
                return value
        raise ValueError(f"rule {name} has no value on the {side} side: give it more alternatives")

    def _made_up(self, name: str, split: str, rng: random.Random) -> list[str]:
        """Made-up words for an expansion of a `coined` rule: as many words; of several, the short ones stay (`in law`)."""
        alternatives, derivation = self.rules[name].alternatives, _Derivation()
        self._closed(alternatives[_below(rng, len(alternatives))], split, rng, derivation)
        words = derivation.tokens
        return [_coined_word(rng) if len(words) == 1 or len(word) >= _SHORTEST_COINED else word for word in words]

    def _coins(self, name: str, split: str, rng: random.Random) -> bool:
        """Whether made-up words replace this rule: sometimes, for `coined` rules, only in values of training rows.

        In a skeleton they would change the hash that separates the splits, and phrasings of the test side would leak in.
        """
        return split == "train" and self.rules[name].coined and rng.random() < _COINED


def rows(split: str, count: int, seed: int = 0) -> Iterator[CommandRow]:
    """`count` rows of a split with distinct utterances, always the same for a (split, seed).

    Raises:
        ValueError: `split` is not in SPLITS, or the split has too few distinct rows.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split}")
    grammar, index = load_grammar(), 0
    seen: set[str] = set()
    while len(seen) < count:
        row = grammar.row(split, random.Random(f"{seed}:{split}:{index}"))
        index += 1
        if row.utterance in seen:
            if index > 20 * count + 1000:
                raise ValueError(f"split {split} has fewer than {count} distinct rows")
            continue
        seen.add(row.utterance)
        yield row


@cache
def load_grammar() -> Grammar:
    """The grammar that ships with the package."""
    folder = resources.files("layerskip_core.embedded") / "grammar"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".txt")), key=lambda f: f.name)
    return Grammar({f.name.removesuffix(".txt"): f.read_text(encoding="utf-8") for f in files})


def _alternative(text: str, compositional: bool = False) -> Alternative:
    pieces: list[str | Choice] = []
    for match in _PIECE.finditer(text):
        choice, reference, literal = match.groups()
        if choice is not None:
            pieces.append(Choice(tuple(_alternative(option) for option in choice.split("|"))))
        else:
            pieces.append(f"{{{reference}}}" if reference else literal)
    return Alternative(tuple(pieces), compositional)


def _source(alternative: Alternative) -> str:
    return " ".join(
        piece if isinstance(piece, str) else f"({'|'.join(_source(a) for a in piece.alternatives)})"
        for piece in alternative.pieces
    )


def _is_label(piece: str | Choice) -> bool:
    return isinstance(piece, str) and piece.startswith("[")


def _coined_word(rng: random.Random) -> str:
    """A pronounceable word of one to three syllables, most likely without a meaning."""
    syllables = [
        _ONSETS[_below(rng, len(_ONSETS))] + _VOWELS[_below(rng, len(_VOWELS))] + _CODAS[_below(rng, len(_CODAS))]
        for _ in range(1 + _below(rng, 2) + _below(rng, 2))
    ]
    return "".join(syllables)


def _side(text: str) -> str:
    bucket = hashlib.blake2b(text.encode(), digest_size=4).digest()[0] % _BUCKETS
    return {0: "test", 1: "validation"}.get(bucket, "train")


def _below(rng: random.Random, count: int) -> int:
    """A random number in 0..count-1, the same on every Python version."""
    return int(rng.random() * count)


def main() -> int:
    """Prints the faults of the grammar, or sample rows of each split."""
    grammar = load_grammar()
    if problems := grammar.check():
        print("\n".join(problems), file=sys.stderr)
        return 1
    labels: Counter[str] = Counter()
    for split in SPLITS:
        sample = list(rows(split, 200, seed=1))
        print(f"\n{split}:", *(f"  {row.domain:10} {row.parse}" for row in sample[:12]), sep="\n")
        labels.update(label for row in sample for label in re.findall(r"(?:IN|SL):[A-Z_]+", row.parse))
    phrasings = {domain: len(alternatives) for domain, alternatives in grammar.roots.items()}
    print(f"\nphrasings {sum(phrasings.values())} {phrasings}; labels seen {len(labels)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
