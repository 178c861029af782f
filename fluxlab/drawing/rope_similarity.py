"""How attention falls off with distance under a program, as a picture (`draw_kernel`) and in numbers (`fall_off`)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fluxlab.drawing.style import GREY, MARKS, OKABE_ITO, STYLE, style, title
from fluxlab.model import Rotary, rotary_table
from fluxlab.model.groups import KeyGroups
from fluxlab.positions.view import COL, INDEX, ROW, View, kinds
from fluxlab.select.arguments import AXES
from fluxlab.select.layout import IMAGE, REFERENCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_kernel(view: View) -> "Figure":
    """How alike a rotation leaves a query and a key of one content, against their distance, for each axis.

    For axis a of width d_a, K_a(Δ) = (2 / d_a) Σ_i cos(ω_i Δ), ω_i = θ^(-2i / d_a), i = 0 … d_a / 2 - 1: the expected
    q·k in units of that at distance 0, all frequencies being equally strong (RoFormer, arXiv 2104.09864, sec. 3.4.3).
    Row and col: over image tokens Δ apart in a column or row of the *untouched* grid; after the program a mean over
    all such pairs and a band from the least to the most, read from the rotary tables, temperatures included. Dashed:
    over the frequencies of all axes. Index: pairs of an image query and a key of each kind, at their distance after the
    program, on the untouched K.
    """
    from matplotlib.figure import Figure

    widths = [dim // 2 for dim in view.context.axes_dim]
    parts = [slice(sum(widths[:a]), sum(widths[: a + 1])) for a in range(len(widths))]
    with style(STYLE):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        panels = figure.subplots(1, len(AXES), sharey=True)
        for axes, axis in zip(panels, (ROW, COL), strict=False):
            for part, of, dashes in ((slice(None), "all axes", (0, (3, 1.5))), (parts[axis], "this axis", "-")):
                distance, mean, _, _ = fall_off(view, _untouched(view), axis, part)
                axes.plot(distance, mean, color=GREY, ls=dashes, lw=3, label=f"untouched, {of}")
                distance, mean, low, high = fall_off(view, _tables(view), axis, part)
                axes.plot(distance, mean, color=OKABE_ITO["blue"], ls=dashes, lw=1.2, label=f"after, {of}")
            axes.fill_between(distance, low, high, color=OKABE_ITO["sky"], alpha=0.3, lw=0, label="after, all pairs")
            axes.set_xlabel(f"{'rows' if axis == ROW else 'columns'} from query to key")
        _index_panel(panels[-1], view, parts[INDEX])
        panels[0].set_ylabel("q·k, of that at distance 0")
        for axes, axis in zip(panels, (ROW, COL, INDEX), strict=True):
            axes.set_title(f"{AXES[axis]} (axis {axis}, {widths[axis]} frequencies)", fontsize=8)
        told = {key: said for key, said in view.told.items() if key not in ("side", "query")}
        figure.suptitle(title(view, told), x=0.01, ha="left")
        handles, labels = (a + b for a, b in zip(*(p.get_legend_handles_labels() for p in panels[1:]), strict=True))
        figure.legend(handles, labels, loc="outside lower left", ncols=4)
    return figure


Tables = tuple[Rotary, Rotary | KeyGroups]


def _untouched(view: View) -> Tables:
    return (rotary_table(view.before[None], view.context.axes_dim, view.context.theta),) * 2


def _tables(view: View) -> Tables:
    rotary = view.compiled.at(view.context.sigmas[view.step]).rotary
    return (rotary, rotary) if isinstance(rotary, Rotary) else rotary[view.block]


def fall_off(view: View, tables: Tables, axis: int, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(distance, mean, least, most), each `(2n - 1,)`, of the similarity of image tokens along a grid's axis of n.

    distance: key - query in tokens. part: which of a head's frequencies count.
    """
    rows, cols = view.context.layout.grid
    tokens = torch.arange(*view.context.layout.range(IMAGE)).reshape(rows, cols)
    lines = tokens.T if axis == ROW else tokens
    scores = _scores(tables, view.head, part, lines, lines)
    distance = torch.arange(1 - lines.shape[1], lines.shape[1])
    pairs = [scores.diagonal(d, 1, 2) for d in distance.tolist()]
    return distance, *(torch.stack([how(p) for p in pairs]) for how in (torch.mean, torch.amin, torch.amax))


def _scores(tables: Tables, head: int, part: slice, queries: Tensor, keys: Tensor) -> Tensor:
    """Similarities `(L, q, k)` of tokens `(L, q)` with `(L, k)`: the mean cosine of the differences of their angles."""
    rotary, seen = tables
    groups = seen if isinstance(seen, KeyGroups) else KeyGroups((queries.flatten(),), (seen,))
    turned = _phases(rotary, head)[queries][..., part]
    scores = torch.zeros(*queries.shape, keys.shape[-1])
    for members, table in zip(*groups, strict=True):
        found = torch.einsum("lqf,lkf->lqk", turned, _phases(table, head)[keys][..., part].conj()).real
        scores = torch.where(torch.isin(queries, members.cpu())[..., None], found / turned.shape[-1], scores)
    return scores


def _phases(table: Rotary, head: int) -> Tensor:
    """A head's table as complex numbers `(N, d/2)`."""
    cos, sin = (part[0, min(head, part.shape[1] - 1)].detach().float().cpu() for part in table)
    return torch.complex(cos, sin)


def _index_panel(axes: "Axes", view: View, part: slice, most: int = 16) -> None:
    """Where pairs of an image query (`most` of them, evenly taken) and a key of each kind fall on the index axis."""
    image = torch.arange(*view.context.layout.range(IMAGE))
    queries = image[torch.linspace(0, len(image) - 1, min(most, len(image))).long()]
    reach = 8.0
    for name, kind, start, stop in kinds(view.context.layout):
        keys = torch.arange(start, stop)
        scores = _scores(_tables(view), view.head, part, queries[None], keys[None])[0]
        places = [_ids(view, "keys", q)[keys, INDEX] - _ids(view, "queries", q)[q, INDEX] for q in queries.tolist()]
        distance = torch.stack(places)
        points = sorted(set(zip(distance.flatten().tolist(), scores.flatten().tolist(), strict=True)))
        if points:
            reach = max(reach, *(abs(d) for d, _ in points))
            marker, colour = MARKS[min(kind, REFERENCE)]
            look = {"ls": "", "marker": marker, "color": colour, "ms": 8 - 2 * min(kind, REFERENCE), "mew": 0}
            axes.plot(*zip(*points, strict=True), label=f"image to {name}", **look)
    distance = torch.linspace(-reach, reach, 401)[:, None]
    tokens = torch.zeros(401, len(AXES))
    tokens[:, INDEX] = distance[:, 0]
    table = rotary_table(tokens[None], view.context.axes_dim, view.context.theta)
    axes.plot(distance, table.cos[0, 0, :, part].mean(-1), color=GREY, lw=3, zorder=1)
    axes.set_xlabel("index from query to key")


def _ids(view: View, side: str, query: int) -> Tensor:
    sigma = view.context.sigmas[view.step]
    return view.compiled.ids(sigma, view.block, side, view.head, query=query).detach().cpu()
