"""`python -m experiments.words STORE -o figures`: do a caption's words look at what they name?

Time: seconds; needs a finished store made with `capture=words` (`+exp=attention` is one) on captions of
`fluxlab.scenes`, and no model. Figure: over the blocks, how much of a word's map lies on the region that the scene
oracle finds for it in the same picture, as a multiple of that region's share of the image. Three panels: words of
colour, of thing, and on the sign. A caption file and a CSV have the numbers.

The block that is best is chosen on the baseline at every other seed, and quoted at the seeds between.
"""

import argparse
import csv
import io
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.results import conditions, counted, label, number, opening, plain_name
from experiments.style import COLUMN, OKABE_ITO, PAGE, figure, paper, save, save_caption
from experiments.wordmaps import KINDS, cell_shares
from fluxlab.compose import guarded
from fluxlab.drawing.pictures import open_cell
from fluxlab.errors import UserError
from fluxlab.experiment.reading import Run, read_store
from fluxlab.files import write_atomic
from fluxlab.measure.summary import summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"colour": "words of colour", "thing": "words of thing", "sign": "words on the sign"}
LOOKS = list(zip(("black", "blue", "vermillion", "green", "purple", "orange", "sky"), "osD^vPX", strict=True))
"""Of the variants, the baseline first: colour and mark."""

MANY = 12
"""Blocks above which intervals are bands rather than bars."""

COLUMNS = ("variant", "words", "of", "block", "n", "share", "share_low", "share_high", "share_sd", "chance")
COLUMNS += ("ratio", "ratio_low", "ratio_high", "ratio_sd", "other_words")
COLUMNS += ("beyond", "beyond_low", "beyond_high", "less_baseline", "less_low", "less_high")
"""Of the CSV. A row is one block, the mean of all, or the best; share, chance and ratio = share / chance are means over
cells with bootstrap 95 % intervals, sd the spread over the seeds of one prompt, other_words the ratio of words that
name neither thing nor sign on the same regions, beyond the ratio less that, cell by cell, less_baseline the ratio less
the baseline's."""

Finding = dict[str, Any]


def make(
    run: Run, folder: Path, *, variants: Sequence[str] | None = None, widths: Sequence[str] = ("column", "page")
) -> list[Path]:
    """Draw where the words of a store's captions look, in column and page width, with a caption and a CSV."""
    shown = pick(run, variants)
    found = findings(run, shown)
    stem, written = folder / f"{plain_name(run)}-words", []
    for width in widths:
        written += save(draw(run, found, shown, width), stem.with_name(f"{stem.name}-{width}"))
    table = stem.with_name(f"{stem.name}.csv")
    table.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(table, to_csv(found))
    return [*written, save_caption(caption(run, found, shown), stem), table]


def pick(run: Run, names: Sequence[str] | None) -> list[str]:
    """The baseline, and the variants asked for or all. `UserError` for one that the store lacks, and too many."""
    wrong = [name for name in names or () if name not in run.variants]
    if wrong or names == []:
        raise UserError(f"--variants {','.join(names)}: the store has {', '.join(run.variants)}")
    shown = list(dict.fromkeys([run.baseline, *(names or run.variants)]))
    if len(shown) > len(LOOKS):
        raise UserError(f"{len(shown)} variants: at most {len(LOOKS)} can be told apart; name some with --variants")
    return shown


