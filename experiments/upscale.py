"""`python -m experiments.upscale STORE [STORE] -o figures`: images at twice their size, against the scene at that size.

Takes seconds; needs finished stores of +exp=upscale or upscale_beyond, or of another run with task=upscale; no model.
Page width: images of every variant above the measures. Column width: two measures. On drawn scenes and with a model
that was trained on them, the scene oracle reads shapes, letters, things and colours at the size of the font. Writes a
CSV with one row per image too.
"""

import sys
from collections.abc import Sequence

import numpy as np

from experiments.taskfigure import About
from experiments.taskfigure import main as run_figure
from fluxlab.experiment.reading import Run
from fluxlab.measure import oracle_columns
from fluxlab.scenes.cases import Case

MEASURES = {
    "psnr_target": "PSNR to the scene, dB",
    "letters": "letters right",
    "ssim_target": "SSIM to the scene",
    "shape": "right shapes",
    "object": "things found",
    "colour": "right colours",
    "sharpness": "sharpness, 1/px",
}
ORACLE = ("shape", "letters", "object", "colour")
"""Measures that the scene oracle reads."""


def read(image: np.ndarray, case: Case) -> dict[str, float]:
    """Return what the oracle reads in the image of a drawn scene, reduced to the size at which the font is drawn."""
    from PIL import Image

    times = len(image) // case.side
    small = np.asarray(Image.fromarray(image).reduce(times)) if times > 1 else image
    found = oracle_columns(small, case.prompt)
    return {name: found[name] for name in ORACLE if name in found}


ABOUT_VARIANTS = {
    "both_ways": "Both ways: text and given tokens attend to new ones too.",
    "freed": "Freed: given tokens are free below the noise level 0.8.",
    "half_steps_aligned": "Aligned: new queries see all positions twice as far apart.",
    "aligned": "Aligned: new queries see all positions twice as far apart.",
    "enlarged": "Enlarged: given tokens are those of the bicubic enlargement, mixed with noise.",
    "resized": "Resized: that enlargement with noise is sampled from a lower noise level on.",
    "prompt": "Prompt: sampled at this size from the prompt alone.",
    "bicubic": "Bicubic: the bicubic enlargement.",
    "drawn": "Drawn: the scene at this size, encoded and decoded.",
}
"""What the caption says of variants of +exp=upscale and upscale_beyond, if a run has them."""


def text(run: Run, oracle: bool) -> str:
    """Return what the caption says of the figure. oracle: whether it reads the images."""
    request = run.record["request"]
    height, width = request["inputs"][0]["image"]["size"]
    parts = [
        f"Images of {height} × {width} px at {request['height']} × {request['width']} px. Blue: pipe.upscale. Spacing: "
        "tokens of the given image are inverted 2 apart, and lie between new ones that are sampled 1 apart. Half "
        "steps: they are inverted 1 apart, with new tokens at half steps between. Text and given tokens do not attend "
        "to new ones.",
        *(about for name, about in ABOUT_VARIANTS.items() if name in run.variants),
        *(["The oracle reads shapes, letters, things and colours at the size of the font."] if oracle else []),
    ]
    return " ".join(parts)


ABOUT = About(
    name="upscale",
    task="upscale",
    measures=MEASURES,
    shown=("psnr_target", "letters", "ssim_target", "shape"),
    shares=("ssim_target", *ORACLE),
    read=read,
    text=text,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 for an error that the user can fix."""
    return run_figure(ABOUT, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
