"""`python -m experiments.conventions -o figures`: how much of each edit models with other conventions bear.

Takes seconds; needs no model and no run: it reads `docs/conventions.json` and its strip of images, which
`python benchmarks/conventions.py` makes from the four training runs of `+train=convention*`. Above, an image of every
model (rows) and edit (columns), of one caption and seed. Below, the share of images with the right object, colour and
place, with 95 % intervals. The caption file has the conditions, the CSV all numbers.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from experiments.style import COLUMN, OKABE_ITO, PAGE, command, figure, paper, save, save_caption, save_table
from fluxlab.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "conventions.json"
NAMES = {
    "flux1": "FLUX.1",
    "index": "index 1",
    "text_line": "text line",
    "sine_cosine": "sine-cosine",
}
"""The conventions, as figures and tables name them."""

MARKS = {"flux1": ("o", "blue"), "index": ("s", "orange"), "text_line": ("^", "green"), "sine_cosine": ("D", "purple")}
SIDE = 32  # px of an image in the strip


def make(folder: Path) -> list[Path]:
    """Draw the four conventions under every edit, in column and page width, with a caption and a table."""
    if not RESULTS.is_file():
        raise UserError(f"{RESULTS}: missing; python benchmarks/conventions.py writes it")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    with Image.open(RESULTS.with_suffix(".png")) as file:
        strip = np.asarray(file.convert("RGB"))
    stem, written = folder / "conventions", []
    for width, inches in (("column", COLUMN), ("page", PAGE)):
        with paper():
            written += save(draw(results, strip, inches), stem.with_name(f"conventions-{width}"))
    return [*written, save_caption(caption(results), stem), save_table(rows(results), stem.with_suffix(".csv"))]


def draw(results: dict[str, Any], strip: np.ndarray, inches: float) -> "Figure":
    """Return the figure. strip: `(models · SIDE, edits · captions · SIDE, 3)`."""
    models, edits = list(results["models"]), list(results["edits"])
    each = len(results["shown"])
    rows, panel = inches * len(models) * (0.078 if inches == PAGE else 0.076), 0.28 * inches
    drawn = figure(inches, 0.9 + rows + panel)
    images, plot = drawn.subplots(2, 1, height_ratios=[rows, panel], sharex=True)
    for row in range(len(models)):
        for col in range(len(edits)):
            left = col * each * SIDE
            one = strip[row * SIDE : (row + 1) * SIDE, left : left + SIDE]
            images.imshow(one, extent=(col - 0.46, col + 0.46, row + 0.46, row - 0.46), interpolation="nearest")
    images.set(xlim=(-0.5, len(edits) - 0.5), ylim=(len(models) - 0.5, -0.5), aspect="auto")
    images.set_yticks(range(len(models)), [NAMES[name] for name in models])
    images.tick_params(length=0)
    images.spines[:].set_visible(False)
    for number, name in enumerate(models):
        found = [results["models"][name]["edits"][edit]["right"] for edit in edits]
        mean, low, high = np.array(found).T
        at = np.arange(len(edits)) + 0.19 * (number - (len(models) - 1) / 2)
        mark, colour = MARKS[name][0], OKABE_ITO[MARKS[name][1]]
        plot.errorbar(at, mean, np.abs([mean - low, high - mean]), fmt="none", ecolor=colour, elinewidth=0.8)
        plot.plot(at, mean, mark, color=colour, markersize=3 if inches == PAGE else 2, label=NAMES[name], clip_on=False)
    plot.set_xticks(range(len(edits)), edits, rotation=90)
    plot.set(ylim=(0, 1), ylabel="object, colour and\nplace right, share")
    plot.grid(axis="y", linewidth=0.3, alpha=0.5)
    drawn.legend(*plot.get_legend_handles_labels(), loc="outside upper center", ncols=len(models), columnspacing=1)
    return drawn


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all numbers, a row for each model, edit or control, and metric."""
    return [
        {
            "convention": name,
            "edit": edit,
            "metric": metric,
            "n": results["cells"],
            **dict(zip(ENDS, ends, strict=True)),
        }
        for name, model in results["models"].items()
        for edit, metrics in model["edits"].items()
        for metric, ends in metrics.items()
    ]


ENDS = ("mean", "low", "high")


def caption(results: dict[str, Any]) -> str:
    """Return the caption: what is shown, the conditions, and each model's share under every edit and control."""
    models = results["models"]
    training = next(iter(models.values()))["training"]
    lines = []
    for edit in next(iter(models.values()))["edits"]:
        shares = [f"{NAMES[name]} {_percent(model['edits'][edit]['right'])}" for name, model in models.items()]
        lines.append(f"  {edit}: {'; '.join(shares)}")
    text = (
        "Small models trained alike but for their position convention, under edits relative to it. Above: "
        f"“{results['shown'][0]}”, seed 0. Below: share of {results['cells']} images with the right object, colour and "
        f"place, 95 % bootstrap intervals over images. {training['samples']:,} training samples "
        f"in {training['steps']} steps, one training seed for each convention, {results['steps']} sampling steps, "
        "32 × 32 pixels, 8 × 8 tokens. The sine-cosine table has no index: offsets of the index "
        "change nothing there. The noise floor shifts all ids; another seed draws unchanged ids from other noise. Made "
        f"by python benchmarks/conventions.py at commit {results['commit']}, python -m experiments.conventions."
    )
    return "\n".join([text, *lines])


def _percent(ends: list[float]) -> str:
    mean, low, high = (round(100 * end) for end in ends)
    return f"{mean} % [{low}, {high}]"


if __name__ == "__main__":
    sys.exit(command(make, "conventions"))
