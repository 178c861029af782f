"""Inversion: from an image back to the noise that sampling makes it of."""

import itertools
from collections.abc import Sequence

from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.sampling.denoise import OnStep, Velocity


def invert(
    velocity: Velocity, x: Tensor, sigmas: Sequence[float], iterations: int = 3, on_step: OnStep | None = None
) -> Tensor:
    """Return the noise from which `euler(velocity, noise, sigmas)` returns to `x`.

    sigmas: the sampling schedule, from 1 to 0. Inversion goes through it backwards. In this direction an Euler step is
        implicit: x_next = x_t + (t_next - t) · v(x_t, t) is solved for x_t by fixed-point iteration from the explicit
        guess (as in AIDI, arXiv 2309.04907).
    iterations: velocities per step. 1 is DDIM-like inversion. Each iteration multiplies the error by
        |t_next - t| · Lipschitz constant of v.
    on_step: called as `on_step(i, t, x)` after step i.

    Raises `UserError` for less than one iteration.
    """
    if iterations < 1:
        raise UserError(f"iterations={iterations}: expected at least 1")
    steps = list(itertools.pairwise(sigmas))
    for i, (t, t_next) in enumerate(reversed(steps)):
        origin = x
        for _ in range(iterations):
            x = origin - (t_next - t) * velocity(x, t).to(x.dtype)
        if on_step is not None:
            on_step(i, t, x)
    return x
