"""`python -m experiments.atlas PLACE DENOISING RUN -o figures`: which frequency of which head carries the place?

Takes seconds. PLACE and DENOISING are folders of `python -m fluxlab.attribution +exp=atlas` with these objectives, RUN
that of their ablation (`python -m fluxlab.ablation PLACE DENOISING`). Shows for every (step, block, head, axis,
frequency) the derivative of the place of the content by a gain of 1 on what the pair of channels adds to the scores;
and what the scene oracle reads in images of other prompts and seeds without the first k of these, without the first k
for the denoising loss, and without k at random. Also writes a CSV of all sites and a JSON file with the numbers.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import atlastable
from experiments.atlastable import ALL, ORDERS
from experiments.results import INTERVALS, conditions, controls, mean_text, opening, plain_name, value_text
from experiments.sheet import LINES
from experiments.style import (
    COLUMN,
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
from fluxlab.compose import guarded
from fluxlab.drawing.legend import legend_below
from fluxlab.experiment.reading import Run, read_run
from fluxlab.files import write_atomic
from fluxlab.learning import Attribution, read_attribution
from fluxlab.learning.ranking import sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = {"place": ("black", "o"), "denoising": ("blue", "s"), "random": ("orange", "^")}
LABELS = {"place": "first k for the place", "denoising": "first k for the denoising loss", "random": "k at random"}
CURVES = {"place": "place right", "found": "thing found", "moved": "thing moved by (px)"}

Found = Mapping[str, Any]


def make(place: Attribution, denoising: Attribution, run: Run, folder: Path) -> list[Path]:
    """Draw the atlas in both widths, with a caption, the CSV of all sites and a JSON file with the numbers."""
    found, numbers = atlastable.read(place, denoising), atlastable.numbers(place, denoising, run)
    stem, files = folder / plain_name(place), []
    for width, name in ((COLUMN, "column"), (PAGE, "page")):
        files += save(draw(found, numbers, width), stem.with_name(f"{stem.name}-{name}"))
    lines = [caption(found, numbers, run), *map(conditions, (place, denoising, run))]
    files += [save_caption("\n".join(lines), stem), save_table(atlastable.table_rows(found), stem.with_suffix(".csv"))]
    write_atomic(stem.with_suffix(".json"), json.dumps(atlastable.rounded(numbers), indent=1) + "\n")
    return [*files, stem.with_suffix(".json")]


def draw(found: Found, numbers: Found, width: float) -> "Figure":
    """Return the figure: a map of frequencies for each block and head, and the ablation next to it or below it."""
    size, side = sizes(found["place"]).mean(0), width == PAGE
    blocks, heads, _ = size.shape
    tall = 0.72 * blocks if side else 0.5 * blocks + 0.6
    with paper():
        drawn = figure(width, tall + (0.6 if side else 3.2))
        if side:
            first, second = drawn.subfigures(1, 2, width_ratios=(2.3, 1))
        else:
            first, second = drawn.subfigures(2, 1, height_ratios=(tall, 3.2))
        panels = first.subplots(blocks, heads, sharex=True, sharey=True, squeeze=False)
        for (block, head), axes in np.ndenumerate(panels):
            mesh = show_site(axes, found, size[block, head], float(size.max()))
            if not block:
                axes.set_title(f"head {head}", loc="left")
            if not head:
                axes.set_ylabel(f"block {block}", rotation=0, ha="right", va="center", labelpad=4)
        first.supxlabel("wavelength (tokens)", fontsize=7)
        place = {"location": "right", "fraction": 0.03, "pad": 0.01} if side else {"location": "top", "aspect": 40}
        first.colorbar(mesh, ax=panels, **place).set_label("|∂ place / ∂ gain| over its mean")
        curves = second.subplots(len(CURVES), 1, sharex=True)
        for axes, (metric, title) in zip(curves, CURVES.items(), strict=True):
            show_curve(axes, numbers["ablation"], metric)
            axes.set_title(title, loc="left")
        curves[-1].set_xlabel("sites without effect, k")
        lines = legend_below(drawn, *labelled(curves), columns=3)
        drawn.set_figheight(drawn.get_figheight() + 0.13 * lines)
        return drawn


def labelled(panels: Sequence["Axes"]) -> tuple[list, list]:
    """Return handles and labels of several panels, each label once."""
    found = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def show_site(axes: "Axes", found: Found, size: np.ndarray, most: float) -> Any:
    """Draw the sizes of one head, a row per axis over the wavelength."""
    from matplotlib.colors import PowerNorm

    names, waves = np.array(found["axis"]), np.array(found["wavelength"])
    axis, mesh = list(dict.fromkeys(found["axis"])), None
    for i, name in enumerate(axis):
        at = names == name
        steps = np.log(waves[at])
        half = np.diff(steps).mean() / 2 if at.sum() > 1 else 0.3
        edges = np.exp(np.append(steps - half, steps[-1] + half))
        mesh = axes.pcolormesh(
            edges, (i - 0.46, i + 0.46), size[at][None], cmap="magma_r", norm=PowerNorm(0.5, 0, most), rasterized=False
        )
    axes.set_xscale("log")
    axes.set_xticks([10, 100, 1000, 10000], ["10", "", "1000", ""])
    axes.minorticks_off()
    axes.set_xlim(3, 2e4)
    axes.set_ylim(len(axis) - 0.5, -0.5)
    axes.set_yticks(range(len(axis)), axis)
    axes.tick_params(axis="y", length=0)
    return mesh


def show_curve(axes: "Axes", ablation: Found, metric: str) -> None:
    """Draw what the oracle reads over the number of sites without effect."""
    if metric == "moved":
        for name, (colour, dashes) in LINES.items():
            if metric in ablation.get(name, {}):
                value = ablation[name][metric]["mean"]
                axes.axhline(value, color=OKABE_ITO[colour], lw=0.9, ls=dashes, label=name, zorder=1)
    else:
        axes.axhline(ablation[ALL][metric]["mean"], color="0.5", lw=0.8, ls=(0, (4, 2)), label=ALL, zorder=1)
        axes.set_ylim(-0.04, 1.04)
    counts = sorted({int(key.split()[1]) for key in ablation if key.startswith(ORDERS)})
    for n, name in enumerate(ORDERS):
        values = {k: ablation[f"{name} {k}"][metric] for k in counts if f"{name} {k}" in ablation}
        shown = {k * 1.06 ** (n - 1): value for k, value in values.items() if value["n"]}
        colour, marker = OKABE_ITO[STYLES[name][0]], STYLES[name][1]
        axes.vlines(list(shown), *([v[end] for v in shown.values()] for end in ("low", "high")), color=colour, lw=0.9)
        means = [value["mean"] for value in shown.values()]
        axes.plot(list(shown), means, color=colour, marker=marker, ms=3, lw=0.8, label=LABELS[name])
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(k) for k in counts])
    axes.minorticks_off()


def caption(found: Found, numbers: Found, run: Run) -> str:
    """Return the caption of the figure, with the numbers that it shows."""
    images, steps, *shape = found["place"].shape[:5]
    sites, agreed = int(np.prod(shape)), numbers["agreement"]
    lines = [
        "Place of the content of images against gains of the rotary tables: blocks × heads × frequencies, "
        f"{sites} sites. Its size is the mean over {images} images of |the sum of the derivatives over {steps} steps|, "
        "divided by its mean over the sites of the image. The place is the centre of mass of the squared distance of "
        "the latents to the background, towards the side that the prompt names, in tokens; it stands in for the "
        "oracle's place, which has no gradient. In the images of the ablation, the movement of this centre, of pixels "
        f"instead of latents, and that of the oracle's thing have a correlation of {agreed['correlation']:.2f} over "
        f"{agreed['n']} images. The curves: what the oracle reads in images of other prompts and seeds when k sites "
        "add nothing to the scores, at all steps. The place is wrong where no thing is found; the movement is over "
        "images with a thing. Of sites at random, an image counts with its mean over several choices. "
        f"{INTERVALS[0].upper() + INTERVALS[1:]}.",
        "Share of the sum of sizes:",
    ]
    lines += [f"  {name}: {value_text(row)}{of_sites(row)}" for name, row in numbers["shares"].items()]
    lines += ["Largest sites:"]
    for row in numbers["first"]:
        ends = mean_text(row["place"], row["place_low"], row["place_high"])
        site = f"block {row['block']} head {row['head']} {row['axis']}, wavelength {row['wavelength']:.3g}"
        lines.append(f"  {site}: {ends}, for the loss {row['denoising']:.3g}, signed {row['signed']:.3g} tokens")
    lines += [f"{opening(run)} {controls(run)}"]
    for variant, row in numbers["ablation"].items():
        shown = [f"{metric} {value_text(value)}{of_sets(value)}" for metric, value in row.items() if value["n"]]
        lines.append(f"  {variant}: {'; '.join(shown)}")
    return "\n".join(lines)


def of_sites(row: Mapping) -> str:
    return f", with {row['sites']:.3g} of the sites" if "sites" in row else ""


def of_sets(row: Mapping) -> str:
    return "" if "sets" not in row else " (single choices {:.3g} to {:.3g})".format(*row["sets"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 for an error that the user can fix."""
    parser = refusing_parser("atlas", make.__doc__)
    text = "the folder of python -m fluxlab.attribution +exp=atlas objective="
    parser.add_argument("place", type=Path, help=f"{text}place")
    parser.add_argument("denoising", type=Path, help=f"{text}denoising")
    parser.add_argument("run", type=Path, help="the run of what python -m fluxlab.ablation writes for both")
    out_argument(parser)

    def work() -> None:
        given = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
        found = [read_attribution(folder) for folder in (given.place, given.denoising)]
        print(*make(*found, read_run(given.run), given.out), sep="\n")

    return guarded(work, "interrupted")


if __name__ == "__main__":
    sys.exit(main())
