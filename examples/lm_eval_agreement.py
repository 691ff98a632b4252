"""Scores, log-likelihoods and seconds of lm-eval's model type `hf` beside those of `layerskip`, on the same requests.

    python examples/lm_eval_agreement.py TASK_FOLDER LIMIT layerskip:MODEL:DTYPE[:EXIT] hf:FOLDER:DTYPE ...

The first model is the one that the others are compared with. Loading is not timed.
"""

import os
import sys
import time
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from lm_eval import evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from layerskip_core.harness import register

TASKS = ("facts_choice", "facts_answer", "facts_text")
BATCH = 16


class Timed:
    """A model whose calls are timed by the kind of request."""

    def __init__(self, model: Any) -> None:
        self._model, self.seconds, self.responses = model, {}, {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._model, name)
        if name not in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            return found

        def timed(requests: list[Any]) -> Any:
            started = time.perf_counter()
            self.responses[name] = found(requests)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            return self.responses[name]

        return timed


@dataclass(frozen=True)
class Run:
    name: str
    scores: dict[str, float]
    responses: dict[str, list[Any]]
    seconds: dict[str, float]


def run(spec: str, folder: str, limit: int) -> Run:
    kind, model, dtype, *rest = spec.split(":")
    name = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    arguments = {"pretrained": model, "dtype": name, **({"exit": int(rest[0])} if rest else {})}
    timed = Timed(get_model(kind).create_from_arg_obj(arguments, {"batch_size": BATCH, "device": "cpu"}))
    tasks = TaskManager(include_path=folder, include_defaults=False).load(list(TASKS))
    found = evaluate(timed, tasks, limit=limit or None, bootstrap_iters=0, log_samples=False)["results"]
    scores = {f"{task} {key.removesuffix(',none')}": value for task, values in found.items() for key, value in values.items()
              if "," in key and "stderr" not in key}  # fmt: skip
    return Run(spec, scores, timed.responses, timed.seconds)


def report(runs: list[Run]) -> None:
    """Markdown: the scores and seconds of each run, and how its responses differ from the first's."""
    first = runs[0]
    print("| | " + " | ".join(each.name for each in runs) + " |\n|---" + "|---" * len(runs) + "|")
    for score in first.scores:
        print(f"| {score} | " + " | ".join(f"{each.scores[score]:.5g}" for each in runs) + " |")
    for kind in first.seconds:
        print(f"| seconds, {kind} | " + " | ".join(f"{each.seconds[kind]:.1f}" for each in runs) + " |")
    for other in runs[1:]:
        ours, theirs = first.responses["loglikelihood"], other.responses["loglikelihood"]
        gaps = [abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True)]
        same = sum(a[1] == b[1] for a, b in zip(ours, theirs, strict=True))
        rolling = [
            abs(a / b - 1) for a, b in zip(*(each.responses["loglikelihood_rolling"] for each in (first, other)), strict=True)
        ]
        texts = [a == b for a, b in zip(*(each.responses["generate_until"] for each in (first, other)), strict=True)]
        print(
            f"\n{other.name} against {first.name}: largest gap of {len(gaps)} log-likelihoods {max(gaps):.2g} nats, same "
            f"greedy verdict {same} of {len(gaps)}; largest relative gap of {len(rolling)} texts {max(rolling):.2g}; "
            f"same answer {sum(texts)} of {len(texts)}"
        )


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    register()
    folder, limit, *specs = sys.argv[1:]
    report([run(spec, folder, int(limit)) for spec in specs])
