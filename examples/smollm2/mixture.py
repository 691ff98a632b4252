"""Three tasks as one training file, and their test files: TOPv2 (reminder, weather), SciTLDR and
MBPP.

Usage: python mixture.py DATA OUT    DATA holds topv2/, scitldr/ and mbpp/ as they are published.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from layerskip_core.data import PARSING_TEMPLATE

TOPV2_DOMAINS = ("reminder", "weather")
TOPV2_ROWS = 6000  # of 40,896, about 70 tokens each
MBPP_REPEATS = 3  # 374 rows of about 170 tokens
# The prompt of `layerskip bench --task mbpp --shots 0`.
MBPP_TASK = "You are an expert Python programmer, and here is your task: {text}"
MBPP_TESTS = " Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
Row = dict[str, str]


def topv2(folder: Path, split: str) -> list[Row]:
    """Utterance and parse; only files of the wanted domains are read."""
    rows = []
    for domain in TOPV2_DOMAINS:
        lines = (folder / f"{domain}_{split}.tsv").read_text(encoding="utf-8").splitlines()[1:]
        for _, utterance, parse in (line.split("\t") for line in lines):
            rows.append({"prompt": PARSING_TEMPLATE.format(prompt=utterance), "completion": parse})
    return rows


def scitldr(file: Path) -> Iterator[Row]:
    """Abstract and its first summary."""
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield {
            "prompt": " ".join(row["source"]) + "\nTL;DR:",
            "completion": " " + row["target"][0].strip(),
        }


def mbpp(file: Path) -> Iterator[Row]:
    """Problems 601 to 974, the training split, without solved examples before them."""
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["task_id"] > 600:
            prompt = MBPP_TASK.format(text=row["text"]) + MBPP_TESTS.format(
                tests="\n".join(row["test_list"])
            )
            yield {
                "prompt": prompt,
                "completion": row["code"].replace("\r\n", "\n").strip() + "\n[DONE]",
            }


def main(data: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    shuffle = random.Random(0)
    parses = topv2(data / "topv2", "train")
    shuffle.shuffle(parses)
    train = [
        *parses[:TOPV2_ROWS],
        *scitldr(data / "scitldr" / "train.jsonl"),
        *list(mbpp(data / "mbpp" / "mbpp.jsonl")) * MBPP_REPEATS,
    ]
    shuffle.shuffle(train)
    tests = topv2(data / "topv2", "test")
    shuffle.shuffle(tests)
    files = {
        "train": train,
        "topv2-test": tests,
        "scitldr-test": list(scitldr(data / "scitldr" / "test.jsonl")),
    }
    for name, rows in files.items():
        (out / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
        print(f"{out / name}.jsonl: {len(rows)} rows", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
