"""`python -m experiments.ids`: the position ids of a small image, and five edits of them.

Takes seconds; needs no run and no model. img_ids and txt_ids of FLUX.1, (index, row, col) of every token, and img_ids
after each edit. Tokens whose ids change are tinted.
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
"""Tokens per side of an image of 1024 × 1024 pixels in FLUX.1, for the caption."""

TINT, PLAIN = "#CFE8F7", "white"


def image_ids(edit: dict | None, side: int) -> tuple[Tensor, Tensor]:
    """Return img_ids `(side², 3)` of a square image, before and after an edit."""
    context = sequence(grid=(side, side), text=TEXT_TOKENS)
    shown = program_at_step(Program.from_config({"edit": edit} if edit else None), context)
    image = slice(*context.layout.range(IMAGE))
    return shown.before[image], shown.after[image]


def text_ids() -> Tensor:
    """Return txt_ids `(TEXT_TOKENS, 3)`."""
    context = sequence(grid=(SIDE, SIDE), text=TEXT_TOKENS)
    return context.ids[0, slice(*context.layout.range(TEXT))]


def make(folder: Path) -> list[Path]:
    """Draw img_ids, txt_ids and five edits of img_ids, in column and page width, and write the caption."""
    drawn = {"column": draw(COLUMN, columns=2), "page": draw(PAGE, columns=4)}
    written = [file for name, plot in drawn.items() for file in save(plot, folder / f"ids-{name}")]
    return [*written, save_caption(caption(), folder / "ids")]


def draw(width: float, columns: int) -> "Figure":
    """Return the figure with so many panels per row."""
    rows = -(-(2 + len(EDITS)) // columns)
    with paper():
        whole = figure(width, rows * (width / columns + 0.08))
        panels = whole.subplots(rows, columns).flatten()
        untouched, _ = image_ids(None, SIDE)
        draw_tokens(panels[0], "img_ids", untouched, untouched, SIDE)
        draw_tokens(panels[1], "txt_ids", text_ids(), text_ids(), 1)
        for panel, (name, edit) in zip(panels[2:], EDITS.items(), strict=False):
            draw_tokens(panel, f"img_ids, {name}", *image_ids(edit, SIDE), SIDE)
        for panel in panels:
            panel.set(xlim=(-0.02, SIDE + 0.02), ylim=(SIDE + 0.02, -0.02), aspect="equal")
            panel.axis("off")
        key(panels[-1])
    return whole


def draw_tokens(axes: "Axes", title: str, before: Tensor, after: Tensor, columns: int) -> None:
    """Draw one square per token in raster order with its ids, tinted if the edit changed them."""
    from matplotlib.patches import Rectangle

    axes.set_title(title)
    for n, (old, new) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
        row, col = divmod(n, columns)
        left = col + (SIDE - columns) / 2
        axes.add_patch(Rectangle((left, row), 1, 1, fc=TINT if old != new else PLAIN, ec="0.4", lw=0.6))
        axes.text(left + 0.5, row + 0.5, ids_text(new), ha="center", va="center", fontsize=6)


def ids_text(ids: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in ids)


def key(axes: "Axes") -> None:
    """Explain the squares in the last panel."""
    from matplotlib.patches import Rectangle

    for row, (tint, text) in enumerate(((PLAIN, "index, row, col\nof a token"), (TINT, "changed by\nthe edit"))):
        axes.add_patch(Rectangle((0.2, row + 0.5), 0.5, 0.5, fc=tint, ec="0.4", lw=0.6))
        axes.text(0.85, row + 0.75, text, va="center", fontsize=6.5)


def caption() -> str:
    """Return the caption. Its numbers come from the ids themselves."""
    text = text_ids()
    lines = [
        f"Position ids of {SIDE} × {SIDE} image tokens and {len(text)} text tokens, (index, row, col) each. "
        f"txt_ids have {len(set(map(tuple, text.tolist())))} value; only the text encoder knows the order of words."
    ]
    for name, edit in EDITS.items():
        before, after = image_ids(edit, SIDE)
        changed = int((before != after).any(-1).sum())
        _, large = image_ids(edit, FULL)
        low, high = large.amin(0).tolist(), large.amax(0).tolist()
        spacing = (large[1] - large[0]).tolist()[2]
        positions = len(set(map(tuple, large.tolist())))
        lines.append(
            f"{name}: {changed} of {len(after)} tokens change. At {16 * FULL} × {16 * FULL} pixels ({FULL} × {FULL} "
            f"tokens) columns run from {low[2]:.4g} to {high[2]:.4g}, {spacing:.3g} apart; index {high[0]:g}; "
            f"{positions} position{'s' if positions > 1 else ''} for {len(large)} tokens."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(command(make, "ids"))
