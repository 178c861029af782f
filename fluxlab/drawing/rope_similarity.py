"""RoPE similarity against distance under a program: the figure (`draw_similarity`) and the numbers."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fluxlab.drawing.style import GREY, MARKS, OKABE_ITO, STYLE, style, title
from fluxlab.model import Rotary, rotary_table
from fluxlab.model.groups import KeyGroups
from fluxlab.model.varied import Varied, plain_keys
from fluxlab.positions.at_step import COL, INDEX, ROW, ProgramAtStep, token_groups
from fluxlab.select.arguments import AXES
from fluxlab.select.layout import IMAGE, REFERENCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Tables = tuple[Rotary, Rotary | KeyGroups]
"""The tables of queries and keys."""


def draw_similarity(state: ProgramAtStep) -> "Figure":
    """Draw the similarity of a rotated query and a rotated key with the same content, against distance on each axis.

    For axis a of width d_a, S_a(Δ) = (2 / d_a) Σ_i cos(ω_i Δ), ω_i = θ^(-2i / d_a), i = 0 … d_a / 2 - 1. It is the
    expected q·k in units of its value at distance 0, if all frequencies are equally strong (RoFormer, arXiv 2104.09864,
    sec. 3.4.3).

    Row and col: image tokens that are Δ apart in a column or row of the *unchanged* grid. After the program the line is
    the mean over all such pairs, and the band extends from the smallest to the largest. Both are computed from the
    rotary tables, so they include temperatures. Dashed: over the frequencies of all axes.
    Index: pairs of an image query and a key of each kind, at their distance after the program, on the unchanged S.
    """
    from matplotlib.figure import Figure

    widths = [dim // 2 for dim in state.context.axes_dim]
    parts = [slice(sum(widths[:a]), sum(widths[: a + 1])) for a in range(len(widths))]
    with style(STYLE):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        panels = figure.subplots(1, len(AXES), sharey=True)
        for axes, axis in zip(panels, (ROW, COL), strict=False):
            for part, name, dashes in ((slice(None), "all axes", (0, (3, 1.5))), (parts[axis], "this axis", "-")):
                distance, mean, _, _ = similarity_by_distance(state, _unchanged_tables(state), axis, part)
                axes.plot(distance, mean, color=GREY, ls=dashes, lw=3, label=f"unchanged, {name}")
                distance, mean, low, high = similarity_by_distance(state, program_tables(state), axis, part)
                axes.plot(distance, mean, color=OKABE_ITO["blue"], ls=dashes, lw=1.2, label=f"after, {name}")
            axes.fill_between(distance, low, high, color=OKABE_ITO["sky"], alpha=0.3, lw=0, label="after, all pairs")
            axes.set_xlabel(f"{'rows' if axis == ROW else 'columns'} from query to key")
        _draw_index_panel(panels[-1], state, parts[INDEX])
        panels[0].set_ylabel("q·k relative to distance 0")
        for axes, axis in zip(panels, (ROW, COL, INDEX), strict=True):
            axes.set_title(f"{AXES[axis]} (axis {axis}, {widths[axis]} frequencies)", fontsize=8)
        labels = {key: label for key, label in state.labels.items() if key not in ("side", "query")}
        figure.suptitle(title(state.program, labels), x=0.01, ha="left")
        handles, names = (a + b for a, b in zip(*(p.get_legend_handles_labels() for p in panels[1:]), strict=True))
        figure.legend(handles, names, loc="outside lower left", ncols=4)
    return figure


def _unchanged_tables(state: ProgramAtStep) -> Tables:
    return (rotary_table(state.before[None], state.context.axes_dim, state.context.theta),) * 2


def program_tables(state: ProgramAtStep) -> Tables:
    """Return the tables of queries and keys after the program. Of several windows, those of the first."""
    rotary = state.compiled.at(state.context.sigmas[state.step]).rotary
    queries, keys = (rotary, rotary) if isinstance(rotary, Rotary) else rotary[state.block]
    if isinstance(keys, Varied) and keys.variations[0].windows:
        return keys.variations[0].windows[0]
    return queries, plain_keys(keys)


def similarity_by_distance(
    state: ProgramAtStep, tables: Tables, axis: int, part: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (distance, mean, smallest, largest), each `(2n - 1,)`: similarity of image tokens along a grid axis of n.

    distance: key - query in tokens. part: the frequencies of a head to use.
    """
    rows, cols = state.context.layout.grid
    tokens = torch.arange(*state.context.layout.range(IMAGE)).reshape(rows, cols)
    lines = tokens.T if axis == ROW else tokens
    scores = _similarities(tables, state.head, part, lines, lines)
    distance = torch.arange(1 - lines.shape[1], lines.shape[1])
    pairs = [scores.diagonal(d, 1, 2) for d in distance.tolist()]
    return distance, *(torch.stack([reduce(p) for p in pairs]) for reduce in (torch.mean, torch.amin, torch.amax))


