"""`python -m layerskip_core.embedded.commands`: checks the grammar and prints its counts and sample rows."""

import re
import sys
from collections import Counter

from . import SPLITS, load_grammar, rows


def main() -> int:
    grammar = load_grammar()
    problems = grammar.check()
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        return 1
    alternatives = {domain: len(phrasings) for domain, phrasings in grammar.roots.items()}
    labels: Counter[str] = Counter()
    for split in SPLITS:
        sample = list(rows(split, 200, seed=1))
        print(f"\n{split}:")
        for row in sample[:12]:
            print(f"  {row.domain:10} {row.parse}")
        labels.update(label for row in sample for label in re.findall(r"(?:IN|SL):[A-Z_]+", row.parse))
    print(f"\nphrasings {sum(alternatives.values())} {alternatives}; labels seen {len(labels)}")
    return 0


sys.exit(main())
