"""Every metric, one function each, in the order of the columns of `metrics.csv`.

Images are uint8 (H, W, 3), RGB. Metrics are floats, nan if there is nothing to measure, and the same on every call.
For 1024 x 1024 px all metrics without a model take about 1.6 s of a CPU core, for 64 x 64 px a few ms.
"""

import numpy as np

from fluxlab.measure import images
from fluxlab.measure.registry import Sample, metric

NOTHING_IN_COMMON = "nothing in common with the baseline"
NO_OBJECT = "no object found"
NOT_ASKED = "not in the prompt"

# ---- compared with the baseline of the same prompt and seed


@metric("PSNR to the baseline", "dB", shown=1, pooled="squared error")
def psnr(image: Sample, baseline: Sample) -> float:
    """Peak signal-to-noise ratio to the baseline; inf for equal images."""
    mse = images.squared_error(image, baseline)
    return float(10 * np.log10(255**2 / mse)) if mse else np.inf


@metric("SSIM to the baseline", share=True, shown=2)
def ssim(image: Sample, baseline: Sample) -> float:
    """Structural similarity to the baseline; 1 for equal images.

    The mean over the channels with windows of 7 px (Wang et al. 2004).
    """
    from skimage.metrics import structural_similarity

    return structural_similarity(image.pixels, baseline.pixels, win_size=7, channel_axis=2, data_range=255)


@metric("RMSE to the baseline", "0..255")
def rmse(image: Sample, baseline: Sample) -> float:
    """Root mean square difference of pixel values to the baseline."""
    return images.squared_error(image, baseline) ** 0.5


@metric("colour shift", "ΔE00", shown=8)
def colour_shift(image: Sample, baseline: Sample) -> float:
    """CIEDE2000 between the mean colour and the baseline's.

    The mean is taken in CIELAB, so the position of things has no influence.
    """
    from skimage.color import deltaE_ciede2000

    return deltaE_ciede2000(images.mean_colour(image), images.mean_colour(baseline))


@metric("displacement, downwards", "px", absent=NOTHING_IN_COMMON)
def displacement_row(image: Sample, baseline: Sample) -> float:
    """How far the image as a whole lies below the baseline."""
    return images.displacement(image, baseline)[0]


@metric("displacement, to the right", "px", absent=NOTHING_IN_COMMON)
def displacement_col(image: Sample, baseline: Sample) -> float:
    """How far the image as a whole lies to the right of the baseline."""
    return images.displacement(image, baseline)[1]


@metric("displacement", "px", shown=7, absent=NOTHING_IN_COMMON)
def displacement(image: Sample, baseline: Sample) -> float:
    """Length of the displacement of the image as a whole."""
    return np.hypot(*images.displacement(image, baseline))


# ---- of one image


@metric("sharpness", "1/px", shown=6)
def sharpness(image: Sample) -> float:
    """Mean gradient magnitude of the luma (0..1)."""
    return np.sqrt(images.squared_gradient(image.luma)).mean()


@metric("edge energy", "1/px²")
def edge_energy(image: Sample) -> float:
    """Mean squared gradient magnitude of the luma (0..1)."""
    return images.squared_gradient(image.luma).mean()


@metric("spectrum slope", absent="no contrast")
def spectrum_slope(image: Sample) -> float:
    """Slope of log power over log frequency; about -2 for photographs, 0 for noise."""
    return images.spectrum_slope(image.luma)


@metric("saw-tooth", "tokens", better="lower", shown=5, absent="too few tokens")
def sawtooth(image: Sample) -> float:
    """Sideways steps of edges at token borders; 0 for smooth edges."""
    return images.sawtooth(image.luma, image.pixels_per_token)


# ---- what the oracle reads, against the caption; nan if the caption does not say


def _verdict(image: Sample, name: str) -> float:
    value = getattr(image.scene, name, None)
    return np.nan if value is None else float(value)


def _of_thing(image: Sample, name: str) -> float:
    return float(getattr(image.thing, name, np.nan))


@metric("things as asked for", better="higher", share=True, needs="scenes", absent=NOT_ASKED)
def object(image: Sample) -> float:
    """The image has as many things as the caption asks for."""
    return _verdict(image, "object")


@metric("colours as asked for", better="higher", share=True, needs="scenes", absent=NOT_ASKED)
def colour(image: Sample) -> float:
    """The things have the colours that the caption asks for."""
    return _verdict(image, "colour")


@metric("shapes as asked for", better="higher", share=True, needs="scenes", absent=NOT_ASKED)
def shape(image: Sample) -> float:
    """The things are the ones that the caption asks for."""
    return _verdict(image, "shape")


@metric("position as asked for", better="higher", share=True, needs="scenes", absent=NOT_ASKED)
def place(image: Sample) -> float:
    """The thing is where the caption asks for it."""
    return _verdict(image, "place")


