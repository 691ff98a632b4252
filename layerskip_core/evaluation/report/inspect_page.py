"""An inspection as an HTML page: a row per layer, a column per token, green from the layer on where it stays correct."""

from collections.abc import Iterator
from typing import NamedTuple

from ..inspection import Inspection, LayerPrediction, TokenTrace, visible
from .pages import render


class _Cell(NamedTuple):
    """The prediction for a token after a layer. `kind` is the CSS class, `title` is shown when hovering."""

    token: str
    kind: str
    probability: str
    title: str


class _Row(NamedTuple):
    name: str
    cells: list[_Cell]


def inspection_page(inspection: Inspection) -> str:
    """The page, in one self-contained file."""
    return render(
        "inspection",
        model=inspection.model,
        prompt=inspection.prompt,
        answer="".join(trace.token for trace in inspection.tokens),
        mean_layers=f"{inspection.mean_layers:.1f}",
        num_layers=inspection.num_layers,
        tokens=[visible(trace.token) for trace in inspection.tokens],
        rows=list(_rows(inspection)),
        has_blocks=any(trace.blocks for trace in inspection.tokens),
        needed=[trace.settled for trace in inspection.tokens],
    )


def _rows(inspection: Inspection) -> Iterator[_Row]:
    """Of every layer, the last one first; that of an exit block is above the layer it follows."""
    tokens = inspection.tokens
    for layer in range(inspection.num_layers, 0, -1):
        name = f"block {layer}"
        if any(layer in trace.blocks for trace in tokens):
            yield _Row(name, [_cell(name, trace, trace.blocks[layer], False) for trace in tokens])
        yield _Row(
            str(layer),
            [_cell(f"layer {layer}", trace, trace.predictions[layer - 1], layer >= trace.settled) for trace in tokens],
        )


def _cell(where: str, trace: TokenTrace, prediction: LayerPrediction, stays: bool) -> _Cell:
    kind = "right" if stays else "early" if prediction.token == trace.token else "wrong"
    title = f"{where}: {prediction.token!r} {prediction.probability:.0%}"
    return _Cell(visible(prediction.token), kind, f"{prediction.probability:.2f}", title)
