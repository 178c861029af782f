"""The table of findings: every metric of every variant and control, in a form that compares with the baseline."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from fluxlab.experiment.reading import Run
from fluxlab.measure.registry import METRICS, about
from fluxlab.measure.summary import CONTROLS, Effect
from fluxlab.measure.text import digits_of, interval_text, number_text

SCALE = (4, 96)
"""Where the smallest and the largest value are drawn, in a drawing of 100 px."""

Row = dict[str, Any]


def metrics_with_values(runs: Sequence[Run]) -> list[str]:
    """Return the metrics that have a value in any run, in the order of `METRICS`, unknown ones last."""
    measured = dict.fromkeys(effect.metric for run in runs for effect in run.effects if effect.n)
    return [*(name for name in METRICS if name in measured), *(name for name in measured if name not in METRICS)]


def findings(runs: Sequence[Run], names: Sequence[str], metrics: Sequence[str]) -> list[Row]:
    """Return one row per variant, then one per control, run by run. `cells` has one entry per metric."""
    effects = [{(effect.variant, effect.metric): effect for effect in run.effects} for run in runs]
    columns = {metric: Column(metric, [effect for table in effects for effect in table.values()]) for metric in metrics}
    rows = []
    for i, (run, name, table) in enumerate(zip(runs, names, effects, strict=True)):
        for variant in (*run.variants, *CONTROLS):
            measured = [table[variant, metric] for metric in metrics if (variant, metric) in table]
            if not measured:
                continue
            n = max(effect.n for effect in measured)
            rows.append(
                {
                    "run": name,
                    "variant": variant,
                    "id": f"run-{i}",
                    "index": run.variants.index(variant) if variant in run.variants else None,
                    "n": n,
                    "cells": [columns[metric].cell(table, variant, n) for metric in metrics],
                }
            )
    return rows


class Column:
    """How a metric is printed and drawn: with three digits of its largest value, on one scale for all runs."""

    def __init__(self, metric: str, effects: Iterable[Effect]):
        column = [effect for effect in effects if effect.metric == metric]
        ends = [end for effect in column for end in (effect.value, effect.low, effect.high) if math.isfinite(end)]
        self.metric = metric
        self.digits = digits_of(effect.value for effect in column)
        self.ends = (min(ends), max(ends)) if ends else (0.0, 0.0)

    def cell(self, table: dict[tuple[str, str], Effect], variant: str, n: int) -> Row:
        """Return the texts and positions of one cell; `n` is the row's number of cells."""
        effect = table.get((variant, self.metric))
        if effect is None or effect.missing:
            reason = effect.missing if effect else "not measured"
            return {"raw": "", "missing": reason}
        paired = not math.isnan(effect.difference)
        ends = (effect.difference_low, effect.difference_high) if paired else (effect.low, effect.high)
        pooled = about(self.metric).pooled and effect.n > 1 and math.isfinite(effect.value)
        controls = [table.get((control, self.metric)) for control in CONTROLS]
        return {
            "raw": raw(effect.value),
            "missing": "",
            "value": number_text(effect.value, self.digits),
            "difference": number_text(effect.difference, self.digits, signed=True) if paired else "",
            "interval": interval_text(*ends, self.digits, signed=paired),
            "median": number_text(effect.median, self.digits) if pooled else "",
            "n": effect.n if effect.n != n else 0,
            "at": self.position(effect.value),
            "from": self.position(effect.low),
            "to": self.position(effect.high),
            "floor": self.position(controls[0].value) if controls[0] else None,
            "ceiling": self.position(controls[1].value) if controls[1] else None,
        }

    def position(self, value: float) -> float | None:
        """Return where a value is drawn, None for one that is not finite or if all values are equal."""
        low, high = self.ends
        if not math.isfinite(value) or low == high:
            return None
        return round(SCALE[0] + (SCALE[1] - SCALE[0]) * (value - low) / (high - low), 1)


def cell_values(row: Row, metrics: Sequence[str]) -> list[Row]:
    """Return a cell's metrics as in metrics.csv; where there is no value, the reason."""
    values = [row.get(metric, math.nan) for metric in metrics]
    return [
        {"text": raw(value), "missing": about(metric).absent or "no value" if math.isnan(value) else ""}
        for metric, value in zip(metrics, values, strict=True)
    ]


def raw(value: float) -> str:
    """Return a number as metrics.csv has it, with ∞ for infinity; "" for nan."""
    return "" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:.6g}"
