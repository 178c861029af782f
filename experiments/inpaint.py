"""`python -m experiments.inpaint STORE -o figures`: what inpainting puts into the hole, and what it leaves outside.

Takes seconds; needs a finished store of +exp=inpaint, or of another run with task=inpaint; no model. Page width: images
of every variant, with the mask as a dashed line, above the measures. Column width: two measures. On drawn scenes and
with a model that was trained on them, the scene oracle looks for the thing in the hole. Writes a CSV with one row per
image too.
"""

import sys
from collections.abc import Sequence

import numpy as np

from experiments.taskfigure import About
from experiments.taskfigure import main as run_figure
from fluxlab.experiment.reading import Run
from fluxlab.measure.oracle import inspect
from fluxlab.scenes.cases import Case

MEASURES = {
    "asked": "the thing asked for",
    "psnr_outside": "PSNR outside, dB",
    "in_hole": "a thing in the hole",
    "coloured": "with the colour",
    "asked_one": "of scenes with one thing",
    "asked_two": "of scenes with two",
    "seam": "step at the border",
}


def read(image: np.ndarray, case: Case) -> dict[str, float]:
    """Return what the oracle finds in the hole of a drawn scene, at the size of the scene."""
    from PIL import Image

    scale = len(image) // case.side
    small = np.asarray(Image.fromarray(image).reduce(scale)) if scale > 1 else image
    hole = case.mask[:: len(case.mask) // case.side, :: len(case.mask) // case.side]
    things = [found for found in inspect(small, case.prompt).things if hole[tuple(map(int, found.centre))]]
    coloured = [found for found in things if found.colour == case.asked.colour]
    asked = float(any(found.name == case.asked.name for found in coloured))
    return {
        "in_hole": float(bool(things)),
        "coloured": float(bool(coloured)),
        "asked": asked,
        ("asked_two" if case.number % 2 else "asked_one"): asked,
    }


ABOUT_VARIANTS = {
    "text_sees": "Text sees: only known tokens do not attend to the hole.",
    "inverted": "Inverted: known tokens are those of the path of an inversion.",
    "inverted_once": "Once: with one iteration per step in place of 3.",
    "prompt": "Prompt: sampled without the image.",
    "filled": "Filled: the hole filled from its border, encoded and decoded.",
    "drawn": "Drawn: the target, encoded and decoded, the most that is possible.",
}
"""What the caption says of variants of +exp=inpaint, if a run has them."""


def text(run: Run, oracle: bool) -> str:
    """Return what the caption says of the figure. oracle: whether it looks into the hole."""
    read = "In the hole the scene oracle looks for a thing, one in the colour asked for, and that with the name too."
    parts = [
        "Dashed: the hole; everything outside of it is known. By default known tokens are those of the image mixed "
        "with noise, and text and known tokens do not attend to the hole.",
        *(about for name, about in ABOUT_VARIANTS.items() if name in run.variants),
        *([read] if oracle else []),
        "PSNR outside of the hole is that to the given image. The step at the border is the median difference of "
        "neighbouring pixels on both sides of it, in 0 … 1.",
    ]
    return " ".join(parts)


ABOUT = About(
    name="inpaint",
    task="inpaint",
    measures=MEASURES,
    shown=("asked", "psnr_outside", "in_hole", "seam"),
    shares=("asked", "in_hole", "coloured", "asked_one", "asked_two"),
    read=read,
    text=text,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 for an error that the user can fix."""
    return run_figure(ABOUT, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
