"""Scores, log-likelihoods and seconds of lm-eval's model type `hf` beside those of `layerskip`, on
the same requests.

    python examples/lm_eval_agreement.py TASK_FOLDER LIMIT layerskip:MODEL:DTYPE[:EXIT]
    hf:FOLDER:DTYPE ...

The first model is the reference. Loading is not timed.
"""

import os
import sys
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from lm_eval import evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from measuring import head, line

from layerskip_core.harness import register

TASKS = ["facts_choice", "facts_answer", "facts_text"]
KINDS = ("loglikelihood", "generate_until", "loglikelihood_rolling")  # of requests
BATCH = 16


class Timed:
    """Wraps a model and times its calls by kind of request."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.seconds = dict[str, float]()
        self.responses = dict[str, list[Any]]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._model, name)
        if name not in KINDS:
            return found

        def timed(requests: list[Any]) -> Any:
            started = time.perf_counter()
            self.responses[name] = found(requests)
            self.seconds[name] = time.perf_counter() - started
            return self.responses[name]

        return timed


def run(spec: str, folder: str, limit: int) -> tuple[Timed, dict[str, float]]:
    kind, model, dtype, *rest = spec.split(":")
    arguments = {"pretrained": model, "dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype]}
    arguments |= {"exit": int(rest[0])} if rest else {}
    timed = Timed(
        get_model(kind).create_from_arg_obj(arguments, {"batch_size": BATCH, "device": "cpu"})
    )
    tasks = TaskManager(include_path=folder, include_defaults=False).load(TASKS)
    found = evaluate(timed, tasks, limit=limit or None, bootstrap_iters=0, log_samples=False)[
        "results"
    ]
    return timed, {
        f"{task} {key.removesuffix(',none')}": value
        for task, values in found.items()
        for key, value in values.items()
        if "," in key and "stderr" not in key
    }


def main(folder: str, limit: str, *specs: str) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    register()
    runs = [run(spec, folder, int(limit)) for spec in specs]
    head("", *specs)
    for score in runs[0][1]:
        line(score, *(f"{scores[score]:.5g}" for _, scores in runs))
    for kind in KINDS:
        line(f"seconds, {kind}", *(f"{timed.seconds[kind]:.1f}" for timed, _ in runs))
    choices, answers, texts = (runs[0][0].responses[kind] for kind in KINDS)
    for spec, (other, _) in zip(specs[1:], runs[1:], strict=True):
        pairs = list(zip(choices, other.responses[KINDS[0]], strict=True))
        gap = max(abs(a[0] - b[0]) for a, b in pairs)
        verdicts = sum(a[1] == b[1] for a, b in pairs)
        same = sum(a == b for a, b in zip(answers, other.responses[KINDS[1]], strict=True))
        relative = max(
            abs(a / b - 1) for a, b in zip(texts, other.responses[KINDS[2]], strict=True)
        )
        print(
            f"\n{spec} against {specs[0]}: largest gap of {len(pairs)} log-likelihoods {gap:.2g} nats, same greedy verdict "
            f"{verdicts} of {len(pairs)}; same answer {same} of {len(answers)}; largest relative gap of {len(texts)} texts "
            f"{relative:.2g}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
