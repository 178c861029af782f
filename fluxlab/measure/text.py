"""Metrics and their intervals as text."""

import math
from collections.abc import Iterable

from fluxlab.measure.registry import about


def heading(metric: str) -> str:
    """Return a metric's name with its unit, and "pooled" if its mean is not the mean of the cells."""
    notes = [about(metric).unit, "pooled" if about(metric).pooled else ""]
    return f"{metric} ({', '.join(filter(None, notes))})" if any(notes) else metric


def digits_of(values: Iterable[float]) -> int:
    """Return the number of decimals that shows the largest of some values with three digits; at most 4."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0)
    return min(4, max(0, 2 - math.floor(math.log10(largest)))) if largest else 1


def number_text(value: float, digits: int, signed: bool = False) -> str:
    """Return a number with so many decimals: `0.125`, `+0.1`, `∞`, "" for nan.

    A number that would round to 0 is written with an exponent: `-1.6e-05`.
    """
    if math.isnan(value):
        return ""
    sign = "+" if signed else ""
    if math.isinf(value):
        return "-∞" if value < 0 else f"{sign}∞"
    if value and not round(value, digits):
        return f"{value:{sign}.1e}"
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # + 0.0: no minus sign before 0


def interval_text(low: float, high: float, digits: int, signed: bool = False) -> str:
    """Return `[0.10, 0.15]`; "" for an interval that is nan or has no width."""
    if math.isnan(low) or low == high:
        return ""
    return f"[{number_text(low, digits, signed)}, {number_text(high, digits, signed)}]"


def mean_text(mean: float, low: float, high: float, digits: int, signed: bool = False) -> str:
    """Return `0.12 [0.10, 0.15]`: a number and its interval if it has one."""
    parts = number_text(mean, digits, signed), interval_text(low, high, digits, signed)
    return " ".join(filter(None, parts))
