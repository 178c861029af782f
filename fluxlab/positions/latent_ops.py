"""Ops that see the latents of their sample at each step."""

import torch
from torch import Tensor

from fluxlab.positions.frequency_ops import GRID_AXES, ntk_ratio, stretch_of
from fluxlab.positions.ops import PerAxis
from fluxlab.positions.registry import op
from fluxlab.positions.waves import Spectrum, Waves
from fluxlab.select import arguments as types

LEAST = 1e-8
"""The smallest energy and spread, as in the authors' code."""


@op(
    "sega",
    {
        "alpha": types.not_negative,
        "beta": types.not_negative,
        "kappa": types.not_negative,
        "power": types.positive,
        "least": types.not_negative,
        "factor": types.positive_per_axis,
    },
    acts_on="frequencies",
    tokens="all",
    axes=GRID_AXES,
    sees_latent=True,
)
def sega(
    waves: Waves,
    spectrum: Spectrum,
    alpha: float = 0.15,
    beta: float = 1.5,
    kappa: float = 0.08,
    power: float = 1.5,
    least: float = 1.0,
    factor: PerAxis | None = None,
) -> Waves:
    """`ntk`, and a gain of each frequency that is lower the more energy the latents have at it; where s > 1.

    Pair i of an axis gets m_i = s^kappa·(1 - alpha·spread·(tanh(beta·z_i) - mean)), at least `least`. z is the
    standardised logarithm of the latents' energy along the axis, from its highest frequency for the first pair to its
    lowest for the last. spread = 1 - flatness^power, where flatness is that of the energy by radius: 1 for white noise.
    Without latents, in plots and notes, all pairs have s^kappa. SEGA (arXiv 2605.22668).
    """
    s = stretch_of(spectrum, factor)
    gain = s**kappa
    if spectrum.latent is not None:
        image = spectrum.latent.mean(-1)
        image = image - image.mean()
        spread = 1 - (_flatness(image)) ** power
        shares = torch.zeros_like(gain)
        for axis in (1, 2):
            pairs = (spectrum.axis == axis).nonzero()[:, 0]
            shares = shares.index_copy(0, pairs, _shares(image, axis - 1, len(pairs), beta))
        gain = (gain * (1 - alpha * spread * shares)).clamp(min=least)
    return waves._replace(
        frequency=torch.where(s > 1, waves.frequency * ntk_ratio(s, spectrum), waves.frequency),
        gain=torch.where(s > 1, waves.gain * gain, waves.gain),
    )


def _shares(image: Tensor, axis: int, pairs: int, beta: float) -> Tensor:
    """Return tanh(beta·z) of each pair `(pairs,)`, with mean 0, for an image `(rows, cols)`."""
    energy = torch.fft.fft(image, dim=axis).abs().square().mean(1 - axis)
    logs = energy[: image.shape[axis] // 2 + 1].clamp(min=LEAST).log()
    places = torch.linspace(len(logs) - 1, 0, pairs, dtype=logs.dtype, device=logs.device)
    below = places.floor().long().clamp(max=max(0, len(logs) - 2))
    above = (below + 1).clamp(max=len(logs) - 1)
    raw = logs[below] + (places - below) * (logs[above] - logs[below])
    z = (raw - raw.mean()) / raw.std().clamp(min=LEAST) if pairs > 1 else torch.zeros_like(raw)
    shares = torch.tanh(beta * z)
    return shares - shares.mean()


def _flatness(image: Tensor) -> Tensor:
    """Return the geometric mean over the mean of the energy by radius, from 0 to 1."""
    rows, cols = image.shape
    energy = torch.fft.fftshift(torch.fft.fft2(image)).abs().square()
    y, x = (torch.arange(n, dtype=image.dtype, device=image.device) - n / 2 for n in (rows, cols))
    radius = (y[:, None].square() + x[None].square()).sqrt()
    bins = max(1, max(rows, cols) // 2)
    which = (radius / radius.max().clamp(min=LEAST) * bins).long().clamp(max=bins - 1).flatten()
    counts = torch.bincount(which, minlength=bins)
    sums = torch.zeros(bins, dtype=image.dtype, device=image.device).index_add(0, which, energy.flatten())
    means = (sums / counts.clamp(min=1)).clamp(min=LEAST)
    return (means.log().mean().exp() / means.mean()).clamp(0, 1)
