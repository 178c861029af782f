"""FLUX.1's convolutional autoencoder (the latent-diffusion VAE without quantisation), with the original's names."""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from fluxlab.errors import UserError


@dataclass(frozen=True)
class AutoEncoderParams:
    """Sizes of the autoencoder, named as in the original release. Each entry of ch_mult but the last halves it."""

    resolution: int
    in_channels: int
    ch: int
    out_ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    scale_factor: float
    shift_factor: float

    def __post_init__(self):
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        bad = [self.ch * mult for mult in self.ch_mult if self.ch * mult % 32]
        if bad or not self.ch_mult:
            raise UserError(f"ch {self.ch} × ch_mult {self.ch_mult}: every level's channels must be divisible by 32")

    @property
    def factor(self) -> int:
        """Image pixels a latent pixel, along a side."""
        return 2 ** (len(self.ch_mult) - 1)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6)


class AttnBlock(nn.Module):
    """One head of self-attention over all pixels."""

    scores = 2**26  # of the score matrix at once: a head this wide has no flash kernel on most devices

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(f(h), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        rows = max(1, self.scores // k.shape[2])
        parts = [F.scaled_dot_product_attention(part, k, v) for part in q.split(rows, dim=2)]
        h = rearrange(torch.cat(parts, dim=2), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = _group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # the original pads right and bottom only


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution; `resample` is None at the end that does not change it."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, resample: str | None):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in itertools.pairwise(widths))
        if resample == "down":
            self.downsample = Downsample(out_channels)
        elif resample == "up":
            self.upsample = Upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for name in ("downsample", "upsample"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


class Encoder(nn.Module):
    def __init__(self, p: AutoEncoderParams):
        super().__init__()
        widths = [p.ch] + [p.ch * mult for mult in p.ch_mult]
        last = len(p.ch_mult) - 1
        self.conv_in = nn.Conv2d(p.in_channels, p.ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(widths[i], widths[i + 1], p.num_res_blocks, "down" if i < last else None) for i in range(last + 1)
        )
        self.mid = Middle(widths[-1])
        self.norm_out = _group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * p.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h)), inplace=True))


class Decoder(nn.Module):
    def __init__(self, p: AutoEncoderParams):
        super().__init__()
        widths = [p.ch * mult for mult in p.ch_mult] + [p.ch * p.ch_mult[-1]]
        self.conv_in = nn.Conv2d(p.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        # up[i] works at the resolution of down[i], so the decoder runs through it backwards
        self.up = nn.ModuleList(
            Level(widths[i + 1], widths[i], p.num_res_blocks + 1, "up" if i > 0 else None)
            for i in range(len(p.ch_mult))
        )
        self.norm_out = _group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], p.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.rise(self.mid(self.conv_in(z)))

    def rise(self, h: Tensor) -> Tensor:
        """From the middle's output to the image: the part that tiles share nothing in."""
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h), inplace=True))


class AutoEncoder(nn.Module):
    """Images `(B, 3, H, W)` in -1 … 1 ↔ latents `(B, z_channels, H/f, W/f)`, shifted and scaled to unit size."""

    def __init__(self, params: AutoEncoderParams):
        super().__init__()
        self.params = params
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)

    def encode(self, x: Float[Tensor, "b c h w"], generator: torch.Generator | None = None) -> Float[Tensor, "b z i j"]:
        """The posterior's mean, or with a `generator` a sample of it, as latents ready for the transformer.

        H and W must be divisible by `params.factor`; raises `UserError` otherwise.
        """
        f = self.params.factor
        if x.shape[-2] % f or x.shape[-1] % f:
            raise UserError(f"image of {x.shape[-2]} × {x.shape[-1]} pixels: both sides must be divisible by {f}")
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=generator.device)
            mean = mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise.to(mean.device)
        return (mean - self.params.shift_factor) * self.params.scale_factor

    def decode(
        self, z: Float[Tensor, "b z i j"], tile: int | Literal["auto"] | None = "auto"
    ) -> Float[Tensor, "b c h w"]:
        """Image `(B, 3, i·f, j·f)`, about -1 … 1, of scaled latents `(B, z_channels, i, j)`.

        Decoding needs memory in proportion to the pixels. `tile` latent pixels a side bound it: the middle, with its
        attention, still sees the whole image, the rest runs in tiles that overlap by a quarter and are blended. Group
        norms then see a tile's statistics, so pixels move a little; `None` never tiles, "auto" tiles (by 64) only where
        the whole would need more than 4 GB. Raises `UserError` for a tile under 8.
        """
        if tile == "auto":
            tile = 64 if self._decode_bytes(z) > 4e9 else None
        z = z / self.params.scale_factor + self.params.shift_factor
        if tile is None:
            return self.decoder(z)
        if isinstance(tile, bool) or not isinstance(tile, int) or tile < 8:
            raise UserError(f"tile {tile!r}: expected a whole number of latent pixels from 8, auto or None")
        return torch.cat([self._decode_tiled(one, tile) for one in z.split(1)])

    def _decode_bytes(self, z: Tensor) -> int:
        """About what `decode` needs: three feature maps as wide as the last upsampling leaves them, at full size."""
        p = self.params
        width = p.ch * p.ch_mult[min(1, len(p.ch_mult) - 1)]
        return 3 * width * len(z) * z.shape[-2] * z.shape[-1] * p.factor**2 * z.element_size()

    def _decode_tiled(self, z: Tensor, tile: int) -> Tensor:
        f, overlap = self.params.factor, tile // 4
        h = self.decoder.mid(self.decoder.conv_in(z))
        size = (h.shape[-2] * f, h.shape[-1] * f)
        image = h.new_zeros(1, self.params.out_ch, *size)
        total = h.new_zeros(1, 1, *size)
        for top, bottom in _spans(h.shape[-2], tile, overlap):
            for left, right in _spans(h.shape[-1], tile, overlap):
                part = self.decoder.rise(h[..., top:bottom, left:right])
                rows, cols = (_ramp(n, overlap * f).to(part) for n in part.shape[-2:])
                weight = rows[:, None] * cols
                image[..., top * f : bottom * f, left * f : right * f] += weight * part
                total[..., top * f : bottom * f, left * f : right * f] += weight
        return image / total


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Spans of at most `tile` that cover `length`, neighbours sharing at least `overlap`."""
    count = max(1, math.ceil((length - overlap) / (tile - overlap)))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)] if count > 1 else [0]
    return [(start, min(start + tile, length)) for start in starts]


def _ramp(length: int, overlap: int) -> Tensor:
    """Blending weights of a tile: rising over `overlap` pixels from each end, never zero."""
    steps = torch.arange(1, length + 1, dtype=torch.float32)
    return torch.minimum(steps, steps.flip(0)).clamp(max=overlap + 1)
