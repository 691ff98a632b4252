"""Prompts to train exit blocks on; the model writes the answers itself. Prints one JSON row per prompt.

Usage: python prompts.py DATA MODEL    DATA holds scitldr/, mbpp/ and topv2/ as they are published.

Abstracts of SciTLDR, problems of MBPP as they are and in the chat template (all of the training splits), and short messages in
the chat template. Train on them with `--template raw`.
"""

import json
import random
import sys
from pathlib import Path

from mixture import MBPP_TASK, MBPP_TESTS
from transformers import AutoTokenizer

MESSAGES = 260


def abstracts(file: Path) -> list[str]:
    """Each before the words that ask for a summary."""
    return [" ".join(json.loads(line)["source"]) + "\nTL;DR:" for line in file.read_text(encoding="utf-8").splitlines()]


def problems(file: Path) -> list[str]:
    """The texts and tests of problems 601 to 974, the training split."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        MBPP_TASK.format(text=row["text"]) + MBPP_TESTS.format(tests="\n".join(row["test_list"]))
        for row in rows
        if row["task_id"] > 600
    ]


def messages(topv2: Path, draw: random.Random) -> list[str]:
    utterances = [
        line.split("\t")[1]
        for file in sorted(topv2.glob("*_train.tsv"))
        for line in file.read_text(encoding="utf-8").splitlines()[1:]
    ]
    return draw.sample(utterances, MESSAGES)


def main(data: Path, model: str) -> None:
    draw, tokenizer = random.Random(0), AutoTokenizer.from_pretrained(model)
    code = problems(data / "mbpp" / "mbpp.jsonl")
    chat = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in [*code, *messages(data / "topv2", draw)]
    ]
    prompts = [*abstracts(data / "scitldr" / "train.jsonl"), *code, *chat]
    draw.shuffle(prompts)
    for prompt in prompts:
        print(json.dumps({"prompt": prompt}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
