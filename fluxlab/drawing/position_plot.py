"""Plots of a program without a model: the positions of its tokens, and RoPE similarity against distance.

`position_plot(program)` and `similarity_plot(program)` return figures, and `write_figure` writes one. With a model's
own prompt, sizes and schedule: `draw_positions(program_at_step(program, context))`. Figures have no pyplot state, and
matplotlib is imported with the first one.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fluxlab.drawing.rope_similarity import draw_similarity, similarity_by_distance
from fluxlab.drawing.style import GREY, MARKS, NO_DATES, OKABE_ITO, STYLE, check_ending, style, title, write_figure
from fluxlab.positions.at_step import (
    COL,
    FLUX,
    INDEX,
    ROW,
    ProgramAtStep,
    program_at_step,
    rounded,
    sequence,
    summary,
    token_groups,
)
from fluxlab.positions.program import Program
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
    "ProgramAtStep",
    "check_ending",
    "draw_positions",
    "draw_similarity",
    "position_plot",
    "program_at_step",
    "sequence",
    "similarity_by_distance",
    "similarity_plot",
    "style",
    "summary",
    "token_groups",
    "write_figure",
]

EDGES = {"top row of the image": OKABE_ITO["vermillion"], "left column of the image": OKABE_ITO["green"]}


def position_plot(
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
    """Return `draw_positions` of a program on a `sequence`, at the given step, block, side and head.

    The default is the first step, block, side and head where the program acts.
    """
    context = sequence(grid=grid, text=text, prompt=prompt, axes_dim=axes_dim, theta=theta)
    return draw_positions(program_at_step(program, context, step=step, block=block, side=side, head=head))


def similarity_plot(
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
    """Return `draw_similarity` of a program on a `sequence`, at the given step, block and head.

    The default is the first step, block and head where the program acts.
    """
    context = sequence(grid=grid, text=text, prompt=prompt, axes_dim=axes_dim, theta=theta)
    return draw_similarity(program_at_step(program, context, step=step, block=block, head=head))


def draw_positions(state: ProgramAtStep) -> "Figure":
    """Draw every token at (col, row) after the program, over its unchanged position in grey.

    Lines join neighbouring image tokens. The top row and the left column have colours of their own, which shows whether
    the grid is stretched, rotated or mirrored. Where the index axis varies, it is the colour of the points. Positions
    with several tokens are annotated if they are few. Each kind of token is a scatter with its name as label.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    row, col, index = (state.after[:, axis].tolist() for axis in (ROW, COL, INDEX))
    varies = len(set(index)) > 1
    layout, handles = state.context.layout, []
    size = min(5.0, 120 / max(max(grid) for grid in layout.grids))  # in points
    with style(STYLE):
        figure = Figure(figsize=(7.2, 6.4), layout="constrained")
        axes = figure.add_subplot(aspect="equal", adjustable="datalim", xlabel="col", ylabel="row")
        axes.scatter(state.before[:, COL], state.before[:, ROW], size**2 / 2, GREY, lw=0, label="unchanged", zorder=1)
        for name, kind, start, stop in token_groups(layout):
            marker, colour = MARKS[min(kind, REFERENCE)]
            if kind != TEXT:
                _mesh(axes, state.before[start:stop], layout.grids[kind - IMAGE], GREY, "unchanged lines")
                _mesh(axes, state.after[start:stop], layout.grids[kind - IMAGE], "0.3", f"{name} lines")
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
            label = f"{name}: {summary(state.after[start:stop])}"
            handles.append(Line2D([], [], ls="", marker=marker, color="0.4" if varies else colour, label=label))
        handles.append(Line2D([], [], ls="", marker=".", color=GREY, label="unchanged positions"))
        handles += [Line2D([], [], color=colour, label=edge) for edge, colour in EDGES.items()]
        if varies:
            few = sorted(set(index)) if len(set(index)) <= 6 else None
            figure.colorbar(points, label="index (axis 0)", shrink=0.7, ticks=few)
        _annotate_piles(axes, state)
        for side in (axes.xaxis, axes.yaxis):
            side.get_major_locator().set_params(integer=True)
        axes.margins(0.08)
        axes.invert_yaxis()
        figure.suptitle(title(state.program, state.labels), x=0.01, ha="left")
        figure.legend(handles=handles, loc="outside lower left", ncols=2)
    return figure


def _mesh(axes: "Axes", ids: Tensor, grid: tuple[int, int], colour: str, label: str) -> None:
    from matplotlib.collections import LineCollection

    points = ids[:, [COL, ROW]].reshape(*grid, 2).numpy()
    lines = [*points, *points.swapaxes(0, 1)]
    axes.add_collection(LineCollection(lines, colors=colour, lw=0.4, alpha=0.6, label=label, zorder=1.5))
    if label == "image lines":
        for line, (edge, edge_colour) in zip((points[0], points[:, 0]), EDGES.items(), strict=True):
            axes.plot(*line.T, color=edge_colour, lw=1.6, label=edge, zorder=2)


def piles(state: ProgramAtStep, most: int = 4) -> list[tuple[float, float, str]]:
    """Return (row, col, description) of positions that hold several tokens of a kind, if they are at most `most`."""
    positions = rounded(state.after)
    found: dict[tuple[float, float], dict[str, list[float]]] = {}
    for name, _, start, stop in token_groups(state.context.layout):
        for token in range(start, stop):
            found.setdefault(positions[token], {}).setdefault(name, []).append(state.after[token, INDEX].item())
    found = {position: groups for position, groups in found.items() if any(len(ids) > 1 for ids in groups.values())}
    described = []
    for (row, col), groups in found.items() if len(found) <= most else ():
        indices = sorted(index for ids in groups.values() for index in ids)
        index_range = f", index {indices[0]:.4g} to {indices[-1]:.4g}" if indices[-1] > indices[0] else ""
        counts = " + ".join(f"{len(ids)} {name}" for name, ids in sorted(groups.items()))
        described.append((row, col, f"{counts} tokens at ({row:.4g}, {col:.4g}){index_range}"))
    return described


def _annotate_piles(axes: "Axes", state: ProgramAtStep) -> None:
    middle = (state.after[:, COL].amin() + state.after[:, COL].amax()).item() / 2
    for row, col, text in piles(state):
        axes.annotate(
            text,
            (col, row),
            xytext=(-8 if col > middle else 8, 9),
            textcoords="offset points",
            ha="right" if col > middle else "left",
            bbox={"boxstyle": "round,pad=0.2", "fc": "white", "ec": "0.5", "lw": 0.5},
            arrowprops={"arrowstyle": "-", "lw": 0.5},
            zorder=5,
        )
