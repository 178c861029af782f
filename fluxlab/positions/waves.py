"""What a frequency op changes and what it sees: the frequencies and gains of a head's channel pairs, in fp64.

Pair i of an axis of width d turns by ω_i = θ^(-2i/d) radians per position. A head has the pairs of the index, then
those of the rows, then those of the columns, d/2 in all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fluxlab.model.rope import frequencies
from fluxlab.positions.tensors import as_tensor, has_tensor
from fluxlab.select.arguments import across, per_axis
from fluxlab.select.layout import IMAGE, Context


class Waves(NamedTuple):
    """frequency: radians per position. gain: factor of cos and sin. Both `(N or 1, d/2)`, fp64.

    score: factor of the scores of these tokens as queries, before the softmax, `(N or 1, 1)`, fp64.
    """

    frequency: Tensor
    gain: Tensor
    score: Tensor

    def equals(self, other: "Waves") -> bool:
        return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(self, other, strict=True))


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What a frequency op sees of the model, the sequence and the step. Tensors are `(d/2,)`, fp64, one per pair.

    axis: number of the pair's axis (whole numbers). pair: i, from the highest frequency. width: d of the axis. base:
    the model's own ω_i. chosen: whether the edit acts on the pair's axis (boolean).
    extent: largest minus smallest position of the image tokens on the axis, plus 1, after the edits so far.
    trained: extent that the model was trained on, in tokens. Infinite for the index, which has no trained extent.
    image, tokens: numbers of image tokens and of all tokens; trained_image, trained_tokens: those of training.
    theta: base of the model's frequencies. t: noise level, 1 is noise.
    latent: the latents of the sample at this step, packed, `(rows, cols, C)` in fp64. None where there are none, as in
    plots and notes.
    """

    axis: Tensor
    pair: Tensor
    width: Tensor
    base: Tensor
    chosen: Tensor
    extent: Tensor
    trained: Tensor
    image: int
    tokens: int
    trained_image: int
    trained_tokens: int
    theta: float
    t: float
    latent: Tensor | None = None

    @property
    def stretch(self) -> Tensor:
        """The extent over the trained one, at least 1: how far positions exceed what the model was trained on."""
        return (self.extent / self.trained).clamp(min=1)

    def values(self, value: float | Sequence[float | None] | Tensor, otherwise: float = 1.0) -> Tensor:
        """Return an argument per axis as one value for each pair. Axes that it leaves out are set to `otherwise`."""
        count = int(self.axis.max()) + 1
        if not isinstance(value, Tensor):
            learned = has_tensor(value)
            numbers = across(value if learned else per_axis(value, "argument"), count)
            numbers = [otherwise if x is None else x for x in numbers]
            value = as_tensor(numbers, self.base) if learned else torch.tensor(numbers)
        return value.to(self.base).expand(count)[self.axis]


def unchanged(context: Context) -> Waves:
    """Return the model's own frequencies, with gain and score 1."""
    device = context.ids.device
    frequency = torch.cat([frequencies(dim, context.theta) for dim in context.axes_dim])[None].to(device)
    return Waves(frequency, torch.ones_like(frequency), torch.ones_like(frequency[:, :1]))


@dataclass(frozen=True)
class Seen:
    """What an op that sees latents depends on at a step. Equal if t and `version` are: each set of latents has its own.

    latent: packed, `(rows · cols, C)`, or None.
    """

    t: float
    version: int
    latent: Tensor | None = field(compare=False)


def spectrum(ids: Tensor, context: Context, axes: Tensor | None, at: float | Seen) -> Spectrum:
    """Return what an op on the given axes (boolean `(A,)` or None for all) sees at ids `(N, A)`. at: noise level."""
    t, latent = (at.t, at.latent) if isinstance(at, Seen) else (at, None)
    device, widths = ids.device, context.axes_dim
    axis = torch.cat([torch.full((dim // 2,), a) for a, dim in enumerate(widths)]).to(device)
    pair = torch.cat([torch.arange(dim // 2, dtype=torch.float64) for dim in widths]).to(device)
    start, stop = context.layout.range(IMAGE)
    image = ids[start:stop].double()
    beyond = [math.inf] * (len(widths) - 3)  # the order of text has no trained extent, as the index
    trained = torch.tensor([math.inf, *context.trained, *beyond], dtype=torch.float64, device=device)
    rows, cols = context.trained
    return Spectrum(
        axis=axis,
        pair=pair,
        width=torch.tensor(widths, dtype=torch.float64, device=device)[axis],
        base=unchanged(context).frequency[0],
        chosen=torch.ones_like(axis, dtype=torch.bool) if axes is None else axes[axis],
        extent=(image.amax(0) - image.amin(0) + 1)[axis],
        trained=trained[axis],
        image=stop - start,
        tokens=context.layout.tokens,
        trained_image=rows * cols,
        trained_tokens=rows * cols + context.trained_text,
        theta=float(context.theta),
        t=t,
        latent=None if latent is None else latent.to(device, torch.float64).reshape(*context.layout.grid, -1),
    )
