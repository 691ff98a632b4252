"""A plot of a run's losses with a curve for every exit."""

import io
from collections.abc import Sequence

from .progress import LossHistory

_POINTS = 200  # per curve: a long run is drawn as means over stretches of steps


def loss_plot(history: LossHistory) -> bytes:
    """A PNG of the loss of each exit over the steps: shallow exits dark, deep exits bright, the last layer black.

    Losses on held-out rows are dots.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    layers = sorted(history.latest)
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = colormaps["viridis"]
    for layer in layers:
        seen = [(step.step, step.exits[layer]) for step in history.steps if layer in step.exits]
        held_out = [(step.step, step.validation[layer]) for step in history.steps if step.validation]
        last = layer == layers[-1]
        colour = "black" if last else colours((layer - 1) / max(layers))
        axes.plot([step for step, _ in held_out], [loss for _, loss in held_out], ".", color=colour)
        axes.plot(
            *_thinned(seen), color=colour, linewidth=2 if last else 1,
            marker="." if len(seen) == 1 else None, label=f"last layer ({layer})" if last else None,
        )  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.legend()
    if len(layers) > 1:
        figure.colorbar(ScalarMappable(Normalize(1, max(layers)), colours), ax=axes, label="exit layer")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _thinned(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Steps and losses, as means over at most _POINTS stretches."""
    width = -(-len(points) // _POINTS)
    stretches = [points[start : start + width] for start in range(0, len(points), width)]
    means = [[sum(values) / len(stretch) for values in zip(*stretch, strict=True)] for stretch in stretches]
    return [step for step, _ in means], [loss for _, loss in means]
