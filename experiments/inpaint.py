"""`python -m experiments.inpaint -o figures`: a thing of a scene exchanged for another one, with everything else kept.

About 5 min on one CPU core with model=tiny. In every scene the hole is the box of one thing. The prompt asks for
another thing in another colour there. Compares the paths and the attention of `pipe.inpaint`: does the scene oracle
find that thing in the hole, is the image outside of the hole the given one, and is there a seam? The floor fills the
hole from its border and samples nothing. Scenes are drawn, and have one thing or two in turn.

Writes the figure, its caption with all numbers, a CSV with one row per image, and a JSON with the means.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.exchange import MEASURES, SIDE, Case, case, scores
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
from fluxlab.editing.inpaint import filled, hole_tokens
from fluxlab.errors import UserError
from fluxlab.files import write_atomic
from fluxlab.measure.summary import summarise
from fluxlab.pixels import image_tensor

if TYPE_CHECKING:
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


def images_of(pipe: Any, one: Case, steps: int, methods: Sequence[str] = tuple(METHODS)) -> Found:
    """Yield the name, the image, and the std of known tokens after the first step of everything that is compared.

    Images are uint8, of the model's size. The std is nan where no token is known.
    """
    import torch

    scale = pipe.size[0] // SIDE
    given, drawn, hole = (part.repeat(scale, 0).repeat(scale, 1) for part in (one.given, one.drawn, one.hole))
    for name, image in ((DRAWN, drawn), (FLOOR, filled(image_tensor(given), torch.from_numpy(hole)))):
        (decoded,) = pipe.decode(*pipe.encode(image))
        yield name, np.asarray(decoded), math.nan
    height, width = hole.shape
    (alone,) = pipe.generate([one.prompt], seeds=[one.number], steps=steps, height=height, width=width)
    yield ALONE, np.asarray(alone), math.nan
    tokens = hole_tokens(hole, hole.shape, pipe.grid(height, width)).flatten()
    known, inside = ([int(n) for n in which.nonzero()[:, 0]] for which in (~tokens, tokens))
    seen: list[Any] = []
    for name in methods:
        options = dict(METHODS[name])
        seen.clear()
        if options["attention"] == "text sees":
            edit = {"op": "mask", "from": {"indices": known}, "to": {"indices": inside}}
            options |= {"attention": "both_ways", "programs": {"one_way": edit}}
        (result,) = pipe.inpaint(
            given,
            hole,
            one.prompt,
            one.number,
            steps=steps,
            on_step=lambda i, t, x: seen.append(x[:, known]),
            **options,
        )
        yield name, np.asarray(result), float(seen[0].std())


def measure(
    pipe: Any, count: int, keep: int, steps: int, say: Callable[[str], None] = lambda text: None
) -> tuple[list[dict[str, Any]], list[dict[str, Image]]]:
    """Return a row of measures for every image of `count` cases, and the images of the first `keep`."""
    rows, images = [], []
    for number in range(count):
        one, kept = case(number), {}
        for name, image, spread in images_of(pipe, one, steps):
            kept[name] = image
            start = {"variant": name, "prompt": one.prompt, "seed": number, **dict.fromkeys(MEASURES, math.nan)}
            rows.append(start | scores(image, one) | {"spread": spread})
        images += [kept] if number < keep else []
        say(f"{number + 1}/{count} scenes")
    return rows, images


def numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return variant → measure → n, mean, low, high, the difference to the first method, and the value of scene 0."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    first = {row["variant"]: row for row in reversed(rows)}
    for row in summarise(rows, next(iter(METHODS)), tuple(MEASURES)):
        if not row["n"]:
            continue
        values = {key: row[key] for key in ("mean", "low", "high", "paired_mean", "paired_low", "paired_high")}
        values |= {"first": first[row["variant"]][row["metric"]]}
        kept = {key: round(value, 6) for key, value in values.items() if not np.isnan(value)}
        found.setdefault(row["variant"], {})[row["metric"]] = {"n": row["n"], **kept}
    return found


def draw(cases: Sequence[Case], images: Sequence[Mapping[str, Image]], found: Mapping[str, Any]) -> "Figure":
    """Return the figure: rows of scenes, with the hole outlined, above the measures of every method."""
    names, columns = list(found), [ALONE, *METHODS]
    with paper():
        drawn = figure(PAGE, 0.84 * len(cases) + 1.9)
        above, below = drawn.subfigures(2, 1, height_ratios=[0.84 * len(cases), 1.9])
        grid = above.subplots(len(cases), 1 + len(columns), squeeze=False)
        for line, one, row in zip(grid, cases, images, strict=True):
            for axes, name, image in zip(line, ("given", *columns), (one.given, *map(row.get, columns)), strict=True):
                _show(axes, image, one.hole)
                if one is cases[0]:
                    axes.set_title(name.replace(", ", ",\n") if "," in name else name.replace(" ", "\n"))
        panels = below.subplots(1, len(SHOWN), sharey=True)
        for axes, measured in zip(panels, SHOWN, strict=True):
            for y, name in enumerate(names):
                row, colour = found[name][measured], OKABE_ITO["blue"] if name in METHODS else "0.45"
                axes.plot([row.get("low", row["mean"]), row.get("high", row["mean"])], [y, y], color=colour)
                axes.plot(row["mean"], y, "o", ms=3, color=colour)
            axes.set_title(MEASURES[measured], loc="left")
            axes.grid(axis="x", color="0.9", lw=0.5)
            if measured in ("object", "colour", "asked"):
                axes.set_xlim(-0.04, 1.04)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].invert_yaxis()
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


def caption(record: Mapping[str, Any], shown: int) -> str:
    """Return the caption of the figure with all numbers. record: the content of the JSON."""
    model, count, steps, found = (record[key] for key in ("model", "scenes", "steps", "measures"))
    lines = [
        f"One thing of a scene exchanged for another one by inpainting, model {model}, {steps} steps, {count} scenes, "
        "a seed each, with one thing or two in turn. Dashed: the hole, the box of the thing; everything outside "
        "of it is known. Noised: known tokens are those of the image mixed with noise. Inverted: those of the path of "
        "an inversion with 3 iterations per step, or once with 1. One-way: text and known tokens do not attend to the "
        f"hole; text sees: only known tokens do not. {DRAWN}: the scene drawn with the new thing, encoded and decoded, "
        f"the most that is possible. {FLOOR}: the hole filled from its border, encoded and decoded. {ALONE}: the whole "
        "image from the prompt. In the hole the scene oracle looks for a thing, one in the colour asked for, and one "
        "with the colour and the name asked for. PSNR outside of the hole is that to the given image. The step at the "
        "border is the median difference of neighbouring pixels on both sides of it, in 0 … 1. The std of known tokens "
        "is that of their latents after the first step. Means with 95 % "
        f"bootstrap intervals over images; Δ: mean difference to {next(iter(METHODS))} at equal scene. Images: scenes "
        f"0 to {shown - 1}."
    ]
    for measured, title in MEASURES.items():
        lines.append(f"{title}:")
        lines += [f"  {name}: {_text(row[measured])}" for name, row in found.items() if measured in row]
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
    parser = refusing_parser("inpaint", __doc__)
    out_argument(parser)
    parser.add_argument("--model", default="tiny", help="default: tiny")
    parser.add_argument("--scenes", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="sampling steps; default: 8")
    parser.add_argument("--rows", type=int, default=4, metavar="N", help="scenes in the figure; default: 4")

    def work() -> None:
        options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
        for name in ("scenes", "steps", "rows"):
            if getattr(options, name) < 1:
                raise UserError(f"--{name} {getattr(options, name)}: expected at least 1")
        import torch

        import fluxlab

        pipe = fluxlab.load_pipeline(options.model, dtype=torch.float32, device="cpu")
        keep = min(options.rows, options.scenes)
        rows, images = measure(
            pipe, options.scenes, keep, options.steps, lambda text: print(text, file=sys.stderr, flush=True)
        )
        found, stem = numbers(rows), options.out / "inpaint"
        weights = fingerprint(find_row(options.model))[:12]
        record = {"model": options.model, "weights": weights, "scenes": options.scenes, "steps": options.steps}
        record["measures"] = found
        files = save(draw([case(i) for i in range(keep)], images, found), stem)
        files += [save_caption(caption(record, keep), stem)]
        files += [save_table(rows, stem.with_suffix(".csv"))]
        write_atomic(stem.with_suffix(".json"), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        print(*files, stem.with_suffix(".json"), sep="\n")

    return guarded(work, "interrupted")


if __name__ == "__main__":
    sys.exit(main())
