"""The kinds of request that tell something of each query: functions (arguments, place) → `Measure`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxlab.errors import join, wrong
from fluxlab.model.attention import Attended
from fluxlab.probes.outputs import Add, Axes, Measure, Place, chosen, chosen_image, grid, named_axis, span, token_axes
from fluxlab.probes.stream import Places, Tokens, chunk_bytes, probabilities, take
from fluxlab.select.layout import IMAGE


def _axes(queries: Sequence[Tokens], place: Place, averaged: bool) -> Axes:
    return Axes() if averaged else token_axes(queries, place, "tokens")


def _where(which: Places, value: Tensor, count: int, averaged: bool) -> tuple[tuple, Tensor]:
    """Where values of queries `(heads, queries, …)` go: to each its own place, or all to their mean over `count`."""
    return ((), value.sum(1) / count) if averaged else ((which,), value)


def entropy(arguments: Mapping[str, Any], place: Place) -> Measure:
    """-Σ p ln p over all keys, in nats: 0 looks at one token, ln N at all alike."""
    queries, everything, averaged = chosen(arguments["tokens"], place, "tokens"), span(place), arguments["average"]

    def observe(seen: Attended, b: int, heads: Tensor | None, add: Add) -> None:
        for p, which in probabilities(seen, b, heads, queries[b], everything):
            add("", *_where(which, torch.special.entr(p).sum(-1), len(queries[b]), averaged))

    return Measure({"": _axes(queries, place, averaged)}, observe, "nats")


def distance(arguments: Mapping[str, Any], place: Place) -> Measure:
    """Attention against distance, in tokens of the image's grid, whatever the ids.

    offset: for each image query, the mean of (row, col) of what it looks at in the image less its own, and the mean
    distance to it. histogram: p against the offset (Δrow, Δcol), mean over queries; what it lacks to 1 is the text's.
    """
    queries, averaged = chosen_image(arguments["tokens"], place, "tokens"), arguments["average"]
    image, (rows, cols) = span(place, IMAGE), place.context.layout.grid
    row, col = grid(place)
    first = int(image.index[0])

    def observe(seen: Attended, b: int, heads: Tensor | None, add: Add) -> None:
        count = len(queries[b])
        own_row, own_col = row[queries[b].index - first], col[queries[b].index - first]
        for p, which in probabilities(seen, b, heads, queries[b], image):
            down = row - take(own_row, 0, which)[:, None]
            right = col - take(own_col, 0, which)[:, None]
            parts = [torch.einsum("hqk,qk->hq", p, part.to(p)) for part in (down, right, torch.hypot(down, right))]
            mean = torch.stack(parts, -1) / p.sum(-1, keepdim=True)
            add("offset", *_where(which, mean, count, averaged))
            at = take(queries[b].index - first, 0, which)
            add("histogram", (), _by_offset(p, at, rows, cols) / count)

    deltas = [(f"delta_{name}", list(range(1 - n, n))) for name, n in (("row", rows), ("col", cols))]
    histogram = named_axis(*deltas[0]) + named_axis(*deltas[1])
    flat = histogram._replace(flat=histogram.shape)
    offset = _axes(queries, place, averaged) + named_axis("offset", ["row", "col", "distance"])
    pictures = 4 * place.context.heads * rows * cols * cols
    return Measure({"offset": offset, "histogram": flat}, observe, "tokens, probability", scratch=2 * pictures)


def _by_offset(p: Tensor, at: Tensor, rows: int, cols: int) -> Tensor:
    """Σ over queries of p by (key - query): `(h, n, rows·cols)` and the queries' raster places `(n,)`, ascending →
    `(h, 2·rows - 1, 2·cols - 1)`.

    The keys of one query are a picture that lies (rows - 1 - r, cols - 1 - c) into the result: a row of queries is
    laid down at once, by the overlapping sum that undoes an unfolding.
    """
    found = p.new_zeros(p.shape[0], 2 * rows - 1, 2 * cols - 1)
    for r in (at // cols).unique().tolist():
        mine = at // cols == r
        pictures = p.new_zeros(p.shape[0], rows * cols, cols)
        pictures[..., cols - 1 - at[mine] % cols] = p[:, mine].mT
        laid = F.fold(pictures, (rows, 2 * cols - 1), (rows, cols))[:, 0]
        found[:, rows - 1 - r : 2 * rows - 1 - r] += laid
    return found


def peak(arguments: Mapping[str, Any], place: Place) -> Measure:
    """Where in the image each query looks most: row, col, and p there."""
    queries, image = chosen(arguments["tokens"], place, "tokens"), span(place, IMAGE)
    row, col = grid(place)

    def observe(seen: Attended, b: int, heads: Tensor | None, add: Add) -> None:
        for p, which in probabilities(seen, b, heads, queries[b], image):
            most, at = p.max(-1)
            add("", (which,), torch.stack((row[at].to(p), col[at].to(p), most), -1))

    axes = token_axes(queries, place, "tokens") + named_axis("peak", ["row", "col", "p"])
    return Measure({"": axes}, observe, "tokens, probability")


def similarity(arguments: Mapping[str, Any], place: Place) -> Measure:
    """How alike each query looks in a sample and in the sample `to` of the same batch, over all keys.

    overlap: Σ min(p, p'), 1 less the total variation. cosine: p·p' / |p||p'|. Both are 1 for equal maps, 0 for maps
    that have no key in common.
    """
    queries, averaged, to = chosen(arguments["tokens"], place, "tokens"), arguments["average"], arguments["to"]
    everything = span(place)
    if to >= place.samples:
        raise wrong(join(place.path, "to"), to, f"a sample of this batch, 0 … {place.samples - 1}")

    def observe(seen: Attended, b: int, heads: Tensor | None, add: Add) -> None:
        pairs = zip(
            probabilities(seen, b, heads, queries[b], everything),
            probabilities(seen, to, heads, queries[b], everything),
            strict=True,
        )
        for (p, which), (other, _) in pairs:
            overlap = torch.minimum(p, other).sum(-1)
            cosine = (p * other).sum(-1) / (p.norm(dim=-1) * other.norm(dim=-1))
            value = torch.stack((overlap, cosine), -1)
            add("", *_where(which, value, len(queries[b]), averaged))

    axes = _axes(queries, place, averaged) + named_axis("measure", ["overlap", "cosine"])
    return Measure({"": axes}, observe, "1", scratch=2 * chunk_bytes(place.context.ids.device))
