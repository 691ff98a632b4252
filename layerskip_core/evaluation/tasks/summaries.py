"""Summaries: news with the prompts of LayerSkip's evaluation (CNN/DM, 1-shot; XSUM, 0-shot), and papers in one sentence."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ...config.evaluation import TaskConfig
from ...data.examples import Example
from ...data.records import Record, spread
from ..metrics import ROUGES
from .pairs import text_scores
from .prompts import BARE, file_rows, forms, framed, hub_rows, shots_and_rest
from .task import Task, TaskLoader

_FORM = "Article: {prompt}\nSummary:"
_STOP = ("\nArticle:",)  # a base model continues with another article
_ARTICLES = ("article", "document", "source")
_SUMMARIES = ("highlights", "summary", "summary_gt", "target")
_READY_STOP = ("###",)  # for complete prompts in HELM's form, with their own shots


@dataclass(frozen=True)
class _Source:
    hub_id: str
    keywords: dict[str, Any]
    shots: int
    max_new_tokens: int
    form: str = _FORM
    stop: tuple[str, ...] = _STOP
    alternatives: bool = False  # a row's summaries are several references, not the sentences of one


def cnn_dm(config: TaskConfig) -> Task:
    return _summaries(config, _Source("abisee/cnn_dailymail", {"name": "3.0.0"}, shots=1, max_new_tokens=128))


def xsum(config: TaskConfig) -> Task:
    # The repository holds a script, which datasets no longer runs. The hub stores its rows as parquet on this branch.
    return _summaries(config, _Source("EdinburghNLP/xsum", {"revision": "refs/convert/parquet"}, shots=0, max_new_tokens=64))


def scitldr(config: TaskConfig) -> Task:
    """Abstracts of papers (Cachola et al., 2020). A row can have several summaries; the best counts."""
    hub = {"data_dir": "Abstract", "revision": "refs/convert/parquet"}
    form, stop = "{prompt}\nTL;DR:", ("\nTL;DR:",)  # a base model continues with another abstract
    return _summaries(config, _Source("allenai/scitldr", hub, 0, 64, form, stop, alternatives=True))


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
    rows = spread(rows, config.samples)
    references = [_references(row, source) for row in rows]
    solved, asked = [_example(row, source) for row in shots], [_example(row, source) for row in rows]
    examples, template = framed(*forms(config.prompting.asked, BARE if ready else source.form, BARE), asked, solved)
    limit = config.max_new_tokens or source.max_new_tokens
    resolved = replace(config, data=config.data or source.hub_id, shots=count, max_new_tokens=limit)
    scorer = partial(text_scores, ROUGES, references)
    return Task(config.task or "", examples, resolved, "rouge2", scorer, _READY_STOP if ready else source.stop, template)


def _example(row: Record, source: _Source) -> Example:
    return Example(row.text(row.first_column(_ARTICLES)), " " + _references(row, source)[0])


def _references(row: Record, source: _Source) -> list[str]:
    column = row.first_column(_SUMMARIES)
    texts = row.texts(column) if source.alternatives else [row.text(column)]
    return [" ".join(text.split()) for text in texts]


CNN_DM = TaskLoader(cnn_dm, accepts=("shots", "template"))
XSUM = TaskLoader(xsum, accepts=("shots", "template"))
SCITLDR = TaskLoader(scitldr, accepts=("shots", "template"))