def findings(run: Run, variants: Sequence[str]) -> list[Finding]:
    """A row of `COLUMNS` for every kind of word, variant, and block, the mean of all blocks, and the best."""
    if not run.attention:
        raise UserError(f"{run.path}: no attention was captured; run its command again with capture=words")
    cells = [
        {"variant": variant, "prompt": prompt, "seed": seed}
        | cell_shares(open_cell(run.image(variant, prompt, seed)), prompt, run.captured(variant, prompt, seed))
        for variant in variants
        for prompt, seed in run.places
    ]
    present = [key for key in dict.fromkeys(key for cell in cells for key in cell) if "/" in key]
    if not present:
        raise UserError(f"{run.path}: in none of its pictures is there a thing or sign that the caption asks for")
    choosing, quoted = halves(cells)
    overall, second = (numbers(part, variants[0], present) for part in (cells, quoted))
    found = []
    for kind in [kind for kind in KINDS if f"{kind}/chance" in present]:
        blocks = [key.split("/")[1] for key in present if key.startswith(f"{kind}/") and key.endswith("/ratio")]
        best = chosen(choosing, variants[0], kind, [block for block in blocks if block != "mean"])
        for variant in variants:
            for block in blocks:
                of = ("mean", "") if block == "mean" else ("block", block)
                found.append(finding(overall, variant, kind, block, of))
            found.append(finding(second, variant, kind, best, ("best", best)))
    return found


def halves(cells: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping], list[Mapping]]:
    """Cells of every other seed from the first, on which a block is chosen, and the others, at which it is quoted."""
    seeds = list(dict.fromkeys(cell["seed"] for cell in cells))
    if len(seeds) < 2:
        raise UserError(
            f"seeds: the store has {seeds[0]} only, and a block is not quoted on the pictures that it was chosen on\n"
            "run its command again with seeds=2 or more"
        )
    return [c for c in cells if c["seed"] in seeds[::2]], [c for c in cells if c["seed"] in seeds[1::2]]


def chosen(cells: Sequence[Mapping[str, Any]], variant: str, kind: str, blocks: Sequence[str]) -> str:
    """The block whose ratio is the largest on average."""
    own = [cell for cell in cells if cell["variant"] == variant and f"{kind}/chance" in cell]
    means = [np.mean([cell[f"{kind}/{block}/ratio"] for cell in own]) if own else 0 for block in blocks]
    return blocks[int(np.argmax(means))]


def numbers(cells: Sequence[Mapping[str, Any]], baseline: str, keys: Sequence[str]) -> dict[tuple[str, str], dict]:
    """By (variant, key): the summary's row, and under sd the spread over the seeds of one prompt, pooled."""
    keys = [key for key in keys if any(key in cell for cell in cells)]
    found = {(row["variant"], row["metric"]): row for row in summarise(cells, baseline, keys)}
    for (variant, key), row in found.items():
        by_prompt: dict[str, list[float]] = {}
        for cell in cells:
            if cell["variant"] == variant and key in cell:
                by_prompt.setdefault(cell["prompt"], []).append(cell[key])
        spread = [np.var(values, ddof=1) for values in by_prompt.values() if len(values) > 1]
        row["sd"] = float(np.mean(spread)) ** 0.5 if spread else math.nan
    return found


def finding(rows: Mapping[tuple[str, str], dict], variant: str, kind: str, block: str, of: tuple[str, str]) -> Finding:
    nothing = dict.fromkeys(("mean", "low", "high", "sd", "paired_mean", "paired_low", "paired_high"), math.nan)
    share, ratio, other, beyond = (
        rows.get((variant, f"{kind}/{block}/{what}"), {**nothing, "n": 0})
        for what in ("share", "ratio", "other", "beyond")
    )
    values = [share[end] for end in ("mean", "low", "high", "sd")]
    values += [rows.get((variant, f"{kind}/chance"), nothing)["mean"]]
    values += [ratio[end] for end in ("mean", "low", "high", "sd")] + [other["mean"]]
    values += [beyond[end] for end in ("mean", "low", "high")]
    values += [ratio[f"paired_{end}"] for end in ("mean", "low", "high")]
    return dict(zip(COLUMNS, (variant, kind, *of, ratio["n"], *values), strict=True))


