"""Computations on images that metrics are made of: errors, displacement, gradients, spectra, saw-teeth.

The metrics are in `metrics`. `compare`, `describe`, `oracle_columns` and `oracle_compare` compute groups of them for
plain arrays.
"""

from functools import lru_cache

import numpy as np

from fluxlab.errors import UserError
from fluxlab.measure.registry import METRICS, Sample, check_pair, check_pixels, evaluate

MIN_AGREEMENT = 0.5
"""Correlation of two images laid on top of each other below which they have nothing in common."""


def compare(image: np.ndarray, baseline: np.ndarray) -> dict[str, float]:
    """Return the metrics of an image against the baseline of the same prompt and seed: psnr ... displacement.

    Raises UserError for images that are not uint8 (H, W, 3), and for two of different sizes.
    """
    check_pair(image, baseline)
    return _group(Sample(image), Sample(baseline), alone=False, needs="")


def describe(image: np.ndarray, period: int) -> dict[str, float]:
    """Return the metrics of one image: sharpness, edge_energy, spectrum_slope and sawtooth.

    period: pixels per token, at least 2. Raises UserError for other periods and for images that are not uint8 (H, W,
    3).
    """
    return _group(Sample(check_pixels(image, "image"), pixels_per_token=period), None, alone=True, needs="")


def oracle_columns(image: np.ndarray, caption: str) -> dict[str, float]:
    """Return what the oracle reads in an image, against its caption: object ... word as 1 or 0, letters, thing_*.

    Values are nan where the caption does not say, and all of them for a caption outside the grammar
    (`fluxlab.scenes.parse`) and for an image with a side above `SCENE_SIDE` px.
    """
    return _group(Sample(check_pixels(image, "image"), caption), None, alone=True, needs="scenes")


def oracle_compare(image: np.ndarray, baseline: np.ndarray, caption: str) -> dict[str, float]:
    """Return how far the first thing lies from the baseline's: thing_moved_row, thing_moved_col and thing_moved, in px.

    Values are nan if either image has no thing, and where those of `oracle_columns` are.
    """
    check_pair(image, baseline)
    return _group(Sample(image, caption), Sample(baseline, caption), alone=False, needs="scenes")


def _group(image: Sample, baseline: Sample | None, alone: bool, needs: str) -> dict[str, float]:
    names = [name for name, entry in METRICS.items() if entry.alone == alone and entry.needs == needs]
    return {name: evaluate(name, image, baseline) for name in names}


@lru_cache(maxsize=1)  # shared by psnr and rmse
def squared_error(image: Sample, baseline: Sample) -> float:
    """Return the mean squared difference of pixel values in 0 ... 255.

    The formula of `skimage.metrics.mean_squared_error`, whose module imports scipy.stats, which takes half a second.
    """
    difference = image.pixels.astype(np.float64) - baseline.pixels.astype(np.float64)
    return float(np.mean(difference**2))


def mean_colour(image: Sample) -> np.ndarray:
    """Return the mean colour of an image in CIELAB."""
    from skimage.color import rgb2lab

    return rgb2lab(image.pixels / 255).mean((0, 1))  # fp64: its last bits do not depend on the processor


@lru_cache(maxsize=1)  # shared by the three metrics of displacement
def displacement(image: Sample, baseline: Sample) -> tuple[float, float]:
    """Return how far an image lies below and to the right of the baseline, in px to 0.1 px.

    The translation that phase correlation finds, or 0 if the images agree better unmoved. nan for images that have
    nothing in common: on top of each other either way, their lumas correlate by less than `MIN_AGREEMENT`, or one has
    no contrast and they are not equal.
    """
    from skimage.registration import phase_cross_correlation

    if np.array_equal(image.pixels, baseline.pixels):
        return 0.0, 0.0
    a, b = image.luma, baseline.luma
    if not (np.ptp(a) and np.ptp(b)):
        return np.nan, np.nan
    window = _window(a.shape)  # without it the frame, which does not move, outweighs a soft image
    shift = phase_cross_correlation(
        (a - a.mean()) * window, (b - b.mean()) * window, upsample_factor=10, normalization="phase"
    )[0]
    moved, unmoved = _agreement(a, b, np.rint(shift).astype(int)), _agreement(a, b, np.zeros(2, int))
    if max(moved, unmoved) < MIN_AGREEMENT:
        return np.nan, np.nan
    return (0.0, 0.0) if unmoved > moved else (float(shift[0]), float(shift[1]))


