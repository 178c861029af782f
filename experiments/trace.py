"""`python -m experiments.trace STORE -o figures`: which attention carries the place, the colour and the letters?

Takes a minute. Needs a finished store of +exp=trace, whose variants inject the keys and values of another prompt's cell
into one quadrant of the attention. Needs no model.

The figure shows how many of the patched images have the place, the colour and the sign of the source's prompt: by
block, by quarter of the steps (all blocks), and for the whole quadrant. The numbers, with intervals, are written to a
caption file and a CSV.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.results import INTERVALS, all_cells, conditions, controls, mean_text, opening, plain_name
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
from experiments.tracetable import ATTRIBUTES, QUADRANTS, SOURCE, Patch, Row, patches, table_rows
from fluxlab.compose import guarded
from fluxlab.config import config_folder
from fluxlab.drawing.legend import legend_below
from fluxlab.experiment.reading import Run, read_store
from fluxlab.measure.summary import CONTROLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = dict(zip(QUADRANTS, (("orange", "s"), ("blue", "o"), ("green", "^"), ("vermillion", "D")), strict=True))
"""Colour and marker of each quadrant. Either one identifies it."""

TITLES = {"place": "place of the thing", "colour": "colour of the thing", "letters": "word on the sign"}

FREEFLUX = {"freeflux_non_rigid": "content", "freeflux_add_object": "position"}
"""Presets with the blocks of FLUX.1 that depend on content or on position (FreeFlux, arXiv 2503.16153)."""

FLUX1_BLOCKS = 57
MANY = 12
"""With more blocks than this, intervals of blocks are drawn as bands instead of bars."""


def make(run: Run, folder: Path, widths: Sequence[str] = ("column", "page")) -> list[Path]:
    """Draw what of its source a patched image shows, by quadrant, block and step, with a caption and a CSV."""
    found = patches(run)
    rows = table_rows(run, found)
    stem, written = folder / f"{plain_name(run)}-transfer", []
    for width in widths:
        written += save(draw(run, found, rows, width), stem.with_name(f"{stem.name}-{width}"))
    table = save_table(rows, stem.with_name(f"{stem.name}.csv"))
    return [*written, save_caption(caption(run, found, rows), stem), table]


def draw(run: Run, found: Sequence[Patch], rows: Sequence[Row], width: str) -> "Figure":
    """Return the figure. width: "column" puts the panels below each other, "page" puts them in one line."""
    with paper():
        height = 2.1 if width == "page" else 5.0
        drawn = figure(PAGE if width == "page" else COLUMN, height)
        shape = {"nrows": 1, "ncols": 3} if width == "page" else {"nrows": 3, "ncols": 1}
        panels = drawn.subplots(**shape, sharey=True, sharex=True, squeeze=False).ravel()
        for axes, attribute in zip(panels, ATTRIBUTES, strict=True):
            of = {row["variant"]: row for row in rows if row["attribute"] == attribute}
            panel(axes, run, found, of)
            axes.set_title(TITLES[attribute], loc="left")
        for axes in panels if width == "page" else panels[-1:]:
            axes.set_xlabel("patched block, or quarter of the steps")
        for axes in panels[:1] if width == "page" else panels:
            axes.set_ylabel("images with the source's")
        lines = legend_below(drawn, *panels[0].get_legend_handles_labels(), columns=3 if width == "column" else 6)
        drawn.set_figheight(height + 0.13 * lines)
        return drawn


def places(found: Sequence[Patch]) -> tuple[dict, float]:
    """Return the position of every (blocks, steps) on the x axis, and the distance between the groups."""
    blocks = sorted({patch.blocks for patch in found if patch.blocks != "all" and patch.steps == "all"})
    windows = sorted({patch.steps for patch in found if patch.blocks == "all" and patch.steps != "all"})
    wide = max(1.0, len(blocks) / 10)
    at = {(block, "all"): float(i) for i, block in enumerate(blocks)}
    start = len(blocks) - 0.5 + wide if blocks else 0.0
    at |= {("all", steps): start + i * wide for i, steps in enumerate(windows)}
    whole = {("all", "all"): (max(at.values()) + 1.5 * wide) if at else 0.0}
    return at | whole, wide


def panel(axes: "Axes", run: Run, found: Sequence[Patch], of: Mapping[str, Row]) -> None:
    """Draw one attribute: a series per quadrant over blocks and steps. The lines are the baseline and the source."""
    at, wide = places(found)
    blocks = [key for key in at if key[0] != "all"]
    dotted = {"color": "0.4", "lw": 0.8, "zorder": 1}
    axes.axhline(of[SOURCE]["source"], ls=(0, (1, 1)), label="the source's own image", **dotted)
    axes.axhline(of[run.baseline]["source"], ls=(0, (4, 2)), label="not patched", **dotted)
    shown = [quadrant for quadrant in QUADRANTS if any(patch.quadrant == quadrant for patch in found)]
    bars = len(blocks) <= MANY
    for i, quadrant in enumerate(shown):
        colour, marker = OKABE_ITO[STYLES[quadrant][0]], STYLES[quadrant][1]
        apart = (i - (len(shown) - 1) / 2) * 0.6 / len(shown)
        label = quadrant
        for kind in ("block", "steps", "all"):
            group = [patch for patch in found if patch.quadrant == quadrant and patch.kind == kind]
            group.sort(key=lambda patch: at[patch.blocks, patch.steps])
            shift = apart * (1 if kind == "block" and bars else wide)
            x = [at[patch.blocks, patch.steps] + shift for patch in group]
            y, low, high = ([of[patch.variant][f"source{end}"] for patch in group] for end in ("", "_low", "_high"))
            axes.plot(x, y, color=colour, marker=marker, ms=2.8, lw=0.7, label=label, zorder=3)
            label = None
            if kind == "block" and not bars:
                axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
            else:
                axes.vlines(x, low, high, color=colour, lw=0.9, zorder=2)
    windows = [key for key in at if key[1] != "all"]
    for group, step in ((blocks, 0.5), (windows, 0.75 * wide)):
        if group:
            axes.axvline(at[group[-1]] + step, color="0.8", lw=0.6)
    ticks = blocks if len(blocks) <= MANY else blocks[::10]
    labels = [*(str(key[0]) for key in ticks), *(window_name(key[1], len(windows)) for key in windows), "all"]
    axes.set_xticks([at[key] for key in (*ticks, *windows, ("all", "all"))], labels)
    axes.set_ylim(-0.04, 1.04)


def window_name(steps: tuple[float, float], count: int) -> str:
    """Return the tick of a part of the schedule: "q1" for the first of four equal parts, else its start."""
    return f"q{round(steps[0] * 4) + 1}" if count == 4 else f"{steps[0]:g}"


def caption(run: Run, found: Sequence[Patch], rows: Sequence[Row]) -> str:
    """Return the caption of the figure, with the numbers that it shows."""
    lines = [
        f"{opening(run)} A patched image takes keys and values from the cell of another prompt, with another place, "
        "colour and word, at the same seed. Text → image: the keys and values are those of the text tokens, and only "
        "the queries of image tokens see them; all other attention is the image's own. Left: patched in one block, all "
        "steps. Middle: in all blocks, in a quarter of the steps (q1 first). Right: in all blocks and steps. Shown: "
        "the share of images in which the scene oracle reads the source's attribute; for the word, exactly that word. "
        f"Means over {all_cells(run)}, {INTERVALS}. {controls(run)}"
    ]
    for attribute in ATTRIBUTES:
        of = {row["variant"]: row for row in rows if row["attribute"] == attribute}
        lines.append(f"{TITLES[attribute]}, share of images with the source's:")
        unpatched = {"the source's own image": SOURCE, "not patched": run.baseline, **{name: name for name in CONTROLS}}
        lines += [f"  {name}: {text(of[variant])}" for name, variant in unpatched.items()]
        lines += [f"  {patch.quadrant}, {patch.where}: {text(of[patch.variant])}" for patch in found]
        single = [patch for patch in found if patch.blocks != "all"]
        if single:
            most = max(single, key=lambda patch: of[patch.variant]["source"])
            lines.append(f"  most in a single block: {most.quadrant}, {most.where}, {text(of[most.variant])}")
    return "\n".join([*lines, freeflux(found, rows), conditions(run)])


def text(row: Row) -> str:
    """Return `0.41 [0.38, 0.44], n = 64`."""
    return f"{mean_text(*(row[key] for key in ('source', 'source_low', 'source_high')))}, n = {row['n']}"


def freeflux(found: Sequence[Patch], rows: Sequence[Row]) -> str:
    """Return the means over FreeFlux's two lists of blocks and over the others, if the model has FLUX.1's blocks."""
    blocks = {patch.blocks for patch in found if patch.blocks != "all"}
    if blocks != set(range(FLUX1_BLOCKS)):
        return (
            "FreeFlux's lists of blocks that depend on content or on position are those of FLUX.1's 57 blocks; this "
            f"run patches {len(blocks)} blocks, each alone."
        )
    import yaml

    lists = {
        kind: set(yaml.safe_load((config_folder() / "op" / f"{preset}.yaml").read_text())["blocks"])
        for preset, kind in FREEFLUX.items()
    }
    lists["neither"] = blocks - set().union(*lists.values())
    lines = ["Mean share over FreeFlux's lists of blocks (arXiv 2503.16153):"]
    source = {(row["variant"], row["attribute"]): row["source"] for row in rows}
    for attribute in ATTRIBUTES:
        for quadrant in QUADRANTS:
            means = []
            for kind, members in lists.items():
                values = [source[p.variant, attribute] for p in found if p.quadrant == quadrant and p.blocks in members]
                means += [f"{kind} {sum(values) / len(values):.3g} ({len(values)} blocks)"] if values else []
            lines.append(f"  {TITLES[attribute]}, {quadrant}: {', '.join(means)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 for an error that the user can fix."""
    parser = refusing_parser("trace", make.__doc__)
    parser.add_argument("store", type=Path, help="the folder of a finished run of +exp=trace")
    out_argument(parser)
    parser.add_argument("--width", choices=["column", "page", "both"], default="both", help="default: both")

    def work() -> None:
        options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
        widths = ("column", "page") if options.width == "both" else (options.width,)
        print(*make(read_store(options.store), options.out, widths), sep="\n")

    return guarded(work, "interrupted")


if __name__ == "__main__":
    sys.exit(main())
