"""Measures on images: metrics (`images`), similarity by a model (`similarity`), what a scene shows (`oracle`), and what
many cells come to (`summary`)."""

from fluxlab.measure.images import METRICS, Metric, compare, describe, oracle_beside, oracle_columns, oracle_compare
from fluxlab.measure.summary import summarise, table, to_csv

__all__ = [
    "METRICS",
    "Metric",
    "compare",
    "describe",
    "oracle_beside",
    "oracle_columns",
    "oracle_compare",
    "summarise",
    "table",
    "to_csv",
]
