"""`python -m experiments.atlas -o figures`: which frequency of which head carries the place of the thing?

About 8 min on 2 CPU cores with model=tiny. For every (step, block, head, axis, frequency), the derivative of the place
of the content by a gain of 1 on what the pair of channels adds to the scores. Then images of other prompts and seeds
without the first k of these sites, without the first k for the denoising loss, and without k at random, read by the
scene oracle. Writes the atlas with its caption, a CSV of all sites, and atlas.json with the numbers of the ablation.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import atlastable
from experiments.atlastable import HELD_OUT, ORDERS, PROMPTS
from experiments.results import INTERVALS, mean_text
from experiments.standalone import Loaded, run_alone, value_text
from experiments.style import OKABE_ITO, PAGE, figure, paper, save, save_caption, save_table
from fluxlab.drawing.legend import legend_below
from fluxlab.errors import UserError
from fluxlab.files import write_atomic

if TYPE_CHECKING:
    from argparse import Namespace

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COUNTS = (2, 4, 8, 16, 32)
"""Numbers k of sites that are ablated, of 576 in the embedded model."""

STYLES = {"place": ("vermillion", "o"), "loss": ("blue", "s"), "random": ("black", "^")}
LABELS = {"place": "first k for the place", "loss": "first k for the denoising loss", "random": "k at random"}
CURVES = {"place": "place right", "found": "thing found", "moved": "thing moved by (px)"}

Found = Mapping[str, Any]


def measure(pipe: Any, seeds: int, steps: int, report: Any = lambda text: None) -> tuple[dict, list]:
    """Return the derivatives (`atlastable.attribute`) and the images without sites (`atlastable.ablate`).

    seeds: the images per prompt, of both. The ablation has the seeds after those of the attribution.
    """
    found = atlastable.attribute(pipe, PROMPTS, range(seeds), steps, report=report)
    shape, order = found["place"].shape[2:], atlastable.rankings(found)
    others = range(seeds, 2 * seeds)
    return found, atlastable.ablate(pipe, order, shape, COUNTS, HELD_OUT, others, steps, report)


def write(found: Found, rows: Sequence[Mapping], folder: Path, conditions: str) -> list[Path]:
    """Write the figure, its caption, the CSV of all sites and atlas.json."""
    sites, stem = atlastable.table_rows(found), folder / "atlas"
    numbers = {
        "images": len(found["place"]),
        "shares": atlastable.shares(found),
        "ablation": atlastable.outcomes(rows),
        "agreement": dict(zip(("correlation", "n"), atlastable.agreement(rows), strict=True)),
        "first": sorted(sites, key=lambda row: -row["place"])[:10],
    }
    files = save(draw(found, numbers), stem)
    files += [save_caption(f"{caption(found, numbers)}\n{conditions}", stem), save_table(sites, folder / "atlas.csv")]
    write_atomic(folder / "atlas.json", json.dumps(rounded(numbers), indent=1) + "\n")
    return [*files, folder / "atlas.json"]


def rounded(value: Any) -> Any:
    """Return numbers with 6 digits, in lists and mappings too, and None for nan."""
    if isinstance(value, Mapping):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    if isinstance(value, float):
        return None if value != value else float(f"{value:.6g}")
    return value


def draw(found: Found, numbers: Found) -> "Figure":
    """Return the figure: a map of frequencies for each block and head, and the ablation next to it."""
    size = atlastable.of_images(found["place"]).mean(0)
    blocks, heads, _ = size.shape
    with paper():
        drawn = figure(PAGE, 0.72 * blocks + 0.8)
        left, right = drawn.subfigures(1, 2, width_ratios=(2.3, 1))
        panels = left.subplots(blocks, heads, sharex=True, sharey=True, squeeze=False)
        for (block, head), axes in np.ndenumerate(panels):
            mesh = show_site(axes, found, size[block, head], float(size.max()))
            if not block:
                axes.set_title(f"head {head}", loc="left")
            if not head:
                axes.set_ylabel(f"block {block}", rotation=0, ha="right", va="center", labelpad=4)
        for axes in panels[-1]:
            axes.set_xlabel("wavelength (tokens)")
        bar = left.colorbar(mesh, ax=panels, location="right", fraction=0.03, pad=0.01)
        bar.set_label("|∂ place / ∂ gain| over its mean")
        curves = right.subplots(len(CURVES), 1, sharex=True)
        for axes, (metric, title) in zip(curves, CURVES.items(), strict=True):
            show_curve(axes, numbers["ablation"], metric)
            axes.set_title(title, loc="left")
        curves[-1].set_xlabel("sites without effect, k")
        handles, labels = curves[0].get_legend_handles_labels()
        lines = legend_below(drawn, handles, labels, columns=4)
        drawn.set_figheight(drawn.get_figheight() + 0.13 * lines)
        return drawn


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
    before = ablation["none"][metric]["mean"]
    axes.axhline(before, color="0.5", lw=0.8, ls=(0, (4, 2)), label="all sites", zorder=1)
    for n, name in enumerate(ORDERS):
        counts = [int(key.split()[1]) for key in ablation if key.startswith(f"{name} ")]
        values = [ablation[f"{name} {k}"][metric] for k in counts]
        x = [k * 1.06 ** (n - 1) for k in counts]
        colour, marker = OKABE_ITO[STYLES[name][0]], STYLES[name][1]
        axes.vlines(x, *([value[end] for value in values] for end in ("low", "high")), color=colour, lw=0.9)
        axes.plot(x, [v["mean"] for v in values], color=colour, marker=marker, ms=3, lw=0.8, label=LABELS[name])
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(k) for k in counts])
    axes.minorticks_off()
    if metric != "moved":
        axes.set_ylim(-0.04, 1.04)


def caption(found: Found, numbers: Found) -> str:
    """Return the caption of the figure, with the numbers that it shows."""
    images, steps, *shape = found["place"].shape[:5]
    sites = int(np.prod(shape))
    lines = [
        "Place of the content of images against gains of the rotary tables: blocks × heads × "
        f"frequencies, {sites} sites. Its size is the mean over {images} images of |the sum of the derivatives "
        f"over {steps} steps|, divided by its mean over the sites of the image. The place is the centre of mass of the "
        "squared distance of the latents to the background, towards the side that the prompt names, in tokens; it "
        "stands in for the oracle's place, which has no gradient. Its movement "
        f"and that of the oracle's thing have a correlation of {numbers['agreement']['correlation']:.2f} over "
        f"{numbers['agreement']['n']} images without some sites. Right: what the oracle reads in images of other "
        "prompts and seeds when k sites add nothing to the scores, at all steps. The place is wrong where no thing is "
        f"found; the movement is over images with a thing. {INTERVALS[0].upper() + INTERVALS[1:]}.",
        "Share of the sum of sizes:",
    ]
    lines += [f"  {name}: {value_text(row)}{of_sites(row)}" for name, row in numbers["shares"].items()]
    lines += ["Largest sites:"]
    for row in numbers["first"]:
        ends = mean_text(row["place"], row["place_low"], row["place_high"])
        site = f"block {row['block']} head {row['head']} {row['axis']}, wavelength {row['wavelength']:.3g}"
        lines.append(f"  {site}: {ends}, for the loss {row['loss']:.3g}, signed {row['signed']:.3g} tokens")
    lines += ["Ablation:"]
    for variant, row in numbers["ablation"].items():
        lines.append(f"  {variant}: {'; '.join(f'{metric} {value_text(value)}' for metric, value in row.items())}")
    return "\n".join(lines)


def of_sites(row: Mapping) -> str:
    return f", with {row['sites']:.3g} of the sites" if "sites" in row else ""


def make(loaded: Loaded, options: "Namespace") -> list[Path]:
    """Make the derivatives and the images, and write the figure.

    Raises `UserError` for a model that draws no scenes.
    """
    if not loaded.row.scenes:
        raise UserError(
            f"model={loaded.row.name}: not one of scenes; the atlas needs the scene oracle, as with model=tiny"
        )
    found, rows = measure(loaded.pipe, options.seeds, loaded.steps, lambda text: print(text, file=sys.stderr))
    return write(found, rows, options.out, loaded.conditions)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 for an error that the user can fix."""
    return run_alone("atlas", __doc__, arguments, {"seeds": (8, "images per prompt")}, 4, make)


if __name__ == "__main__":
    sys.exit(main())
