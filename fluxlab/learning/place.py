"""Where the content of an image is, from its latents: a stand-in with gradients for the place that the oracle reads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxlab import scenes
from fluxlab.errors import UserError, show
from fluxlab.gradients import Make, Prepared, Score, sampled

SIDES = {"left": ("col", -1), "right": ("col", 1), "top": ("row", -1), "bottom": ("row", 1)}
"""Side → the axis along which it lies, and the sign of its direction."""


def side_of(prompt: str) -> str:
    """Return the side that a caption names. Raises UserError for a prompt that is no caption, or names none."""
    try:
        side = scenes.parse(prompt).place
    except UserError:
        side = None
    if side not in SIDES:
        raise UserError(
            f"objective=place: {show(prompt)} names no side; expected prompts such as 'a red fox on the left', with "
            "on the left, on the right, at the top or at the bottom"
        )
    return side


def centre(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return where the content of images is: the centre of mass `(B, 2)`, row and column in tokens.

    values: of tokens, `(B, N, C)`, such as packed latents. The mass of a token is its squared distance to the
    background, which is the median of the tokens in each channel.
    """
    mass = (values - values.detach().median(1, keepdim=True).values).square().sum(-1)
    mass = (mass / mass.sum(1, keepdim=True)).unflatten(1, grid)
    rows, cols = (torch.arange(n, dtype=mass.dtype, device=mass.device) for n in grid)
    return torch.stack(((mass.sum(2) * rows).sum(1), (mass.sum(1) * cols).sum(1)), 1)


def towards(values: Tensor, grid: tuple[int, int], sides: Sequence[str]) -> Tensor:
    """Return how far the content of each image lies towards its side, `(B,)` in tokens. values: see `centre`."""
    found = centre(values, grid)
    signs = [SIDES[side] for side in sides]
    return torch.stack([sign * found[b, int(axis == "col")] for b, (axis, sign) in enumerate(signs)])


def place(prompts: Sequence[str]) -> Score:
    """Return the score `towards` of the sampled latents, with the side that each prompt of the batch names."""
    sides = [side_of(prompt) for prompt in prompts]

    def score(prepared: Prepared, make: Make) -> Tensor:
        return towards(sampled(prepared, make()), prepared.context.layout.grid, sides)

    return score
