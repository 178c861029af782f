"""Where reference images lie: the placements that published methods use, as one op on reference tokens.

Without it, reference k lies on its own grid at index k + 1: (1, r, c) for the first, as in FLUX.1 Kontext.
"""

import torch
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.positions.registry import op
from fluxlab.positions.tensors import as_tensor
from fluxlab.select import arguments as types
from fluxlab.select.layout import REFERENCE, Layout, Scope

ARRANGEMENTS = ("own", "tiled", "diagonal", "left", "over")


@op(
    "place",
    {"arrangement": types.choice(*ARRANGEMENTS), "index": types.number, "scale": types.positive},
    tokens="reference",
)
def place(
    ids: Tensor, scope: Scope, arrangement: str = "own", index: float | None = None, scale: float = 1.0
) -> Tensor:
    """Place reference images around the image, each by its own size and those before it.

    own: each on its own grid, from (0, 0) (FLUX.1 Kontext with index 1, arXiv 2506.15742). tiled: the second below or
    right of the first and so on, whichever keeps the whole squarer (ComfyUI's "offset" for Kontext). diagonal: each
    beyond the lower right corner of all before it, the image first (UNO, arXiv 2504.02160, with index 0). left: to the
    left of the image by its own width (OminiControl's subjects, arXiv 2411.15098, with index 0). over: spread over the
    image, p · H/H_c (EasyControl, arXiv 2503.07027, with index 0).

    index: the position on axis 0; without it, it is left as it is. scale: then s · p + (s - 1)/2 on rows and columns
    (OminiControl's position_scale).
    """
    if (scope.kind < REFERENCE).any():
        raise UserError("tokens: place moves reference images, expected a selection of reference tokens only")
    number = scope.kind - REFERENCE
    origins, factors = (
        torch.tensor(values, dtype=ids.dtype, device=ids.device)[number]
        for values in _places(scope.layout, arrangement)
    )
    placed = ids[:, 1:3] * factors + origins
    placed = placed if scale == 1 else placed * scale + (scale - 1) / 2
    first = ids[:, :1] if index is None else as_tensor(index, ids).expand_as(ids[:, :1])
    return torch.cat((first, placed, ids[:, 3:]), -1)


def _places(layout: Layout, arrangement: str) -> tuple[list, list]:
    """Return what is added to the (row, col) of each reference, and the factor before."""
    rows, cols = layout.grid
    origins, factors = [], [(1.0, 1.0)] * len(layout.references)
    if arrangement == "diagonal":
        down, right = rows, cols
        for height, width in layout.references:
            origins.append((down, right))
            down, right = down + height, right + width
    elif arrangement == "tiled":
        down = right = 0
        for height, width in layout.references:
            origin = (0, right) if down + height > right + width else (down, 0)
            origins.append(origin)
            down, right = max(down, origin[0] + height), max(right, origin[1] + width)
    else:
        origins = [(0, -width if arrangement == "left" else 0) for _, width in layout.references]
    if arrangement == "over":
        factors = [(rows / height, cols / width) for height, width in layout.references]
    return origins, factors
