"""The numbers of `experiments.words`: attention of words to what they name, by block, with intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.wordmaps import KINDS, cell_shares
from fluxlab.drawing.pictures import open_cell
from fluxlab.errors import UserError
from fluxlab.experiment.reading import Run
from fluxlab.measure.summary import summarise

COLUMNS = ("variant", "words", "of", "block", "n", "share", "share_low", "share_high", "share_sd", "chance")
COLUMNS += ("ratio", "ratio_low", "ratio_high", "ratio_sd", "other_words")
COLUMNS += ("beyond", "beyond_low", "beyond_high", "less_baseline", "less_low", "less_high")
"""Columns of the CSV. A row is one block, the mean of all blocks, or the best block.

- share: how much of a word's map is on its region; chance: the region's share of the image; ratio: share / chance.
  All are means over cells, with bootstrap 95 % intervals.
- *_sd: standard deviation over the seeds of one prompt
- other_words: the ratio on the same regions of words that name neither object, colour nor lettering
- beyond: ratio - other_words, computed per cell
- less_*: ratio - the baseline's ratio, paired by cell
"""

Row = dict[str, Any]


def table_rows(run: Run, variants: Sequence[str]) -> list[Row]:
    """Return a row of `COLUMNS` for every kind of word and variant: each block, the mean of all, and the best block."""
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
        raise UserError(f"{run.path}: none of its images shows the object or the sign that its caption asks for")
    selection, evaluation = halves(cells)
    overall, held_out = (statistics(part, variants[0], present) for part in (cells, evaluation))
    rows = []
    for kind in [kind for kind in KINDS if f"{kind}/chance" in present]:
        blocks = [key.split("/")[1] for key in present if key.startswith(f"{kind}/") and key.endswith("/ratio")]
        best = best_block(selection, variants[0], kind, [block for block in blocks if block != "mean"])
        for variant in variants:
            for block in blocks:
                of = ("mean", "") if block == "mean" else ("block", block)
                rows.append(table_row(overall, variant, kind, block, of))
            rows.append(table_row(held_out, variant, kind, best, ("best", best)))
    return rows


def halves(cells: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping], list[Mapping]]:
    """Split the cells by seed: every other one to select the best block, the remaining ones to evaluate it.

    Raises `UserError` for a single seed.
    """
    seeds = list(dict.fromkeys(cell["seed"] for cell in cells))
    if len(seeds) < 2:
        raise UserError(
            f"seeds: the store has only seed {seeds[0]}, but the best block is evaluated at other seeds than it is "
            "selected at\nrun its command again with seeds=2 or more"
        )
    return [c for c in cells if c["seed"] in seeds[::2]], [c for c in cells if c["seed"] in seeds[1::2]]


def best_block(cells: Sequence[Mapping[str, Any]], variant: str, kind: str, blocks: Sequence[str]) -> str:
    """Return the block with the largest mean ratio."""
    cells = [cell for cell in cells if cell["variant"] == variant and f"{kind}/chance" in cell]
    means = [np.mean([cell[f"{kind}/{block}/ratio"] for cell in cells]) if cells else 0 for block in blocks]
    return blocks[int(np.argmax(means))]


def statistics(cells: Sequence[Mapping[str, Any]], baseline: str, keys: Sequence[str]) -> dict[tuple[str, str], dict]:
    """Return the summary row by (variant, key). Its `sd` is pooled over prompts, from the seeds of each."""
    keys = [key for key in keys if any(key in cell for cell in cells)]
    summary = {(row["variant"], row["metric"]): row for row in summarise(cells, baseline, keys)}
    for (variant, key), row in summary.items():
        by_prompt: dict[str, list[float]] = {}
        for cell in cells:
            if cell["variant"] == variant and key in cell:
                by_prompt.setdefault(cell["prompt"], []).append(cell[key])
        spread = [np.var(values, ddof=1) for values in by_prompt.values() if len(values) > 1]
        row["sd"] = float(np.mean(spread)) ** 0.5 if spread else math.nan
    return summary


def table_row(
    statistics: Mapping[tuple[str, str], dict], variant: str, kind: str, block: str, of: tuple[str, str]
) -> Row:
    missing = dict.fromkeys(("mean", "low", "high", "sd", "paired_mean", "paired_low", "paired_high"), math.nan)
    share, ratio, other, beyond = (
        statistics.get((variant, f"{kind}/{block}/{what}"), {**missing, "n": 0})
        for what in ("share", "ratio", "other", "beyond")
    )
    values = [share[end] for end in ("mean", "low", "high", "sd")]
    values += [statistics.get((variant, f"{kind}/chance"), missing)["mean"]]
    values += [ratio[end] for end in ("mean", "low", "high", "sd")] + [other["mean"]]
    values += [beyond[end] for end in ("mean", "low", "high")]
    values += [ratio[f"paired_{end}"] for end in ("mean", "low", "high")]
    return dict(zip(COLUMNS, (variant, kind, *of, ratio["n"], *values), strict=True))
