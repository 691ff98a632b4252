"""Summaries: news with the prompts of LayerSkip's evaluation (CNN/DM, 1-shot; XSUM, 0-shot), and papers in one sentence."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ...config.evaluation import TaskConfig
from ...data import Example, Record, spread
from ..metrics import ROUGES
from .pairs import text_scores
from .task import BARE, Task, TaskLoader, framed, rows_of, shots_and_rest

_CNN_DM, _XSUM, _SCITLDR = "abisee/cnn_dailymail", "EdinburghNLP/xsum", "allenai/scitldr"
_FORM = "Article: {prompt}\nSummary:"
_STOP = ("\nArticle:",)  # a base model continues with another article
_ARTICLES = ("article", "document", "source")
_SUMMARIES = ("highlights", "summary", "summary_gt", "target")
_READY_STOP = ("###",)  # for complete prompts in HELM's form, with their own shots
_AS_PARQUET = "refs/convert/parquet"  # the branch of the hub's own copy: datasets no longer runs a repository's script


def cnn_dm(config: TaskConfig) -> Task:
    return _summaries(config, _CNN_DM, {"name": "3.0.0"}, shots=1)


def xsum(config: TaskConfig) -> Task:
    return _summaries(config, _XSUM, {"revision": _AS_PARQUET})


def scitldr(config: TaskConfig) -> Task:
    """Abstracts of papers (Cachola et al., 2020). A row can have several summaries; the best counts."""
    hub = {"data_dir": "Abstract", "revision": _AS_PARQUET}
    return _summaries(config, _SCITLDR, hub, form="{prompt}\nTL;DR:", stop=("\nTL;DR:",), alternatives=True)


def _summaries(
    config: TaskConfig,
    hub_id: str,
    hub: Mapping[str, Any],
    shots: int = 0,
    form: str = _FORM,
    stop: tuple[str, ...] = _STOP,
    alternatives: bool = False,
) -> Task:
    """The shots are a file's first rows; on the hub, the first rows of the training split.

    `alternatives`: a row's summaries are several references, not the sentences of one.
    """

    def references(row: Record) -> list[str]:
        column = row.first_column(_SUMMARIES)
        return [" ".join(text.split()) for text in (row.texts(column) if alternatives else [row.text(column)])]

    def example(row: Record) -> Example:
        return Example(row.text(row.first_column(_ARTICLES)), " " + references(row)[0])

    data = str(config.data)
    rows = rows_of(data, hub_id, config.split, **hub)
    if "summary_gt" in rows[0].fields:
        shots, form, stop = 0, BARE, _READY_STOP
    count = shots if config.shots is None else config.shots
    if data == hub_id:
        first = rows_of(data, hub_id, "train", count, **hub) if count else []
    else:
        first, rows = shots_and_rest(rows, count, data)
    rows = spread(rows, config.samples)
    examples, template = framed(config.prompting.asked, form, BARE, map(example, rows), list(map(example, first)))
    scorer = partial(text_scores, ROUGES, list(map(references, rows)))
    return Task(examples, replace(config, shots=count), "rouge2", scorer, stop, template)


CNN_DM = TaskLoader(cnn_dm, ("shots", "template"), _CNN_DM)
XSUM = TaskLoader(xsum, ("shots", "template"), _XSUM, max_new_tokens=64)
SCITLDR = TaskLoader(scitldr, ("shots", "template"), _SCITLDR, max_new_tokens=64)
