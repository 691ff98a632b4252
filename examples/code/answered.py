"""Rows with a model's own answers, on which a conversion changes least of what it does.

Usage: python answered.py ROWS.jsonl ANSWERS.jsonl OUT.jsonl    ANSWERS: what `layerskip generate
--jsonl` wrote for ROWS. Answers that met the limit of tokens are left out.
"""

import json
import sys
from pathlib import Path


def main(rows: Path, answers: Path, out: Path) -> None:
    whole = []
    for given, answered in zip(_records(rows), _records(answers), strict=True):
        if answered["finish_reason"] == "eos":
            whole.append({"prompt": given["prompt"], "completion": answered["text"]})
    out.write_text("".join(json.dumps(row) + "\n" for row in whole), encoding="utf-8")
    print(f"{out}: {len(whole)} rows", file=sys.stderr)


def _records(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
