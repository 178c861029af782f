"""The convolutional autoencoder of FLUX.1: the latent-diffusion VAE (arXiv 2112.10752), with the original's names."""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from fluxlab.errors import UserError
from fluxlab.model.stripes import in_stripes

WHOLE = 4e9
"""Bytes above which an image is decoded in stripes."""

STRIPE = 128
"""Rows of a stripe, at every resolution, unless given."""


@dataclass(frozen=True)
class AutoEncoderParams:
    """Sizes of the autoencoder, named as in the original release.

    Each entry of ch_mult except the last halves height and width. Raises `UserError` for channels that are not
    divisible by 32, the number of groups of a group norm.
    """

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
        check_channels(self.ch, self.ch_mult)

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along a side."""
        return 2 ** (len(self.ch_mult) - 1)


def check_channels(ch: int, ch_mult: tuple[int, ...]) -> None:
    """Raise `UserError` for channels that group norms cannot divide into 32 groups."""
    if not ch_mult or any(ch * mult % 32 for mult in ch_mult):
        raise UserError(f"ch {ch} × ch_mult {ch_mult}: expected channels divisible by 32 on every level")


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6)


class AttnBlock(nn.Module):
    """Self-attention over all pixels, with one head."""

    scores = 2**26  # computed at a time: most devices have no flash kernel for a head as wide as this

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
    """The residual blocks of one resolution. `resample` is "down", "up", or None for the last level."""

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
        # up[i] has the resolution of down[i], so the decoder runs from the last to the first
        self.up = nn.ModuleList(
            Level(widths[i + 1], widths[i], p.num_res_blocks + 1, "up" if i > 0 else None)
            for i in range(len(p.ch_mult))
        )
        self.norm_out = _group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], p.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.start(z)
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h), inplace=True))

    def start(self, z: Tensor) -> Tensor:
        """Return the middle's output, at the resolution of the latents."""
        return self.mid(self.conv_in(z))


class AutoEncoder(nn.Module):
    """Maps images `(B, 3, H, W)` in -1 … 1 to latents `(B, z_channels, H/f, W/f)` and back.

    f is `params.factor`. Latents are shifted and scaled to a standard deviation of about 1.
    """

    def __init__(self, params: AutoEncoderParams):
        super().__init__()
        self.params = params
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)

    def encode(self, x: Float[Tensor, "b c h w"], generator: torch.Generator | None = None) -> Float[Tensor, "b z i j"]:
        """Return the mean of the posterior, or with a `generator` a sample of it, as scaled latents.

        Raises `UserError` if H or W is not divisible by `params.factor`.
        """
        return self.normalise(self._posterior(x, generator, self.params.factor))

    def normalise(self, z: Tensor) -> Tensor:
        """Return latents of the posterior, shifted and scaled."""
        return (z - self.params.shift_factor) * self.params.scale_factor

    def _posterior(self, x: Tensor, generator: torch.Generator | None, multiple: int) -> Tensor:
        """Return the mean of the posterior, or a sample of it, before any scaling."""
        if x.shape[-2] % multiple or x.shape[-1] % multiple:
            raise UserError(f"image of {x.shape[-2]} × {x.shape[-1]} pixels: expected sides divisible by {multiple}")
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        if generator is None:
            return mean
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=generator.device)
        return mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise.to(mean.device)

    def decode(
        self, z: Float[Tensor, "b z i j"], stripe: int | Literal["auto"] | None = "auto"
    ) -> Float[Tensor, "b c h w"]:
        """Return the image `(B, 3, i·f, j·f)`, in about -1 … 1, of scaled latents `(B, z_channels, i, j)`.

        Decoding needs memory in proportion to the pixels. With `stripe`, images are decoded one by one and layer by
        layer, that many rows of a layer's input at a time. This takes two thirds of the memory, and the image is equal
        up to rounding: group norms have the statistics of all rows. "auto" computes stripes of 128 rows if one image
        would need more than 4 GB, else as many images at a time as need no more. None computes everything at once.
        Stripes have no gradient, and "auto" means None for latents with one. Raises `UserError` for a stripe below 8,
        and for one of latents with a gradient.
        """
        return self._image(z / self.params.scale_factor + self.params.shift_factor, stripe)

    def _image(self, z: Tensor, stripe: int | Literal["auto"] | None) -> Tensor:
        """Return the image of latents that are no longer scaled."""
        gradient = torch.is_grad_enabled() and z.requires_grad
        if stripe == "auto" and not gradient:
            each = self._decode_bytes(z)
            if each <= WHOLE:
                return torch.cat([self.decoder(part) for part in z.split(max(1, int(WHOLE // each)))])
            stripe = STRIPE
        if stripe in (None, "auto"):
            return self.decoder(z)
        if isinstance(stripe, bool) or not isinstance(stripe, int) or stripe < 8:
            raise UserError(f"stripe {stripe!r}: expected a whole number of rows from 8, auto or None")
        if gradient:
            raise UserError(f"stripe {stripe}: stripes have no gradient; use stripe=None")
        with torch.no_grad():
            return torch.cat([in_stripes(self.decoder, sample, stripe) for sample in z.split(1)])

    def _decode_bytes(self, z: Tensor) -> int:
        """Return about the memory of decoding one image: three maps of full size, as wide as the widest one."""
        p = self.params
        width = p.ch * p.ch_mult[min(1, len(p.ch_mult) - 1)]
        return 3 * width * z.shape[-2] * z.shape[-1] * p.factor**2 * z.element_size()
