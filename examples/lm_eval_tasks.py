"""Writes small lm-eval tasks with rows of its own, to try lm-evaluation-harness without the hub.

    python examples/lm_eval_tasks.py FOLDER

`facts_choice` (240 rows, multiple choice of four), `facts_answer` (240, generated answers, exact match), `facts_text` (120,
perplexity), and of the embedded grammar `commands_choice` (240) and `commands_parse` (240, exact match).
"""

import json
import random
import sys
from itertools import pairwise
from pathlib import Path

from layerskip_core.config.model import DataConfig
from layerskip_core.data import load_examples

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
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: "{delimiter}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""
ANSWER = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: "{delimiter}"
generation_kwargs:
  until: ["\\n", "."]
  max_gen_toks: {limit}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
filter_list:
  - name: none
    filter:
      - function: remove_whitespace
metadata:
  version: 1
"""
TEXT = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
metadata:
  version: 1
"""


def facts(draw: random.Random) -> list[dict[str, object]]:
    """240 questions, each with its answer and three wrong ones."""
    capitals = [pair.rsplit(" ", 1) for pair in CAPITALS.split(", ")]
    opposites = [pair.split() for pair in OPPOSITES.split(", ")]
    kinds = {line.split(": ")[0]: line.split(": ")[1].split() for line in KINDS.split("; ")}
    asked = []
    for country, city in capitals:
        cities = [other for _, other in capitals if other != city]
        for form in ("Q: What is the capital of {}?\nA:", "The capital city of {} is called"):
            asked.append((form.format(country), city, draw.sample(cities, 3)))
    for word, opposite in opposites:
        words = [other for _, other in opposites if other != opposite]
        for form in ("Q: What is the opposite of {}?\nA:", "The opposite of {} is"):
            asked.append((form.format(f'"{word}"'), opposite, draw.sample(words, 3)))
    for kind, members in kinds.items():
        others = [other for other in kinds if other != kind]
        for word in members:
            asked.append((f"Q: Is {word} a fruit, an animal, a tool or what?\nA: It is a", kind, draw.sample(others, 3)))
    for first in range(1, 7):
        for second in range(1, 7):
            total = NUMBERS[first + second]
            wrong = draw.sample([number for number in NUMBERS[2:] if number != total], 3)
            asked.append((f"{NUMBERS[first].capitalize()} plus {NUMBERS[second]} is", total, wrong))
    for before, after in pairwise(NUMBERS):
        wrong = draw.sample([number for number in NUMBERS if number not in (before, after)], 3)
        asked += [(f"When you count, the number after {before} is", after, wrong)]
        asked += [(f"When you count down, the number after {after} is", before, wrong)]
    return [_row(draw, question, answer, wrong) for question, answer, wrong in draw.sample(asked, 240)]


def parses(draw: random.Random) -> list[dict[str, object]]:
    """240 commands, each with its parse and three parses that are wrong in a name or a word."""
    examples = load_examples(DataConfig("commands", "test", limit=240))
    rows = []
    for example in examples:
        names = sorted({word for other in examples for word in other.completion.split() if word.startswith("[")})
        right, wrong = example.completion.split(), set[str]()
        while len(wrong) < 3:
            changed, place = list(right), draw.randrange(len(right))
            changed[place] = draw.choice(names) if right[place].startswith("[") else draw.choice(right)
            if changed != right:
                wrong.add(" ".join(changed))
        rows.append(_row(draw, f"{example.prompt}\n", " ".join(right), sorted(wrong)))
    return rows


def texts(draw: random.Random) -> list[dict[str, object]]:
    """120 short texts of such facts."""
    rows = [str(row["question"]) + " " + str(row["answer"]) + "." for row in facts(draw)]
    return [{"text": " ".join(draw.sample(rows, draw.randrange(2, 9)))} for _ in range(120)]


def _row(draw: random.Random, question: str, answer: str, wrong: list[str]) -> dict[str, object]:
    choices = draw.sample([answer, *wrong], 4)
    return {"question": question, "answer": answer, "choices": choices, "label": choices.index(answer)}


def write_tasks(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    sources = {"facts": facts(draw), "commands": parses(draw), "texts": texts(draw)}
    for name, rows in sources.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tasks = {
        "facts_choice": (CHOICE, "facts", " ", 0),
        "facts_answer": (ANSWER, "facts", " ", 8),
        "facts_text": (TEXT, "texts", "", 0),
        "commands_choice": (CHOICE, "commands", "", 0),
        "commands_parse": (ANSWER, "commands", "", 128),
    }
    for name, (form, source, delimiter, limit) in tasks.items():
        file = (folder / f"{source}.jsonl").resolve()
        text = form.format(name=name, file=file, delimiter=delimiter, limit=limit)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_tasks(Path(sys.argv[1]))
