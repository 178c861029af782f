"""What was captured: arrays with named axes, in memory and in safetensors files."""

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
"""Labels: name → (the axes they lie along, their values). A name that is an axis' own labels that axis."""


@dataclass(frozen=True, eq=False)
class Captured:
    """An array with named axes, labels along them, and in `about` what it is: request, unit.

    Axes come in this order: sample, step, block, head (those not averaged), then the request's own.
    """

    values: np.ndarray
    axes: tuple[str, ...]
    coords: Coords
    about: Mapping[str, Any]

    def sel(self, **labels: Any) -> "Captured":
        """The part with these labels, `sel(block=3, word="cat")`; the axes named are gone. `UserError` otherwise."""
        found = self
        for axis, label in labels.items():
            known = found.labels(axis)
            if label not in known:
                listed = ", ".join(map(str, known[:8])) + (" …" if len(known) > 8 else "")
                raise UserError(f"{axis}={label!r}: there is none, expected one of {listed}")
            found = found._at(axis, known.index(label))
        return found

    def mean(self, *axes: str) -> "Captured":
        """Averaged over these axes."""
        found = self
        for axis in axes:
            n = found._number(axis)
            found = replace(found._at(axis, 0), values=found.values.mean(n))
        return found

    def labels(self, axis: str) -> list:
        """Of one axis: its own, or 0, 1, 2, … where it has none."""
        n = self._number(axis)
        return list(self.coords[axis][1] if axis in self.coords else range(self.values.shape[n]))

    def _number(self, axis: str) -> int:
        if axis not in self.axes:
            raise UserError(f"{axis}: there is no such axis, expected one of {', '.join(self.axes)}")
        return self.axes.index(axis)

    def _at(self, axis: str, i: int) -> "Captured":
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
    """One sample of a batch's arrays. Labels that differ from sample to sample become its own."""
    found = {}
    for name, captured in arrays.items():
        one = captured.sel(sample=sample)
        own = {}  # a sample's places in the sequence label their axis, as they do where all samples have the same
        for key, (along, labels) in one.coords.items():
            moved = key.endswith("_place") and along == (key.removesuffix("_place"),)
            own[key.removesuffix("_place") if moved else key] = (along, labels)
        one = replace(one, coords=own)
        words = one.coords.get("text")
        if words is not None:  # as many as its own prompt has
            count = sum(label != "" for label in words[1])
            axis = one.axes.index("word")
            coords = {k: v for k, v in one.coords.items() if k != "text"}
            coords["word"] = (("word",), list(words[1][:count]))
            one = replace(one, values=one.values.take(range(count), axis), coords=coords)
        found[name] = one
    return found


def write(path: "str | PathLike[str]", arrays: Mapping[str, Captured]) -> None:
    """Write arrays as one safetensors file, names of axes and labels in its metadata; whole or not at all."""
    from safetensors.numpy import save

    described = {
        name: {"axes": one.axes, "coords": dict(one.coords), "about": dict(one.about)} for name, one in arrays.items()
    }
    values = {name: np.ascontiguousarray(one.values) for name, one in arrays.items()}
    write_atomic(Path(path), save(values, {METADATA_KEY: json.dumps(described, ensure_ascii=False)}))


def load(path: "str | PathLike[str]") -> dict[str, Captured]:
    """The arrays of a file that `write` wrote. `UserError` for any other file."""
    with opened(path) as (file, described):
        return {name: replace(one, values=file.get_tensor(name)) for name, one in described.items()}


def whole(path: "str | PathLike[str]") -> bool:
    """Whether a file that `write` wrote is there to its last byte: told by its header and its length."""
    try:
        with opened(path):
            return True
    except ValueError:
        return False


@contextmanager
def opened(path: "str | PathLike[str]") -> Iterator[tuple[Any, dict[str, Captured]]]:
    """The open file, and its arrays without their values (NaN that takes no memory). `UserError` as `load`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            described = json.loads((file.metadata() or {})[METADATA_KEY])
            found = {}
            for name, one in described.items():
                empty = np.broadcast_to(np.float32(np.nan), file.get_slice(name).get_shape())
                coords = {key: (tuple(along), labels) for key, (along, labels) in one["coords"].items()}
                found[name] = Captured(empty, tuple(one["axes"]), coords, one["about"])
            yield file, found
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (SafetensorError, KeyError, OSError) as error:
        raise UserError(f"{path}: holds no captured arrays, or is damaged ({error})") from None
