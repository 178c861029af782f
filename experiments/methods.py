"""`python -m experiments.methods STORE STORE -o figures`: methods for larger images side by side, alone and composed.

Takes seconds; needs finished stores of +exp=methods and methods_2x, or other runs of enlarged scenes; no model.
Page width: one row per variant and one group of columns per store. A group has two images, the shares of images that
the scene oracle reads as asked for, their mean (the score), and the sharpness. Column width: the score alone. The
caption has the best composition against the best method alone, on prompts that chose neither.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.methodtable import CONTROL, KINDS, PARTS, HeldOut, Row, enlarged, held_out, scores, table_rows
from experiments.results import INTERVALS, all_cells, conditions, controls, label, mean_text, opening, plain_name
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
from fluxlab.drawing.pictures import open_cell
from fluxlab.errors import UserError
from fluxlab.experiment.reading import Run, read_store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = dict(zip(KINDS, (("black", "o"), ("blue", "s"), ("green", "^"), ("vermillion", "D")), strict=True))
"""Colour and marker of each kind of variant. Either one identifies it."""

NAMES = ("baseline and resized", "frequencies", "attention", "composed")
HEADS = ("things", "colour", "shape", "place", "letters")
ROW = 0.185
"""Height of a row in inches."""


def make(runs: Sequence[Run], folder: Path, widths: Sequence[str] = ("column", "page")) -> list[Path]:
    """Draw what the oracle reads in enlarged images of every method, with a caption and a CSV of all numbers."""
    check(runs)
    every = [scores(run) for run in runs]
    tables = [table_rows(run, rows) for run, rows in zip(runs, every, strict=True)]
    compared = [held_out(run, rows) for run, rows in zip(runs, every, strict=True)]
    stem, written = folder / plain_name(runs[0]), []
    for width in widths:
        drawn = draw_page(runs, tables) if width == "page" else draw_column(runs, tables)
        written += save(drawn, stem.with_name(f"{stem.name}-{width}"))
    table = save_table([row for rows in tables for row in rows], stem.with_name(f"{stem.name}.csv"))
    return [*written, save_caption(caption(runs, tables, compared), stem), table]


def check(runs: Sequence[Run]) -> None:
    """Raise `UserError` unless all runs have the same variants, prompts and seeds, and different sizes."""
    for run in runs[1:]:
        for what, here, first in (
            ("variants", run.variants, runs[0].variants),
            ("prompts and seeds", run.places, runs[0].places),
        ):
            if here != first:
                raise UserError(f"{run.path}: other {what} than {runs[0].path}; give runs of the same ones")
    sizes = [enlarged(run) for run in runs]
    if len(set(sizes)) < len(sizes):
        raise UserError(f"{runs[-1].path}: as large as another run; give one run of each size")


def sections(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of variants by kind, in the order of `KINDS`."""
    variants = [row for row in rows if row["kind"] != CONTROL]
    return sorted(variants, key=lambda row: KINDS.index(row["kind"]))  # stable: as listed within a kind


def draw_page(runs: Sequence[Run], tables: Sequence[Sequence[Row]]) -> "Figure":
    """Return the figure of page width: images, shares, score and sharpness of every variant and size."""
    with paper():
        count = len(sections(tables[0]))
        drawn = figure(PAGE, ROW * count + 0.75)
        widths = [part for _ in runs for part in (0.5 * len(runs), 2.5, 1.7, 1.2)]
        panels = drawn.subplots(1, len(widths), gridspec_kw={"width_ratios": widths}, squeeze=False)[0]
        for n, (run, table) in enumerate(zip(runs, tables, strict=True)):
            rows = sections(table)
            images, shares, score, sharp = panels[4 * n : 4 * n + 4]
            show_images(images, run, rows)
            show_shares(shares, rows)
            show_dots(score, rows, "score", "score")
            show_dots(sharp, rows, "sharpness", "sharpness")
            images.set_title(f"{enlarged(run):g} × the trained size", loc="left")
            for axes in (images, shares, score, sharp):
                axes.set_ylim(count - 0.5, -0.5)
                axes.set_yticks([])
            score.set_xlim(-0.03, 1.03)
        panels[0].set_yticks(range(count), [row["variant"] for row in sections(tables[0])])
        panels[0].tick_params(axis="y", length=0)
        handles, labels = panels[2].get_legend_handles_labels()
        legend_below(drawn, handles, labels)
        return drawn


