"""What the metrics of many cells come to: means with intervals, differences to the baseline, a table, a CSV."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxlab.errors import UserError
from fluxlab.measure.images import METRICS

if TYPE_CHECKING:
    from rich.table import Table

NOISE_FLOOR, ANOTHER_SEED = "noise floor", "another seed"
"""What every effect is quoted beside, as variants: all ids shifted by a constant, and the baseline of another seed."""
CSV_COLUMNS = ("variant", "metric", "n", "mean", "low", "high", "paired_mean", "paired_low", "paired_high")
SHOWN = ("psnr", "ssim", "word", "thing_moved", "sawtooth", "sharpness", "displacement", "colour_shift", "clip_text")
"""What a table shows unless told, as far as there is room; what stands first goes in first."""
RESAMPLES = 2000
_CONFIDENCE = 0.95
_NAN = float("nan")


def summarise(rows: Sequence[Mapping[str, Any]], baseline: str, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Mean and 95 % interval of each metric of each variant, over cells: a dict of `CSV_COLUMNS` for every pair.

    rows: one a cell, with variant, prompt, seed and numbers by metric; nan, or no such key, is no value and not counted
    in n. low and high are the bootstrap's percentiles (2,000 resamples of cells, the same on every call), nan for fewer
    than two cells. Cells count as independent of each other, which the seeds of one prompt are not quite.
    For metrics of one image by itself, paired_* is the same for variant - baseline at equal (prompt, seed); nan for the
    baseline, for comparisons, and without pairs. psnr is pooled as mean squared error, so that it is finite unless all
    pictures equal their baselines.
    Variants come in the order of the rows. Raises UserError for a baseline or metric that no row has, two rows of one
    cell, and infinite numbers other than psnr.
    """
    cells = _cells(rows)
    if baseline not in cells:
        raise UserError(f"baseline={baseline!r}: no such variant in the rows, which have {', '.join(map(repr, cells))}")
    unknown = [name for name in metrics if not any(name in row for row in rows)]
    if unknown:
        raise UserError(f"metrics: {unknown[0]!r} is in none of the rows")
    found: list[dict[str, Any]] = []
    samples: list[np.ndarray] = []
    for variant, own in cells.items():
        for metric in metrics:
            values = {key: value for key, row in own.items() if not math.isnan(value := _value(row, metric))}
            pairs = []
            if variant != baseline and (metric not in METRICS or METRICS[metric].alone):
                before = ((value, _value(cells[baseline].get(key, {}), metric)) for key, value in values.items())
                pairs = [value - other for value, other in before if not math.isnan(other)]
            found.append({"variant": variant, "metric": metric, "n": len(values)})
            samples += [np.array(list(values.values())), np.array(pairs)]
    moments = _moments(samples)
    for row, alone, paired in zip(found, moments[::2], moments[1::2], strict=True):
        if row["metric"] == "psnr":
            mean, low, high = map(_decibels, alone)
            alone = mean, high, low  # the larger error is the smaller psnr
        row |= dict(zip(CSV_COLUMNS[3:], (*alone, *paired), strict=True))
    return found


def table(
    summary: Sequence[Mapping[str, Any]],
    metrics: Sequence[str] | None = None,
    references: Sequence[str] = (NOISE_FLOOR, ANOTHER_SEED),
    width: int = 100,
) -> "Table":
    """A summary for a terminal: a row a variant, means with their 95 % intervals, the references below a rule.

    metrics: the columns; by default those of `SHOWN` that have values, as many as fit `width` characters. Print it on a
    console of that width: rich takes 80 where stdout is no terminal, and cuts. Raises UserError for a metric that is
    not in the summary.
    """
    from rich import box
    from rich.table import Table

    cells = {(row["variant"], row["metric"]): row for row in summary}
    present = dict.fromkeys(row["metric"] for row in summary if not math.isnan(row["mean"]))
    unknown = [name for name in metrics or () if not any(name == row["metric"] for row in summary)]
    if unknown:
        raise UserError(f"metrics: no {unknown[0]!r} in the summary, which has {', '.join(present)}")
    variants = list(dict.fromkeys(row["variant"] for row in summary))
    last = [name for name in references if name in variants]
    variants = [name for name in variants if name not in last] + last
    columns = {name: _column(name, variants, cells) for name in metrics or [m for m in SHOWN if m in present]}
    named = min(24, max(map(len, ["variant", *variants])))
    if metrics is None:
        left, kept = width - named - 2, {}
        for name, texts in columns.items():
            left -= max(map(len, (_heading(name), *texts))) + 3  # and what is between columns
            if left < 0:
                break
            kept[name] = texts
        columns = kept
    made = Table(box=box.HORIZONTALS, caption="mean [95 % interval] over cells", caption_justify="left", pad_edge=False)
    made.add_column("variant", no_wrap=True, overflow="ellipsis", max_width=named)
    for name in columns:
        made.add_column(_heading(name), justify="right", no_wrap=True)
    for i, variant in enumerate(variants):
        if last and variant == last[0] and i:
            made.add_section()
        made.add_row(variant, *(texts[i] for texts in columns.values()))
    return made


