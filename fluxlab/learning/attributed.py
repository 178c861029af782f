"""The table and the figure of an attribution, from the derivatives of its cells."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fluxlab.learning.objectives import Place
    from fluxlab.probes import Captured

BY_BAND = ("predicted", "measured")
"""Arrays of `bands.ablated`, which are neither in the table nor in the figure."""


def table(found: Sequence[Mapping[str, "Captured"]], places: Sequence["Place"]) -> list[dict[str, Any]]:
    """Return the mean effect of each block, head and axis over cells with its 95 % bootstrap interval.

    The effect of gains is minus the sum of derivatives over steps and frequencies: the change of the score, to first
    order, without this part. That of patches is the sum over steps: the change with the patch at full strength.
    """
    import numpy as np

    from fluxlab.measure.summary import summarise

    rows, names = [], {}
    for cell, place in zip(found, places, strict=True):
        for name, array in cell.items():
            if name in BY_BAND:
                continue
            per_step = array.values.sum(0)  # block, head, pair; or block, head; or block
            parts = {}
            if name == "gains":
                axis = np.array(array.coords["axis"][1])
                parts = {a: -per_step[..., axis == a].sum(-1) for a in dict.fromkeys(axis.tolist())}
            for axis_name, values in (parts or {"": per_step}).items():
                for place_of, value in np.ndenumerate(values):
                    block, head = place_of[0], place_of[1] if len(place_of) > 1 else ""
                    key = f"{name} {block} {head} {axis_name}"
                    names[key] = {"array": name, "block": block, "head": head, "axis": axis_name}
                    rows.append({"variant": key, "prompt": place.prompt, "seed": place.seed, "effect": float(value)})
    summary = summarise(rows, rows[0]["variant"], ["effect"])
    return [
        {**names[r["variant"]], "effect": r["mean"], "low": r["low"], "high": r["high"], "n": r["n"]} for r in summary
    ]


def draw(found: Sequence[Mapping[str, "Captured"]], title: str) -> "Figure":
    """Return heatmaps of the mean effect over cells: block × frequency of each axis, or block × head of each site."""
    import numpy as np
    from matplotlib.figure import Figure

    from fluxlab.drawing.style import STYLE, style

    panels = {}
    for name, array in found[0].items():
        if name in BY_BAND:
            continue
        mean = np.mean([cell[name].values for cell in found], 0).sum(0)
        if name == "gains":
            axis = np.array(array.coords["axis"][1])
            panels |= {
                a: (-mean[..., axis == a].sum(1), "frequency, high to low") for a in dict.fromkeys(axis.tolist())
            }
        else:
            panels[name] = (mean if mean.ndim == 2 else mean[:, None], "head" if mean.ndim == 2 else "")
    most = max(float(np.abs(values).max()) for values, _ in panels.values()) or 1.0
    with style(STYLE):
        figure = Figure((1.2 + 1.9 * len(panels), 2.6), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, (name, (values, label)) in zip(axes, panels.items(), strict=True):
            drawn = ax.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
            ax.set_title(name)
            ax.set_xlabel(label)
        axes[0].set_ylabel("block")
        figure.colorbar(drawn, ax=list(axes), label="first-order effect")
        figure.suptitle(title, x=0.02, ha="left")
    return figure
