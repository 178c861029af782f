"""`python -m experiments.schedule`: how FLUX.1's μ moves the steps of a run towards noise.

Takes seconds; needs no run and no model. σ after the shift over t for several μ. Page width adds the steps of a run.
"""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.style import COLUMN, OKABE_ITO, PAGE, command, figure, paper, save, save_caption
from fluxlab.sampling import FLUX_SCHEDULE, schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOKS = {
    None: ("black", ":"),
    0.5: ("sky", "-"),
    0.75: ("green", "--"),
    1.0: ("orange", "-."),
    1.15: ("vermillion", "-"),
}
"""The μ that are drawn, None for no shift, with colours and lines that differ in greyscale."""

POINTS, STEPS = 200, 28


def times(mu: float | None, steps: int) -> list[float]:
    """Return `steps + 1` times from 1 to 0, shifted by μ. In a run μ depends on the image size. None: not shifted."""
    if mu is None:
        return schedule(steps, FLUX_SCHEDULE.base_image_seq_len, shift=False)
    return schedule(steps, FLUX_SCHEDULE.base_image_seq_len, base_shift=mu, max_shift=mu)


def tokens(mu: float) -> float:
    """Return the number of image tokens at which a run has this μ."""
    s = FLUX_SCHEDULE
    share = (mu - s.base_shift) / (s.max_shift - s.base_shift)
    return s.base_image_seq_len + share * (s.max_image_seq_len - s.base_image_seq_len)


def make(folder: Path) -> list[Path]:
    """Draw σ after the shift over t for several μ, in column and page width, and write the caption."""
    drawn = {"column": draw(COLUMN, steps=False), "page": draw(PAGE, steps=True)}
    written = [file for name, plot in drawn.items() for file in save(plot, folder / f"schedule-{name}")]
    return [*written, save_caption(caption(), folder / "schedule")]


def draw(width: float, steps: bool) -> "Figure":
    """Return the curves, with `steps` next to a panel of the σ at which the steps of a run start."""
    with paper():
        whole = figure(width, 2.5)
        panels = whole.subplots(1, 2 if steps else 1, width_ratios=(2, 3) if steps else None, squeeze=False)[0]
        curves = panels[0]
        unshifted = times(None, POINTS)
        for mu, (colour, line) in LOOKS.items():
            curves.plot(unshifted, times(mu, POINTS), color=OKABE_ITO[colour], ls=line, label=named(mu), clip_on=False)
        curves.set(xlabel="t, before the shift", ylabel="σ, after the shift", xlim=(0, 1), ylim=(0, 1), aspect="equal")
        curves.set_xticks(curves.get_yticks())
        curves.legend(loc="lower right")
        if steps:
            for height, (mu, (colour, _)) in enumerate(LOOKS.items()):
                starts = times(mu, STEPS)[:-1]
                panels[1].plot(starts, [height] * STEPS, ls="", marker="|", ms=11, color=OKABE_ITO[colour])
            panels[1].set_yticks(range(len(LOOKS)), [named(mu) for mu in LOOKS])
            panels[1].set(xlabel=f"σ at which the {STEPS} steps start", xlim=(0, 1.02), ylim=(len(LOOKS) - 0.4, -0.6))
    return whole


def named(mu: float | None) -> str:
    return "not shifted" if mu is None else f"μ = {mu:g}"


def caption() -> str:
    """Return the caption. Its numbers come from the same function as the curves."""
    lines = [
        "FLUX.1's time shift, σ = e^μ / (e^μ + 1/t - 1). μ is linear in the number of image tokens: "
        f"{FLUX_SCHEDULE.base_shift:g} at {FLUX_SCHEDULE.base_image_seq_len}, "
        f"{FLUX_SCHEDULE.max_shift:g} at {FLUX_SCHEDULE.max_image_seq_len}; schnell does not shift. "
        f"A larger image has more of its steps at high noise."
    ]
    for mu in LOOKS:
        half = times(mu, 2)[1]
        early = sum(sigma > 0.5 for sigma in times(mu, STEPS)[:-1])
        last = times(mu, STEPS)[-2]
        size = ""
        if mu is not None:
            size = (
                f" ({tokens(mu):.0f} tokens, {16 * math.sqrt(tokens(mu)):.0f} pixels square, e^μ = {math.exp(mu):.2f})"
            )
        lines.append(
            f"{named(mu)}{size}: σ = {half:.3f} at t = 0.5; {early} of {STEPS} steps start above σ = 0.5, "
            f"the last at {last:.3f}."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(command(make, "schedule"))