def _similarities(tables: Tables, head: int, part: slice, queries: Tensor, keys: Tensor) -> Tensor:
    """Return `(L, q, k)` for tokens `(L, q)` with `(L, k)`: the mean cosine of the differences of their angles."""
    query_table, key_tables = tables
    groups = key_tables if isinstance(key_tables, KeyGroups) else KeyGroups((queries.flatten(),), (key_tables,))
    query_phases = _phases(query_table, head)[queries][..., part]
    scores = torch.zeros(*queries.shape, keys.shape[-1])
    for members, table in zip(groups.queries, groups.tables, strict=True):
        sums = torch.einsum("lqf,lkf->lqk", query_phases, _phases(table, head)[keys][..., part].conj()).real
        in_group = torch.isin(queries, members.cpu())[..., None]
        scores = torch.where(in_group, sums / query_phases.shape[-1], scores)
    return scores


def _phases(table: Rotary, head: int) -> Tensor:
    """Return the table of a head as complex numbers `(N, d/2)`."""
    cos, sin = (part[0, min(head, part.shape[1] - 1)].detach().float().cpu() for part in table)
    return torch.complex(cos, sin)


def _draw_index_panel(axes: "Axes", state: ProgramAtStep, part: slice, most: int = 16) -> None:
    """Draw pairs of an image query (at most `most` of them, evenly spaced) and a key of each kind."""
    image = torch.arange(*state.context.layout.range(IMAGE))
    queries = image[torch.linspace(0, len(image) - 1, min(most, len(image))).long()]
    reach = 8.0
    for name, kind, start, stop in token_groups(state.context.layout):
        keys = torch.arange(start, stop)
        scores = _similarities(program_tables(state), state.head, part, queries[None], keys[None])[0]
        distances = [
            _ids(state, "keys", q)[keys, INDEX] - _ids(state, "queries", q)[q, INDEX] for q in queries.tolist()
        ]
        distance = torch.stack(distances)
        points = sorted(set(zip(distance.flatten().tolist(), scores.flatten().tolist(), strict=True)))
        if points:
            reach = max(reach, *(abs(d) for d, _ in points))
            marker, colour = MARKS[min(kind, REFERENCE)]
            size = 8 - 2 * min(kind, REFERENCE)
            axes.plot(
                *zip(*points, strict=True), label=f"image to {name}", ls="", marker=marker, color=colour, ms=size, mew=0
            )
    distance = torch.linspace(-reach, reach, 401)[:, None]
    tokens = torch.zeros(401, len(AXES))
    tokens[:, INDEX] = distance[:, 0]
    table = rotary_table(tokens[None], state.context.axes_dim, state.context.theta)
    axes.plot(distance, table.cos[0, 0, :, part].mean(-1), color=GREY, lw=3, zorder=1)
    axes.set_xlabel("index from query to key")


def _ids(state: ProgramAtStep, side: str, query: int) -> Tensor:
    sigma = state.context.sigmas[state.step]
    return state.compiled.ids(sigma, state.block, side, state.head, query=query).detach().cpu()