def squared_gradient(luma: np.ndarray) -> np.ndarray:
    """Return the squared gradient magnitude |d|² (H - 1, W - 1) of the luma, from differences to the next pixel.

    The mean of |d| is the same for a lone edge and its blurred copy; the mean of |d|² is lower for the blurred one.
    """
    return np.diff(luma, axis=0)[:, :-1] ** 2 + np.diff(luma, axis=1)[:-1] ** 2


def spectrum_slope(luma: np.ndarray) -> float:
    """Return the slope of log power over log frequency; nan without contrast.

    Fitted to the power spectrum under a Hann window, averaged over rings of equal frequency up to 0.5 cycles/px.
    """
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


def sawtooth(luma: np.ndarray, period: int) -> float:
    """Return how far edges step sideways at token borders, more than elsewhere, in tokens.

    luma: (H, W) in 0 ... 1. period: pixels per token, at least 2.

    The luma Y is smoothed along the rows by a triangle of ±period px. From one row to the next an edge then moves by
    -(∂Y/∂row) / (∂Y/∂col) px. z(k) is this displacement at the k-th step of a token, minus its mean over the token
    around it, weighted by the squared slope ∂Y/∂col. The index is Σ z(k) cos 2π(k + 1)/period / period. It is computed
    for rows and for columns, and averaged with the weights of their edges.

    Straight and round edges have 0 at any angle. An edge moved by ±a px in alternate rows of tokens has about
    2a/period. Steps of more than half a token count as another edge. One image with few edges scatters around 0 by a
    few hundredths: compare it with the baseline's value. An image without edges has 0, one with a side below
    2 period + 3 px nan. Raises UserError for a period that is not a whole number of at least 2.
    """
    if period != int(period) or period < 2:
        raise UserError(f"period={period!r}: expected the pixels per token, a whole number of at least 2")
    if min(luma.shape) < 2 * period + 3:
        return np.nan
    both = [_steps(lines, int(period)) for lines in (luma, luma.T)]
    weight = sum(w for _, w in both)
    return float(sum(index * w for index, w in both) / weight) if weight > 0 else 0.0


def _agreement(image: np.ndarray, baseline: np.ndarray, shift: np.ndarray) -> float:
    """Return the correlation of two lumas where they overlap, the baseline moved by whole pixels."""
    (down, right), (height, width) = shift, image.shape
    a = image[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]
    b = baseline[max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)]
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm > 0 else 0.0


def _window(shape: tuple[int, int]) -> np.ndarray:
    """Return a Hann window of an image's shape that is 0 nowhere."""
    rows, cols = (np.hanning(n + 2)[1:-1] for n in shape)
    return np.outer(rows, cols)


def _steps(luma: np.ndarray, period: int) -> tuple[float, float]:
    """Return the index of `sawtooth` for steps from row to row, and the weight of the edges it was measured on."""
    from scipy.ndimage import convolve1d, uniform_filter1d

    triangle = np.bartlett(2 * period + 1)[1:-1]
    smooth = convolve1d(luma, triangle / triangle.sum(), axis=1)[:, period - 1 : -period + 1]
    slope = (smooth[:, 2:] - smooth[:, :-2]) / 2
    above, below = slope[:-1], slope[1:]
    down = np.diff(smooth[:, 1:-1], axis=0)
    both = (above + below) / 2
    weight = np.where(above * below > 0, np.minimum(np.abs(above), np.abs(below)), 0) ** 2  # edges that both rows have
    weight[np.abs(down) > period / 2 * np.abs(both)] = 0
    step = np.divide(-down, both, out=np.zeros_like(both), where=weight > 0)
    window = period + 1 - period % 2  # one token, rounded up to an odd number of rows
    mass, moment = (uniform_filter1d(x, window, axis=0, mode="constant") for x in (weight, weight * step))
    trend = np.divide(moment, mass, out=np.zeros_like(mass), where=mass > 0)
    phase = np.arange(len(weight)) % period
    total = np.bincount(phase, weight.sum(1), period)
    if total.min() <= 1e-9 * total.max():
        return 0.0, float(total.sum())
    excess = np.bincount(phase, (np.abs(step - trend) * weight).sum(1), period) / total
    return float(excess @ np.cos(2 * np.pi * (np.arange(period) + 1) / period) / period), float(total.sum())
