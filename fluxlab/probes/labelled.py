"""Captured arrays as xarray `DataArray`s: those of one file, or of all cells of a store. And the similarity of maps."""

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fluxlab.errors import UserError
from fluxlab.probes.arrays import Captured, load, open_arrays

if TYPE_CHECKING:
    from os import PathLike

    from xarray import DataArray

Maps = TypeVar("Maps", Captured, "DataArray")

INDEX = "attention/index.json"
"""File in a store: the capture, and which file has the arrays of which cell."""


def label(captured: Captured, name: str | None = None) -> "DataArray":
    """Convert to an xarray `DataArray`. Raises `UserError` if xarray is not installed."""
    try:
        from xarray import DataArray
    except ImportError:
        raise UserError(
            "labelled arrays need xarray: pip install 'fluxlab[probes]' (or use fluxlab.probes.load)"
        ) from None
    coords = {key: (along, np.asarray(values)) for key, (along, values) in captured.coords.items()}
    return DataArray(captured.values, dims=captured.axes, coords=coords, name=name, attrs=dict(captured.about))


def read(
    path: "str | PathLike[str]",
    variants: str | Sequence[str] | None = None,
    prompts: str | Sequence[str] | None = None,
    seeds: int | Sequence[int] | None = None,
) -> "dict[str, DataArray]":
    """Read what a run captured, or one file that `write` wrote, as xarray `DataArray`s by name.

    Args:
        path: a store (run folder) or a file. The arrays of a store have the axes variant, prompt and seed in front, in
            the order of the experiment.
        variants, prompts, seeds: select cells of a store, so that a large run need not fit in memory.

    Where prompts have different words, the axis `word` has all of them. Words that a prompt does not have are NaN.

    Raises `UserError` for a store without captured attention, for a variant, prompt or seed that it does not have, for
    any other file, and if xarray is not installed (pip install 'fluxlab[probes]').
    """
    selection = {"variant": variants, "prompt": prompts, "seed": seeds}
    if Path(path).is_dir():
        return _read_store(Path(path), selection)
    given = [f"{key}s" for key, value in selection.items() if value is not None]
    if given:
        raise UserError(f"{given[0]}= selects cells of a run folder, but {path} is not a folder")
    return {name: label(array, name) for name, array in load(path).items()}


def index(folder: "str | PathLike[str]") -> dict[str, Any] | None:
    """Return the contents of `attention/index.json` of a store, or None if nothing was captured.

    `capture` is the config and `digest` its hash. `cells` has one row per cell: variant, prompt, seed, cell (its key)
    and file (of its arrays, relative to the store). Raises `UserError` if the file is damaged.
    """
    file = Path(folder) / INDEX
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
        missing = [
            key for row in loaded["cells"] for key in ("variant", "prompt", "seed", "cell", "file") if key not in row
        ]
        if missing:
            raise UserError(f"{missing[0]} is missing")
        return loaded
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); delete it and run the command again") from error


