"""`python -m experiments.inpaint -o figures`: a thing of a scene exchanged for another one, with everything else kept.

About 5 min on one CPU core with model=tiny. In every scene the hole is the box of one thing. The prompt asks for
another thing in another colour there. Compares the paths and the attention of `pipe.inpaint`: does the scene oracle
find that thing in the hole, is the image outside of the hole the given one, and is there a seam? The floor fills the
hole from its border and samples nothing. Scenes are drawn, and have one thing or two in turn.

Other models, such as model=schnell device=cuda, get the scenes at their own size. The oracle reads the embedded models
only, so that the other measures remain.

Writes the figure, its caption with all numbers, a CSV with one row per image, and a JSON with the means.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.exchange import MEASURES, SIDE, Case, case, scores
from experiments.standalone import Loaded, Means, mean_panels, means, measure_lines, run_alone
from experiments.style import PAGE, figure, paper, save, save_caption, save_table
from fluxlab.editing.inpaint import filled, hole_tokens
from fluxlab.files import write_atomic
from fluxlab.pixels import image_tensor

if TYPE_CHECKING:
    from argparse import Namespace
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHODS: dict[str, dict[str, Any]] = {
    "noised, one-way": {"path": "noised", "attention": "one_way"},
    "noised, text sees": {"path": "noised", "attention": "text sees"},
    "noised, both ways": {"path": "noised", "attention": "both_ways"},
    "inverted, one-way": {"path": "inverted", "attention": "one_way"},
    "inverted, both ways": {"path": "inverted", "attention": "both_ways"},
    "inverted once, one-way": {"path": "inverted", "attention": "one_way", "iterations": 1},
}
"""Row of the figure: arguments of `pipe.inpaint`. "text sees": only known image tokens do not attend to the hole."""

Image = np.ndarray
Found = Iterator[tuple[str, Image, float]]

DRAWN, FLOOR, ALONE = "drawn", "border only", "prompt alone"
"""What the methods are compared with: the scene with the new thing and the given one with its hole filled from the
border, both encoded and decoded; and `generate` with the prompt."""

SHOWN = ("object", "asked", "psnr_outside", "seam")
SHARES = ("object", "colour", "asked", "asked_one", "asked_two")


def images_of(pipe: Any, one: Case, steps: int, methods: Sequence[str] | None = None) -> Found:
    """Yield the name, the image, and the std of known tokens after the first step of everything that is compared.

    Images are uint8, of the size of the given one. methods: None for all. The std is nan where no token is known.
    """
    import torch

    scale = len(one.given) // SIDE
    hole = one.hole.repeat(scale, 0).repeat(scale, 1)
    for name, image in ((DRAWN, one.drawn), (FLOOR, filled(image_tensor(one.given), torch.from_numpy(hole)))):
        (decoded,) = pipe.decode(*pipe.encode(image))
        yield name, np.asarray(decoded), math.nan
    height, width = hole.shape
    (alone,) = pipe.generate([one.prompt], seeds=[one.number], steps=steps, height=height, width=width)
    yield ALONE, np.asarray(alone), math.nan
    tokens = hole_tokens(hole, hole.shape, pipe.grid(height, width)).flatten()
    known, inside = ([int(n) for n in which.nonzero()[:, 0]] for which in (~tokens, tokens))
    seen: list[Any] = []
    for name in METHODS if methods is None else methods:
        options = dict(METHODS[name])
        seen.clear()
        if options["attention"] == "text sees":
            edit = {"op": "mask", "from": {"indices": known}, "to": {"indices": inside}}
            options |= {"attention": "both_ways", "programs": {"one_way": edit}}
        (result,) = pipe.inpaint(
            one.given,
            hole,
            one.prompt,
            one.number,
            steps=steps,
            on_step=lambda i, t, x: seen.append(x.cpu()[:, known]),
            **options,
        )
        yield name, np.asarray(result), float(seen[0].std())


def measure(
    loaded: Loaded, cases: Sequence[Case], keep: int, say: Callable[[str], None] = lambda text: None
) -> tuple[list[dict[str, Any]], list[dict[str, Image]]]:
    """Return a row of measures for every image of the cases, and the images of the first `keep` cases."""
    rows, images = [], []
    for number, one in enumerate(cases):
        kept = {}
        for name, image, spread in images_of(loaded.pipe, one, loaded.steps):
            kept[name] = image
            start = {"variant": name, "prompt": one.prompt, "seed": one.number, **dict.fromkeys(MEASURES, math.nan)}
            rows.append(start | scores(image, one, loaded.row.scenes) | {"spread": spread})
        images += [kept] if number < keep else []
        say(f"{number + 1}/{len(cases)} scenes")
    return rows, images


def draw(cases: Sequence[Case], images: Sequence[Mapping[str, Image]], found: Means) -> "Figure":
    """Return the figure: rows of scenes, with the hole outlined, above the measures of every method."""
    columns = [ALONE, *METHODS]
    with paper():
        drawn = figure(PAGE, 0.84 * len(cases) + 1.9)
        above, below = drawn.subfigures(2, 1, height_ratios=[0.84 * len(cases), 1.9])
        grid = above.subplots(len(cases), 1 + len(columns), squeeze=False)
        for line, one, row in zip(grid, cases, images, strict=True):
            for axes, name, image in zip(line, ("given", *columns), (one.given, *map(row.get, columns)), strict=True):
                _show(axes, image, one.hole)
                if one is cases[0]:
                    axes.set_title(name.replace(", ", ",\n") if "," in name else name.replace(" ", "\n"))
        shown = {name: MEASURES[name] for name in SHOWN if any(name in row for row in found.values())}
        mean_panels(below.subplots(1, len(shown), sharey=True), found, shown, SHARES, METHODS)
    return drawn


def _show(axes: "Axes", image: Image, hole: np.ndarray) -> None:
    """Draw an image with the border of its hole as a dashed line."""
    axes.imshow(image, interpolation="nearest", extent=(0, SIDE, SIDE, 0))
    (top, left), (bottom, right) = np.argwhere(hole).min(0), np.argwhere(hole).max(0) + 1
    box = [left, right, right, left, left], [top, top, bottom, bottom, top]
    axes.plot(*box, color="white", lw=0.7)
    axes.plot(*box, color="black", lw=0.7, ls=(0, (2, 2)))
    axes.set(xlim=(0, SIDE), ylim=(SIDE, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def caption(found: Means, count: int, shown: int, oracle: bool) -> str:
    """Return the caption of the figure with all numbers, of `count` scenes."""
    read = (
        "In the hole the scene oracle looks for a thing, one in the colour asked for, and one with the colour and the "
        "name asked for. "
    )
    lines = [
        f"One thing of a scene exchanged for another one by inpainting, {count} scenes, "
        "a seed each, with one thing or two in turn. Dashed: the hole, the box of the thing; everything outside "
        "of it is known. Noised: known tokens are those of the image mixed with noise. Inverted: those of the path of "
        "an inversion with 3 iterations per step, or once with 1. One-way: text and known tokens do not attend to the "
        f"hole; text sees: only known tokens do not. {DRAWN}: the scene drawn with the new thing, encoded and decoded, "
        f"the most that is possible. {FLOOR}: the hole filled from its border, encoded and decoded. {ALONE}: the whole "
        f"image from the prompt. {read if oracle else ''}"
        "PSNR outside of the hole is that to the given image. The step at the "
        "border is the median difference of neighbouring pixels on both sides of it, in 0 … 1. The std of known tokens "
        "is that of their latents after the first step. Means with 95 % "
        f"bootstrap intervals over images; Δ: mean difference to {next(iter(METHODS))} at equal scene. Images: scenes "
        f"0 to {shown - 1}."
    ]
    return "\n".join([*lines, *measure_lines(found, MEASURES)])


def make(loaded: Loaded, options: "Namespace") -> "list[Path]":
    """Make the images, and write the figure and its files."""
    scale, keep, stem = loaded.scale(SIDE), min(options.rows, options.scenes), options.out / "inpaint"
    cases = [case(number, scale) for number in range(options.scenes)]
    rows, images = measure(loaded, cases, keep, lambda text: print(text, file=sys.stderr, flush=True))
    found = means(rows, next(iter(METHODS)), MEASURES)
    text = caption(found, len(cases), keep, loaded.row.scenes)
    files = [*save(draw(cases[:keep], images, found), stem), save_caption(f"{text}\n{loaded.conditions}", stem)]
    record = loaded.record | {"scenes": len(cases), "measures": found}
    write_atomic(stem.with_suffix(".json"), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return [*files, save_table(rows, stem.with_suffix(".csv")), stem.with_suffix(".json")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 for an error that the user can fix."""
    counts = {"scenes": (64, "scenes"), "rows": (4, "scenes in the figure")}
    return run_alone("inpaint", __doc__, arguments, counts, 8, make)


if __name__ == "__main__":
    sys.exit(main())
