"""`python -m experiments.upscale -o figures`: images at twice their size through position ids.

About 13 min on one CPU core with model=tiny. Scenes are given to `pipe.upscale` at half the model's size, or at a size
whose double is beyond what the model was trained on. The results are compared with the same scenes drawn at twice the
size. Next to its methods: sampling at that size from the prompt alone, with published methods for larger images, and
bicubic enlargement.

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
    SETTINGS,
    SHOWN,
    STEPS,
    Case,
    Setting,
    case,
    images_of,
    scores,
)
from experiments.style import (
    OKABE_ITO,
    PAGE,
    figure,
    out_argument,
    paper,
    refusing_parser,
    save,
    save_caption,
    save_table,
)
from fluxlab.checkpoints.identity import fingerprint
from fluxlab.compose import guarded
from fluxlab.config import find_row
from fluxlab.errors import UserError
from fluxlab.files import write_atomic
from fluxlab.measure.summary import summarise

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def measure(
    pipe: Any,
    setting: Setting,
    count: int,
    keep: int,
    steps: int | None,
    at_once: int = 4,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[dict[str, Any]], list[dict[str, np.ndarray]]]:
    """Return a row of measures for every image of `count` cases, and the images of the first `keep` by name."""
    rows, kept = [], [{} for _ in range(keep)]
    for start in range(0, count, at_once):
        cases = [case(setting, number) for number in range(start, min(start + at_once, count))]
        for name, images in images_of(pipe, setting, cases, steps):
            for one, image in zip(cases, images, strict=True):
                rows.append({"variant": name, "prompt": one.prompt, "seed": one.number} | scores(image, one))
                if one.number < keep:
                    kept[one.number][name] = image
        say(f"{min(start + at_once, count)}/{count} scenes")
    return rows, kept


def numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return variant → measure → n, mean, low, high, the paired difference to bicubic, and the value of scene 0."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    first = {row["variant"]: row for row in reversed(rows)}
    for row in summarise(rows, BICUBIC, tuple(MEASURES)):
        values = {key: row[key] for key in ("mean", "low", "high", "paired_mean", "paired_low", "paired_high")}
        values |= {"first": first[row["variant"]][row["metric"]]}
        kept = {key: round(value, 6) for key, value in values.items() if np.isfinite(value)}
        found.setdefault(row["variant"], {})[row["metric"]] = {"n": row["n"], **kept}
    return found


def draw(
    setting: Setting, cases: Sequence[Case], images: Sequence[Mapping[str, np.ndarray]], found: Mapping[str, Any]
) -> "Figure":
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
        panels = parts[-1].subplots(1, len(SHOWN), sharey=True)
        for axes, measured in zip(panels, SHOWN, strict=True):
            for y, name in enumerate(names):
                row, colour = found[name][measured], OKABE_ITO["blue"] if name in setting.upscaled else "0.45"
                axes.plot([row.get("low", row["mean"]), row.get("high", row["mean"])], [y, y], color=colour)
                axes.plot(row["mean"], y, "o", ms=3, color=colour)
            axes.set_title(MEASURES[measured], loc="left")
            axes.grid(axis="x", color="0.9", lw=0.5)
            if not measured.startswith("psnr"):
                axes.set_xlim(-0.04, 1.04)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].invert_yaxis()
    return drawn


def caption(name: str, model: str, steps: int, count: int, shown: int, found: Mapping[str, Any]) -> str:
    """Return the caption of the figure with all numbers."""
    lines = [
        f"{ABOUT[name]} Model {model}, {steps} steps, {count} scenes that were held out from training, a seed each; "
        "compared with the scene drawn at that size. Blue: pipe.upscale. spacing: tokens of the given image are "
        "inverted 2 apart, and lie between new ones that are sampled 1 apart. half steps: they are inverted 1 apart, "
        "with new tokens at half steps between. Text and given tokens do not attend to new ones, except for both ways. "
        "aligned: new queries see all positions twice as far apart. until 0.8: given tokens are free below that noise "
        "level. enlarged: given tokens are those of the bicubic enlargement, mixed with noise. resized: that "
        "enlargement with noise is sampled from σ = 0.8 on, beyond the model's size from 0.7 on. Grey: sampled at this "
        "size from the prompt alone, and without sampling: the bicubic enlargement, the same after the autoencoder, "
        "and the scene at twice the size after it, the most that it lets through. The oracle reads shapes, letters, "
        "things and colours at the size of the font. Means with 95 % bootstrap intervals over images; Δ: mean "
        f"difference to {BICUBIC} at equal scene. Images: scenes 0 to {shown - 1}."
    ]
    for measured, title in MEASURES.items():
        lines.append(f"{title}:")
        lines += [f"  {name}: {_text(row[measured])}" for name, row in found.items()]
    return "\n".join(lines)


def _text(row: Mapping[str, float]) -> str:
    """Return `0.91 [0.84, 0.97], Δ 0.02 [-0.03, 0.06], n = 64`, as far as there are intervals."""
    parts = []
    for sign, kind in (("", ""), ("Δ ", "paired_")):
        if f"{kind}mean" in row:
            ends = f" [{row[f'{kind}low']:.3g}, {row[f'{kind}high']:.3g}]" if f"{kind}low" in row else ""
            parts.append(f"{sign}{row[f'{kind}mean']:.3g}{ends}")
    return ", ".join([*parts, f"n = {row['n']}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 for an error that the user can fix."""
    parser = refusing_parser("upscale", __doc__)
    out_argument(parser)
    parser.add_argument("--model", default="tiny", help="default: tiny")
    parser.add_argument("--scenes", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"default: {STEPS}")
    parser.add_argument("--rows", type=int, default=4, metavar="N", help="scenes in the figure; default: 4")

    def work() -> None:
        options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
        for name in ("scenes", "steps", "rows"):
            if getattr(options, name) < 1:
                raise UserError(f"--{name} {getattr(options, name)}: expected at least 1")
        import torch

        import fluxlab

        pipe = fluxlab.load_pipeline(options.model, dtype=torch.float32, device="cpu")
        keep, files, every = min(options.rows, options.scenes), [], {}
        for name, setting in SETTINGS.items():

            def say(text: str, name: str = name) -> None:
                print(f"{name}: {text}", file=sys.stderr, flush=True)

            rows, images = measure(pipe, setting, options.scenes, keep, options.steps, say=say)
            every[name], stem = numbers(rows), options.out / f"upscale-{name}"
            shown = [case(setting, number) for number in range(keep)]
            files += save(draw(setting, shown, images, every[name]), stem)
            text = caption(name, options.model, options.steps, options.scenes, keep, every[name])
            files += [save_caption(text, stem), save_table(rows, stem.with_suffix(".csv"))]
        weights = fingerprint(find_row(options.model))[:12]
        record = {"model": options.model, "weights": weights, "scenes": options.scenes, "steps": options.steps}
        file = options.out / "upscale.json"
        write_atomic(file, json.dumps(record | {"measures": every}, indent=1, ensure_ascii=False) + "\n")
        print(*files, file, sep="\n")

    return guarded(work, "interrupted")


if __name__ == "__main__":
    sys.exit(main())