def similarity(a: Maps, b: Maps, over: str | Sequence[str] = ("row", "col")) -> Maps:
    """Return the cosine similarity of two maps over the axes `over`: Σ ab / √(Σ a² · Σ b²). Other axes remain.

    It is 1 for maps that differ by a factor, 0 for maps without common positions, and NaN where a map is all 0 or has
    NaN. It is computed in fp64.

    Two `Captured` need equal axes and labels. Two `DataArray`s are broadcast, and keep the labels that both have: with
    `maps = fluxlab.probes.read(folder)`, `similarity(maps["words"], maps["words"].sel(variant="baseline"))` compares
    every variant with the baseline.

    This function compares maps that were stored. The request kind `similarity` compares the full attention of two
    samples while they are computed in one batch.

    Raises `UserError` for unknown axes, and for maps of different shapes.
    """
    over = (over,) if isinstance(over, str) else tuple(over)
    plain = isinstance(a, Captured)
    if plain != isinstance(b, Captured):
        raise UserError("similarity: expected two Captured or two DataArrays; fluxlab.probes.label converts the former")
    for maps in (a, b):
        axes = maps.axes if plain else maps.dims
        if not over or not {*over} <= {*axes}:
            raise UserError(f"over={list(over)}: expected some of {', '.join(map(str, axes))}")
    if plain and a.axes != b.axes:
        raise UserError(f"similarity: the axes differ, {', '.join(a.axes)} and {', '.join(b.axes)}")
    for axis in a.axes if plain else over:
        labels = [maps.labels(axis) if plain else maps[axis].values.tolist() for maps in (a, b)]
        if labels[0] != labels[1]:
            counts = " and ".join(str(len(part)) for part in labels)
            raise UserError(f"similarity: the labels of {axis} differ ({counts} entries)")
    if plain:
        positions, rest = [a.axes.index(axis) for axis in over], tuple(axis for axis in a.axes if axis not in over)
        moved = [np.moveaxis(maps.values, positions, range(-len(over), 0)) for maps in (a, b)]
        coords = {key: (along, labels) for key, (along, labels) in a.coords.items() if not {*along} & {*over}}
        return Captured(_cosine(*moved, last=len(over)), rest, coords, {**a.about, "unit": "cosine"})
    import xarray

    cosine = xarray.apply_ufunc(_cosine, a, b, input_core_dims=[over, over], join="inner", kwargs={"last": len(over)})
    return cosine.rename(None).assign_attrs(unit="cosine")


def _cosine(a: np.ndarray, b: np.ndarray, last: int) -> np.ndarray:
    """Return the cosine over the last axes."""
    axes = tuple(range(-last, 0))

    def total(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.multiply(x, y, dtype=np.float64).sum(axes)

    with np.errstate(invalid="ignore"):
        return total(a, b) / np.sqrt(total(a, a) * total(b, b))


def _read_store(folder: Path, selection: Mapping[str, Any]) -> "dict[str, DataArray]":
    """Return the arrays of the selected cells, with the axes of `selection` in front."""
    loaded = index(folder)
    if loaded is None:
        raise UserError(f"{folder}: no attention was captured; run its command again with capture=words")
    cells = {key: _select(loaded["cells"], key, values) for key, values in selection.items()}
    files = {tuple(row[key] for key in cells): folder / row["file"] for row in loaded["cells"]}
    places = list(product(*cells.values()))
    headers = []
    for place in places:
        with open_arrays(files[place]) as (_, arrays):
            headers.append(arrays)
    combined = {name: _allocated(name, [arrays[name] for arrays in headers], cells) for name in headers[0]}
    for place in places:
        cell = dict(zip(cells, place, strict=True))
        for name, array in load(files[place]).items():
            labels = {axis: array.labels(axis) for axis in array.axes}
            combined[name].loc[cell | labels] = array.values
    return combined


def _allocated(name: str, headers: Sequence[Captured], cells: Mapping[str, list]) -> "DataArray":
    """Return an array of NaN for all cells, whose axes have the labels of every cell in order of appearance."""
    first = headers[0]
    labels = {axis: list(dict.fromkeys(n for array in headers for n in array.labels(axis))) for axis in first.axes}
    coords = {key: ((key,), values) for key, values in cells.items()}
    coords |= {key: (along, labels.get(key, values)) for key, (along, values) in first.coords.items()}
    lengths = [len(values) for values in (*cells.values(), *labels.values())]
    values = np.full(lengths, np.nan, np.float32)
    return label(Captured(values, (*cells, *first.axes), coords, first.about), name)


def _select(rows: Sequence[Mapping[str, Any]], key: str, wanted: Any) -> list:
    """Return the wanted labels, or all of them in the order of the experiment."""
    known = list(dict.fromkeys(row[key] for row in rows))
    labels = known if wanted is None else [wanted] if isinstance(wanted, str | int) else list(wanted)
    for value in labels or [wanted]:
        if value not in known:
            listed = ", ".join(map(str, known[:8])) + (" …" if len(known) > 8 else "")
            raise UserError(f"{key}s={value!r}: not found, expected some of {listed}")
    return labels
