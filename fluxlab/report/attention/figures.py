"""Figures of attention by block, one line per variant: distance, entropy, and attention between text and image."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fluxlab.drawing.legend import legend_below
from fluxlab.drawing.style import NO_DATES, OKABE_ITO, STYLE, style
from fluxlab.experiment.reading import Run
from fluxlab.probes import Captured

DPI = 150
PANEL = (3.1, 2.5)  # in
LEGEND_COLUMNS, LEGEND_LINE = 6, 0.17  # LEGEND_LINE in inches
COLOURS = list(zip(("black", "vermillion", "blue", "green", "orange", "purple", "sky"), "os^DvPX", strict=True))
"""Colour and marker of the first variants, the baseline first: either one identifies a line."""
HEADLINES = {"distance": "mean distance", "entropy": "entropy", "quadrants": "image → text"}
"""The panel whose mean is the summary value of a request."""


class Panel(NamedTuple):
    """One quantity against blocks. Against steps, or a single value, where the capture averaged over blocks."""

    title: str
    unit: str
    axis: str  # "block", "step" or ""
    labels: list
    values: np.ndarray  # one per label


def figure(run: Run, name: str, request: Mapping[str, Any]) -> bytes | None:
    """Return a PNG of one request over all cells, or None for a kind without a figure.

    A line is the mean of a variant's cells. Its band goes from their minimum to their maximum.
    """
    if request["kind"] not in PANELS:
        return None
    variants: dict[str, list[list[Panel]]] = {}
    for entry in run.attention:
        captured = run.captured(entry["variant"], entry["prompt"], entry["seed"])
        variants.setdefault(entry["variant"], []).append(PANELS[request["kind"]](captured, name))
    return _draw(f"{run.record['name']}: {name}", variants)


def headline(captured: Mapping[str, Captured], name: str, kind: str) -> float:
    """Return the summary value of a request in one cell: the mean over blocks of its panel in `HEADLINES`."""
    panels = {panel.title: panel for panel in PANELS[kind](captured, name)}
    return float(np.nanmean(panels[HEADLINES[kind]].values))


def _distance(captured: Mapping[str, Captured], name: str) -> list[Panel]:
    """Return mean |Δrow|, |Δcol| and distance from an image query to the image keys: moments of the histogram."""
    histogram = captured[f"{name}.histogram"]
    down, right = (np.abs(np.asarray(histogram.labels(f"delta_{part}"), dtype=float)) for part in ("row", "col"))
    axis, labels, p = _by_block(histogram, ("delta_row", "delta_col"))
    total = p.sum((1, 2))
    parts = (("mean |Δrow|", down[:, None]), ("mean |Δcol|", right), ("mean distance", np.hypot(down[:, None], right)))
    return [Panel(title, "tokens", axis, labels, (p * length).sum((1, 2)) / total) for title, length in parts]


def _entropy(captured: Mapping[str, Captured], name: str) -> list[Panel]:
    axis, labels, values = _by_block(captured[name], ())
    return [Panel("entropy", "nats", axis, labels, values)]


def _quadrants(captured: Mapping[str, Captured], name: str) -> list[Panel]:
    quadrants = captured[name]
    axis, labels, values = _by_block(quadrants, ("from", "to"))
    return [
        Panel(f"{query} → {key}", "share of attention", axis, labels, values[:, i, j])
        for i, query in enumerate(quadrants.labels("from"))
        for j, key in enumerate(quadrants.labels("to"))
    ]


PANELS: Mapping[str, Callable[[Mapping[str, Captured], str], list[Panel]]] = {
    "distance": _distance,
    "entropy": _entropy,
    "quadrants": _quadrants,
}
"""The kinds of request that have a figure."""


def _by_block(captured: Captured, kept: Sequence[str]) -> tuple[str, list, np.ndarray]:
    """Return (axis, its labels, `(blocks, *kept)`), averaged over all other axes; by step if there are no blocks."""
    axis = next((axis for axis in ("block", "step") if axis in captured.axes), "")
    front = [captured.axes.index(part) for part in ((axis,) if axis else ()) + tuple(kept)]
    rest = tuple(n for n in range(captured.values.ndim) if n not in front)
    values = np.asarray(captured.values, dtype=float).transpose([*front, *rest])
    values = np.nanmean(values, tuple(range(len(front), values.ndim)))
    return axis, captured.labels(axis) if axis else ["all"], values if axis else values[None]


def _draw(title: str, variants: Mapping[str, list[list[Panel]]]) -> bytes:
    from matplotlib.figure import Figure

    first = next(iter(variants.values()))[0]
    columns = next(n for n in (3, 2, 1) if len(first) % n == 0) if len(first) != 2 else 2
    rows = len(first) // columns
    width, height = max(columns * PANEL[0], 4.6), rows * PANEL[1] + 0.65
    with style({**STYLE, "axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 7}):
        drawn = Figure(figsize=(width, height), layout="constrained")
        panels = drawn.subplots(rows, columns, squeeze=False)
        for n, axes in enumerate(panels.flat):
            for i, (variant, cells) in enumerate(variants.items()):
                _line(axes, variant, [cell[n] for cell in cells], i, len(variants))
            panel = first[n]
            axes.set_title(panel.title, fontsize=8)
            axes.set_ylabel(panel.unit)
            axes.set_ylim(*((-0.02, 1.02) if panel.unit.startswith("share") else (0, None)))
            _ticks(axes, panel)
        lines = legend_below(drawn, *panels.flat[0].get_legend_handles_labels(), columns=LEGEND_COLUMNS)
        drawn.set_figheight(height + lines * LEGEND_LINE)
        cells = max(len(cells) for cells in variants.values())
        spread = f"mean of {cells} cells, band: minimum to maximum" if cells > 1 else "1 cell"
        drawn.suptitle(f"{title}\n{spread}" if len(title) > 30 else f"{title}, {spread}", fontsize=8)
        content = io.BytesIO()
        drawn.savefig(content, format="png", dpi=DPI, metadata=NO_DATES[".png"])
    return content.getvalue()


def _line(axes: Any, variant: str, cells: Sequence[Panel], i: int, count: int) -> None:
    values = np.stack([cell.values for cell in cells])
    mean, low, high = values.mean(0), values.min(0), values.max(0)
    colour, marker = _colour_and_marker(i, count)
    if len(mean) == 1:
        axes.errorbar([i], mean, [mean - low, high - mean], fmt=marker, color=colour, label=variant, capsize=2)
        return
    x = np.arange(len(mean))
    order = 3 if i else 4  # the baseline on top
    axes.plot(x, mean, color=colour, label=variant, marker=marker, markersize=3, linewidth=1.2, zorder=order)
    axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def _colour_and_marker(i: int, count: int) -> tuple[Any, str]:
    """Return a variant's (colour, marker). More variants than `COLOURS` go along a colormap; the baseline is black."""
    import matplotlib

    if i == 0 or count <= len(COLOURS):
        name, marker = COLOURS[i]
        return OKABE_ITO[name], marker
    return matplotlib.colormaps["viridis"]((i - 1) / (count - 2)), COLOURS[i % len(COLOURS)][1]


def _ticks(axes: Any, panel: Panel) -> None:
    if len(panel.labels) == 1:
        axes.set_xticks([])
        return
    step = -(-len(panel.labels) // 12)
    axes.set_xticks(range(0, len(panel.labels), step), [str(label) for label in panel.labels[::step]])
    axes.set_xlabel(panel.axis)
