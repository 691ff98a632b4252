"""An inspection as an HTML page: a row per layer, a column per token, green from the layer on where it stays correct."""

from typing import NamedTuple

from ..inspection import Inspection, TokenTrace
from .pages import render


class _Cell(NamedTuple):
    """The prediction for a token after a layer. `kind` is the CSS class, `title` is shown when hovering."""

    token: str
    kind: str
    probability: str
    title: str


class _Row(NamedTuple):
    layer: int
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
        tokens=[_visible(trace.token) for trace in inspection.tokens],
        rows=[
            _Row(layer, [_cell(trace, layer) for trace in inspection.tokens]) for layer in range(inspection.num_layers, 0, -1)
        ],
        needed=[trace.settled for trace in inspection.tokens],
    )


def _cell(trace: TokenTrace, layer: int) -> _Cell:
    prediction = trace.predictions[layer - 1]
    kind = "right" if layer >= trace.settled else "early" if prediction.token == trace.token else "wrong"
    title = f"layer {layer}: {prediction.token!r} {prediction.probability:.0%}"
    return _Cell(_visible(prediction.token), kind, f"{prediction.probability:.2f}", title)


def _visible(token: str) -> str:
    """The token with visible spaces and line ends."""
    return token.replace(" ", "\N{OPEN BOX}").replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
