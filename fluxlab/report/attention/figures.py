"""Figures of what attention does block by block, a line a variant: how far it looks, how evenly, at text or image."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fluxlab.drawing.token_layout import NO_DATES, OKABE_ITO, STYLE, style
from fluxlab.experiment.reading import Run
from fluxlab.probes import Captured

DPI = 150
PANEL = (3.1, 2.5)  # in
LEGEND_COLUMNS, LEGEND_LINE = 6, 0.17  # in a line
COLOURS = [OKABE_ITO[name] for name in ("vermillion", "blue", "green", "orange", "purple", "sky")]
HEADLINES = {"distance": "mean distance", "entropy": "entropy", "quadrants": "image → text"}


class Panel(NamedTuple):
    """A quantity over blocks (or steps, or nothing, where the capture has averaged over them)."""

    title: str
    unit: str
    axis: str  # block, step or ""
    labels: list
    values: np.ndarray  # one a label


def figure(run: Run, name: str, request: Mapping[str, Any]) -> bytes | None:
    """A PNG of one request over all cells, None for a kind that has no figure.

    A line is a variant's mean over cells, its band reaches from the least to the greatest cell.
    """
    if request["kind"] not in KINDS:
        return None
    variants: dict[str, list[list[Panel]]] = {}
    for entry in run.attention:
        captured = run.captured(entry["variant"], entry["prompt"], entry["seed"])
        variants.setdefault(entry["variant"], []).append(KINDS[request["kind"]](captured, name))
    return _draw(f"{run.record['name']}: {name}", variants)


def headline(captured: Mapping[str, Captured], name: str, kind: str) -> float:
    """The one number that stands for a request of a cell, mean over blocks."""
    panels = {panel.title: panel for panel in KINDS[kind](captured, name)}
    return float(np.nanmean(panels[HEADLINES[kind]].values))


def _distance(captured: Mapping[str, Captured], name: str) -> list[Panel]:
    """Mean |Δrow|, |Δcol| and distance of what image tokens look at in the image: moments of the histogram."""
    one = captured[f"{name}.histogram"]
    down, right = (np.abs(np.asarray(one.labels(f"delta_{part}"), dtype=float)) for part in ("row", "col"))
    axis, labels, p = _over(one, ("delta_row", "delta_col"))
    seen = p.sum((1, 2))
    parts = (("mean |Δrow|", down[:, None]), ("mean |Δcol|", right), ("mean distance", np.hypot(down[:, None], right)))
    return [Panel(title, "tokens", axis, labels, (p * far).sum((1, 2)) / seen) for title, far in parts]


def _entropy(captured: Mapping[str, Captured], name: str) -> list[Panel]:
    axis, labels, values = _over(captured[name], ())
    return [Panel("entropy", "nats", axis, labels, values)]


def _quadrants(captured: Mapping[str, Captured], name: str) -> list[Panel]:
    one = captured[name]
    axis, labels, values = _over(one, ("from", "to"))
    sides = one.labels("from"), one.labels("to")
    return [
        Panel(f"{a} → {b}", "share of attention", axis, labels, values[:, i, j])
        for i, a in enumerate(sides[0])
        for j, b in enumerate(sides[1])
    ]


KINDS: Mapping[str, Callable[[Mapping[str, Captured], str], list[Panel]]] = {
    "distance": _distance,
    "entropy": _entropy,
    "quadrants": _quadrants,
}


def _over(one: Captured, own: Sequence[str]) -> tuple[str, list, np.ndarray]:
    """An array as `(blocks, *own)`, mean over all else; over steps instead where blocks were averaged over."""
    axis = next((axis for axis in ("block", "step") if axis in one.axes), "")
    kept = [one.axes.index(part) for part in ((axis,) if axis else ()) + tuple(own)]
    rest = tuple(n for n in range(one.values.ndim) if n not in kept)
    values = np.nanmean(
        np.asarray(one.values, dtype=float).transpose([*kept, *rest]), tuple(range(len(kept), len(kept) + len(rest)))
    )
    return axis, one.labels(axis) if axis else ["all"], values if axis else values[None]


def _draw(title: str, variants: Mapping[str, list[list[Panel]]]) -> bytes:
    from matplotlib.figure import Figure

    first = next(iter(variants.values()))[0]
    columns = next(n for n in (3, 2, 1) if len(first) % n == 0) if len(first) != 2 else 2
    rows = len(first) // columns
    foot = 0.15 + LEGEND_LINE * -(-len(variants) // LEGEND_COLUMNS)
    width = max(columns * PANEL[0], 4.6)
    with style({**STYLE, "axes.spines.top": False, "axes.spines.right": False}):
        drawn = Figure(figsize=(width, rows * PANEL[1] + foot + 0.5), layout="constrained")
        panels = drawn.subplots(rows, columns, squeeze=False)
        for n, axes in enumerate(panels.flat):
            for i, (variant, cells) in enumerate(variants.items()):
                _line(axes, variant, [cell[n] for cell in cells], i, len(variants))
            panel = first[n]
            axes.set_title(panel.title, fontsize=8)
            axes.set_ylabel(panel.unit)
            axes.set_ylim(*((-0.02, 1.02) if panel.unit.startswith("share") else (0, None)))
            _ticks(axes, panel)
        handles, labels = panels.flat[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=min(LEGEND_COLUMNS, len(variants)), fontsize=7)
        counts = {len(cells) for cells in variants.values()}
        drawn.suptitle(f"{title}, mean of {max(counts)} cells, band from the least to the greatest", fontsize=8)
        content = io.BytesIO()
        drawn.savefig(content, format="png", dpi=DPI, metadata=NO_DATES[".png"])
    return content.getvalue()


def _line(axes: Any, variant: str, cells: Sequence[Panel], i: int, count: int) -> None:
    values = np.stack([cell.values for cell in cells])
    mean, low, high = values.mean(0), values.min(0), values.max(0)
    colour = _colour(i, count)
    if len(mean) == 1:
        axes.errorbar([i], mean, [mean - low, high - mean], fmt="o", color=colour, label=variant, capsize=2)
        return
    x = np.arange(len(mean))
    axes.plot(x, mean, color=colour, label=variant, marker="o", markersize=2.5, linewidth=1.2, zorder=3 if i else 4)
    axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def _colour(i: int, count: int) -> Any:
    """The baseline black; a few variants in colours that can be told apart, many along a scale."""
    import matplotlib

    if i == 0:
        return OKABE_ITO["black"]
    if count - 1 <= len(COLOURS):
        return COLOURS[i - 1]
    return matplotlib.colormaps["viridis"]((i - 1) / (count - 2))


def _ticks(axes: Any, panel: Panel) -> None:
    if len(panel.labels) == 1:
        axes.set_xticks([])
        return
    every = -(-len(panel.labels) // 12)
    axes.set_xticks(range(0, len(panel.labels), every), [str(label) for label in panel.labels[::every]])
    axes.set_xlabel(panel.axis)
