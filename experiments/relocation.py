"""`python -m experiments.relocation STORE -o figures`: does a thing follow the tokens of its phrase to a box?

Takes a minute. Needs a finished store of +exp=relocation, whose variants give the tokens of a phrase the positions of a
box, hide them from the image outside of the box, or both, for a grid of boxes. Needs no model.

The figure shows where the thing is for each box: in the box if it followed. The numbers, with intervals, are written to
a caption file and two CSV tables.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.relocationtable import Target, by_box, conditions, targets, wherever
from experiments.results import all_cells, mean_text, opening, plain_name
from experiments.results import conditions as made_with
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
from fluxlab.experiment.reading import Run, read_store
from fluxlab.measure.summary import CONTROLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

WORDS = {
    "in_box": "thing in the box",
    "in_box_gain": "  more than the baseline's thing",
    "distance": "distance of the thing to the box's centre",
    "distance_gain": "  more than the baseline's thing",
    "object": "a thing is found",
    "single": "one thing and no more",
    "shape": "it is the prompt's",
    "letters": "letters of the sign right",
}


def make(run: Run, folder: Path, widths: Sequence[str] = ("column", "page")) -> list[Path]:
    """Draw where the thing is for every box of a phrase, with a caption and two CSV tables."""
    found = targets(run)
    rows, places = conditions(run, found), by_box(run, found)
    stem, written = folder / f"{plain_name(run)}-moved", []
    for width in widths:
        written += save(draw(found, rows, places, width), stem.with_name(f"{stem.name}-{width}"))
    tables = [
        save_table(part, stem.with_name(f"{stem.name}{end}.csv")) for part, end in ((rows, ""), (places, "-boxes"))
    ]
    return [*written, save_caption(caption(run, found, rows), stem), *tables]


def draw(found: Mapping[str, Sequence[Target]], rows: Sequence[Row], places: Sequence[Row], width: str) -> "Figure":
    """Return the figure: a panel per condition, those with the same steps in one line."""
    windows = list(dict.fromkeys(chosen[0].steps for chosen in found.values()))
    lines = [[name for name, chosen in found.items() if chosen[0].steps == steps] for steps in windows]
    across = max(map(len, lines))
    wide = PAGE if width == "page" else COLUMN
    height = len(lines) * (wide / across + (0.25 if width == "page" else 0.35))
    with paper():
        drawn = figure(wide, height)
        panels = drawn.subplots(len(lines), across, sharex=True, sharey=True, squeeze=False)
        for line, names in zip(panels, lines, strict=True):
            for axes in line[len(names) :]:
                axes.set_axis_off()
            for axes, name in zip(line, names, strict=False):
                (row,) = (row for row in rows if row["condition"] == name)
                panel(axes, [part for part in places if part["condition"] == name])
                axes.set_title(row["what"], loc="left")
                slope, low, high = (row[f"slope{end}"] for end in ("", "_low", "_high"))
                between = "" if math.isnan(low) else f"{' ' if width == 'page' else chr(10)}[{low:.2f}, {high:.2f}]"
                axes.set_xlabel("" if math.isnan(slope) else f"slope {slope:.2f}{between}")
            line[0].set_ylabel(wherever(found[names[0]][0]).replace(" of the", "\nof the"))
        more = legend_below(drawn, *panels[0][0].get_legend_handles_labels(), columns=3)
        drawn.set_figheight(height + 0.13 * more)
        return drawn


def panel(axes: "Axes", places: Sequence[Row]) -> None:
    """Draw the centres of the boxes, each joined with its thing, and the baseline's thing."""
    blue, grey = OKABE_ITO["blue"], "0.55"
    ends = {what: [[row[f"{what}_col"], row[f"{what}_row"]] for row in places] for what in ("box", "thing")}
    joined = [point for pair in zip(ends["box"], ends["thing"], strict=True) for point in (*pair, [math.nan] * 2)]
    axes.plot(*zip(*joined, strict=True), color=blue, lw=0.5, alpha=0.6)
    axes.plot(*zip(*ends["box"], strict=True), "s", color=grey, ms=2.5, mfc="white", label="box of the phrase")
    axes.plot(*zip(*ends["thing"], strict=True), "o", color=blue, ms=2.2, label="its thing")
    known = [row for row in places if row["n"]]
    if known:  # box - (box - baseline's thing)
        start = [
            sum(row["n"] * (row[f"box_{side}"] - row[f"box_from_{side}"]) for row in known)
            / sum(row["n"] for row in known)
            for side in ("row", "col")
        ]
        look = {"color": OKABE_ITO["vermillion"], "ms": 5, "mec": "white", "mew": 0.3, "zorder": 4}
        axes.plot(start[1], start[0], "*", label="thing of the baseline", **look)
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], aspect="equal")
    axes.spines[["top", "right"]].set_visible(True)


def caption(run: Run, found: Mapping[str, Sequence[Target]], rows: Sequence[Row]) -> str:
    """Return the caption of the figure, with the numbers that it shows."""
    moved = {effect.variant: effect for effect in run.effects if effect.metric == "thing_moved"}
    side = run.record["settings"]["width"]
    lines = [
        f"{opening(run)} positions: the tokens of the phrase get the positions of a box. mask: image tokens outside of "
        "the box do not attend to them. Each square is the centre of a box, and the dot that it is joined with the "
        "mean centre of the thing, the largest if there are several. Slope: by how much the thing moves when the box "
        "moves by 1, rows and columns together, within the boxes of one prompt and seed: 1 if it follows, 0 if it "
        f"stays, below 0 if it moves the other way. Over {all_cells(run)}, 95 % intervals: bootstrap over "
        "pairs of prompt and seed, each with all its boxes. Chance: 95 % of the slopes with the boxes of each pair "
        "exchanged at random. Distances are shares of the image's side."
    ]
    for name in CONTROLS:
        if name in moved and moved[name].n:
            effect = moved[name]
            text = mean_text(*(value / side for value in (effect.value, effect.low, effect.high)))
            lines.append(f"{name}: the thing moves by {text}, n = {effect.n}")
    for row in rows:
        lines.append(
            f"{row['condition']} ({row['what']}, {row['steps']}), n = {row['n']} images of {row['pairs']} pairs:"
        )
        if not math.isnan(row["slope"]):
            slopes = [value_text(row, f"slope{axis}") for axis in ("", "_row", "_col")]
            chance, seeds = (f"[{row[f'{of}_low']:.2g}, {row[f'{of}_high']:.2g}]" for of in ("chance", "seeds"))
            lines.append(f"  slope {slopes[0]}, of rows {slopes[1]}, of columns {slopes[2]}; chance {chance}")
            lines.append(f"  slopes of single seeds: {seeds}")
        lines += [f"  {words}: {value_text(row, key)}" for key, words in WORDS.items() if math.isfinite(row[key])]
    return "\n".join([*lines, made_with(run)])


def value_text(row: Row, key: str) -> str:
    """Return `0.41 [0.38, 0.44]`."""
    return mean_text(*(row[f"{key}{end}"] for end in ("", "_low", "_high")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 for an error that the user can fix."""
    parser = refusing_parser("relocation", make.__doc__)
    parser.add_argument("store", type=Path, help="the folder of a finished run of +exp=relocation")
    out_argument(parser)
    parser.add_argument("--width", choices=["column", "page", "both"], default="both", help="default: both")

    def work() -> None:
        options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
        widths = ("column", "page") if options.width == "both" else (options.width,)
        print(*make(read_store(options.store), options.out, widths), sep="\n")

    return guarded(work, "interrupted")


if __name__ == "__main__":
    sys.exit(main())
