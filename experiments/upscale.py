"""`python -m experiments.upscale -o figures`: images at twice their size through position ids.

About 12 min on one CPU core with model=tiny. Scenes are given to `pipe.upscale` at half the model's size, or at a size
whose double is beyond the model's. The results are compared with the same scenes drawn at twice the size. Next to its
methods: sampling at that size from the prompt alone, with published methods for larger images, and bicubic enlargement.

Other models, such as model=schnell device=cuda, get the scenes at sizes in proportion to their own. The oracle reads
the embedded models only, so that the other measures remain.

Writes a figure for each of the two, its caption with all numbers, a CSV with one row per image, and a JSON with the
means of both.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.enlarge import (
    ABOUT,
    BICUBIC,
    MEASURES,
    ORACLE,
    SETTINGS,
    SHOWN,
    SIDE,
    STEPS,
    Case,
    Setting,
    case,
    images_of,
    scores,
)
from experiments.standalone import Loaded, Means, mean_panels, means, measure_lines, run_alone
from experiments.style import PAGE, figure, paper, save, save_caption, save_table
from fluxlab.files import write_atomic

if TYPE_CHECKING:
    from argparse import Namespace
    from pathlib import Path

    from matplotlib.figure import Figure


def measure(
    loaded: Loaded,
    setting: Setting,
    cases: Sequence[Case],
    keep: int,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[dict[str, Any]], list[dict[str, np.ndarray]]]:
    """Return a row of measures for every image of the cases, and the images of the first `keep` by name."""
    rows, kept = [], [{} for _ in range(keep)]
    at_once = 4 if loaded.row.scenes else 1
    for start in range(0, len(cases), at_once):
        some = cases[start : start + at_once]
        for name, images in images_of(loaded.pipe, setting, some, loaded.steps):
            for one, image in zip(some, images, strict=True):
                row = {"variant": name, "prompt": one.prompt, "seed": one.number}
                rows.append(row | scores(image, one, loaded.row.scenes))
                if one.number < keep:
                    kept[one.number][name] = image
        say(f"{start + len(some)}/{len(cases)} scenes")
    return rows, kept


def draw(setting: Setting, cases: Sequence[Case], images: Sequence[Mapping[str, np.ndarray]], found: Means) -> "Figure":
    """Return the figure: rows of scenes with every method's image, above the measures of every method."""
    names = list(found)
    titles = ["given", "scene at × 2", *names]
    lines, height = -(-len(titles) // 9), 0.75
    columns = -(-len(titles) // lines)
    with paper():
        drawn = figure(PAGE, (height * len(cases) + 0.3) * lines + 2.3)
        parts = drawn.subfigures(lines + 1, 1, height_ratios=[height * len(cases) + 0.3] * lines + [2.3])
        for line in range(lines):
            chosen = titles[line * columns : (line + 1) * columns]
            grid = parts[line].subplots(len(cases), columns, squeeze=False)
            for axes in grid.flat:
                axes.set_axis_off()
            for row, one, made in zip(grid, cases, images, strict=True):
                shown = {"given": one.small, "scene at × 2": one.large, **made}
                for axes, title in zip(row, chosen, strict=False):
                    axes.imshow(shown[title], interpolation="nearest")
                    if one is cases[0]:
                        axes.set_title(title.replace(", ", ",\n"))
        chosen = {name: MEASURES[name] for name in SHOWN if name in found[BICUBIC]}
        panels = parts[-1].subplots(1, len(chosen), sharey=True)
        mean_panels(panels, found, chosen, ("ssim_scene", *ORACLE), setting.upscaled)
    return drawn


def caption(name: str, times: int, count: int, shown: int, found: Means, oracle: bool) -> str:
    """Return the caption of the figure with all numbers, of `count` scenes at `times` the size of the setting."""
    sizes = {"side": times * SETTINGS[name].side, "given": times * SETTINGS[name].given}
    drawn = "that were held out from training, a seed each" if oracle else "a seed each"
    larger = "Things are twice as large as any that it was trained on. " if oracle and name == "beyond" else ""
    read = "The oracle reads shapes, letters, things and colours at the size of the font. " if oracle else ""
    lines = [
        f"{ABOUT[name].format(**sizes)} {larger}{count} scenes, {drawn}; "
        "compared with the scene drawn at that size. Blue: pipe.upscale. spacing: tokens of the given image are "
        "inverted 2 apart, and lie between new ones that are sampled 1 apart. half steps: they are inverted 1 apart, "
        "with new tokens at half steps between. Text and given tokens do not attend to new ones, except for both ways. "
        "aligned: new queries see all positions twice as far apart. until 0.8: given tokens are free below that noise "
        "level. enlarged: given tokens are those of the bicubic enlargement, mixed with noise. resized: that "
        "enlargement with noise is sampled from σ = 0.8 on, beyond the model's size from 0.7 on. Grey: sampled at this "
        "size from the prompt alone, and without sampling: the bicubic enlargement, the same after the autoencoder, "
        f"and the scene at twice the size after it, the most that it lets through. {read}Means with 95 % bootstrap "
        f"intervals over images; Δ: mean difference to {BICUBIC} at equal scene. Images: scenes 0 to {shown - 1}."
    ]
    return "\n".join([*lines, *measure_lines(found, MEASURES)])


def make(loaded: Loaded, options: "Namespace") -> "list[Path]":
    """Make the images of both settings, and write the figures and their files."""
    times, keep, files, every = loaded.scale(SIDE), min(options.rows, options.scenes), [], {}
    for name, setting in SETTINGS.items():

        def say(text: str, name: str = name) -> None:
            print(f"{name}: {text}", file=sys.stderr, flush=True)

        cases = [case(setting, number, times) for number in range(options.scenes)]
        rows, images = measure(loaded, setting, cases, keep, say)
        every[name], stem = means(rows, BICUBIC, MEASURES), options.out / f"upscale-{name}"
        files += save(draw(setting, cases[:keep], images, every[name]), stem)
        text = caption(name, times, len(cases), keep, every[name], loaded.row.scenes)
        files += [save_caption(f"{text}\n{loaded.conditions}", stem), save_table(rows, stem.with_suffix(".csv"))]
    record, file = loaded.record | {"scenes": options.scenes, "measures": every}, options.out / "upscale.json"
    write_atomic(file, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return [*files, file]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 for an error that the user can fix."""
    counts = {"scenes": (64, "scenes"), "rows": (3, "scenes in the figure")}
    return run_alone("upscale", __doc__, arguments, counts, STEPS, make)


if __name__ == "__main__":
    sys.exit(main())
