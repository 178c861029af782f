"""Summaries of metrics over cells: means with intervals and paired differences to the baseline."""

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple

import numpy as np

from fluxlab.errors import UserError
from fluxlab.measure.registry import METRICS, about

CONTROLS = NOISE_FLOOR, ANOTHER_SEED = ("noise floor", "another seed")
"""The two controls next to every effect: all ids shifted by a constant, and the baseline at a different seed."""

CSV_COLUMNS = ("variant", "metric", "n", "mean", "low", "high", "paired_mean", "paired_low", "paired_high")
CSV_COLUMNS += ("paired_n", "median")
RESAMPLES = 2000
_CONFIDENCE = 0.95
_NAN = float("nan")

Rows = Sequence[Mapping[str, Any]]


def summarise(rows: Rows, baseline: str, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row of `CSV_COLUMNS` for every variant and metric: the mean over cells and its 95 % interval.

    rows: one per cell, with variant, prompt, seed and the metrics. nan and a missing key are no value and not counted
    in n. low and high are percentiles of a bootstrap over cells (2,000 resamples, the same on every call), nan for
    fewer than two cells. Cells count as independent, which the seeds of one prompt are not quite.

    paired_* describe variant - baseline at equal (prompt, seed), over the paired_n cells where both have a value. They
    are nan for the baseline and for metrics that compare with the baseline anyway.

    The mean of psnr is pooled: it belongs to the mean squared error over cells, so that it is finite unless all images
    equal their baselines. One bad cell dominates it; median is that of the cells.

    Variants come in the order of the rows. Raises UserError for a baseline or metric that no row has, two rows of one
    cell, and infinite numbers other than psnr.
    """
    table = _Table(rows, metrics)
    if baseline not in table.variants:
        raise UserError(f"baseline={baseline!r}: not in the rows, which have {', '.join(map(repr, table.variants))}")
    unknown = [name for name in metrics if name not in table.found]
    if unknown:
        raise UserError(f"metrics: {unknown[0]!r} is in none of the rows")
    summary: list[dict[str, Any]] = []
    before = table.read(baseline)
    for variant in table.variants:
        pairs = list(_pairs(metrics, before if variant == baseline else table.read(variant), before))
        moments = _moments([sample for pair in pairs for sample in pair])
        for metric, (values, differences), alone, paired in zip(
            metrics, pairs, moments[::2], moments[1::2], strict=True
        ):
            if metric == "psnr":
                mean, low, high = map(decibels, alone)
                alone = mean, high, low  # the larger error is the smaller psnr
            row = {"variant": variant, "metric": metric, "n": len(values)}
            row |= dict(zip(CSV_COLUMNS[3:9], (*alone, *paired), strict=True))
            summary.append(row | {"paired_n": len(differences), "median": _median(metric, values)})
    return summary


def complete(summary: Rows, rows: Callable[[], Rows], baseline: str) -> list[dict[str, Any]]:
    """Return a summary with `paired_n` and `median`, which release 0.1 did not write. rows: gives those it is of."""
    if all("paired_n" in row and "median" in row for row in summary):
        return [dict(row) for row in summary]
    metrics, completed = list(dict.fromkeys(row["metric"] for row in summary)), []
    table = _Table(rows(), metrics)
    before = table.read(baseline)
    for variant, of_variant in groupby(summary, key=lambda row: row["variant"]):
        own = before if variant == baseline else table.read(variant)
        pairs = dict(zip(metrics, _pairs(metrics, own, before), strict=True))
        for row in of_variant:
            values, differences = pairs[row["metric"]]
            completed.append({**row, "paired_n": len(differences), "median": _median(row["metric"], values)})
    return completed


class Effect(NamedTuple):
    """A metric of a variant in a form that compares with the baseline and with other variants.

    For a metric of one image, value is the baseline's mean over all cells plus the mean paired difference, and low and
    high are the ends of that difference's interval on the same scale: a control that has fewer cells than the variants
    stands at the baseline if it changes nothing. difference, difference_low and difference_high are the paired
    difference itself. n counts the pairs.

    For the baseline, and for a metric that compares with the baseline, value is the mean, difference is nan, and n
    counts the cells. own_mean is the mean over the variant's own cells, median their median. missing says why there is
    no value; it is "" if there is one.
    """

    variant: str
    metric: str
    n: int
    value: float
    low: float
    high: float
    difference: float = _NAN
    difference_low: float = _NAN
    difference_high: float = _NAN
    own_mean: float = _NAN
    median: float = _NAN
    missing: str = ""


def effects(summary: Rows, baseline: str) -> list[Effect]:
    """Return the `Effect` of every row of a summary, in its order."""
    means = {row["metric"]: row["mean"] for row in summary if row["variant"] == baseline}
    return [_effect(row, means.get(row["metric"], _NAN), row["variant"] == baseline) for row in summary]


def _effect(row: Mapping[str, Any], level: float, is_baseline: bool) -> Effect:
    names = row["variant"], row["metric"]
    own = {"own_mean": row["mean"], "median": row["median"]}
    if not row["n"]:
        reason = about(row["metric"]).absent or "no value"
        return Effect(*names, 0, _NAN, _NAN, _NAN, missing=reason)
    if is_baseline or (row["metric"] in METRICS and not METRICS[row["metric"]].alone):
        return Effect(*names, row["n"], row["mean"], row["low"], row["high"], **own)
    if not row["paired_n"]:
        return Effect(*names, 0, _NAN, _NAN, _NAN, **own, missing="no cell where the baseline has a value")
    difference = row["paired_mean"], row["paired_low"], row["paired_high"]
    return Effect(*names, row["paired_n"], *(level + part for part in difference), *difference, **own)


def to_csv(summary: Rows) -> str:
    """Return a summary as CSV, a line per variant and metric: numbers with 10 digits, empty for nan."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows([_csv_number(row[name]) for name in CSV_COLUMNS] for row in summary)
    return text.getvalue()


def error_of(psnr: float) -> float:
    """Return the mean squared error over 255² that a PSNR in dB stands for."""
    return 10 ** (-psnr / 10)


def decibels(error: float) -> float:
    """Return the PSNR in dB of a mean squared error over 255²; inf for 0."""
    return math.inf if error == 0 else -10 * math.log10(error)


def _csv_number(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.10g}"


class _Numbers(NamedTuple):
    """The metrics (cells, metrics) of a variant, nan for no value, and a number for the (prompt, seed) of each cell."""

    places: np.ndarray
    values: np.ndarray


class _Table:
    """The numbers of rows, read for one variant at a time, because a large run has millions of rows.

    variants: the numbers of the rows of each variant. found: the metrics that a row has.
    """

    def __init__(self, rows: Rows, metrics: Sequence[str]):
        self.rows, self.metrics = rows, metrics
        self.variants: dict[str, list[range]] = {}
        self.found: set[str] = set()
        self._prompts: dict[str, int] = {}
        self._seeds: dict[int, int] = {}
        for i, row in enumerate(rows):
            ranges = self.variants.setdefault(row["variant"], [range(i, i)])
            if ranges[-1].stop < i:
                ranges.append(range(i, i))
            ranges[-1] = range(ranges[-1].start, i + 1)
            self._prompts.setdefault(row["prompt"], len(self._prompts))
            self._seeds.setdefault(row["seed"], len(self._seeds))
            if len(self.found) < len(metrics):
                self.found.update(name for name in metrics if name in row)

    def read(self, variant: str) -> _Numbers:
        """Return the numbers of a variant. Raises UserError for two rows of one cell, and infinite numbers."""
        ranges = self.variants[variant]
        count = sum(map(len, ranges))
        places, values = np.empty(count, np.int64), np.empty((count, len(self.metrics)))
        for k, i in enumerate(chain.from_iterable(ranges)):
            row = self.rows[i]
            places[k] = self._prompts[row["prompt"]] * len(self._seeds) + self._seeds[row["seed"]]
            values[k] = [_value(row, name) for name in self.metrics]
        which, counts = np.unique(places, return_counts=True)
        if counts.max() > 1:
            prompt, seed = divmod(int(which[counts.argmax()]), len(self._seeds))
            prompt, seed = list(self._prompts)[prompt], list(self._seeds)[seed]
            raise UserError(f"rows: variant {variant!r} has prompt {prompt!r} with seed {seed!r} twice")
        return _Numbers(places, values)


def _pairs(metrics: Sequence[str], own: _Numbers, baseline: _Numbers) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield for each metric a variant's values, and the differences to the baseline where both have one."""
    order = np.argsort(baseline.places)
    at = order[np.searchsorted(baseline.places, own.places, sorter=order).clip(max=len(order) - 1)]
    same = baseline.places[at] == own.places
    for j, metric in enumerate(metrics):
        values, before = own.values[:, j], baseline.values[at, j]
        here = ~np.isnan(values)
        if own is baseline or (metric in METRICS and not METRICS[metric].alone):
            yield values[here], np.array([])
        else:
            both = here & same & ~np.isnan(before)
            yield values[here], values[both] - before[both]


def _value(row: Mapping[str, Any], metric: str) -> float:
    """Return a cell's number; for psnr, the mean squared error over 255²."""
    value = row.get(metric)
    value = _NAN if value is None else float(value)
    if metric == "psnr":
        return error_of(value)
    if math.isinf(value):
        raise UserError(
            f"rows: {metric} of variant {row['variant']!r}, seed {row['seed']!r} is {value}; only psnr may be infinite"
        )
    return value


def _median(metric: str, values: np.ndarray) -> float:
    if not len(values):
        return _NAN
    return float(np.median([decibels(value) for value in values] if metric == "psnr" else values))


def _moments(samples: Sequence[np.ndarray]) -> list[tuple[float, float, float]]:
    """Return (mean, low, high) of each sample.

    Samples of equal length are resampled together, by draws that do not depend on the other samples.
    """
    moments = [(float(x.mean()), _NAN, _NAN) if len(x) else (_NAN,) * 3 for x in samples]
    by_length: dict[int, list[int]] = {}
    for i, x in enumerate(samples):
        if len(x) > 1 and not np.ptp(x):
            moments[i] = (float(x[0]),) * 3
        elif len(x) > 1:
            by_length.setdefault(len(x), []).append(i)
    for picks in by_length.values():
        for start in range(0, len(picks), 20):
            part = picks[start : start + 20]
            for i, low, high in zip(part, *_bounds(np.stack([samples[i] for i in part])), strict=True):
                moments[i] = (moments[i][0], float(low), float(high))
    return moments


def _bounds(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the low and high ends of the bootstrap's intervals for the means of the rows of (k, n) samples."""
    # As scipy.stats.bootstrap with method="percentile", bit by bit, without its import of half a second. Its "bca"
    # fails on nearly constant samples, which right-or-wrong metrics have.
    rng, n = np.random.default_rng(0), samples.shape[1]
    batch, means = max(1, 200_000 // n), []  # about 30 MB at a time
    for start in range(0, RESAMPLES, batch):
        drawn = rng.integers(0, n, (min(batch, RESAMPLES - start), n))
        means.append(samples[..., drawn].mean(axis=-1))
    ranked = np.sort(np.concatenate(means, axis=-1), axis=-1)

    def quantile(p: float) -> np.ndarray:
        place = p * RESAMPLES + (1 - p) - 1
        below = math.floor(place)
        above = min(below + 1, RESAMPLES - 1)
        return (1 - (place - below)) * ranked[:, below] + (place - below) * ranked[:, above]

    outside = (1 - _CONFIDENCE) / 2
    return quantile(outside), quantile(1 - outside)
