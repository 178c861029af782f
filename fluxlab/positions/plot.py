"""A program as pictures, with no model at hand: where its tokens stand, and how attention falls off with distance.

`layout(program)` and `kernel(program)` give figures, `write_figure` writes one. With a model's own prompt, sizes and
schedule: `draw_layout(view(program, context))`. Figures have no pyplot state; matplotlib loads with the first.
"""

import itertools
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxlab.files import write_atomic
from fluxlab.model import TRANSFORMERS, Rotary, rotary_table
from fluxlab.model.groups import KeyGroups
from fluxlab.positions.apply import resolve
from fluxlab.positions.arguments import AXES
from fluxlab.positions.compiled import Compiled
from fluxlab.positions.layout import IMAGE, REFERENCE, TEXT, Context, Layout
from fluxlab.positions.program import Program
from fluxlab.positions.words import Prompt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLUX = TRANSFORMERS["dev"]
INDEX, ROW, COL = range(len(AXES))
NO_DATES = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    ".svg": {"Date": None, "Creator": None},
}
"""What `write_figure` writes, and the metadata that it leaves out."""

OKABE_ITO = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
}
"""Colours that colour-blind readers tell apart (Okabe and Ito, Color Universal Design, 2008)."""

GREY = "0.75"
STYLE = {"font.size": 8, "figure.titlesize": 9, "legend.frameon": False}
EDGES = {"top row of the image": OKABE_ITO["vermillion"], "left column of the image": OKABE_ITO["green"]}
MARKS = {TEXT: ("^", OKABE_ITO["orange"]), IMAGE: ("o", OKABE_ITO["blue"]), REFERENCE: ("s", OKABE_ITO["purple"])}


@dataclass(frozen=True, eq=False)
class View:
    """A program at one step, block, side and head of a sequence.

    before, after: positions `(N, A)` of that side, dropped rotation as 0. query: the token that sees the keys so, None
    where all do. told: what of step, block, head, side and query matters, and whether nothing moved, in words.
    """

    program: Program
    context: Context
    compiled: Compiled
    step: int
    block: int
    side: str
    head: int
    query: int | None
    before: Tensor
    after: Tensor
    told: Mapping[str, str]


def sequence(
    *,
    grid: tuple[int, int] = (16, 16),
    text: int = 24,
    references: Sequence[tuple[int, int]] = (),
    prompt: Prompt | str | None = None,
    axes_dim: Sequence[int] = FLUX.axes_dim,
    theta: float = FLUX.theta,
    double: int = FLUX.depth,
    single: int = FLUX.depth_single_blocks,
    heads: int = FLUX.num_heads,
    steps: int = 28,
) -> Context:
    """FLUX.1's sequence: text at (0, 0, 0), image tokens at (0, row, col), those of reference k at (k + 1, row, col).

    The schedule is even. A prompt given as a string counts one token a word, which T5 does not; a `Prompt` brings its
    tokenizer's spans. Raises `ValueError` for sizes that are not whole numbers.
    """
    counts = {"text": (text, 0), "double": (double, 0), "single": (single, 0), "heads": (heads, 1), "steps": (steps, 1)}
    counts |= {f"{key} {size[0]}x{size[1]}": (min(size), 1) for key, size in [("grid", grid)]}
    counts |= {f"references[{k}]": (min(size), 1) for k, size in enumerate(references)}
    for key, (n, least) in counts.items():
        if isinstance(n, bool) or not isinstance(n, Integral) or n < least:
            raise ValueError(f"{key}: {n!r}, expected a whole number from {least}")
    if double + single < 1:
        raise ValueError("double, single: 0, expected at least one block")
    if len(axes_dim) != len(AXES) or any(d < 2 or d % 2 for d in axes_dim):
        raise ValueError(f"axes_dim: {tuple(axes_dim)}, expected an even number for each of {', '.join(AXES)}")
    if not 1 < theta < math.inf:
        raise ValueError(f"theta: {theta!r}, expected a finite number above 1")
    kinds = [torch.zeros(text, len(AXES))]
    for index, (rows, cols) in enumerate((grid, *references)):
        kinds.append(
            torch.cartesian_prod(torch.tensor([float(index)]), torch.arange(float(rows)), torch.arange(float(cols)))
        )
    if isinstance(prompt, str):
        spans = [match.span() for match in re.finditer(r"\w+(?:['-]\w+)*|[^\w\s]", prompt)][:text]
        prompt = Prompt(prompt, (*spans, *[(0, 0)] * (text - len(spans))))
    return Context(
        ids=torch.cat(kinds)[None],
        layout=Layout(text, tuple(grid), tuple(tuple(size) for size in references)),
        axes_dim=tuple(axes_dim),
        theta=theta,
        double=double,
        single=single,
        heads=heads,
        sigmas=tuple(1 - i / steps for i in range(steps + 1)),
        prompts=None if prompt is None else [prompt],
    )


