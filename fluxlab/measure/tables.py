"""A summary as a table for a terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fluxlab.errors import UserError
from fluxlab.measure.registry import about, shown_metrics
from fluxlab.measure.summary import CONTROLS, Effect, Rows, effects
from fluxlab.measure.text import digits_of, heading, mean_text, number_text

if TYPE_CHECKING:
    from rich.table import Table


def table(
    summary: Rows,
    metrics: Sequence[str] | None = None,
    references: Sequence[str] = CONTROLS,
    width: int = 100,
    baseline: str | None = None,
) -> "Table":
    """Return a summary as a table for a terminal: one row per variant, the controls below a rule.

    metrics: the columns; by default those of `shown_metrics()` that have values, as many as fit `width` characters.
    baseline: by default the first variant that is not a control. Print it on a console of that width: rich assumes 80
    if stdout is not a terminal. Raises UserError for a metric that is not in the summary.
    """
    from rich import box
    from rich.table import Table

    with_values = dict.fromkeys(row["metric"] for row in summary if not math.isnan(row["mean"]))
    unknown = [name for name in metrics or () if not any(name == row["metric"] for row in summary)]
    if unknown:
        raise UserError(f"metrics: no {unknown[0]!r} in the summary, which has {', '.join(with_values)}")
    variants = list(dict.fromkeys(row["variant"] for row in summary))
    controls = [name for name in references if name in variants]
    variants = [name for name in variants if name not in controls] + controls
    entries = {entry[:2]: entry for entry in effects(summary, baseline or variants[0])}
    counts = {name: max(e.n for e in entries.values() if e.variant == name) for name in variants}
    chosen = list(metrics) if metrics else [name for name in shown_metrics() if name in with_values]
    columns = {
        name: _column(
            [entries.get((v, name), Effect(v, name, 0, math.nan, math.nan, math.nan)) for v in variants], counts
        )
        for name in chosen
    }
    name_width = min(24, max(map(len, ["variant", *variants])))
    if metrics is None:
        columns = _fitting(columns, width - name_width - 2 - 3 - max(len(str(n)) for n in counts.values()))
    lines = ["mean [95 % interval] over n cells", "Δ: mean paired difference to the baseline [95 % interval]"]
    lines += [f"{name}: of the mean {about(name).pooled} over cells (pooled)" for name in columns if about(name).pooled]
    made = Table(box=box.HORIZONTALS, caption="\n".join(lines), caption_justify="left", pad_edge=False)
    made.min_width = min(width, max(map(len, lines)))  # the caption wraps at the table's width
    made.add_column("variant", no_wrap=True, overflow="ellipsis", max_width=name_width)
    made.add_column("n", justify="right", no_wrap=True)
    for name in columns:
        made.add_column(heading(name), justify="right", no_wrap=True)
    for i, variant in enumerate(variants):
        if controls and variant == controls[0] and i:
            made.add_section()
        made.add_row(variant, str(counts[variant]), *(texts[i] for texts in columns.values()))
    return made


def _column(entries: Sequence[Effect], counts: Mapping[str, int]) -> list[str]:
    """Return the texts of a metric's column, one per variant. A cell with fewer than the variant's n says its own."""
    digits = digits_of(entry.value for entry in entries)

    def text(entry: Effect) -> str:
        if not entry.n:
            return entry.missing or "no value"
        lines = [mean_text(entry.value, entry.low, entry.high, digits)]
        if not math.isnan(entry.difference):
            ends = entry.difference, entry.difference_low, entry.difference_high
            lines = [number_text(entry.value, digits), f"Δ {mean_text(*ends, digits, signed=True)}"]
        if about(entry.metric).pooled and entry.n > 1:
            lines.append(f"median {number_text(entry.median, digits)}")
        if entry.n < counts[entry.variant]:
            lines[0] += f", n = {entry.n}"
        return "\n".join(lines)

    return [text(entry) for entry in entries]


def _fitting(columns: Mapping[str, Sequence[str]], width: int) -> dict[str, Sequence[str]]:
    """Return the first columns that fit a width in characters."""
    fitting = {}
    for name, texts in columns.items():
        width -= max(len(line) for text in (heading(name), *texts) for line in text.split("\n")) + 3
        if width < 0:
            break
        fitting[name] = texts
    return fitting