def to_csv(found: Sequence[Finding]) -> str:
    """The findings as CSV: numbers to 6 digits, nothing for what is not there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in found:
        shown = {key: f"{value:.6g}" for key, value in row.items() if isinstance(value, float)}
        writer.writerow(row | {key: "" if value == "nan" else value for key, value in shown.items()})
    return text.getvalue()


def draw(run: Run, found: Sequence[Finding], variants: Sequence[str], width: str) -> "Figure":
    """The figure. width: "column", panels below each other, or "page", side by side."""
    kinds = list(dict.fromkeys(row["words"] for row in found))
    with paper():
        whole = figure(PAGE, 2.5) if width == "page" else figure(COLUMN, 0.5 + 1.6 * len(kinds))
        shape = {"nrows": 1, "ncols": len(kinds)} if width == "page" else {"nrows": len(kinds), "ncols": 1}
        panels = whole.subplots(**shape, sharey=True, squeeze=False).ravel()
        for axes, kind in zip(panels, kinds, strict=True):
            panel(axes, run, [row for row in found if row["words"] == kind], variants)
            axes.set_title(TITLES[kind], loc="left")
        panels[0].set_ylim(bottom=0)
        panels[0].locator_params(axis="y", nbins=5)
        for axes in panels if width == "page" else panels[-1:]:
            axes.set_xlabel("block")
        for axes in panels[:1] if width == "page" else panels:
            axes.set_ylabel("word's map on its region,\n× chance")
        handles, labels = panels[0].get_legend_handles_labels()
        whole.legend(handles, labels, loc="outside lower center", ncols=2 if width == "column" else 6)
    return whole


def panel(axes: "Axes", run: Run, found: Sequence[Finding], variants: Sequence[str]) -> None:
    """One kind of word: every variant over the blocks, then the mean of all, and the best of them."""
    blocks = [row["block"] for row in found if row["variant"] == variants[0] and row["of"] == "block"]
    count, best = len(blocks), next(row["block"] for row in found if row["of"] == "best")
    apart = 0.0 if count > MANY else 0.5 / len(variants)
    axes.axhline(1, color="0.4", lw=0.8, ls=(0, (4, 2)), label="chance", zorder=1)
    for i, variant in enumerate(variants):
        own = [row for row in found if row["variant"] == variant]
        over = [row for row in own if row["of"] == "block"]
        colour, mark = OKABE_ITO[LOOKS[i][0]], LOOKS[i][1]
        shift = (i - (len(variants) - 1) / 2) * apart
        x, y = np.arange(count) + shift, [row["ratio"] for row in over]
        looks = {"color": colour, "marker": mark, "ms": 2.8, "lw": 0.9, "zorder": 3}
        axes.plot(x, y, label=named(run, variant), **looks)
        if count > MANY:
            axes.fill_between(
                x, *([row[f"ratio_{end}"] for row in over] for end in ("low", "high")), color=colour, alpha=0.15, lw=0
            )
        wide = max(1.0, count / 8)  # what stands beside the blocks keeps its distance
        places = {"mean": count - 0.5 + wide, "best": count - 0.5 + 2 * wide}
        beside = [row for row in own if row["of"] in places]
        points = [(places[row["of"]] + shift * wide, row) for row in beside]
        points += [] if count > MANY else list(zip(x, over, strict=True))
        for at, row in points:
            axes.plot([at, at], [row["ratio_low"], row["ratio_high"]], color=colour, lw=0.9, zorder=2)
        for at, row in points[: len(beside)]:
            axes.plot([at], [row["ratio"]], **{**looks, "lw": 0})
    plain = [row["other_words"] for row in found if row["variant"] == variants[0] and row["of"] == "block"]
    dotted = {"color": "0.55", "lw": 0.9, "ls": (0, (1, 1)), "zorder": 1}
    axes.plot(range(count), plain, label="other words, untouched ids", **dotted)
    for row in (row for row in found if row["variant"] == variants[0] and row["of"] in places):
        axes.plot([places[row["of"]] + side * wide for side in (-0.35, 0.35)], [row["other_words"]] * 2, **dotted)
    axes.axvline(count - 0.5 + wide / 2, color="0.8", lw=0.6)
    step = 1 if count <= MANY else 10
    ticks = list(range(0, count, step))
    axes.set_xticks([*ticks, *places.values()], [*(blocks[i] for i in ticks), "all", f"best\n({best})"])


def named(run: Run, variant: str) -> str:
    said = label(run, variant)
    return said if len(said) <= 24 else variant


def caption(run: Run, found: Sequence[Finding], variants: Sequence[str]) -> str:
    """The figure's text, with the numbers that it shows."""
    prompts, seeds = (list(dict.fromkeys(place[i] for place in run.places)) for i in (0, 1))
    lines = [
        f"{opening(run)} How much of a word's map lies on what the word names, as a multiple of that region's share of "
        "the image, so that a map that looks alike everywhere has 1. A word's map is how much each image token looks "
        "at the word, mean over heads, made to sum to 1 over the image's tokens; shares are means over steps. Regions "
        "are the boxes that the scene oracle finds in the same picture: of the thing for words of colour and thing, of "
        "the board for words on the sign; pictures where it finds none do not count (n). "
        f"{counted(len(prompts), 'prompt')} × {counted(len(seeds), 'seed')}; intervals are 95 %, bootstrap over "
        "pictures, which count as independent; sd is the spread over the seeds of one prompt. Best: the block with the "
        f"largest mean for untouched ids at {listed(seeds[::2])}, quoted at {listed(seeds[1::2])}. Other "
        "words: those of the caption that name neither thing, colour nor lettering, on the same regions.",
    ]
    for kind in dict.fromkeys(row["words"] for row in found):
        lines.append(f"{TITLES[kind].capitalize()}.")
        for variant in variants:
            own = [row for row in found if (row["words"], row["variant"]) == (kind, variant)]
            told = [said(row) for row in own if row["of"] != "block"]
            lines.append(f"  {variant} ({label(run, variant)}): {'; '.join(told)}")
    return "\n".join([*lines, conditions(run)])


