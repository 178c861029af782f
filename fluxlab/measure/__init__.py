"""Metrics of images and their summaries.

`registry` and `metrics` hold the metrics, `images` the computations they are made of, `oracle` reads scenes,
`similarity` runs CLIP and DINO, `summary` takes means over cells, `tables` and `text` write them.
"""

from fluxlab.measure import metrics  # registers every metric
from fluxlab.measure.images import compare, describe, oracle_columns, oracle_compare
from fluxlab.measure.registry import METRICS, Metric, Sample, about, metric
from fluxlab.measure.summary import summarise, to_csv
from fluxlab.measure.tables import table

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
