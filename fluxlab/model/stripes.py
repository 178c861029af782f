"""Decoding in stripes: the image of the whole decoder, to rounding, in less memory.

Layers are computed one after the other, each in stripes of rows with one more row of the layer's input on either side,
as many as a 3 × 3 convolution reads. The statistics of a group norm are those of all rows.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Map = Float[Tensor, "1 c h w"]
NewMap = Float[Tensor, "1 new_c new_h new_w"]


def in_stripes(decoder: nn.Module, z: Map, rows: int) -> NewMap:
    """Return the image of a `Decoder` for the latents of one image. rows: height of a stripe, at every resolution.

    No more than three maps of full size are in memory, two of them as wide as the decoder's last blocks.
    """
    h = decoder.start(z)
    for level in reversed(decoder.up):
        for block in level.block:
            h = _residual(block, h, rows)
        if hasattr(level, "upsample"):
            h = _mapped(level.upsample, h, rows, factor=2)
    norm = _whole_norm(decoder.norm_out, h, rows)
    return _mapped(lambda part: decoder.conv_out(F.silu(norm(part), inplace=True)), h, rows)


def _residual(block: nn.Module, x: Map, rows: int) -> NewMap:
    """Return the output of a `ResnetBlock`. x: may be overwritten."""
    norm1 = _whole_norm(block.norm1, x, rows)
    h = _mapped(lambda part: block.conv1(F.silu(norm1(part), inplace=True)), x, rows)
    out = _mapped(block.nin_shortcut, x, rows) if hasattr(block, "nin_shortcut") else x
    norm2 = _whole_norm(block.norm2, h, rows)
    return _mapped(lambda part: block.conv2(F.silu(norm2(part), inplace=True)), h, rows, added_to=out)


def _mapped(
    layer: Callable[[Tensor], Tensor], x: Map, rows: int, factor: int = 1, added_to: Tensor | None = None
) -> NewMap:
    """Return a layer's output, computed in stripes. factor: rows of the output per row of the input.

    added_to: a map to which the output is added in place.
    """
    out = added_to
    for top, bottom in _stripes(x, rows):
        above = min(1, top)  # at the border of the image the layer pads
        part = layer(x[..., top - above : bottom + 1, :])[..., above * factor :, :][..., : (bottom - top) * factor, :]
        if out is None:
            out = part.new_empty(*part.shape[:2], x.shape[-2] * factor, part.shape[-1])
        place = out[..., top * factor : bottom * factor, :]
        place.copy_(part) if added_to is None else place.add_(part)
    return out


def _whole_norm(norm: nn.GroupNorm, x: Map, rows: int) -> Callable[[Tensor], Tensor]:
    """Return the group norm of stripes of `x`, with the mean and the variance of all of it."""
    count, mean, squares = 0, 0.0, 0.0  # squares: sum of squared distances to the mean
    for top, bottom in _stripes(x, rows):
        part = x[..., top:bottom, :].float().reshape(1, norm.num_groups, -1)
        variance, mean_of_part = torch.var_mean(part, dim=-1, correction=0)
        n = part.shape[-1]
        distance, total = mean_of_part - mean, count + n  # Chan et al. 1979, "Updating formulae …", equation 2.1
        squares = squares + variance * n + distance**2 * (count * n / total)
        mean = mean + distance * (n / total)
        count = total
    each = norm.num_channels // norm.num_groups
    scale = (squares / count + norm.eps).rsqrt().repeat_interleave(each, 1) * norm.weight.float()
    shift = norm.bias.float() - mean.repeat_interleave(each, 1) * scale
    scale, shift = scale[..., None, None], shift[..., None, None]
    return lambda part: torch.addcmul(shift, part.float(), scale).to(part.dtype)


def _stripes(x: Tensor, rows: int) -> Iterator[tuple[int, int]]:
    """Yield the first row of each stripe, and the first row behind it."""
    for top in range(0, x.shape[-2], rows):
        yield top, min(top + rows, x.shape[-2])
