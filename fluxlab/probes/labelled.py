"""Captured arrays with their labels, as xarray: of one file, or of all cells of a run folder. And how alike two are."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fluxlab.errors import UserError
from fluxlab.probes.arrays import Captured, load, opened

if TYPE_CHECKING:
    from os import PathLike

    from xarray import DataArray

Maps = TypeVar("Maps", Captured, "DataArray")

INDEX = "attention/index.json"
"""In a run folder: the capture, and which file holds the arrays of which cell."""


def label(captured: Captured, name: str | None = None) -> "DataArray":
    """As an xarray `DataArray`. `UserError` telling how to get xarray where it is missing."""
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
    """What a run captured, or one file that `write` wrote, as xarray `DataArray`s by name.

    path: a run folder, or a file. Of a run folder, every array has the axes variant, prompt and seed in front, in the
    experiment's order; `variants`, `prompts` and `seeds` choose some, for all of a large run need not fit in memory.
    Where prompts have words of their own, the axis `word` has them all, and a prompt's values are NaN where it lacks
    one.

    Raises `UserError` for a folder in which nothing was captured, for what a run does not have, for any other file,
    and where xarray is missing (pip install 'fluxlab[probes]').
    """
    asked = {"variant": variants, "prompt": prompts, "seed": seeds}
    if Path(path).is_dir():
        captured = _read_run(Path(path), asked)
    else:
        needless = [f"{key}s" for key, value in asked.items() if value is not None]
        if needless:
            raise UserError(f"{needless[0]}= chooses from a run folder, which {path} is not")
        captured = load(path)
    return {name: label(one, name) for name, one in captured.items()}


def index(folder: "str | PathLike[str]") -> dict[str, Any] | None:
    """What `attention/index.json` of a run folder tells; None where nothing was captured.

    `capture` is the config, `digest` tells captures apart, `cells` has a row a cell: variant, prompt, seed, cell (its
    key) and file (of its arrays, in the folder). Raises `UserError` for a damaged one.
    """
    file = Path(folder) / INDEX
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        lacking = [
            key for row in found["cells"] for key in ("variant", "prompt", "seed", "cell", "file") if key not in row
        ]
        if lacking:
            raise UserError(f"{lacking[0]} is missing")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); delete it and run the command again") from error


def similarity(a: Maps, b: Maps, over: str | Sequence[str] = ("row", "col")) -> Maps:
    """How alike two maps are: their cosine over the axes `over`, Σ ab / √(Σ a² · Σ b²); the other axes stay.

    1 for maps that differ by a factor only, 0 for maps with no place in common, NaN where either is NaN or all zero.
    Computed in fp64. Two `Captured` need equal axes and labels. Of two `DataArray`s, an axis that only one has serves
    the other too, and of labels that differ those that both have are kept: with `maps = fluxlab.probes.read(folder)`,
    `similarity(maps["words"], maps["words"].sel(variant="baseline"))` compares every variant with the baseline.

    Raises `UserError` for axes that are not there, and for maps of different places.
    """
    over = (over,) if isinstance(over, str) else tuple(over)
    plain = isinstance(a, Captured)
    if plain != isinstance(b, Captured):
        raise UserError("similarity: two of a kind are needed; fluxlab.probes.label makes a DataArray of a Captured")
    for one in (a, b):
        axes = one.axes if plain else one.dims
        if not over or not {*over} <= {*axes}:
            raise UserError(f"over={list(over)}: expected some of {', '.join(map(str, axes))}")
    if plain and a.axes != b.axes:
        raise UserError(f"similarity: the axes differ, {', '.join(a.axes)} and {', '.join(b.axes)}")
    for axis in a.axes if plain else over:
        here, there = (one.labels(axis) if plain else one[axis].values.tolist() for one in (a, b))
        if here != there:
            raise UserError(f"similarity: {axis} has {len(here)} places and {len(there)}, or other ones")
    if plain:
        places, rest = [a.axes.index(axis) for axis in over], tuple(axis for axis in a.axes if axis not in over)
        moved = [np.moveaxis(one.values, places, range(-len(over), 0)) for one in (a, b)]
        coords = {key: (along, labels) for key, (along, labels) in a.coords.items() if not {*along} & {*over}}
        return Captured(_cosine(*moved, last=len(over)), rest, coords, {**a.about, "unit": "cosine"})
    import xarray

    found = xarray.apply_ufunc(_cosine, a, b, input_core_dims=[over, over], join="inner", kwargs={"last": len(over)})
    return found.rename(None).assign_attrs(unit="cosine")


def _cosine(a: np.ndarray, b: np.ndarray, last: int) -> np.ndarray:
    """Over the last axes."""
    axes = tuple(range(-last, 0))

    def total(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.multiply(x, y, dtype=np.float64).sum(axes)

    with np.errstate(invalid="ignore"):
        return total(a, b) / np.sqrt(total(a, a) * total(b, b))


def _read_run(folder: Path, asked: Mapping[str, Any]) -> dict[str, Captured]:
    """The arrays of the cells asked for, in one, with the axes of `asked` in front."""
    told = index(folder)
    if told is None:
        raise UserError(f"{folder}: nothing of attention was captured; run its command again with capture=words")
    labels = {key: _choose(told["cells"], key, values) for key, values in asked.items()}
    files = {tuple(row[key] for key in labels): folder / row["file"] for row in told["cells"]}
    cells = [files[place] for place in product(*labels.values())]
    described = []
    for cell in cells:
        with opened(cell) as (_, arrays):
            described.append(arrays)
    found = {}
    for name, first in described[0].items():
        unions = [list(dict.fromkeys(n for cell in described for n in cell[name].labels(axis))) for axis in first.axes]
        coords = {
            key: (along, unions[first.axes.index(key)] if key in first.axes else values)
            for key, (along, values) in first.coords.items()
        }
        values = np.full((len(cells), *map(len, unions)), np.nan, np.float32)
        for n, cell in enumerate(cells):
            with opened(cell) as (file, arrays):
                own = [arrays[name].labels(axis) for axis in first.axes]
                at = [[union.index(one) for one in labels] for union, labels in zip(unions, own, strict=True)]
                values[n][np.ix_(*at)] = file.get_tensor(name)
        values = values.reshape(*map(len, labels.values()), *values.shape[1:])
        coords |= {key: ((key,), values) for key, values in labels.items()}
        found[name] = replace(first, values=values, axes=(*labels, *first.axes), coords=coords)
    return found


def _choose(rows: Sequence[Mapping[str, Any]], key: str, asked: Any) -> list:
    """The labels asked for, or all, in the experiment's order."""
    there = list(dict.fromkeys(row[key] for row in rows))
    wanted = there if asked is None else [asked] if isinstance(asked, str | int) else list(asked)
    for one in wanted or [asked]:
        if one not in there:
            listed = ", ".join(map(str, there[:8])) + (" …" if len(there) > 8 else "")
            raise UserError(f"{key}s={one!r}: there is none, expected some of {listed}")
    return wanted
