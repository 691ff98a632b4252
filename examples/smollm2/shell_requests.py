"""Requests in words and the shell commands that they ask for, drawn at random: python
shell_requests.py ROWS SEED > rows.jsonl

A small task that no model here was tuned on. Rows with seed 1 are for training; other seeds leave
out requests among the first 20,000 of seed 1.
"""

import json
import random
import sys
from collections.abc import Iterator

_KINDS = {
    **{
        "pdf files": "pdf",
        "pictures": "jpg",
        "spreadsheets": "csv",
        "log files": "log",
        "notes": "txt",
        "Python files": "py",
    },
    **{"web pages": "html", "archives": "zip", "songs": "mp3", "slides": "pptx"},
}
_PLACES = (
    "home",
    "work",
    "old",
    "new",
    "shared",
    "private",
    "summer",
    "winter",
    "client",
    "draft",
    "final",
    "raw",
)
_THINGS = (
    "reports",
    "photos",
    "invoices",
    "backups",
    "projects",
    "letters",
    "scans",
    "recipes",
    "results",
    "talks",
    "maps",
)
_POLITE = ("", "", "", "please ", "can you ", "I need you to ", "could you ")
_TIMES = (
    ("last day", 1),
    ("last two days", 2),
    ("last week", 7),
    ("last month", 30),
    ("last year", 365),
)
_ACTIONS = (
    ("copy the {kind} from {source} to {target}", "cp {source}/*.{ending} {target}/"),
    ("move all {kind} in {source} into {target}", "mv {source}/*.{ending} {target}/"),
    ("delete the {kind} in {source}", "rm {source}/*.{ending}"),
    ("count the {kind} in {source}", "ls {source}/*.{ending} | wc -l"),
    ("list the {kind} in {source}, the {most} first", "ls {order} {source}/*.{ending}"),
    (
        "find {kind} under {source} that changed in the {time}",
        "find {source} -name '*.{ending}' -mtime -{days}",
    ),
    (
        "find {kind} under {source} above {size} MB",
        "find {source} -name '*.{ending}' -size +{size}M",
    ),
    (
        "pack the {kind} of {source} into {target}.tar.gz",
        "tar -czf {target}.tar.gz {source}/*.{ending}",
    ),
    ("show lines with {word} in the {kind} of {source}", "grep {word} {source}/*.{ending}"),
    (
        "show the first {size} lines of every one of the {kind} in {source}",
        "head -n {size} {source}/*.{ending}",
    ),
)
_ORDERS = (("newest", "-t"), ("oldest", "-tr"), ("largest", "-S"), ("smallest", "-Sr"))
_WORDS = (
    "error",
    "total",
    "urgent",
    "TODO",
    "Berlin",
    "Monday",
    "budget",
    "refund",
    "import",
    "version",
)


def rows(seed: int) -> Iterator[dict[str, str]]:
    """Yields distinct rows endlessly."""
    draw = random.Random(seed)
    seen = set()
    while True:
        kind, (most, order), (time, days) = (
            draw.choice(list(_KINDS)),
            draw.choice(_ORDERS),
            draw.choice(_TIMES),
        )
        source, target = (f"{draw.choice(_PLACES)}-{draw.choice(_THINGS)}" for _ in range(2))
        fields = {
            **{
                "kind": kind,
                "ending": _KINDS[kind],
                "source": source,
                "target": target,
                "most": most,
                "order": order,
            },
            **{
                "time": time,
                "days": days,
                "size": draw.randrange(2, 60),
                "word": draw.choice(_WORDS),
            },
        }
        words, command = (text.format(**fields) for text in draw.choice(_ACTIONS))
        prompt = draw.choice(_POLITE) + words
        if prompt not in seen:
            seen.add(prompt)
            yield {"prompt": prompt, "completion": command}


if __name__ == "__main__":
    wanted = int(sys.argv[1])
    seed = int(sys.argv[2])
    training = (
        {row["prompt"] for row, _ in zip(rows(1), range(20_000), strict=False)}
        if seed != 1
        else set()
    )
    left = (row for row in rows(seed) if row["prompt"] not in training)
    for row, _ in zip(left, range(wanted), strict=False):
        print(json.dumps(row))
