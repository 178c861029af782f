"""Kinds of request that compute a value per query. Like `measures`; results can be averaged over the queries."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxlab.errors import join, wrong
from fluxlab.model.attention import Attended
from fluxlab.probes.outputs import (
    Add,
    Axes,
    Measure,
    ProbeContext,
    grid_positions,
    named_axis,
    select_image_tokens,
    select_tokens,
    token_axes,
    token_range,
)
from fluxlab.probes.registry import AVERAGES, probe
from fluxlab.probes.stream import Indexer, Tokens, attention_weights, chunk_bytes, take
from fluxlab.select.arguments import integer
from fluxlab.select.layout import IMAGE
from fluxlab.select.tokens import parse_tokens

WITH_TOKENS = (*AVERAGES, "tokens")


def parse_sample(value: Any, path: str) -> int:
    """Parse the index of a sample in the batch."""
    if integer(value, path, "a sample of the batch, from 0") < 0:
        raise wrong(path, value, "a sample of the batch, from 0")
    return int(value)


def query_axes(queries: Sequence[Tokens], context: ProbeContext) -> Axes:
    """Return the axes of values per query: none if the request averages over tokens."""
    return Axes() if context.averages_tokens else token_axes(queries, context, "tokens")


def per_query(which: Indexer, values: Tensor, count: int, context: ProbeContext) -> tuple[tuple, Tensor]:
    """Return (index, values) to add for values `(heads, queries, …)`.

    Each query has its own entry, or adds its share to the mean over all `count` queries.
    """
    return ((), values.sum(1) / count) if context.averages_tokens else ((which,), values)


@probe("entropy", {"tokens": parse_tokens}, averages=WITH_TOKENS)
def entropy(context: ProbeContext, tokens: Any = "image") -> Measure:
    """Entropy -Σ p ln p of each query's attention over all keys, in nats: 0 for a single key, ln N for all alike."""
    queries, keys = select_tokens(tokens, context, "tokens"), token_range(context)

    def observe(attended: Attended, b: int, heads: Tensor | None, add: Add) -> None:
        for p, which in attention_weights(attended, b, heads, queries[b], keys):
            add("", *per_query(which, torch.special.entr(p).sum(-1), len(queries[b]), context))

    return Measure({"": query_axes(queries, context)}, observe, "nats")


