"""Writes small lm-eval tasks with rows of its own, to try lm-evaluation-harness without the hub.

    python examples/lm_eval_tasks.py FOLDER

`facts_choice` (240 rows, multiple choice of four), `facts_answer` (240, generated answers, exact
match), `facts_text` (120, perplexity).
"""

import json
import random
import sys
from itertools import pairwise
from pathlib import Path

CAPITALS = (
    "France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Greece Athens, Austria Vienna, Poland Warsaw, "
    "Hungary Budapest, Sweden Stockholm, Norway Oslo, Finland Helsinki, Denmark Copenhagen, Ireland Dublin, Belgium Brussels, "
    "Japan Tokyo, China Beijing, India Delhi, Thailand Bangkok, Vietnam Hanoi, Turkey Ankara, Egypt Cairo, Kenya Nairobi, "
    "Cuba Havana, Peru Lima, Chile Santiago, Canada Ottawa, Russia Moscow, Ukraine Kyiv, Iran Tehran"
)
OPPOSITES = (
    "hot cold, big small, fast slow, light dark, happy sad, old new, high low, open closed, rich poor, strong weak, hard soft, "
    "wet dry, early late, full empty, long short, loud quiet, thick thin, clean dirty, near far, good bad, up down, day night, "
    "left right, true false, win lose, begin end, love hate, give take, push pull, buy sell"
)
KINDS = (
    "fruit: apple banana pear grape peach plum; animal: dog horse lion tiger rabbit sheep; color: red blue green yellow purple "
    "orange; tool: hammer saw drill wrench shovel axe; vehicle: car truck bus train bicycle boat; drink: water milk coffee tea "
    "juice beer; metal: iron gold silver copper tin lead; body part: hand foot knee nose ear arm; instrument: piano guitar "
    "violin drum flute trumpet; clothing: shirt coat hat glove sock scarf"
)
NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]


def mean_of(*metrics: str) -> list[dict[str, object]]:
    return [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics
    ]


CHOICE = {
    "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "label",
    "target_delimiter": " ", "metric_list": mean_of("acc", "acc_norm"),
}  # fmt: skip
ANSWER = {
    "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
    "metric_list": [{**mean_of("exact_match")[0], "ignore_case": True}],
    "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 8}, "target_delimiter": " ",
    "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}]}],
}  # fmt: skip
TEXT = {
    "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
    "metric_list": [{"metric": metric} for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
}  # fmt: skip


TASKS = {
    "facts_choice": ("facts", CHOICE),
    "facts_answer": ("facts", ANSWER),
    "facts_text": ("texts", TEXT),
}


def facts(draw: random.Random) -> list[dict[str, object]]:
    """240 questions, each with its answer and three wrong ones."""
    capitals = [tuple(pair.rsplit(" ", 1)) for pair in CAPITALS.split(", ")]
    opposites = [tuple(pair.split()) for pair in OPPOSITES.split(", ")]
    kinds = {line.split(": ")[0]: line.split(": ")[1].split() for line in KINDS.split("; ")}
    asked = []
    for pairs, shown, forms in (
        (capitals, "{}", ("Q: What is the capital of {}?\nA:", "The capital city of {} is called")),
        (opposites, '"{}"', ("Q: What is the opposite of {}?\nA:", "The opposite of {} is")),
    ):
        for first, second in pairs:
            others = [other for _, other in pairs if other != second]
            asked += [
                (form.format(shown.format(first)), second, draw.sample(others, 3)) for form in forms
            ]
    for kind, members in kinds.items():
        others = [other for other in kinds if other != kind]
        for word in members:
            asked.append(
                (
                    f"Q: Is {word} a fruit, an animal, a tool or what?\nA: It is a",
                    kind,
                    draw.sample(others, 3),
                )
            )
    for first in range(1, 7):
        for second in range(1, 7):
            total = NUMBERS[first + second]
            wrong = draw.sample([number for number in NUMBERS[2:] if number != total], 3)
            asked.append((f"{NUMBERS[first].capitalize()} plus {NUMBERS[second]} is", total, wrong))
    for before, after in pairwise(NUMBERS):
        wrong = draw.sample([number for number in NUMBERS if number not in (before, after)], 3)
        asked += [(f"When you count, the number after {before} is", after, wrong)]
        asked += [(f"When you count down, the number after {after} is", before, wrong)]
    return [
        _row(draw, question, answer, wrong) for question, answer, wrong in draw.sample(asked, 240)
    ]


def texts(draw: random.Random) -> list[dict[str, object]]:
    """120 short texts of such facts."""
    rows = [f"{row['question']} {row['answer']}." for row in facts(draw)]
    return [{"text": " ".join(draw.sample(rows, draw.randrange(2, 9)))} for _ in range(120)]


def _row(draw: random.Random, question: str, answer: str, wrong: list[str]) -> dict[str, object]:
    choices = draw.sample([answer, *wrong], 4)
    return {
        "question": question,
        "answer": answer,
        "choices": choices,
        "label": choices.index(answer),
    }


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for name, rows in {"facts": facts(draw), "texts": texts(draw)}.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    for name, (rows, task) in TASKS.items():
        files = {"data_files": {"test": str((folder / f"{rows}.jsonl").resolve())}}
        where = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": files,
            "test_split": "test",
        }
        # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps({**where, **task}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
