"""Image → noise along the path that sampling takes back."""

import itertools
from collections.abc import Sequence

from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.sampling.denoise import OnStep, Velocity


def invert(
    velocity: Velocity, x: Tensor, sigmas: Sequence[float], iterations: int = 3, on_step: OnStep | None = None
) -> Tensor:
    """The noise from which `euler(velocity, noise, sigmas)` returns to `x`.

    `sigmas` is the sampling schedule, 1 → 0; it is walked backwards. An Euler step is implicit in that direction: the
    x_t sought has x_next = x_t + (t_next - t) · v(x_t, t), solved by fixed-point iteration (as AIDI, arXiv 2309.04907)
    from the explicit guess. `iterations` counts velocities a step: 1 is plain DDIM-like inversion. The error shrinks by
    |t_next - t| · Lipschitz constant an iteration. Raises `UserError` for less than one.
    """
    if iterations < 1:
        raise UserError(f"iterations {iterations}: at least 1 is needed")
    steps = list(itertools.pairwise(sigmas))
    for i, (t, t_next) in enumerate(reversed(steps)):
        origin = x
        for _ in range(iterations):
            x = origin - (t_next - t) * velocity(x, t).to(x.dtype)
        if on_step is not None:
            on_step(i, t, x)
    return x
