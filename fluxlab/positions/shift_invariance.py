"""The noise floor: attention depends on differences of positions only, so shifting all ids changes rounding alone."""

from collections.abc import Callable

from torch import Tensor

from fluxlab.positions.program import Program


def shifted(program: Program, by: float | list[float] = 5.0) -> Program:
    """Return the program followed by a shift of all ids, text and image. `by`: a number, or one for each axis."""
    return program + Program.from_config({"shift": {"op": "offset", "by": by, "tokens": "all"}})


def noise_floor(
    run: Callable[[Program], Tensor], program: Program | None = None, by: float | list[float] = (3.0, -2.5, 7.0)
) -> float:
    """Return the largest change of `run(program)` when all ids shift by a constant, in units of its standard deviation.

    `run` maps a program to the values that are compared: a velocity, latents or pixels. RoPE depends on differences of
    positions only, so the change is rounding, and an effect below it means nothing. Only with `drop` the change is
    real: tokens without rotation do not shift with the others.
    """
    program = program or Program()
    unshifted = run(program)
    change = run(shifted(program, list(by) if not isinstance(by, float | int) else by)) - unshifted
    return (change.abs().max() / unshifted.std()).item()
