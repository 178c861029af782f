"""The sampler loop and wrappers of a velocity field: a function `(x, t) -> dx/dt` of packed latents."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fluxlab.errors import UserError

Velocity = Callable[[Tensor, float], Tensor]
OnStep = Callable[[int, float, Tensor], None]


def euler(
    velocity: Velocity, x: Tensor, sigmas: Sequence[float], on_step: OnStep | None = None, first: int = 0
) -> Tensor:
    """Return x after Euler steps x ← x + (t_next - t) · v(x, t) along `sigmas`. From 1 to 0 they make an image.

    `x` keeps its dtype. It should be fp32 whatever the dtype of the model, so that rounding does not accumulate. After
    step i, `on_step(i, t_next, x)` is called. first: the step that x is at.
    """
    for i, (t, t_next) in enumerate(itertools.pairwise(sigmas[first:]), first):
        x = x + (t_next - t) * velocity(x, t).to(x.dtype)
        if on_step is not None:
            on_step(i, t_next, x)
    return x


def with_negative(positive: Velocity, negative: Velocity, scale: float) -> Velocity:
    """Return the velocity of classifier-free guidance (arXiv 2207.12598), v⁻ + scale · (v⁺ - v⁻), at twice the cost."""

    def velocity(x: Tensor, t: float) -> Tensor:
        v = negative(x, t)
        return v + scale * (positive(x, t) - v)

    return velocity


def round_timesteps(values: Tensor, like: str | None) -> Tensor:
    """Return timesteps (or guidance strengths), fp32 `(B,)`, rounded as in a bf16 run of another implementation.

    None does not round. "bfl" returns bf16(1000 · bf16(t)) / 1000. "diffusers" first replaces t by
    bf16(bf16(1000 · t) / 1000). Both multiply by 1000 in bf16, so a guidance of 3.5 acts as 3.504. Raises `UserError`
    for another value of `like`.
    """
    if like is None:
        return values
    if like not in ("bfl", "diffusers"):
        raise UserError(f"timestep_rounding={like!r}: expected bfl, diffusers or None")
    low = values.to(torch.bfloat16) if like == "bfl" else (1000 * values).to(torch.bfloat16) / 1000
    return (1000 * low).float() / 1000