def view(
    program: Program | Mapping[str, Any] | None,
    context: Context,
    *,
    step: int | None = None,
    block: int | None = None,
    side: str | None = None,
    head: int | None = None,
) -> View:
    """A program where it acts first, or at the step, block, side and head that are given. Of a batch, the first sample.

    Raises `ValueError` for what the sequence does not have.
    """
    program = Program.from_config(program)
    compiled = program.compile(context)
    edits = [resolve(edit, context, 0) for edit in program.edits]
    if side not in (None, "queries", "keys"):
        raise ValueError(f"side: {side!r}, expected queries or keys")
    choices = (
        _choices("step", step, context.steps),
        _choices("block", block, context.blocks),
        _choices("head", head, context.heads),
        ("queries", "keys") if side is None else (side,),
    )

    def acting(spot: tuple[int, int, int, str]) -> list:
        s, b, h, one = spot
        found = [edit for edit in edits if edit.at_work(s, context.sigmas[s], b, h) > 0]
        return [edit for edit in found if edit.touches(one, h) or edit.acts_on == "attention"]

    spot = next(filter(acting, itertools.product(*choices)), tuple(some[0] for some in choices))
    s, b, h, one = spot
    limited = [edit.seen_by for edit in acting(spot) if edit.seen_by is not None]
    query = int(limited[0].nonzero()[0]) if limited else None
    told = {}
    if step is not None or any(not all(edit.steps) or isinstance(edit.strength, list) for edit in edits):
        told["step"] = f"step {s} (σ {context.sigmas[s]:.3g})"
    if block is not None or any(len(edit.blocks) < context.blocks for edit in edits):
        told["block"] = f"block {b} ({f'double {b}' if b < context.double else f'single {b - context.double}'})"
    if head is not None or any(edit.heads is not None for edit in edits):
        told["head"] = f"head {h}"
    if side is not None or any(edit.side != "both" for edit in edits):
        told["side"] = one
    if query is not None:
        name, _, start, _ = next(kind for kind in kinds(context.layout) if kind[2] <= query < kind[3])
        told["query"] = f"as {name} token {query - start} sees them"
    before = context.ids[0].detach().cpu()
    after = compiled.ids(context.sigmas[s], b, one, h, query=query).detach().cpu()
    if program and torch.equal(after, before):
        told["same"] = "positions unchanged"
    return View(program, context, compiled, s, b, one, h, query, before, after, told)


def _choices(key: str, chosen: int | None, count: int) -> Sequence[int]:
    if chosen is None:
        return range(count)
    if isinstance(chosen, bool) or not isinstance(chosen, Integral) or not 0 <= chosen < count:
        raise ValueError(f"{key}: {chosen!r}, expected a whole number from 0 to {count - 1}")
    return (int(chosen),)


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
        figure.suptitle(_title(view, view.told), x=0.01, ha="left")
        figure.legend(handles=handles, loc="outside lower left", ncols=2)
    return figure


def kinds(layout: Layout) -> list[tuple[str, int, int, int]]:
    """(name, kind, first token, one past the last) of each kind of tokens."""
    names = ["text", "image", *(f"reference {k}" for k in range(len(layout.references)))]
    return [(name, kind, *layout.range(kind)) for kind, name in enumerate(names)]


def summary(ids: Tensor) -> str:
    """`256 tokens, index 0, row 0 to 15, col 0 to 15, in 256 places` of positions `(n, A)`."""
    if not len(ids):
        return "no tokens"
    ends = zip(AXES, ids.amin(0).tolist(), ids.amax(0).tolist(), strict=True)
    ranges = [f"{name} {low:.4g}" + (f" to {high:.4g}" if high > low else "") for name, low, high in ends]
    count = len(set(_places(ids)))
    return ", ".join([f"{len(ids)} tokens", *ranges, f"in {count} place{'s' if count > 1 else ''}"])


def _places(ids: Tensor) -> list[tuple[float, float]]:
    """(row, col) of each, equal where nobody could see a difference."""
    return [(round(r, 4) + 0.0, round(c, 4) + 0.0) for _, r, c in ids.tolist()]


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
    places = _places(view.after)
    piles: dict[tuple[float, float], dict[str, list[float]]] = {}
    for name, _, start, stop in kinds(view.context.layout):
        for token in range(start, stop):
            piles.setdefault(places[token], {}).setdefault(name, []).append(view.after[token, INDEX].item())
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


def _title(view: View, told: Mapping[str, str]) -> str:
    lines = textwrap.wrap(view.program.describe(), 100, max_lines=4, placeholder=" …")
    return "\n".join([*lines, ", ".join(told.values())]).strip()


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
        figure.suptitle(_title(view, told), x=0.01, ha="left")
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


@contextmanager
def style(settings: Mapping[str, Any]) -> Iterator[None]:
    """matplotlib's defaults and `settings`, whatever a user's own are."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield


def write_figure(figure: "Figure", path: str | Path, dpi: int = 200) -> Path:
    """Write a figure as PNG, PDF or SVG, whichever the name says: the same bytes for the same figure, letters as
    letters in a PDF. Raises `ValueError` for another ending.
    """
    file = check_ending(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with style({"pdf.fonttype": 42, "svg.hashsalt": "fluxlab"}):
        write_atomic(
            file,
            lambda handle: figure.savefig(handle, format=file.suffix[1:], dpi=dpi, metadata=NO_DATES[file.suffix]),
        )
    return file


def check_ending(path: str | Path) -> Path:
    """The path of a figure. `ValueError` for an ending that `write_figure` does not write."""
    if Path(path).suffix not in NO_DATES:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(NO_DATES)}")
    return Path(path)
