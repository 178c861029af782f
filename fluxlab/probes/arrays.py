"""Captured arrays with named axes and labels, in memory and in safetensors files.

`Captured` works without xarray, which is optional. `fluxlab.probes.label` converts it to a `DataArray`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxlab.errors import UserError
from fluxlab.files import write_atomic

if TYPE_CHECKING:
    from os import PathLike

METADATA_KEY = "fluxlab.probes"

Coords = Mapping[str, tuple[tuple[str, ...], Sequence]]
"""Labels: name → (axes, values along them). The labels of an axis have its name."""


@dataclass(frozen=True, eq=False)
class Captured:
    """An array with named axes and labels. `about` has the request and the unit.

    The order of the axes is sample, step, block, head (without those averaged over), then those of the kind.
    """

    values: np.ndarray
    axes: tuple[str, ...]
    coords: Coords
    about: Mapping[str, Any]

    def sel(self, **labels: Any) -> "Captured":
        """Select by label, like `sel(block=3, word="cat")`. The selected axes are dropped.

        Raises `UserError` for an unknown axis or label.
        """
        selected = self
        for axis, label in labels.items():
            known = selected.labels(axis)
            if label not in known:
                listed = ", ".join(map(str, known[:8])) + (" …" if len(known) > 8 else "")
                raise UserError(f"{axis}={label!r}: not found, expected one of {listed}")
            selected = selected._take(axis, known.index(label))
        return selected

    def mean(self, *axes: str) -> "Captured":
        """Average over axes. Raises `UserError` for an unknown axis."""
        result = self
        for axis in axes:
            n = result._number(axis)
            result = replace(result._take(axis, 0), values=result.values.mean(n))
        return result

    def labels(self, axis: str) -> list:
        """Return the labels of an axis, or 0, 1, 2, … if it has none. Raises `UserError` for an unknown axis."""
        n = self._number(axis)
        return list(self.coords[axis][1] if axis in self.coords else range(self.values.shape[n]))

    def _number(self, axis: str) -> int:
        if axis not in self.axes:
            raise UserError(f"{axis}: axis not found, expected one of {', '.join(self.axes)}")
        return self.axes.index(axis)

    def _take(self, axis: str, i: int) -> "Captured":
        coords = {}
        for name, (along, values) in self.coords.items():
            if axis in along:
                values = np.take(np.asarray(values, dtype=object), i, along.index(axis))
                along = tuple(other for other in along if other != axis)
            if along:
                coords[name] = (along, values.tolist() if isinstance(values, np.ndarray) else values)
        axes = tuple(other for other in self.axes if other != axis)
        return replace(self, values=self.values.take(i, self._number(axis)), axes=axes, coords=coords)


def of_sample(arrays: Mapping[str, Captured], sample: int) -> dict[str, Captured]:
    """Return one sample of a batch's arrays. Labels that differ between samples become labels of its axes."""
    selected = {}
    for name, batch in arrays.items():
        array = batch.sel(sample=sample)
        coords = {}
        for key, (along, labels) in array.coords.items():
            axis = key.removesuffix("_place")
            coords[axis if key.endswith("_place") and along == (axis,) else key] = (along, labels)
        array = replace(array, coords=coords)
        words = array.coords.get("text")
        if words is not None:  # padded to the largest number of words in the batch
            count = sum(label != "" for label in words[1])
            axis = array.axes.index("word")
            coords = {k: v for k, v in array.coords.items() if k != "text"}
            coords["word"] = (("word",), list(words[1][:count]))
            array = replace(array, values=array.values.take(range(count), axis), coords=coords)
        selected[name] = array
    return selected


def write(path: "str | PathLike[str]", arrays: Mapping[str, Captured]) -> None:
    """Write arrays to one safetensors file, with axes and labels in its metadata. The write is atomic."""
    from safetensors.numpy import save

    metadata = {
        name: {"axes": array.axes, "coords": dict(array.coords), "about": dict(array.about)}
        for name, array in arrays.items()
    }
    values = {name: np.ascontiguousarray(array.values) for name, array in arrays.items()}
    write_atomic(Path(path), save(values, {METADATA_KEY: json.dumps(metadata, ensure_ascii=False)}))


def load(path: "str | PathLike[str]") -> dict[str, Captured]:
    """Load the arrays of a file that `write` wrote. Raises `UserError` for any other file."""
    with open_arrays(path) as (file, arrays):
        return {name: replace(array, values=file.get_tensor(name)) for name, array in arrays.items()}


def is_complete(path: "str | PathLike[str]") -> bool:
    """Return whether a file that `write` wrote exists and is not truncated. Reads only its header."""
    try:
        with open_arrays(path):
            return True
    except ValueError:
        return False


@contextmanager
def open_arrays(path: "str | PathLike[str]") -> Iterator[tuple[Any, dict[str, Captured]]]:
    """Open a file and yield it with its arrays, whose values are NaN until `file.get_tensor(name)` reads them.

    The NaN are broadcast from one value and take no memory. Raises `UserError` like `load`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            metadata = json.loads((file.metadata() or {})[METADATA_KEY])
            arrays = {}
            for name, stored in metadata.items():
                empty = np.broadcast_to(np.float32(np.nan), file.get_slice(name).get_shape())
                coords = {key: (tuple(along), labels) for key, (along, labels) in stored["coords"].items()}
                arrays[name] = Captured(empty, tuple(stored["axes"]), coords, stored["about"])
            yield file, arrays
    except FileNotFoundError:
        raise UserError(f"{path}: file not found") from None
    except (SafetensorError, KeyError, OSError) as error:
        raise UserError(f"{path}: not a file of captured arrays, or damaged ({error})") from None
