"""The things in scenes, as binary masks of any size in pixels.

A thing is a function of unit coordinates (x to the right, y down, both in -1 ... 1). Its mask is the mean of the
function over 4 x 4 points per pixel, thresholded at 0.5.
"""

from functools import lru_cache

import numpy as np

from fluxlab.errors import UserError

_SUBSAMPLES = 4


def _disc(x, y, cx, cy, rx, ry=None):
    return ((x - cx) / rx) ** 2 + ((y - cy) / (ry or rx)) ** 2 <= 1


def _polygon(x, y, points):
    inside = np.zeros(np.broadcast(x, y).shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
        if y0 != y1:
            inside ^= ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


def _box(x, y, left, top, right, bottom):
    return (x >= left) & (x <= right) & (y >= top) & (y <= bottom)


def _circle(x, y):
    return _disc(x, y, 0, 0, 1)


def _square(x, y):
    return _box(x, y, -0.92, -0.92, 0.92, 0.92)


def _triangle(x, y):
    return _polygon(x, y, [(0, -1), (1, 0.95), (-1, 0.95)])


def _ring(x, y):
    return _disc(x, y, 0, 0, 1) & ~_disc(x, y, 0, 0, 0.56)


def _star(x, y):
    angles = np.pi * np.arange(10) / 5
    radii = np.where(np.arange(10) % 2, 0.45, 1.08)
    return _polygon(x, y, list(zip(radii * np.sin(angles), 0.08 - radii * np.cos(angles), strict=True)))


def _cross(x, y):
    return _box(x, y, -0.34, -1, 0.34, 1) | _box(x, y, -1, -0.34, 1, 0.34)


def _heart(x, y):
    lobes = _disc(x, y, -0.5, -0.42, 0.52) | _disc(x, y, 0.5, -0.42, 0.52)
    return lobes | _polygon(x, y, [(-0.95, -0.18), (0, -0.5), (0.95, -0.18), (0, 1)])


def _cat(x, y):
    """A face seen from the front: round, with two ears and two eyes."""
    ears = _polygon(abs(x), y, [(0.95, -1), (0.2, -0.5), (0.9, 0.2)])
    eyes = _disc(x, y, -0.4, 0.08, 0.16, 0.2) | _disc(x, y, 0.4, 0.08, 0.16, 0.2)
    return (ears | _disc(x, y, 0, 0.22, 1, 0.76)) & ~eyes


def _fox(x, y):
    """Seen from the side, standing: a raised bushy tail on the left, two legs, a pointed snout on the right."""
    tail = _disc(x, y, -0.72, -0.42, 0.27, 0.5)
    tail |= _polygon(x, y, [(-0.98, -0.4), (-0.5, -0.4), (-0.25, 0.4), (-0.6, 0.3)])
    body = _box(x, y, -0.6, 0.02, 0.5, 0.5)
    legs = _box(x, y, -0.6, 0.4, -0.3, 1) | _box(x, y, 0.2, 0.4, 0.5, 1)
    head = _polygon(x, y, [(0.1, -0.98), (0.4, -0.55), (0.62, -0.55), (1, -0.1), (0.5, 0.2), (0.1, 0.1)])
    return (tail | body | legs | head) & ~_disc(x, y, 0.5, -0.3, 0.1)


def _bird(x, y):
    """Seen from the side: a head with a beak on the left, a round body, a raised tail on the right, two thin legs."""
    head = _disc(x, y, -0.35, -0.56, 0.44) | _polygon(x, y, [(-0.6, -0.72), (-1, -0.46), (-0.6, -0.32)])
    body = _disc(x, y, 0.05, 0.14, 0.68, 0.52) | _polygon(x, y, [(0.2, 0.2), (1, -0.45), (1, -0.05), (0.5, 0.5)])
    legs = _box(x, y, -0.22, 0.5, -0.04, 1) | _box(x, y, 0.22, 0.5, 0.4, 1)
    return (head | body | legs) & ~_disc(x, y, -0.42, -0.62, 0.11)


_SHAPES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "ring": _ring,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
    "cat": _cat,
    "fox": _fox,
    "bird": _bird,
}
THINGS = tuple(_SHAPES)


@lru_cache(maxsize=4096)
def thing_mask(name: str, size: int) -> np.ndarray:
    """Return the silhouette of a thing in a box of `size` pixels: bool (size, size), read-only.

    Raises `UserError` for an unknown name and for size < 4.
    """
    if name not in _SHAPES:
        raise UserError(f"name={name!r}: expected one of {', '.join(THINGS)}")
    if size < 4:
        raise UserError(f"size={size!r}: expected at least 4 pixels")
    points = (np.arange(size * _SUBSAMPLES) + 0.5) / (size * _SUBSAMPLES) * 2 - 1
    fine = _SHAPES[name](points[None, :], points[:, None])
    mask = fine.reshape(size, _SUBSAMPLES, size, _SUBSAMPLES).mean(axis=(1, 3)) >= 0.5
    mask.setflags(write=False)
    return mask
