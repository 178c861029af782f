"""The autoencoder of FLUX.2: FLUX.1's with 32 channels, whose latents are normalised per channel of a packed token."""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from fluxlab.model.autoencoder import AutoEncoder, Decoder, Encoder, check_channels

BN_EPS = 1e-4


@dataclass(frozen=True)
class AutoEncoder2Params:
    """Sizes of the autoencoder, named as in the original release. They mean the same as in `AutoEncoderParams`."""

    resolution: int
    in_channels: int
    ch: int
    out_ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int

    def __post_init__(self):
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        check_channels(self.ch, self.ch_mult)

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along a side."""
        return 2 ** (len(self.ch_mult) - 1)


class Encoder2(Encoder):
    def __init__(self, p: AutoEncoder2Params):
        super().__init__(p)
        self.quant_conv = nn.Conv2d(2 * p.z_channels, 2 * p.z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_conv(super().forward(x))


class Decoder2(Decoder):
    def __init__(self, p: AutoEncoder2Params):
        super().__init__(p)
        self.post_quant_conv = nn.Conv2d(p.z_channels, p.z_channels, 1)

    def start(self, z: Tensor) -> Tensor:
        return super().start(self.post_quant_conv(z))


class AutoEncoder2(AutoEncoder):
    """Maps images `(B, 3, H, W)` in -1 … 1 to latents `(B, 4 · z_channels, H/2f, W/2f)` and back.

    f is `params.factor`. A latent pixel is the 2 × 2 patch of a token. Its channels are normalised by the mean and
    variance that a batch norm recorded in training.
    """

    def __init__(self, params: AutoEncoder2Params):
        nn.Module.__init__(self)
        self.params = params
        self.encoder = Encoder2(params)
        self.decoder = Decoder2(params)
        self.bn = nn.BatchNorm2d(4 * params.z_channels, eps=BN_EPS, affine=False)  # holds the statistics only

    def encode(self, x: Float[Tensor, "b c h w"], generator: torch.Generator | None = None) -> Float[Tensor, "b z i j"]:
        """Return the mean of the posterior, or with a `generator` a sample of it, as normalised patches.

        Raises `UserError` if H or W is not divisible by twice `params.factor`.
        """
        return self.normalise(self._posterior(x, generator, 2 * self.params.factor))

    def normalise(self, z: Tensor) -> Tensor:
        """Return latents of the posterior as normalised patches."""
        z = rearrange(z, "b c (i pi) (j pj) -> b (c pi pj) i j", pi=2, pj=2)
        mean, deviation = self._statistics()
        return (z - mean) / deviation

    def decode(
        self, z: Float[Tensor, "b z i j"], stripe: int | Literal["auto"] | None = "auto"
    ) -> Float[Tensor, "b c h w"]:
        """Return the image `(B, 3, 2·i·f, 2·j·f)`, in about -1 … 1, of normalised patches `(B, 4 · z_channels, i, j)`.

        stripe: as in `AutoEncoder.decode`.
        """
        mean, deviation = self._statistics()
        return self._image(rearrange(z * deviation + mean, "b (c pi pj) i j -> b c (i pi) (j pj)", pi=2, pj=2), stripe)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation of each channel, `(C, 1, 1)`."""
        return self.bn.running_mean[:, None, None], (self.bn.running_var + self.bn.eps).sqrt()[:, None, None]
