"""A legend below a figure that never runs over the figure's edges."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARGIN = 0.02
"""Part of the figure's width that stays free on each side."""


def legend_below(figure: "Figure", handles: Sequence[Any], labels: Sequence[str], columns: int = 6) -> int:
    """Add a legend below the axes of a figure with a constrained layout. Return its number of lines.

    The legend has at most `columns` columns, and fewer where they would be wider than the figure. Labels that are too
    wide for a single column are shortened in the middle, because names tend to differ at both ends.
    """
    columns = max(1, min(columns, len(labels)))
    while columns > 1 and _excess(figure, handles, labels, columns) > 0:
        columns -= 1
    labels = [_shortened(figure, handle, label) for handle, label in zip(handles, labels, strict=True)]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return -(-len(labels) // columns)


def _excess(figure: "Figure", handles: Sequence[Any], labels: Sequence[str], columns: int) -> float:
    """Return by how many pixels such a legend is too wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = figure.canvas if hasattr(figure.canvas, "get_renderer") else FigureCanvasAgg(figure)
    legend = figure.legend(handles, labels, loc="center", ncols=columns)
    width = legend.get_window_extent(canvas.get_renderer()).width
    legend.remove()
    return width - (1 - 2 * MARGIN) * figure.bbox.width


def _shortened(figure: "Figure", handle: Any, label: str) -> str:
    kept = len(label)
    shown = label
    while kept > 2 and _excess(figure, [handle], [shown], 1) > 0:
        kept -= 1
        shown = f"{label[: kept - kept // 2]}…{label[len(label) - kept // 2 :]}"
    return shown
