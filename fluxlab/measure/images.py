"""Metrics of images: against a baseline (`compare`), alone (`describe`), and of what they show (`oracle_columns`,
`oracle_compare`, and both of many images with one baseline: `oracle_beside`).

Images are uint8 (H, W, 3), RGB, of at least 8 px a side. Metrics are floats, nan where there is nothing to measure, and
the same on every call. For 1024 x 1024 px `compare` takes 1.3 s of a CPU core and `describe` 0.3 s; for 64 x 64 px both
take a few ms.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fluxlab.errors import UserError
from fluxlab.scenes import parse

if TYPE_CHECKING:
    from fluxlab.measure.oracle import FoundThing, Report


class Metric(NamedTuple):
    """What a column of numbers is. unit: "" for none. better: "higher", "lower" or "neutral". alone: it says something
    of one image by itself, so that the baseline has it too and differences to the baseline can be paired."""

    unit: str
    meaning: str
    better: str = "neutral"
    alone: bool = True


METRICS: dict[str, Metric] = {
    "psnr": Metric("dB", "peak signal-to-noise ratio to the baseline; inf for equal images", "neutral", False),
    "ssim": Metric("", "structural similarity to the baseline; 1 for equal images", "neutral", False),
    "rmse": Metric("0..255", "root mean square difference of pixel values to the baseline", "neutral", False),
    "colour_shift": Metric("ΔE00", "CIEDE2000 between the mean colour and the baseline's", "neutral", False),
    "displacement_row": Metric("px", "how far the picture as a whole lies below the baseline's", "neutral", False),
    "displacement_col": Metric("px", "how far it lies to the right of the baseline's", "neutral", False),
    "displacement": Metric("px", "the length of that displacement", "neutral", False),
    "sharpness": Metric("1/px", "mean gradient magnitude of the luma (0..1)"),
    "edge_energy": Metric("1/px²", "mean squared gradient magnitude of the luma (0..1)"),
    "spectrum_slope": Metric("", "slope of log power over log frequency; -2 or so for photographs, 0 for noise"),
    "sawtooth": Metric("tokens", "sideways steps of edges at token borders; 0 for smooth edges", "lower"),
    "object": Metric("", "as many things are there as the caption asks for", "higher"),
    "colour": Metric("", "the things have the colours asked for", "higher"),
    "shape": Metric("", "the things are the ones asked for", "higher"),
    "place": Metric("", "the thing is where it is asked to be", "higher"),
    "relation": Metric("", "the first thing is on the right side of the second", "higher"),
    "sign": Metric("", "there is a sign if and only if one is asked for", "higher"),
    "word": Metric("", "the sign says exactly the words asked for", "higher"),
    "letters": Metric("", "share of the sign's letters that are right", "higher"),
    "thing_row": Metric("px", "the thing's centroid, from the top"),
    "thing_col": Metric("px", "the thing's centroid, from the left"),
    "thing_size": Metric("px", "the longer side of the thing's box"),
    "thing_moved_row": Metric("px", "how far the thing lies below the baseline's thing", "neutral", False),
    "thing_moved_col": Metric("px", "how far the thing lies to the right of the baseline's thing", "neutral", False),
    "thing_moved": Metric("px", "the distance between the two", "neutral", False),
    "clip_image": Metric("cosine", "similarity to the baseline, of CLIP's image embeddings", "neutral", False),
    "clip_text": Metric("cosine", "similarity to the prompt, of CLIP's embeddings", "higher"),
    "dino_image": Metric("cosine", "similarity to the baseline, of DINO's image embeddings", "neutral", False),
}
"""Every metric: its unit, its meaning in a line, and which way is better."""

MIN_SIDE = 8  # px; SSIM looks through windows of 7
MIN_AGREEMENT = 0.5  # correlation of two pictures laid over each other, below which they have nothing in common
SCENE_SIDE = 256  # px; the oracle knows scenes of 48 ... 80 px, which a grid of twice the tokens may double
_ORACLE = ("object", "colour", "shape", "place", "relation", "sign", "word")


def compare(image: np.ndarray, baseline: np.ndarray) -> dict[str, float]:
    """An image against the baseline of the same prompt and seed: the columns psnr ... displacement of `METRICS`.

    ssim is the mean over the channels with windows of 7 px (Wang et al. 2004). colour_shift compares the mean colours
    in CIELAB and so ignores where things are. displacement is the translation that phase correlation finds, to 0.1 px,
    or none where the pictures agree better unmoved. It is nan for pictures that have nothing in common: laid over each
    other either way, their lumas correlate by less than `MIN_AGREEMENT`, or one has no contrast and they are not equal.
    Raises UserError for images of another kind and for two of different sizes.
    """
    from skimage.color import deltaE_ciede2000, rgb2lab
    from skimage.metrics import mean_squared_error, structural_similarity

    image, baseline = _pixels(image, "image"), _pixels(baseline, "baseline")
    if image.shape != baseline.shape:
        raise UserError(f"image: {_size(image)} against a baseline of {_size(baseline)}; only equal sizes compare")
    mse = float(mean_squared_error(image, baseline))
    mean_colours = [rgb2lab(x / 255).mean((0, 1)) for x in (image, baseline)]  # fp64
    row, col = _displacement(image, baseline)
    return {
        "psnr": float(10 * np.log10(255**2 / mse)) if mse else np.inf,
        "ssim": float(structural_similarity(image, baseline, win_size=7, channel_axis=2, data_range=255)),
        "rmse": mse**0.5,
        "colour_shift": float(deltaE_ciede2000(*mean_colours)),
        "displacement_row": row,
        "displacement_col": col,
        "displacement": float(np.hypot(row, col)),
    }


def describe(image: np.ndarray, period: int) -> dict[str, float]:
    """An image by itself: sharpness, edge_energy, spectrum_slope and sawtooth. period: pixels per token, at least 2.

    With the luma Y in 0 ... 1 and its differences d to the next pixel down and to the right, sharpness is the mean of
    |d| and edge_energy the mean of |d|²: blur leaves the first of a lone edge as it is and lowers the second.
    spectrum_slope is fitted to the power spectrum of Y under a Hann window, averaged over rings of equal frequency up
    to 0.5 cycles/px; nan without contrast. `sawtooth` says what the last one is.
    Raises UserError for an image of another kind and another period.
    """
    from skimage.color import rgb2gray

    luma = rgb2gray(_pixels(image, "image"))
    squared = np.diff(luma, axis=0)[:, :-1] ** 2 + np.diff(luma, axis=1)[:-1] ** 2
    return {
        "sharpness": float(np.sqrt(squared).mean()),
        "edge_energy": float(squared.mean()),
        "spectrum_slope": _spectrum_slope(luma),
        "sawtooth": sawtooth(luma, period),
    }


def sawtooth(luma: np.ndarray, period: int) -> float:
    """How far edges step sideways at the borders of tokens, more than elsewhere, in tokens. luma: (H, W) in 0 ... 1.

    With Y smoothed along the rows by a triangle of ±period px, an edge moves by -(∂Y/∂row) / (∂Y/∂col) px from a row to
    the next. That displacement less its mean over the token around it, weighted by the squared slope ∂Y/∂col, is z(k)
    for the k-th step of a token; the index is Σ z(k) cos 2π(k + 1)/period / period, likewise for columns, and both
    averaged by the weight of their edges. Straight and round edges have 0, whatever their angle; an edge moved by ±a px
    in alternate rows of tokens has about 2a/period. Steps of more than half a token count as another edge. One picture
    of few edges scatters around 0 by a few hundredths: quote it beside the baseline's. An image without edges has 0,
    one with a side below 2 period + 3 px nan.
    """
    if period != int(period) or period < 2:
        raise UserError(f"period={period!r}: expected the pixels per token, a whole number of at least 2")
    if min(luma.shape) < 2 * period + 3:
        return np.nan
    found = [_steps(lines, int(period)) for lines in (luma, luma.T)]
    weight = sum(w for _, w in found)
    return float(sum(index * w for index, w in found) / weight) if weight > 0 else 0.0


def oracle_columns(image: np.ndarray, caption: str) -> dict[str, float]:
    """What a scene shows against its caption: object ... word as 1 or 0, nan where the caption does not say; letters;
    and thing_row, thing_col, thing_size of the first thing, nan without one.

    Every column is nan for a caption that is no scene's (`fluxlab.scenes.parse`) and for an image with a side above
    `SCENE_SIDE` px.
    """
    return _verdicts(_inspect(image, caption))


def oracle_compare(image: np.ndarray, baseline: np.ndarray, caption: str) -> dict[str, float]:
    """How far the first thing lies from the baseline's: thing_moved_row, thing_moved_col and thing_moved, in px; nan
    where either has none, and where `oracle_columns` is."""
    return _moved(*(_first_thing(_inspect(x, caption)) for x in (image, baseline)))


def oracle_beside(baseline: np.ndarray, caption: str) -> Callable[[np.ndarray], dict[str, float]]:
    """A function of an image: its `oracle_columns` and its `oracle_compare` with this baseline, which is inspected once
    and not again for each image. Raises as they do."""
    before = _first_thing(_inspect(baseline, caption))

    def columns(image: np.ndarray) -> dict[str, float]:
        report = _inspect(image, caption)
        return _verdicts(report) | _moved(_first_thing(report), before)

    return columns


def _verdicts(report: "Report | None") -> dict[str, float]:
    thing = _first_thing(report)
    columns = {name: getattr(report, name, None) for name in _ORACLE}
    columns["letters"] = getattr(report, "letter_accuracy", None)
    columns |= {f"thing_{name}": getattr(thing, name, None) for name in ("row", "col", "size")}
    return {name: np.nan if value is None else float(value) for name, value in columns.items()}


def _moved(there: "FoundThing | None", before: "FoundThing | None") -> dict[str, float]:
    row, col = (there.row - before.row, there.col - before.col) if there and before else (np.nan, np.nan)
    return {"thing_moved_row": row, "thing_moved_col": col, "thing_moved": float(np.hypot(row, col))}


def _inspect(image: np.ndarray, caption: str) -> "Report | None":
    from fluxlab.measure.oracle import inspect

    image = _pixels(image, "image")
    if max(image.shape) > SCENE_SIDE:
        return None
    try:
        wanted = parse(caption)
    except UserError:  # a prompt of the user's own
        return None
    return inspect(image, wanted)


def _first_thing(report: "Report | None") -> "FoundThing | None":
    return report.things[0] if report and report.things else None


def _pixels(image: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or min(array.shape[:2]) < MIN_SIDE:
        raise UserError(
            f"{name}: {array.dtype} {array.shape}, expected uint8 (height, width, 3) of {MIN_SIDE} px or more a side"
        )
    return array


def _size(image: np.ndarray) -> str:
    return f"{image.shape[0]} x {image.shape[1]} px"


def _displacement(image: np.ndarray, baseline: np.ndarray) -> tuple[float, float]:
    from skimage.color import rgb2gray
    from skimage.registration import phase_cross_correlation

    if np.array_equal(image, baseline):
        return 0.0, 0.0
    here, there = rgb2gray(image), rgb2gray(baseline)
    if not (np.ptp(here) and np.ptp(there)):
        return np.nan, np.nan
    window = _window(here.shape)  # else the frame, which does not move, outweighs a soft picture
    found = phase_cross_correlation(
        (here - here.mean()) * window, (there - there.mean()) * window, upsample_factor=10, normalization="phase"
    )[0]
    whole = np.rint(found).astype(int)
    moved, unmoved = _agreement(here, there, whole), _agreement(here, there, np.zeros(2, int))
    if max(moved, unmoved) < MIN_AGREEMENT:
        return np.nan, np.nan
    return (0.0, 0.0) if unmoved > moved else (float(found[0]), float(found[1]))


def _agreement(here: np.ndarray, there: np.ndarray, shift: np.ndarray) -> float:
    """Correlation of `here` with `there` moved by whole pixels, where they overlap."""
    (down, right), (height, width) = shift, here.shape
    a = here[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]
    b = there[max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)]
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm > 0 else 0.0


def _window(shape: tuple[int, int]) -> np.ndarray:
    """A Hann window over an image that is nowhere 0."""
    rows, cols = (np.hanning(n + 2)[1:-1] for n in shape)
    return np.outer(rows, cols)


def _spectrum_slope(luma: np.ndarray) -> float:
    if not np.ptp(luma):
        return np.nan
    window = _window(luma.shape)
    power = np.abs(np.fft.fft2((luma - np.average(luma, weights=window)) * window)) ** 2
    radius = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, luma.shape), indexing="ij"))
    side = min(luma.shape)
    ring = np.rint(radius * side).astype(int).ravel()
    inside = slice(2, side // 2 + 1)  # the first ring is what the window makes of the mean
    count, power, radius = (np.bincount(ring, x)[inside] for x in (np.ones(ring.size), power.ravel(), radius.ravel()))
    return float(np.polyfit(np.log(radius / count), np.log(power / count), 1)[0])


def _steps(luma: np.ndarray, period: int) -> tuple[float, float]:
    """The index of `sawtooth` for steps from row to row, and the weight of the edges that it was measured on."""
    from scipy.ndimage import convolve1d, uniform_filter1d

    triangle = np.bartlett(2 * period + 1)[1:-1]
    smooth = convolve1d(luma, triangle / triangle.sum(), axis=1)[:, period - 1 : -period + 1]
    slope = (smooth[:, 2:] - smooth[:, :-2]) / 2
    above, below = slope[:-1], slope[1:]
    down = np.diff(smooth[:, 1:-1], axis=0)
    both = (above + below) / 2
    weight = np.where(above * below > 0, np.minimum(np.abs(above), np.abs(below)), 0) ** 2  # the edge is in both rows
    weight[np.abs(down) > period / 2 * np.abs(both)] = 0
    step = np.divide(-down, both, out=np.zeros_like(both), where=weight > 0)
    around = period + 1 - period % 2  # a token, and an odd number of rows
    mass, moment = (uniform_filter1d(x, around, axis=0, mode="constant") for x in (weight, weight * step))
    trend = np.divide(moment, mass, out=np.zeros_like(mass), where=mass > 0)
    place = np.arange(len(weight)) % period
    total = np.bincount(place, weight.sum(1), period)
    if total.min() <= 1e-9 * total.max():
        return 0.0, float(total.sum())
    excess = np.bincount(place, (np.abs(step - trend) * weight).sum(1), period) / total
    return float(excess @ np.cos(2 * np.pi * (np.arange(period) + 1) / period) / period), float(total.sum())
