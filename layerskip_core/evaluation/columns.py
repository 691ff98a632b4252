"""The figures of results and trainings: how tables show each, and how runs are compared by it."""

from dataclasses import dataclass
from typing import Literal

from .metrics import METRICS, metric_named

RESULTS = "results.json"
LOSSES = "losses.jsonl"
# Of a training's held-out rows, and of its Cost, see checkpoint.info
HELD_OUT = "held_out_perplexity"
ANSWERED = "held_out_exact_match"
OWN_AGREEMENT = "own_text_agreement"
OWN_PERPLEXITY = "own_text_perplexity"


@dataclass(frozen=True)
class Column:
    """A figure, by its name in a Result or a flat row, and its column in tables."""

    header: str
    figure: str
    # A format; `±` before it adds the interval; `ppl`: 1.2e4; `*`: a mark
    form: str = ""
    legend: str = ""
    spare_rank: int = 0  # a narrow terminal leaves out column 1 first; 0: shown always
    compared: Literal["always", "if asked", "never"] = "never"
    is_logarithmic: bool = False  # compared by ratio: a shallow exit's perplexity would hide others
    is_quality: bool = False  # left out of settings that draft: their output is plain decoding's
    # The file of the run that has it, whose rows must be the same in both runs; None: each model's
    # own texts
    source: str | None = RESULTS
    is_tabulated: bool = True  # shown in the table of a record

    @property
    def is_share(self) -> bool:
        """In 0..1, shown in percent."""
        return self.form.endswith("%")

    @property
    def plain_form(self) -> str:
        """The format where there is room, without an interval."""
        if self.is_logarithmic:
            return ".3g"
        if self.is_share:
            return ".1%"
        return ".0f" if self.form == ".0f" else ".2f"


COLUMNS = (
    Column(
        METRICS["perplexity"].short_name,
        "perplexity",
        "ppl",
        METRICS["perplexity"].legend,
        4,
        compared="always",
        is_logarithmic=True,
        is_quality=True,
    ),
    Column("", "agreement", ".1%", compared="always", is_quality=True, is_tabulated=False),
    Column("accept", "acceptance_rate", ".1%", "share of drafts accepted", compared="always"),
    Column("mean", "mean_accepted_tokens", ".1f", "accepted drafts per round", 3, "if asked"),
    Column("tok/s", "tokens_per_second", ".0f", compared="if asked"),
    Column("speed", "speedup", "±.2f", "speedup over plain decoding", compared="always"),
    Column("vs hf", "speedup_over_transformers", ".2f"),
    Column("pred", "predicted_speedup", ".2f", "", 5),
    Column(
        "same",
        "identical_outputs",
        ".0%",
        "share of outputs equal to plain decoding",
        compared="if asked",
    ),
    Column("first", "ttft_ms", ".1f", "milliseconds to the first token", 2),
    Column("MB", "peak_memory_mb", ".0f", "peak memory", 1),
    Column("", "front", "*"),
    Column("", HELD_OUT, "ppl", compared="always", is_logarithmic=True, source=LOSSES),
    Column("", ANSWERED, ".1%", compared="always", source=LOSSES),
    Column("", OWN_AGREEMENT, ".1%", compared="always", source=None),
    Column("", OWN_PERPLEXITY, "ppl", compared="always", is_logarithmic=True, source=None),
)
_BY_FIGURE = {column.figure: column for column in COLUMNS}


def column_named(figure: str) -> Column:
    """The column of a figure: one of COLUMNS, else that of a metric of this name."""
    if figure in _BY_FIGURE:
        return _BY_FIGURE[figure]
    metric = metric_named(figure)
    form = "±.1%" if metric.is_share else ".4g"
    return Column(
        metric.short_name,
        figure,
        form,
        metric.legend,
        compared="always",
        is_logarithmic=metric.lower_is_better,
    )