@probe("distance", {"tokens": parse_tokens}, averages=WITH_TOKENS)
def distance(context: ProbeContext, tokens: Any = "image") -> Measure:
    """Offset and distance from image queries to the image keys that they attend to, and a histogram of offsets.

    offset: for each query, the mean of (Δrow, Δcol) and of the distance √(Δrow² + Δcol²), weighted by attention to
    image keys. histogram: attention by offset (Δrow, Δcol), averaged over queries; it sums to the attention to the
    image. Both are in tokens of the image grid, whatever the ids are.
    """
    queries = select_image_tokens(tokens, context, "tokens")
    image, (rows, cols) = token_range(context, IMAGE), context.layout.grid
    places = [one.index - int(image.index[0]) for one in queries]
    moved = lambda *parts: tuple(part.to(context.device) for part in parts)  # noqa: E731
    row, col = moved(*grid_positions(context))
    own = [(*moved(place // cols, place % cols, cols - 1 - place % cols),) for place in places]

    def observe(attended: Attended, b: int, heads: Tensor | None, add: Add) -> None:
        count, (own_row, own_col, from_right) = len(queries[b]), own[b]
        for p, which in attention_weights(attended, b, heads, queries[b], image):
            down = row - take(own_row, 0, which)[:, None]
            right = col - take(own_col, 0, which)[:, None]
            parts = [torch.einsum("hqk,qk->hq", p, part.to(p)) for part in (down, right, torch.hypot(down, right))]
            mean = torch.stack(parts, -1) / p.sum(-1, keepdim=True)
            add("offset", *per_query(which, mean, count, context))
            in_rows = (take(places[b], 0, which) // cols).bincount(minlength=rows).tolist()
            add("histogram", (), _by_offset(p, in_rows, take(from_right, 0, which), rows, cols) / count)

    deltas = [(f"delta_{name}", list(range(1 - n, n))) for name, n in (("row", rows), ("col", cols))]
    histogram = named_axis(*deltas[0]) + named_axis(*deltas[1])
    flat = histogram._replace(flat=histogram.shape)
    offset = query_axes(queries, context) + named_axis("offset", ["row", "col", "distance"])
    unfolded = 4 * context.run.heads * rows * cols * cols
    return Measure({"offset": offset, "histogram": flat}, observe, "tokens, probability", scratch=2 * unfolded)


def _by_offset(p: Tensor, in_rows: Sequence[int], from_right: Tensor, rows: int, cols: int) -> Tensor:
    """Sum attention weights over queries by offset (key - query).

    p: `(h, n, rows·cols)`, for n queries row by row. in_rows: the number of queries in each row. from_right: `(n,)`,
    number of columns to the right of each. Returns `(h, 2·rows - 1, 2·cols - 1)`. The keys of a query at (r, c) form an
    image, which is added to the result at (rows - 1 - r, cols - 1 - c). `fold` adds the images of one row of queries at
    once.
    """
    total = p.new_zeros(p.shape[0], 2 * rows - 1, 2 * cols - 1)
    parts = zip(p.split(list(in_rows), dim=1), from_right.split(list(in_rows)), strict=True)
    for r, (in_row, places) in enumerate(parts):
        if len(places):
            images = p.new_zeros(p.shape[0], rows * cols, cols)
            images[..., places] = in_row.mT
            folded = F.fold(images, (rows, 2 * cols - 1), (rows, cols))[:, 0]
            total[:, rows - 1 - r : 2 * rows - 1 - r] += folded
    return total


@probe("peak", {"tokens": parse_tokens}, averages=())
def peak(context: ProbeContext, tokens: Any = "image") -> Measure:
    """The image key with the largest attention weight of each query: its row, its column, and the weight."""
    queries, image = select_tokens(tokens, context, "tokens"), token_range(context, IMAGE)
    row, col = (part.to(context.device) for part in grid_positions(context))

    def observe(attended: Attended, b: int, heads: Tensor | None, add: Add) -> None:
        for p, which in attention_weights(attended, b, heads, queries[b], image):
            most, index = p.max(-1)
            add("", (which,), torch.stack((row[index].to(p), col[index].to(p), most), -1))

    axes = token_axes(queries, context, "tokens") + named_axis("peak", ["row", "col", "p"])
    return Measure({"": axes}, observe, "tokens, probability")


@probe("similarity", {"tokens": parse_tokens, "to": parse_sample}, averages=WITH_TOKENS)
def similarity(context: ProbeContext, tokens: Any = "image", to: int = 0) -> Measure:
    """Overlap and cosine of each query's attention with that of sample `to` of the same batch; from Python only.

    overlap: Σ min(p, p'), which is 1 - the total variation distance. cosine: p·p' / |p||p'|. Both are 1 for equal
    attention and 0 for disjoint keys. To compare stored maps instead, use the function `fluxlab.probes.similarity`.
    """
    queries, keys = select_tokens(tokens, context, "tokens"), token_range(context)
    if to >= context.samples:
        raise wrong(join(context.path, "to"), to, f"a sample of this batch, 0 … {context.samples - 1}")

    def observe(attended: Attended, b: int, heads: Tensor | None, add: Add) -> None:
        pairs = zip(
            attention_weights(attended, b, heads, queries[b], keys),
            attention_weights(attended, to, heads, queries[b], keys),
            strict=True,
        )
        for (p, which), (other, _) in pairs:
            overlap = torch.minimum(p, other).sum(-1)
            cosine = (p * other).sum(-1) / (p.norm(dim=-1) * other.norm(dim=-1))
            values = torch.stack((overlap, cosine), -1)
            add("", *per_query(which, values, len(queries[b]), context))

    axes = query_axes(queries, context) + named_axis("measure", ["overlap", "cosine"])
    return Measure({"": axes}, observe, "1", scratch=2 * chunk_bytes(context.device))
