"""A program as pictures, with no model at hand: where its tokens stand, and how attention falls off with distance.

`layout(program)` and `kernel(program)` give figures, `write_figure` writes one. With a model's own prompt, sizes and
schedule: `draw_layout(view(program, context))`. Figures have no pyplot state; matplotlib loads with the first.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fluxlab.drawing.rope_similarity import draw_kernel, fall_off
from fluxlab.drawing.style import GREY, MARKS, NO_DATES, OKABE_ITO, STYLE, check_ending, style, title, write_figure
from fluxlab.positions.program import Program
from fluxlab.positions.view import COL, FLUX, INDEX, ROW, View, kinds, places, sequence, summary, view
from fluxlab.select.layout import IMAGE, REFERENCE, TEXT
from fluxlab.select.words import Prompt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "EDGES",
    "FLUX",
    "GREY",
    "MARKS",
    "NO_DATES",
    "OKABE_ITO",
    "STYLE",
    "View",
    "check_ending",
    "draw_kernel",
    "draw_layout",
    "fall_off",
    "kernel",
    "kinds",
    "layout",
    "sequence",
    "style",
    "summary",
    "view",
    "write_figure",
]

EDGES = {"top row of the image": OKABE_ITO["vermillion"], "left column of the image": OKABE_ITO["green"]}


def layout(
    program: Program | Mapping[str, Any] | None,
    *,
    grid: tuple[int, int] = (16, 16),
    text: int = 24,
    prompt: Prompt | str | None = None,
    axes_dim: Sequence[int] = FLUX.axes_dim,
    theta: float = FLUX.theta,
    step: int | None = None,
    block: int | None = None,
    side: str | None = None,
    head: int | None = None,
) -> "Figure":
    """`draw_layout` of a program on a `sequence`, where it acts first or at the step, block, side and head given."""
    context = sequence(grid=grid, text=text, prompt=prompt, axes_dim=axes_dim, theta=theta)
    return draw_layout(view(program, context, step=step, block=block, side=side, head=head))


def kernel(
    program: Program | Mapping[str, Any] | None,
    *,
    grid: tuple[int, int] = (16, 16),
    text: int = 24,
    prompt: Prompt | str | None = None,
    axes_dim: Sequence[int] = FLUX.axes_dim,
    theta: float = FLUX.theta,
    step: int | None = None,
    block: int | None = None,
    head: int | None = None,
) -> "Figure":
    """`draw_kernel` of a program on a `sequence`, where it acts first or at the step, block and head given."""
    context = sequence(grid=grid, text=text, prompt=prompt, axes_dim=axes_dim, theta=theta)
    return draw_kernel(view(program, context, step=step, block=block, head=head))


def draw_layout(view: View) -> "Figure":
    """Every token at (col, row) after the program, over its untouched place in grey.

    Lines join neighbours of the image, its top row and left column in colours of their own, so that a stretched, turned
    or mirrored grid is seen as such. Axis 0 is the colour of the points where it varies. Places that hold several
    tokens are named while they are few. Each kind of tokens is a scatter of its own, labelled with it.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    row, col, index = (view.after[:, axis].tolist() for axis in (ROW, COL, INDEX))
    varies = len(set(index)) > 1
    sequence, handles = view.context.layout, []
    size = min(5.0, 120 / max(max(grid) for grid in sequence.grids))  # points across
    with style(STYLE):
        figure = Figure(figsize=(7.2, 6.4), layout="constrained")
        axes = figure.add_subplot(aspect="equal", adjustable="datalim", xlabel="col", ylabel="row")
        axes.scatter(view.before[:, COL], view.before[:, ROW], size**2 / 2, GREY, lw=0, label="untouched", zorder=1)
        for name, kind, start, stop in kinds(sequence):
            marker, colour = MARKS[min(kind, REFERENCE)]
            if kind != TEXT:
                _mesh(axes, view.before[start:stop], sequence.grids[kind - IMAGE], GREY, "untouched lines")
                _mesh(axes, view.after[start:stop], sequence.grids[kind - IMAGE], "0.3", f"{name} lines")
            points = axes.scatter(
                col[start:stop],
                row[start:stop],
                (max(6.0, 1.5 * size) if kind == TEXT else size) ** 2,
                index[start:stop] if varies else colour,
                marker=marker,
                cmap="cividis" if varies else None,
                vmin=min(index) if varies else None,
                vmax=max(index) if varies else None,
                lw=0.1 * size,
                edgecolors="black" if kind == TEXT or varies else "none",
                label=name,
                zorder=4 if kind == TEXT else 3,
            )
            said = f"{name}: {summary(view.after[start:stop])}"
            handles.append(Line2D([], [], ls="", marker=marker, color="0.4" if varies else colour, label=said))
        handles.append(Line2D([], [], ls="", marker=".", color=GREY, label="untouched places"))
        handles += [Line2D([], [], color=colour, label=edge) for edge, colour in EDGES.items()]
        if varies:
            few = sorted(set(index)) if len(set(index)) <= 6 else None
            figure.colorbar(points, label="index (axis 0)", shrink=0.7, ticks=few)
        _name_piles(axes, view)
        for side in (axes.xaxis, axes.yaxis):
            side.get_major_locator().set_params(integer=True)
        axes.margins(0.08)
        axes.invert_yaxis()
        figure.suptitle(title(view, view.told), x=0.01, ha="left")
        figure.legend(handles=handles, loc="outside lower left", ncols=2)
    return figure


def _mesh(axes: "Axes", ids: Tensor, grid: tuple[int, int], colour: str, label: str) -> None:
    from matplotlib.collections import LineCollection

    points = ids[:, [COL, ROW]].reshape(*grid, 2).numpy()
    lines = [*points, *points.swapaxes(0, 1)]
    axes.add_collection(LineCollection(lines, colors=colour, lw=0.4, alpha=0.6, label=label, zorder=1.5))
    if label == "image lines":
        for line, (edge, chosen) in zip((points[0], points[:, 0]), EDGES.items(), strict=True):
            axes.plot(*line.T, color=chosen, lw=1.6, label=edge, zorder=2)


def _name_piles(axes: "Axes", view: View, most: int = 4) -> None:
    """Say how many tokens stand in a place, where no more than `most` places hold several of a kind."""
    stand = places(view.after)
    piles: dict[tuple[float, float], dict[str, list[float]]] = {}
    for name, _, start, stop in kinds(view.context.layout):
        for token in range(start, stop):
            piles.setdefault(stand[token], {}).setdefault(name, []).append(view.after[token, INDEX].item())
    piles = {place: held for place, held in piles.items() if any(len(found) > 1 for found in held.values())}
    middle = (view.after[:, COL].amin() + view.after[:, COL].amax()).item() / 2
    for (row, col), held in piles.items() if len(piles) <= most else ():
        indices = sorted(index for found in held.values() for index in found)
        more = f", index {indices[0]:.4g} to {indices[-1]:.4g}" if indices[-1] > indices[0] else ""
        counts = " + ".join(f"{len(found)} {name}" for name, found in sorted(held.items()))
        axes.annotate(
            f"{counts} tokens at ({row:.4g}, {col:.4g}){more}",
            (col, row),
            xytext=(-8 if col > middle else 8, 9),
            textcoords="offset points",
            ha="right" if col > middle else "left",
            bbox={"boxstyle": "round,pad=0.2", "fc": "white", "ec": "0.5", "lw": 0.5},
            arrowprops={"arrowstyle": "-", "lw": 0.5},
            zorder=5,
        )
