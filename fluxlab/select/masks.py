"""Masks of the image: read from text, arrays, image files or the packed form, and written back.

In canonical form a mask is a list of rows of equal length, `#` selected and `.` not. Rules for image files are in
docs/programs.md, "Masks from image files".
"""

import base64
import binascii
import hashlib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxlab.errors import UserError, unknown_key, wrong
from fluxlab.images import open_image
from fluxlab.select.arguments import integer, is_list, plain

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

LARGEST_ROWS = 256 * 256
"""Pixels of the largest mask that a config writes as rows. A larger one is packed."""

LARGEST = 4096 * 4096
"""Pixels of the largest mask that is read."""

ACCEPTED = "rows of equal length of '#' and '.', or of 0 and 1, or an image file"


def parse_mask(value: Any, path: str) -> list[str]:
    """Return the rows of a mask given as such rows, as 0s and 1s, as an image file or in packed form."""
    if isinstance(value, str):
        return _to_rows(_read_image(value, path))
    if isinstance(value, Mapping):
        return _to_rows(_unpack(value, path))
    value = plain(value)
    if not is_list(value) or not value:
        raise wrong(path, value, ACCEPTED)
    rows = [_row(row, f"{path}[{i}]") for i, row in enumerate(value)]
    if len({len(row) for row in rows}) != 1:
        raise wrong(path, rows, ACCEPTED)
    _check_size(len(rows), len(rows[0]), path)
    return rows


def read_mask(value: Any, path: str) -> "np.ndarray":
    """Return a mask as a boolean array `(rows, cols)`: a PIL image, or what `parse_mask` reads."""
    from PIL import Image

    if isinstance(value, Image.Image):
        _check_size(value.height, value.width, path)
        return _selected(value, path)
    return to_array(parse_mask(value, path))


def _row(row: Any, path: str) -> str:
    if isinstance(row, str):
        if not row or set(row) - {"#", "."}:
            raise wrong(path, row, ACCEPTED)
        return row
    marks = row if is_list(row) else [row]
    if not marks or any(mark not in ("#", ".", 0, 1) for mark in marks):
        raise wrong(path, row, ACCEPTED)
    return "".join("#" if mark in ("#", 1) else "." for mark in marks)


def _check_size(rows: int, cols: int, path: str) -> None:
    if rows < 1 or cols < 1 or rows * cols > LARGEST:
        raise UserError(f"{path}: {rows} × {cols}, expected a mask of at most 4096 × 4096 pixels")


def to_array(rows: list[str]) -> "np.ndarray":
    """Return a canonical mask as a boolean array `(rows, cols)`."""
    import numpy as np

    marks = np.frombuffer("".join(rows).encode("ascii"), np.uint8)
    return (marks == ord("#")).reshape(len(rows), len(rows[0]))


def _to_rows(selected: "np.ndarray") -> list[str]:
    import numpy as np

    marks = np.where(selected, np.uint8(ord("#")), np.uint8(ord(".")))
    return [row.tobytes().decode("ascii") for row in marks]


def compact(value: Any, digests: bool = False) -> Any:
    """Return a config, or a part of one, in which the masks of more than `LARGEST_ROWS` pixels are packed.

    With `digests`, they are replaced by their size and SHA-256. Such a config identifies the mask but cannot be read
    back.
    """
    if isinstance(value, Mapping):
        return {
            key: _pack(part, digests) if key == "mask" and _is_large(part) else compact(part, digests)
            for key, part in value.items()
        }
    return [compact(part, digests) for part in value] if isinstance(value, list) else value


def _is_large(mask: Any) -> bool:
    if isinstance(mask, Mapping):
        return "packed" in mask
    rows = isinstance(mask, list) and bool(mask) and all(isinstance(row, str) for row in mask)
    return rows and len(mask) * len(mask[0]) > LARGEST_ROWS


def _pack(mask: "list[str] | Mapping", digest: bool) -> dict[str, Any]:
    import numpy as np

    if isinstance(mask, Mapping) and not digest:
        return dict(mask)
    selected = _unpack(mask, "mask") if isinstance(mask, Mapping) else to_array(mask)
    size, bits = list(selected.shape), np.packbits(selected).tobytes()
    if digest:
        return {"size": size, "sha256": hashlib.sha256(bits).hexdigest()}
    return {"size": size, "packed": base64.b64encode(zlib.compress(bits, 9)).decode("ascii")}


