"""`python -m experiments.words STORE -o figures`: do the words of a caption attend to what they name?

Takes seconds. Needs a finished store with `capture=words`, such as one of `+exp=attention`, whose prompts are captions
of `fluxlab.scenes`. Needs no model.

The figure shows for each block how much of a word's attention map is on the region that the oracle finds for the word
in the same image, as a multiple of that region's share of the image. It has three panels: colour words, object words
and sign words. The numbers are written to a caption file and a CSV.

The best block is selected with the baseline at every other seed, and its value is reported at the remaining seeds.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.results import conditions, counted, label, number, opening, plain_name
from experiments.style import COLUMN, OKABE_ITO, PAGE, figure, paper, save, save_caption, save_table
from experiments.wordtable import Row, table_rows
from fluxlab.compose import guarded
from fluxlab.drawing.legend import legend_below
from fluxlab.errors import UserError
from fluxlab.experiment.reading import Run, read_store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"colour": "colour words", "thing": "object words", "sign": "sign words"}
STYLES = list(zip(("black", "blue", "vermillion", "green", "purple", "orange", "sky"), "osD^vPX", strict=True))
"""Colour and marker of each variant, the baseline first. Either one identifies a variant."""

LEGEND_LINE = 0.13
"""Height of a line of the legend in inches."""

MANY = 12
"""With more blocks than this, intervals are drawn as bands instead of bars."""


def make(
    run: Run, folder: Path, *, variants: Sequence[str] | None = None, widths: Sequence[str] = ("column", "page")
) -> list[Path]:
    """Draw how much the words of a store's captions attend to what they name, with a caption and a CSV.

    widths: "column" and/or "page". Returns the files. Raises `UserError` for a store without captured words.
    """
    shown = select_variants(run, variants)
    rows = table_rows(run, shown)
    stem, written = folder / f"{plain_name(run)}-words", []
    for width in widths:
        written += save(draw(run, rows, shown, width), stem.with_name(f"{stem.name}-{width}"))
    table = save_table(rows, stem.with_name(f"{stem.name}.csv"))
    return [*written, save_caption(caption(run, rows, shown), stem), table]


def select_variants(run: Run, names: Sequence[str] | None) -> list[str]:
    """Return the baseline and the variants in `names`, or all variants if `names` is None.

    Raises `UserError` for a name that the store does not have, and for more variants than there are colours.
    """
    unknown = [name for name in names or () if name not in run.variants]
    if unknown or names == []:
        raise UserError(f"--variants {','.join(names)}: expected some of {', '.join(run.variants)}")
    shown = list(dict.fromkeys([run.baseline, *(names or run.variants)]))
    if len(shown) > len(STYLES):
        raise UserError(
            f"{len(shown)} variants, but the figure has colours for {len(STYLES)}: select some with --variants"
        )
    return shown


def draw(run: Run, rows: Sequence[Row], variants: Sequence[str], width: str) -> "Figure":
    """Return the figure. width: "column" puts the panels below each other, "page" puts them in one line."""
    kinds = list(dict.fromkeys(row["words"] for row in rows))
    with paper():
        height = 2.3 if width == "page" else 0.3 + 1.6 * len(kinds)
        drawn = figure(PAGE if width == "page" else COLUMN, height)
        shape = {"nrows": 1, "ncols": len(kinds)} if width == "page" else {"nrows": len(kinds), "ncols": 1}
        panels = drawn.subplots(**shape, sharey=True, squeeze=False).ravel()
        for axes, kind in zip(panels, kinds, strict=True):
            panel(axes, run, [row for row in rows if row["words"] == kind], variants)
            axes.set_title(TITLES[kind], loc="left")
        panels[0].set_ylim(bottom=0)
        panels[0].locator_params(axis="y", nbins=5)
        for axes in panels if width == "page" else panels[-1:]:
            axes.set_xlabel("block")
        for axes in panels[:1] if width == "page" else panels:
            axes.set_ylabel("attention on the word's\nregion, × chance")
        lines = legend_below(drawn, *panels[0].get_legend_handles_labels(), columns=2 if width == "column" else 6)
        drawn.set_figheight(height + LEGEND_LINE * lines)
        return drawn


def panel(axes: "Axes", run: Run, rows: Sequence[Row], variants: Sequence[str]) -> None:
    """Draw one kind of word: every variant against blocks, then the mean of all blocks and the best block."""
    blocks = [row["block"] for row in rows if row["variant"] == variants[0] and row["of"] == "block"]
    count, best = len(blocks), next(row["block"] for row in rows if row["of"] == "best")
    apart = 0.0 if count > MANY else 0.5 / len(variants)
    wide = max(1.0, count / 8)  # the distance of "all" and "best" from the blocks
    positions = {"mean": count - 0.5 + wide, "best": count - 0.5 + 2 * wide}
    axes.axhline(1, color="0.4", lw=0.8, ls=(0, (4, 2)), label="chance", zorder=1)
    for i, variant in enumerate(variants):
        per_block = [row for row in rows if row["variant"] == variant and row["of"] == "block"]
        overall = [row for row in rows if row["variant"] == variant and row["of"] in positions]
        colour, marker = OKABE_ITO[STYLES[i][0]], STYLES[i][1]
        style = {"color": colour, "marker": marker, "ms": 2.8, "zorder": 3}
        shift = (i - (len(variants) - 1) / 2) * apart
        x = np.arange(count) + shift
        axes.plot(x, [row["ratio"] for row in per_block], label=legend_label(run, variant), lw=0.9, **style)
        bars = [(positions[row["of"]] + shift * wide, row) for row in overall]
        for at, row in bars:
            axes.plot([at], [row["ratio"]], lw=0, **style)
        if count > MANY:
            low, high = ([row[f"ratio_{end}"] for row in per_block] for end in ("low", "high"))
            axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        else:
            bars += zip(x, per_block, strict=True)
        for at, row in bars:
            axes.plot([at, at], [row["ratio_low"], row["ratio_high"]], color=colour, lw=0.9, zorder=2)
    others = [row for row in rows if row["variant"] == variants[0]]
    dotted = {"color": "0.55", "lw": 0.9, "ls": (0, (1, 1)), "zorder": 1}
    values = [row["other_words"] for row in others if row["of"] == "block"]
    axes.plot(range(count), values, label=f"other words, {legend_label(run, variants[0])}", **dotted)
    for row in others:
        if row["of"] in positions:
            ends = [positions[row["of"]] + side * wide for side in (-0.35, 0.35)]
            axes.plot(ends, [row["other_words"]] * 2, **dotted)
    axes.axvline(count - 0.5 + wide / 2, color="0.8", lw=0.6)
    ticks = list(range(0, count, 1 if count <= MANY else 10))
    axes.set_xticks([*ticks, *positions.values()], [*(blocks[i] for i in ticks), "all", f"best\n({best})"])


def legend_label(run: Run, variant: str) -> str:
    """Return what the variant does to the ids, or its name if that is too long for a legend."""
    text = label(run, variant)
    return text if len(text) <= 24 else variant


def caption(run: Run, rows: Sequence[Row], variants: Sequence[str]) -> str:
    """Return the caption of the figure, with the numbers that it shows."""
    prompts, seeds = (list(dict.fromkeys(place[i] for place in run.places)) for i in (0, 1))
    lines = [
        f"{opening(run)} How much of a word's attention map is on the region that the word names, as a multiple of the "
        "region's share of the image: an even map has 1 (chance). A word's map is the attention of each image token to "
        "the word, mean over heads, normalised to sum 1 over image tokens; shares are means over steps. Regions are "
        "the boxes that the oracle finds in the same image: the object for colour and object words, the board for "
        "sign words. Images in which it finds none are not counted (n). "
        f"{counted(len(prompts), 'prompt')} × {counted(len(seeds), 'seed')}; 95 % bootstrap intervals, treating images "
        "as independent; sd: standard deviation over the seeds of one prompt. Best: the block with the largest mean "
        f"for {label(run, variants[0])} at {listed(seeds[::2])}, evaluated at {listed(seeds[1::2])}. Other words: "
        "those of the caption that name neither object, colour nor lettering, on the same regions.",
    ]
    for kind in dict.fromkeys(row["words"] for row in rows):
        lines.append(f"{TITLES[kind].capitalize()}.")
        for variant in variants:
            shown = [row for row in rows if (row["words"], row["variant"]) == (kind, variant) and row["of"] != "block"]
            lines.append(f"  {variant} ({label(run, variant)}): {'; '.join(map(sentence, shown))}")
    return "\n".join([*lines, conditions(run)])


def sentence(row: Row) -> str:
    """Return `best block 3: 2.1 [1.9, 2.3] times chance, sd 0.2 (share 0.3, chance 0.14; …; n = 16)`."""
    where = "mean of all blocks" if row["of"] == "mean" else f"best block {row['block']}"
    if not row["n"]:
        return f"{where}: region not found in any image (n = 0)"
    ratio, low, high = (number(row[key]) for key in ("ratio", "ratio_low", "ratio_high"))
    parts = [f"{where}: {ratio} [{low}, {high}] times chance"]
    if not math.isnan(row["less_baseline"]):
        low, high = (number(row[f"less_{end}"]) for end in ("low", "high"))
        parts.append(f"difference to the baseline {number(row['less_baseline'])} [{low}, {high}]")
    if not math.isnan(row["ratio_sd"]):
        parts.append(f"sd {number(row['ratio_sd'])}")
    low, high = (number(row[f"beyond_{end}"]) for end in ("low", "high"))
    details = f"share {number(row['share'])}, chance {number(row['chance'])}; other words {number(row['other_words'])}"
    details += f", difference to them {number(row['beyond'])} [{low}, {high}]"
    return f"{', '.join(parts)} ({details}; n = {row['n']})"


def listed(seeds: Sequence[int]) -> str:
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m experiments.words", description=make.__doc__, allow_abbrev=False)
    parser.add_argument("store", type=Path, help="run folder of a finished run with capture=words")
    parser.add_argument("-o", "--out", type=Path, default=Path("figures"), metavar="FOLDER", help="default: figures")
    parser.add_argument("--variants", metavar="NAME,NAME", help="default: all; the baseline is always drawn")
    parser.add_argument("--width", choices=["column", "page", "both"], default="both", help="default: both")
    options = parser.parse_args(arguments)
    names = None if options.variants is None else [part for part in options.variants.split(",") if part]
    widths = ("column", "page") if options.width == "both" else (options.width,)

    def work() -> None:
        print(*make(read_store(options.store), options.out, variants=names, widths=widths), sep="\n")

    return guarded(work, "interrupted")


if __name__ == "__main__":
    sys.exit(main())