def said(row: Finding) -> str:
    """`block 3, the best: 2.1 [1.9, 2.3] times chance, sd 0.2 (share 0.3 of 0.14; …; n = 16)`."""
    where = "mean of all blocks" if row["of"] == "mean" else f"block {row['block']}, the best"
    if not row["n"]:
        return f"{where}: nothing found, n = 0"
    ratio, low, high, sd = (number(row[key]) for key in ("ratio", "ratio_low", "ratio_high", "ratio_sd"))
    beyond = ", ".join(number(row[f"beyond_{end}"]) for end in ("low", "high"))
    beside = f"share {number(row['share'])} of {number(row['chance'])}; other words {number(row['other_words'])}, "
    beside += f"beyond them {number(row['beyond'])} [{beyond}]"
    less = ""
    if not math.isnan(row["less_baseline"]):
        ends = ", ".join(number(row[f"less_{end}"]) for end in ("low", "high"))
        less = f"less the baseline's {number(row['less_baseline'])} [{ends}], "
    return f"{where}: {ratio} [{low}, {high}] times chance, {less}sd {sd} ({beside}; n = {row['n']})"


def listed(seeds: Sequence[int]) -> str:
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m experiments.words", description=make.__doc__, allow_abbrev=False)
    parser.add_argument("store", type=Path, help="the folder of a finished run with capture=words")
    parser.add_argument("-o", "--out", type=Path, default=Path("figures"), metavar="FOLDER", help="default: figures")
    parser.add_argument("--variants", metavar="NAME,NAME", help="default: all; the baseline is always there")
    parser.add_argument("--width", choices=["column", "page", "both"], default="both", help="default: both")
    options = parser.parse_args(arguments)
    names = None if options.variants is None else [part for part in options.variants.split(",") if part]
    widths = ("column", "page") if options.width == "both" else (options.width,)

    def work() -> None:
        print(*make(read_store(options.store), options.out, variants=names, widths=widths), sep="\n")

    return guarded(work, "interrupted")


if __name__ == "__main__":
    sys.exit(main())
