"""The sampler loop, and what wraps a velocity field. A velocity is a function `(x, t) -> dx/dt` of packed latents."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fluxlab.errors import UserError

Velocity = Callable[[Tensor, float], Tensor]
OnStep = Callable[[int, float, Tensor], None]


def euler(velocity: Velocity, x: Tensor, sigmas: Sequence[float], on_step: OnStep | None = None) -> Tensor:
    """Walk x along `sigmas` (1 → 0 makes an image): x ← x + (t_next - t) · v(x, t).

    `x` keeps its dtype; give fp32, whatever the model runs in, and no rounding builds up. After step i,
    `on_step(i, t_next, x)` is called.
    """
    for i, (t, t_next) in enumerate(itertools.pairwise(sigmas)):
        x = x + (t_next - t) * velocity(x, t).to(x.dtype)
        if on_step is not None:
            on_step(i, t_next, x)
    return x


def with_negative(positive: Velocity, negative: Velocity, scale: float) -> Velocity:
    """True classifier-free guidance (arXiv 2207.12598): v⁻ + scale · (v⁺ - v⁻), at twice the cost."""

    def velocity(x: Tensor, t: float) -> Tensor:
        away = negative(x, t)
        return away + scale * (positive(x, t) - away)

    return velocity


def round_timesteps(values: Tensor, like: str | None) -> Tensor:
    """Timesteps (or guidance strengths), fp32 `(B,)`, as a bf16 run of another implementation feeds them on.

    `None` leaves them alone. "bfl": bf16(1000 · bf16(t)) / 1000. "diffusers": t goes through bf16(bf16(1000 t) / 1000)
    first. Both multiply by 1000 in bf16, so a guidance of 3.5 acts as 3.504. Raises `UserError` for another word.
    """
    if like is None:
        return values
    if like not in ("bfl", "diffusers"):
        raise UserError(f"timestep_rounding {like!r}: expected bfl, diffusers or nothing")
    low = values.to(torch.bfloat16) if like == "bfl" else (1000 * values).to(torch.bfloat16) / 1000
    return (1000 * low).float() / 1000