def _unpack(value: Mapping, path: str) -> "np.ndarray":
    import numpy as np

    for key in value:
        if key not in ("size", "packed", "sha256"):
            raise unknown_key(path, key, value[key], ("size", "packed"), "key of a packed mask")
    if "sha256" in value and "packed" not in value:
        raise UserError(
            f"{path}: this config holds the digest of a mask only; the run's experiment.yaml holds the mask itself"
        )
    size, packed = value.get("size"), value.get("packed")
    if not is_list(size) or len(size) != 2 or not isinstance(packed, str):
        raise wrong(path, dict(value), f"{ACCEPTED}, or {{size: [rows, cols], packed: …}} as a config writes it")
    rows, cols = (integer(n, f"{path}.size[{i}]") for i, n in enumerate(size))
    _check_size(rows, cols, path)
    need = -(-rows * cols // 8)
    try:
        unpacker = zlib.decompressobj()
        bits = unpacker.decompress(base64.b64decode(packed, validate=True), need + 1)
    except (binascii.Error, zlib.error, ValueError):
        raise UserError(f"{path}.packed: damaged, expected the text that a config writes for a mask") from None
    if len(bits) != need:
        raise UserError(f"{path}.packed: damaged, expected {need} bytes for a mask of {rows} × {cols}")
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=rows * cols).reshape(rows, cols).astype(bool)


REMEDY = "expected a mask: white on black, or painted on a transparent background"


def _read_image(file: str, path: str) -> "np.ndarray":
    """Return which pixels of an image file are selected.

    If a part is transparent, it is not selected. Of the rest the white part is selected, or all of it if it is not
    black and white. Without transparency, white is selected and black is not. Raises UserError for any other image.
    """
    from PIL import ImageOps

    try:
        image = ImageOps.exif_transpose(open_image(Path(file).expanduser(), mode=None))
    except UserError as error:
        raise UserError(f"{path}: {error}, expected an image file or rows of '#' and '.'") from None
    except (RuntimeError, ValueError, OSError, SyntaxError) as error:
        raise UserError(f"{path}: {file!r}, expected an image file ({error})") from None
    _check_size(image.height, image.width, path)
    return _selected(image, f"{path}: {file}")


def _selected(image: "Image", name: str) -> "np.ndarray":
    import numpy as np

    brightness, full, colours, alpha = _channels(image, name)
    visible = _visible(alpha, name)
    values = np.unique(brightness if visible is None else brightness[visible])
    inside = slice(None) if visible is None else visible
    coloured = colours is not None and (colours[inside] > full // 5).mean() > 0.02
    if visible is not None and (coloured or len(values) < 2 or values[-1] < full / 4):
        return visible  # painted in one colour, or a cut-out: the transparency is the mask
    if coloured:
        raise UserError(f"{name} has colours and no transparent part, {REMEDY}")
    if len(values) == 2:
        bright = brightness == values[1]
    elif len(values) == 1:
        bright = np.full(brightness.shape, bool(values[0] >= full / 2))
    else:
        gray = brightness[inside]
        unclear = ((gray > full / 4) & (gray < full * 3 / 4)).mean()
        if unclear > 0.25 or values[-1] < full / 4:
            if visible is not None:
                return visible
            level = f"{unclear:.0%} of it is gray" if unclear > 0.25 else "it is dark everywhere"
            raise UserError(f"{name} is not black and white ({level}), {REMEDY}")
        bright = brightness >= full / 2
    return bright if visible is None else bright & visible


def _visible(alpha: "np.ndarray | None", name: str) -> "np.ndarray | None":
    """Return which pixels are not transparent, or None for an image without transparency."""
    import numpy as np

    if alpha is None or not alpha.any():
        if alpha is not None:
            raise UserError(f"{name} is transparent everywhere, {REMEDY}")
        return None
    top = float(alpha.max())
    if alpha.min() >= 0.9 * top:
        return None
    levels = np.unique(alpha)
    if len(levels) == 2:
        return alpha == levels[1]
    unclear = ((alpha > top / 4) & (alpha < top * 3 / 4)).mean()
    if unclear > 0.25 or alpha.min() > top / 4:
        raise UserError(f"{name}: half transparent over {unclear:.0%} of it, neither opaque nor transparent; {REMEDY}")
    return alpha >= top / 2


def _channels(image: "Image", name: str) -> "tuple[np.ndarray, float, np.ndarray | None, np.ndarray | None]":
    """Return brightness `(H, W)`, its largest possible value, how coloured each pixel is, and its opacity."""
    import numpy as np

    transparent = image.has_transparency_data
    if image.mode.startswith("I") or image.mode == "F":  # one channel of more than 8 bits
        values, key = np.asarray(image), image.info.get("transparency")
        if not np.isfinite(values).all() or values.min() < 0:
            raise UserError(f"{name} has negative or infinite values, {REMEDY}")
        full = 65535 if image.mode.startswith("I;16") else max(float(values.max()), 1e-30)
        return values, full, None, None if key is None else (values != key).astype(np.uint8)
    try:
        if image.mode in ("La", "RGBa"):
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        pixels = np.asarray(image.convert("RGBA" if transparent else "RGB"))
    except ValueError as error:
        raise UserError(f"{name}: colours of kind {image.mode} cannot be read ({error}), {REMEDY}") from None
    colour = pixels[..., :3]
    high = colour.max(-1)
    return high, 255, high - colour.min(-1), pixels[..., 3] if transparent else None
