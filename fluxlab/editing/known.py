"""Known tokens: latents that follow a given path through the steps while the other tokens are sampled."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.positions import Program
from fluxlab.sampling import OnStep

PATHS = ("inverted", "noised")

Path = list[Tensor]
"""Latents `(B, N, C)` before the first step, then after each step. The last are those of the image."""


def one_way(known: Bool[Tensor, " n"], steps: Sequence[int] | None = None, text: bool = True) -> Program:
    """Return the program in which text and known image tokens do not attend to the other image tokens.

    known: which image tokens are known, on the host. steps: in which steps; None for all. text: whether text is
    included, which would otherwise pass on what it reads in the other tokens.
    """
    inside, outside = ({"indices": [int(n) for n in which.nonzero()[:, 0]]} for which in (known, ~known))
    edit = {"op": "mask", "from": ["text", inside] if text else inside, "to": outside}
    if steps is not None:
        edit["steps"] = list(steps)
    return Program.from_config({"one_way": edit})


def inverted_path(pipe: Any, images: Tensor, prompts: Sequence[str], options: dict[str, Any]) -> Path:
    """Return the latents of an inversion at every step of sampling. options: of `Pipeline.invert`."""
    latents, _, _ = pipe.encode(images)
    path = [latents.expand(len(prompts), -1, -1)]
    pipe.invert(images, prompts, **options, on_step=lambda i, t, x: path.append(x.clone()))
    return path[::-1]


def noised_path(latents: Float[Tensor, "b n c"], noise: Float[Tensor, "b n c"], sigmas: Sequence[float]) -> Path:
    """Return (1 - t)·latents + t·noise at each t of the schedule: what the model sees of an image in training."""
    return [(1 - t) * latents + t * noise for t in sigmas[:-1]] + [latents.expand_as(noise)]


def hold(path: Path, known: Bool[Tensor, " n"], on_step: OnStep | None = None, steps: int | None = None) -> OnStep:
    """Return an `on_step` that puts the known tokens on their path after each step, then calls `on_step`.

    known: on the host. steps: after this many steps they are free; None for never.
    """
    which = numbers(known, path[0].device)

    def after_step(i: int, t: float, x: Tensor) -> None:
        if steps is None or i < steps:
            x[:, which] = path[i + 1][:, which]
        if on_step is not None:
            on_step(i, t, x)

    return after_step


def check_path(path: str) -> None:
    """Raise `UserError` for an unknown kind of path."""
    if path not in PATHS:
        raise UserError(f"path={path!r}: expected {' or '.join(PATHS)}")


def check_inversion(path: str, arguments: Mapping[str, Any]) -> None:
    """Raise `UserError` for arguments of an inversion that are given though the path has none."""
    given = [name for name, value in arguments.items() if value is not None]
    if given and path != "inverted":
        raise UserError(f"{given[0]} has no effect with path={path!r}: leave it out, or set path='inverted'")


def start(noise: Float[Tensor, "b n c"], path: Path, known: Bool[Tensor, " n"]) -> Float[Tensor, "b n c"]:
    """Return the latents before the first step: the path where tokens are known, noise elsewhere.

    known: on the host.
    """
    return torch.where(known[:, None].to(noise.device), path[0], noise)


def numbers(known: Bool[Tensor, " n"], device: torch.device) -> Int[Tensor, " k"]:
    """Return the numbers of the known tokens on a device. Unlike an index of flags, they are not read back from it."""
    return known.nonzero()[:, 0].to(device)
