"""Local task files of lm-eval over the rows of `commands`: choices, generated answers, whole texts,
and few-shot choices.
"""

import json
import random

import yaml

from layerskip_core.config.model import DataConfig
from layerskip_core.data import load_examples

CHOICE = {
    "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "label",
    "target_delimiter": "\n", "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True}
                                              for name in ("acc", "acc_norm")],
}  # fmt: skip
TASKS = {
    "choice": CHOICE,
    "shots": {**CHOICE, "fewshot_split": "test", "fewshot_config": {"sampler": "default"}, "num_fewshot": 2},
    "answer": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["]", "<|endoftext|>"], "max_gen_toks": 10},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "bits_per_byte")],
    },
}  # fmt: skip


def write_tasks(folder, answers=(), count=10):
    """Writes the tasks and their rows. `answers`: what the model generates, so that some of the
    rows are right.
    """
    draw = random.Random(1)
    examples = load_examples(DataConfig("commands", "test", limit=count))
    rows = []
    for place, example in enumerate(examples):
        words = example.completion.split()[:5]
        choices = [
            " ".join(words),
            *(" ".join(draw.sample(words, len(words))) for _ in range(2)),
            words[0],
        ]
        answer = answers[place] if place < len(answers) else "nothing"
        # Some are longer than the model's context
        text = " ".join(other.completion for other in examples[: 1 + place % 2])
        rows.append(
            {
                "question": example.prompt,
                "choices": choices,
                "label": place % 2,
                "answer": answer,
                "text": text,
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
    }
    for name, settings in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **source, **settings}))
    return folder