def show_images(axes: "Axes", run: Run, rows: Sequence[Row]) -> None:
    """Draw two images of every variant: the first seed of the first prompt of each half."""
    prompts = list(dict.fromkeys(place[0] for place in run.places))
    shown = list(dict.fromkeys((prompts[0], prompts[len(prompts) // 2])))
    seed = run.places[0][1]
    for i, row in enumerate(rows):
        for j, prompt in enumerate(shown):
            image = open_cell(run.image(row["variant"], prompt, seed))
            axes.imshow(image, extent=(j - 0.46, j + 0.46, i + 0.46, i - 0.46), aspect="auto", zorder=2)
    axes.set_xlim(-0.5, len(shown) - 0.5)
    axes.set_xticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def show_shares(axes: "Axes", rows: Sequence[Row]) -> None:
    """Draw the shares of `PARTS` as a table: darker is more."""
    values = [[row[part] for part in PARTS] for row in rows]
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1.25, aspect="auto")
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            shown = "–" if value != value else f"{value:.2f}".removeprefix("0") if value < 1 else "1"
            axes.text(j, i, shown, ha="center", va="center", size=5.5, color="white" if value > 0.75 else "black")
    axes.set_xticks(range(len(PARTS)), HEADS, rotation=90)
    axes.tick_params(axis="x", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def show_dots(axes: "Axes", rows: Sequence[Row], metric: str, title: str) -> None:
    """Draw a metric's mean and interval of every variant, with a line at the baseline's mean."""
    from matplotlib.ticker import MaxNLocator

    axes.axvline(rows[0][metric], color="0.6", lw=0.6, ls=(0, (4, 2)), zorder=1)
    for kind, name in zip(KINDS, NAMES, strict=True):
        at = [i for i, row in enumerate(rows) if row["kind"] == kind]
        colour, marker = OKABE_ITO[STYLES[kind][0]], STYLES[kind][1]
        mean, low, high = ([rows[i][metric + end] for i in at] for end in ("", "_low", "_high"))
        axes.hlines(at, low, high, color=colour, lw=0.9, zorder=2)
        axes.plot(mean, at, color=colour, marker=marker, ms=2.6, lw=0, label=name, zorder=3)
    axes.xaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}".removeprefix("0") or "0")  # ".02": neighbours must not touch
    axes.set_xlabel(title)


def draw_column(runs: Sequence[Run], tables: Sequence[Sequence[Row]]) -> "Figure":
    """Return the figure of column width: the score of every variant, one panel per size."""
    with paper():
        count = len(sections(tables[0]))
        drawn = figure(COLUMN, 0.115 * count + 0.65)
        panels = drawn.subplots(1, len(runs), sharey=True, squeeze=False)[0]
        for axes, run, table in zip(panels, runs, tables, strict=True):
            rows = sections(table)
            show_dots(axes, rows, "score", "score")
            axes.set_title(f"{enlarged(run):g} ×", loc="left")
            axes.set_xlim(-0.03, 1.03)
            axes.set_ylim(count - 0.4, -0.6)
            axes.set_yticks(range(count), [row["variant"] for row in rows])
            axes.tick_params(axis="y", length=0, labelsize=5.5)
        handles, labels = panels[0].get_legend_handles_labels()
        legend_below(drawn, handles, labels, columns=2)
        return drawn


def caption(runs: Sequence[Run], tables: Sequence[Sequence[Row]], compared: Sequence[HeldOut]) -> str:
    """Return the caption of the figure, with the numbers that it shows."""
    lines = [
        f"{opening(runs[0])} Larger images by published methods. Things: there are exactly as many as the caption "
        "names. Colour, shape, place: those of the largest thing are as asked for. Letters: the share that is right, "
        "read in the image and in the image resized to the trained size, whichever has more. Score: the mean of the "
        "five. All right: all five are. bicubic is the image of the trained size, resized; the dashed line is the "
        f"baseline without a method. Means over {all_cells(runs[0])}, {INTERVALS}. {controls(runs[0])}"
    ]
    for run, table, found in zip(runs, tables, compared, strict=True):
        lines.append(f"{enlarged(run):g} × the trained size, {run.record['settings']['steps']} steps:")
        lines += [f"  {row['variant']}: {numbers(row)}" for row in table if row["kind"] == CONTROL]
        lines += [f"  {row['variant']} ({label(run, row['variant'])}): {numbers(row)}" for row in sections(table)]
        lines += [f"  {text}" for text in comparison(found)]
    return "\n".join([*lines, *map(conditions, runs)])


def numbers(row: Mapping) -> str:
    """Return the numbers of a variant as text."""
    titles = {"all_right": "all right", "size": "size, px"}
    parts = ("score", *PARTS, "all_right", "size", "sharpness")
    shown = [f"{titles.get(m, m)} {mean_text(*(row[m + end] for end in ('', '_low', '_high')))}" for m in parts]
    return f"{', '.join(shown)}, n = {row['n']}"


def comparison(found: HeldOut) -> list[str]:
    """Return what a composition adds to the best method alone, as lines."""
    lines = [
        f"chosen by the {half} half of the prompts: alone {alone}, composed {pair}; on the other half composed - alone "
        f"= {mean_text(*ends)}, n = {n}"
        for half, (alone, pair), ends, n in zip(
            ("first", "second"), found.chosen, found.difference, found.counts, strict=True
        )
    ]
    listed = [f"above: {', '.join(found.above) or 'none'}", f"below: {', '.join(found.below) or 'none'}"]
    return [
        *lines,
        f"both halves: composed - alone = {mean_text(*found.pooled)}, n = {found.n}",
        f"all prompts, each of {found.compared} compositions against {found.best}, the best alone: intervals "
        f"{'; '.join(listed)}. These are {found.compared} comparisons; of so many without any effect, "
        f"{0.025 * found.compared:.1f} would be above by chance.",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 for an error that the user can fix."""
    parser = refusing_parser("methods", make.__doc__)
    parser.add_argument("stores", type=Path, nargs="+", metavar="STORE", help="finished runs, one of each size")
    out_argument(parser)
    parser.add_argument("--width", choices=["column", "page", "both"], default="both", help="default: both")

    def work() -> None:
        options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
        widths = ("column", "page") if options.width == "both" else (options.width,)
        print(*make([read_store(store) for store in options.stores], options.out, widths), sep="\n")

    return guarded(work, "interrupted")


if __name__ == "__main__":
    sys.exit(main())
