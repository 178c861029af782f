"""First training stage: a small FLUX autoencoder of the scenes. The transformer then works on latents, as FLUX.1."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fluxlab import scenes
from fluxlab.model import AutoEncoder
from fluxlab.training.seeds import numpy_rng


def to_pixels(images: np.ndarray) -> Tensor:
    """Convert uint8 images `(B, H, W, 3)` to fp32 `(B, 3, H, W)` in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def busiest_crops(images: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """Return the most detailed of three random crops of each image. Flat background is easy to learn."""
    height, width = images.shape[1:3]
    crops = []
    for image in images:
        corners = [
            (int(rng.integers(0, (height - side) // 4 + 1)) * 4, int(rng.integers(0, (width - side) // 4 + 1)) * 4)
            for _ in range(3)
        ]
        cut = [image[r : r + side, c : c + side] for r, c in corners]
        crops.append(max(cut, key=lambda part: part.std()))
    return np.stack(crops)


def reconstruction_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean absolute error of pixels plus that of their differences along both axes (edges of lettering)."""
    loss = (made - wanted).abs().mean()
    for axis in (-1, -2):
        loss = loss + 0.5 * (made.diff(dim=axis) - wanted.diff(dim=axis)).abs().mean()
    return loss


def step_loss(
    model: AutoEncoder, pixels: Tensor, generator: torch.Generator, kl_weight: float
) -> tuple[Tensor, Tensor]:
    """Return the loss of one batch on a sample of the posterior, and its mean absolute error in [-1, 1]."""
    mean, logvar = model.encoder(pixels).float().chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    made = model.decoder(mean + (0.5 * logvar).exp() * noise).float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return reconstruction_loss(made, pixels) + kl_weight * kl, (made.detach() - pixels).abs().mean()


def polish_loss(model: AutoEncoder, pixels: Tensor, generator: torch.Generator, noise: float) -> tuple[Tensor, Tensor]:
    """As `step_loss`, for the decoder alone. It decodes the mean plus `noise` standard deviations of noise, because
    sampled latents are noisy too.
    """
    with torch.no_grad():
        mean = model.encoder(pixels)[:, : model.params.z_channels].float()
    drawn = torch.randn(mean.shape, generator=generator).to(mean.device)
    made = model.decoder(mean + noise * mean.std() * drawn).float()
    return reconstruction_loss(made, pixels), (made.detach() - pixels).abs().mean()


def batch_of(seed: int, step: int, count: int, crop: int | None, small_d: bool) -> Tensor:
    """Return the pixels of one step, a pure function of the arguments."""
    rng = numpy_rng(seed, "autoencoder", step)
    size = (64, 64) if crop or rng.random() < 0.75 else scenes.SIZES[int(rng.integers(len(scenes.SIZES)))]
    images, _ = scenes.batch(rng, count, size, small_d=small_d)
    return to_pixels(busiest_crops(images, crop, rng) if crop else images)


def normalised(model: AutoEncoder, seed: int, device: str, small_d: bool) -> AutoEncoder:
    """Set shift_factor and scale_factor so that latents of scenes have mean 0 and variance 1 over all channels."""
    with torch.no_grad():
        images, _ = scenes.batch(numpy_rng(seed, "statistics", 0), 64, small_d=small_d)
        mean, _ = model.encoder(to_pixels(images).to(device)).float().chunk(2, dim=1)
    params = replace(
        model.params, shift_factor=round(mean.mean().item(), 4), scale_factor=round(1 / mean.std().item(), 4)
    )
    model.params = params
    return model