@metric("relation as asked for", better="higher", share=True, needs="scenes", absent=NOT_ASKED)
def relation(image: Sample) -> float:
    """The first thing is on the right side of the second."""
    return _verdict(image, "relation")


@metric("sign where asked for", better="higher", share=True, needs="scenes", absent=NOT_ASKED)
def sign(image: Sample) -> float:
    """There is a sign if and only if the caption asks for one."""
    return _verdict(image, "sign")


@metric("sign as asked for", better="higher", share=True, shown=3, needs="scenes", absent=NOT_ASKED)
def word(image: Sample) -> float:
    """The sign says exactly the words that the caption asks for."""
    return _verdict(image, "word")


@metric("letters right", better="higher", share=True, needs="scenes", absent=NOT_ASKED)
def letters(image: Sample) -> float:
    """Share of the sign's letters that are right."""
    return _verdict(image, "letter_accuracy")


@metric("thing, from the top", "px", needs="scenes", absent=NO_OBJECT)
def thing_row(image: Sample) -> float:
    """The thing's centroid, from the top."""
    return _of_thing(image, "row")


@metric("thing, from the left", "px", needs="scenes", absent=NO_OBJECT)
def thing_col(image: Sample) -> float:
    """The thing's centroid, from the left."""
    return _of_thing(image, "col")


@metric("size of the thing", "px", needs="scenes", absent=NO_OBJECT)
def thing_size(image: Sample) -> float:
    """Longer side of the thing's bounding box."""
    return _of_thing(image, "size")


@metric("thing moved downwards", "px", needs="scenes", absent=NO_OBJECT)
def thing_moved_row(image: Sample, baseline: Sample) -> float:
    """How far the thing lies below the baseline's thing."""
    return _of_thing(image, "row") - _of_thing(baseline, "row")


@metric("thing moved to the right", "px", needs="scenes", absent=NO_OBJECT)
def thing_moved_col(image: Sample, baseline: Sample) -> float:
    """How far the thing lies to the right of the baseline's thing."""
    return _of_thing(image, "col") - _of_thing(baseline, "col")


@metric("thing moved by", "px", shown=4, needs="scenes", absent=NO_OBJECT)
def thing_moved(image: Sample, baseline: Sample) -> float:
    """Distance between the thing and the baseline's thing."""
    return np.hypot(thing_moved_row(image, baseline), thing_moved_col(image, baseline))


# ---- with the given images of a task


def _psnr(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB, at most 100, so that means are finite."""
    error = ((found / 255 - expected / 255) ** 2).mean()
    return float(-10 * np.log10(max(1e-10, error)))


@metric("PSNR outside the mask", "dB", better="higher", shown=3, needs="mask")
def psnr_outside(image: Sample) -> float:
    """PSNR to the given image outside of the mask, at most 100."""
    outside = ~image.given("mask")
    return _psnr(image.pixels[outside], image.given("image")[outside])


@metric("step at the border of the mask", "0..1", better="lower", shown=6, needs="mask")
def seam(image: Sample) -> float:
    """Median difference of neighbouring pixels on both sides of the border of the mask.

    The median is that of the background, as long as things cross less than half of the border.
    """
    steps, mask = [], image.given("mask").astype(int)
    for axis in (0, 1):
        across = np.diff(mask, axis=axis) != 0
        steps.append(np.abs(np.diff(image.pixels / 255, axis=axis))[across].mean(-1))
    return float(np.median(np.concatenate(steps)))


@metric("PSNR to the target", "dB", better="higher", shown=3, needs="target")
def psnr_target(image: Sample) -> float:
    """PSNR to the target, at most 100."""
    return _psnr(image.pixels, image.given("target"))


@metric("SSIM to the target", share=True, better="higher", shown=6, needs="target")
def ssim_target(image: Sample) -> float:
    """Structural similarity to the target."""
    return ssim(image, Sample(image.given("target")))


# ---- by a similarity model


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum(-1)[0])


@metric("CLIP, to the baseline", "cosine", needs="clip")
def clip_image(image: Sample, baseline: Sample) -> float:
    """Similarity to the baseline by CLIP's image embeddings."""
    return _cosine(image.embeddings["clip"], baseline.embeddings["clip"])


@metric("CLIP, to the prompt", "cosine", better="higher", shown=9, needs="clip")
def clip_text(image: Sample) -> float:
    """Similarity to the prompt by CLIP's embeddings."""
    return _cosine(image.embeddings["clip"], image.prompt_embedding)


@metric("DINO, to the baseline", "cosine", needs="dino")
def dino_image(image: Sample, baseline: Sample) -> float:
    """Similarity to the baseline by DINO's image embeddings."""
    return _cosine(image.embeddings["dino"], baseline.embeddings["dino"])
