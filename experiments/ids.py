"""`python -m experiments.ids`: the position ids of a small picture, and five edits of them.

Time: seconds; needs no run and no model. Figure: img_ids and txt_ids as FLUX.1 gives them, (index, row, col) in every
token's cell, and img_ids after each edit; cells whose ids an edit changes are tinted.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from experiments.style import COLUMN, PAGE, command, figure, paper, save, save_caption
from fluxlab.positions import IMAGE, TEXT, Program
from fluxlab.positions.at_step import program_at_step, sequence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EDITS = {
    "all zero": {"op": "zero"},
    "× 0.5": {"op": "scale", "factor": 0.5},
    "× 2": {"op": "scale", "factor": 2},
    "× 1.2": {"op": "scale", "factor": 1.2},
    "axis 0 = 1": {"op": "set", "value": 1, "axes": "index"},
}
SIDE, TEXT_TOKENS = 3, 3
FULL = 64
"""Tokens a side of FLUX.1's picture of 1024 × 1024 pixels, for the caption."""

TINT, PLAIN = "#CFE8F7", "white"


def image_ids(edit: dict | None, side: int) -> tuple[Tensor, Tensor]:
    """img_ids `(side², 3)` of a square picture, before and after an edit."""
    context = sequence(grid=(side, side), text=TEXT_TOKENS)
    seen = program_at_step(Program.from_config({"edit": edit} if edit else None), context)
    image = slice(*context.layout.range(IMAGE))
    return seen.before[image], seen.after[image]


def text_ids() -> Tensor:
    """txt_ids `(TEXT_TOKENS, 3)`."""
    context = sequence(grid=(SIDE, SIDE), text=TEXT_TOKENS)
    return context.ids[0, slice(*context.layout.range(TEXT))]


def make(folder: Path) -> list[Path]:
    """Draw img_ids, txt_ids and five edits of img_ids, in column and page width, and write the caption."""
    drawn = {"column": draw(COLUMN, columns=2), "page": draw(PAGE, columns=4)}
    written = [file for name, one in drawn.items() for file in save(one, folder / f"ids-{name}")]
    return [*written, save_caption(caption(), folder / "ids")]


def draw(width: float, columns: int) -> "Figure":
    rows = -(-(2 + len(EDITS)) // columns)
    with paper():
        whole = figure(width, rows * (width / columns + 0.08))
        panels = whole.subplots(rows, columns).flatten()
        untouched, _ = image_ids(None, SIDE)
        cells(panels[0], "img_ids", untouched, untouched, SIDE)
        cells(panels[1], "txt_ids", text_ids(), text_ids(), 1)
        for panel, (name, edit) in zip(panels[2:], EDITS.items(), strict=False):
            cells(panel, f"img_ids, {name}", *image_ids(edit, SIDE), SIDE)
        for panel in panels:
            panel.set(xlim=(-0.02, SIDE + 0.02), ylim=(SIDE + 0.02, -0.02), aspect="equal")
            panel.axis("off")
        key(panels[-1])
    return whole


def cells(axes: "Axes", title: str, before: Tensor, after: Tensor, columns: int) -> None:
    """A cell a token, in raster order: its ids, tinted where the edit changed them."""
    from matplotlib.patches import Rectangle

    axes.set_title(title)
    for n, (old, new) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
        row, col = divmod(n, columns)
        left = col + (SIDE - columns) / 2
        axes.add_patch(Rectangle((left, row), 1, 1, fc=TINT if old != new else PLAIN, ec="0.4", lw=0.6))
        axes.text(left + 0.5, row + 0.5, written(new), ha="center", va="center", fontsize=6)


def written(ids: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in ids)


def key(axes: "Axes") -> None:
    """What the cells say, in the place that is left."""
    from matplotlib.patches import Rectangle

    for row, (tint, said) in enumerate(((PLAIN, "index, row, col\nof a token"), (TINT, "changed by\nthe edit"))):
        axes.add_patch(Rectangle((0.2, row + 0.5), 0.5, 0.5, fc=tint, ec="0.4", lw=0.6))
        axes.text(0.85, row + 0.75, said, va="center", fontsize=6.5)


def caption() -> str:
    """The figure's text, with numbers from the ids themselves."""
    text = text_ids()
    lines = [
        f"Position ids of {SIDE} × {SIDE} image tokens and {len(text)} text tokens, (index, row, col) each. "
        f"txt_ids take {len(set(map(tuple, text.tolist())))} value; the order of words is the text encoder's business."
    ]
    for name, edit in EDITS.items():
        before, after = image_ids(edit, SIDE)
        changed = int((before != after).any(-1).sum())
        _, large = image_ids(edit, FULL)
        low, high = large.amin(0).tolist(), large.amax(0).tolist()
        spacing = (large[1] - large[0]).tolist()[2]
        places = len(set(map(tuple, large.tolist())))
        lines.append(
            f"{name}: {changed} of {len(after)} tokens change. At {16 * FULL} × {16 * FULL} pixels ({FULL} × {FULL} "
            f"tokens) columns run from {low[2]:.4g} to {high[2]:.4g}, {spacing:.3g} apart; index {high[0]:g}; "
            f"{places} place{'s' if places > 1 else ''} for {len(large)} tokens."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(command(make, "ids"))
