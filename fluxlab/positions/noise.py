"""A check that costs nothing: attention sees differences of positions only."""

from collections.abc import Callable

from torch import Tensor

from fluxlab.positions.program import Program


def shifted(program: Program, by: float | list[float] = 5.0) -> Program:
    """The program, and after it all ids, text and image, + `by` (a number, or one an axis)."""
    return program + Program.from_config({"shift": {"op": "offset", "by": by, "tokens": "all"}})


def noise_floor(
    run: Callable[[Program], Tensor], program: Program | None = None, by: float | list[float] = (3.0, -2.5, 7.0)
) -> float:
    """The largest change of `run(program)` when all ids are shifted by a constant, in units of its standard deviation.

    `run` maps a program to whatever is compared: a velocity, latents, pixels. RoPE sees differences only, so this is
    rounding, and no effect below it means anything. Only `drop` makes it real: what is not turned does not shift along.
    """
    program = program or Program()
    untouched = run(program)
    return (
        (run(shifted(program, list(by) if not isinstance(by, float | int) else by)) - untouched).abs().max()
        / untouched.std()
    ).item()
