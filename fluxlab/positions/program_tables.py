"""The rotary tables of a program without a model, for comparison with other implementations."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fluxlab.positions.at_step import FLUX, sequence
from fluxlab.positions.compiling import compile_programs
from fluxlab.positions.program import Program
from fluxlab.select.layout import Context


def tables(
    program: Program | Mapping[str, Any] | None,
    rows: int = 64,
    cols: int = 64,
    text_tokens: int = 0,
    axes_dim: Sequence[int] = FLUX.axes_dim,
    theta: float = FLUX.theta,
    trained: tuple[int, int] = (64, 64),
    t: float = 1.0,
    side: str = "keys",
    latent: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each `(N, d/2)` fp32, of a program at noise level t: text tokens first, then the grid.

    trained: the grid that the model was trained on, in tokens. side: "keys", or "queries", whose table also has the
    factors of scores (`temperature`, `imax`). The first block and head are meant, and the one step of a schedule.
    latent: packed latents `(rows · cols, C)` for ops that depend on them.
    Raises UserError for a program that does not fit, such as one that names words.
    """
    context = sequence(grid=(rows, cols), text=text_tokens, axes_dim=axes_dim, theta=theta, trained=trained, steps=1)
    compiled = compile_programs([Program.from_config(program)], Context(**{**vars(context), "sigmas": (t, 0.0)}))
    compiled.at(t, latents=None if latent is None else latent[None])
    return compiled.side_table(t, side)
