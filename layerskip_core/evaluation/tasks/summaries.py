"""News summaries with the prompts of LayerSkip's evaluation: CNN/DM (1-shot) and XSUM (0-shot)."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ...config.evaluation import TaskConfig
from ...data.examples import Example
from ...data.records import Record, spread
from .pairs import text_scores
from .prompts import BARE, forms, framed
from .rows import file_rows, hub_rows, shots_and_rest
from .task import Task, TaskLoader

_FORM = "Article: {prompt}\nSummary:"
_STOP = ("\nArticle:",)  # a base model continues with another article
_ARTICLES = ("article", "document")
_SUMMARIES = ("highlights", "summary", "summary_gt")
_READY_STOP = ("###",)  # for complete prompts in HELM's form, with their own shots


@dataclass(frozen=True)
class _Source:
    hub_id: str
    keywords: dict[str, Any]
    shots: int
    max_new_tokens: int


def cnn_dm(config: TaskConfig) -> Task:
    return _summaries(config, _Source("abisee/cnn_dailymail", {"name": "3.0.0"}, shots=1, max_new_tokens=128))


def xsum(config: TaskConfig) -> Task:
    # The repository holds a script, which datasets no longer runs. The hub stores its rows as parquet on this branch.
    return _summaries(config, _Source("EdinburghNLP/xsum", {"revision": "refs/convert/parquet"}, shots=0, max_new_tokens=64))


def _summaries(config: TaskConfig, source: _Source) -> Task:
    """The shots are a file's first rows; on the hub, the first rows of the training split."""
    count = source.shots if config.shots is None else config.shots
    if config.data:
        every = file_rows(config.data)
        ready = "summary_gt" in every[0].fields
        count = 0 if ready and config.shots is None else count
        shots, rows = shots_and_rest(every, count, config.data)
    else:
        ready = False
        shots = hub_rows(source.hub_id, "train", count, **source.keywords) if count else []
        rows = hub_rows(source.hub_id, config.split, **source.keywords)
    solved, asked = [_example(row) for row in shots], [_example(row) for row in spread(rows, config.samples)]
    examples, template = framed(*forms(config.prompting.asked, BARE if ready else _FORM, BARE), asked, solved)
    limit = config.max_new_tokens or source.max_new_tokens
    resolved = replace(config, data=config.data or source.hub_id, shots=count, max_new_tokens=limit)
    scorer = partial(text_scores, "rouge2", [[example.completion] for example in examples])
    return Task(config.task or "", examples, resolved, "rouge2", scorer, _READY_STOP if ready else _STOP, template)


def _example(row: Record) -> Example:
    summary = row.text(row.first_column(_SUMMARIES))
    return Example(row.text(row.first_column(_ARTICLES)), " " + " ".join(summary.split()))


CNN_DM = TaskLoader(cnn_dm, accepts=("shots", "template"))
XSUM = TaskLoader(xsum, accepts=("shots", "template"))
