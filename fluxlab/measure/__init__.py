"""Metrics of images and their summaries.

`registry` and `metrics` hold the metrics, `images` the computations they are made of, `oracle` reads scenes,
`similarity` runs CLIP and DINO, `summary` takes means over cells.
"""

from fluxlab.measure import metrics  # registers every metric
from fluxlab.measure.images import compare, describe, oracle_columns, oracle_compare
from fluxlab.measure.registry import METRICS, Metric, Sample, about, metric
from fluxlab.measure.summary import summarise, table, to_csv

__all__ = [
    "METRICS",
    "Metric",
    "Sample",
    "about",
    "compare",
    "describe",
    "metric",
    "metrics",
    "oracle_columns",
    "oracle_compare",
    "summarise",
    "table",
    "to_csv",
]