def to_csv(summary: Sequence[Mapping[str, Any]]) -> str:
    """A summary as CSV, a line a (variant, metric): numbers to 10 digits, nothing for nan, lines ended by \\n."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows([_number(row[name]) for name in CSV_COLUMNS] for row in summary)
    return text.getvalue()


def _number(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.10g}"


def _cells(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[tuple, Mapping[str, Any]]]:
    """The rows by variant, then by (prompt, seed)."""
    cells: dict[str, dict[tuple, Mapping[str, Any]]] = {}
    for row in rows:
        own, key = cells.setdefault(row["variant"], {}), (row["prompt"], row["seed"])
        if key in own:
            raise UserError(f"rows: variant {row['variant']!r} has prompt {key[0]!r} with seed {key[1]!r} twice")
        own[key] = row
    return cells


def _value(row: Mapping[str, Any], metric: str) -> float:
    """A cell's number; of psnr, the mean squared error over 255²."""
    value = row.get(metric)
    value = _NAN if value is None else float(value)
    if metric == "psnr":
        return 10 ** (-value / 10)
    if math.isinf(value):
        raise UserError(
            f"rows: {metric} of variant {row['variant']!r}, seed {row['seed']!r} is {value}; only psnr may be"
        )
    return value


def _decibels(error: float) -> float:
    return math.inf if error == 0 else -10 * math.log10(error)


def _moments(samples: Sequence[np.ndarray]) -> list[tuple[float, float, float]]:
    """(mean, low, high) of each sample. Equally long ones are resampled together, by the same draws whatever the others
    are, so that a number does not depend on what else was asked for."""
    found = [(float(x.mean()), _NAN, _NAN) if len(x) else (_NAN,) * 3 for x in samples]
    by_length: dict[int, list[int]] = {}
    for i, x in enumerate(samples):
        if len(x) > 1 and not np.ptp(x):
            found[i] = (float(x[0]),) * 3
        elif len(x) > 1:
            by_length.setdefault(len(x), []).append(i)
    for picks in by_length.values():
        for start in range(0, len(picks), 20):
            part = picks[start : start + 20]
            for i, low, high in zip(part, *_bounds(np.stack([samples[i] for i in part])), strict=True):
                found[i] = (found[i][0], float(low), float(high))
    return found


def _bounds(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bootstrap's low and high ends for the means of the rows of (k, n) samples."""
    from scipy.stats import bootstrap

    interval = bootstrap(
        (samples,),
        np.mean,
        axis=1,
        n_resamples=RESAMPLES,
        batch=max(1, 200_000 // samples.shape[1]),  # some 30 MB at a time
        vectorized=True,
        confidence_level=_CONFIDENCE,
        method="percentile",  # bca has no answer for the nearly constant samples that right-or-wrong metrics make
        rng=np.random.default_rng(0),
    ).confidence_interval
    return interval.low, interval.high


def _heading(metric: str) -> str:
    unit = METRICS[metric].unit if metric in METRICS else ""
    return f"{metric} ({unit})" if unit else metric


def _column(metric: str, variants: Sequence[str], cells: Mapping[tuple, Mapping[str, Any]]) -> list[str]:
    """A metric's texts, to three digits of its largest mean."""
    rows = [cells.get((variant, metric), {"mean": _NAN, "low": _NAN, "high": _NAN}) for variant in variants]
    largest = max((abs(row["mean"]) for row in rows if math.isfinite(row["mean"])), default=0)
    digits = min(4, max(0, 2 - math.floor(math.log10(largest)))) if largest else 1

    def text(row: Mapping[str, Any]) -> str:
        if math.isnan(row["mean"]):
            return "-"
        mean, low, high = (f"{row[name]:.{digits}f}" for name in ("mean", "low", "high"))
        return mean if math.isnan(row["low"]) or low == high else f"{mean} [{low}, {high}]"

    return [text(row) for row in rows]
