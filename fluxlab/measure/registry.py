"""The registry of metrics: `@metric` adds one, `METRICS` lists them, `evaluate` computes them."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fluxlab.errors import UserError
from fluxlab.scenes import parse

if TYPE_CHECKING:
    from fluxlab.measure.oracle import FoundThing, Report
    from fluxlab.measure.similarity import Similarity

MIN_SIDE = 8
"""Smallest side of an image in px. SSIM uses windows of 7 px."""

SCENE_SIDE = 256
"""Largest side in px that the oracle reads. Scenes have 48 to 80 px; a grid with twice the tokens doubles that."""

BETTER = ("higher", "lower", "neutral")
NEEDS = ("", "scenes", "clip", "dino", "mask", "target")


@dataclass(frozen=True, eq=False)
class Sample:
    """An image as metrics see it. What several metrics share is computed once.

    pixels: uint8 (H, W, 3). pixels_per_token: side of a token in px. models: the similarity models of the run by kind,
    "clip" and "dino". given: of a run with tasks, the function that returns the "image", "mask" or "target" of its
    prompt, each an array or None.
    """

    pixels: np.ndarray
    prompt: str = ""
    pixels_per_token: int = 0
    models: Mapping[str, "Similarity"] = field(default_factory=dict)
    given: Callable[[str], np.ndarray | None] | None = None

    @cached_property
    def luma(self) -> np.ndarray:
        """Luma (H, W) in 0 ... 1."""
        from skimage.color import rgb2gray

        return rgb2gray(self.pixels)

    @cached_property
    def scene(self) -> "Report | None":
        """The oracle's report; None if the prompt is not a scene's caption or a side is above `SCENE_SIDE`."""
        from fluxlab.measure import oracle

        if max(self.pixels.shape) > SCENE_SIDE:
            return None
        try:
            wanted = parse(self.prompt)
        except UserError:  # the prompt is outside the grammar of captions
            return None
        return oracle.inspect(self.pixels, wanted)

    @property
    def thing(self) -> "FoundThing | None":
        """The first thing that the oracle finds."""
        return self.scene.things[0] if self.scene and self.scene.things else None

    @cached_property
    def embeddings(self) -> dict[str, np.ndarray]:
        """The unit vector (1, d) of the image by each similarity model."""
        return {kind: model.image([self.pixels]) for kind, model in self.models.items()}

    @property
    def prompt_embedding(self) -> np.ndarray:
        """CLIP's unit vector (1, d) of the prompt."""
        return _embed_prompt(self.models["clip"], self.prompt)


@lru_cache(maxsize=16)  # every image of a prompt needs the same vector
def _embed_prompt(model: "Similarity", prompt: str) -> np.ndarray:
    return model.text([prompt])


class Metric(NamedTuple):
    """A column of numbers.

    unit: "" if it has none. meaning: one line. better: "higher", "lower" or "neutral". alone: computed from one image,
    so that the baseline has a value too and differences to the baseline are paired. share: between 0 and 1, drawn on
    that range. shown: rank in tables that have no room for all metrics, 1 first; 0 for metrics that are shown on
    request only. pooled: what the mean over cells is a mean of, if not of the metric itself. absent: why an image may
    have no value. needs: "scenes" (a model trained on scenes), "clip" or "dino" (a checkpoint of that
    kind), "mask" or "target" (a given image of a run with tasks), or "".
    function: (image) or (image, baseline) → value, both `Sample`; nan if there is nothing to measure.
    """

    unit: str
    meaning: str
    title: str = ""
    better: str = "neutral"
    share: bool = False
    shown: int = 0
    alone: bool = True
    pooled: str = ""
    absent: str = ""
    needs: str = ""
    function: Callable[..., float] | None = None


METRICS: dict[str, Metric] = {}
"""Every metric by name, in the order of the columns of `metrics.csv`."""


def metric(
    title: str,
    unit: str = "",
    better: str = "neutral",
    share: bool = False,
    shown: int = 0,
    *,
    needs: str = "",
    pooled: str = "",
    absent: str = "",
) -> Callable[[Callable[..., float]], Callable[..., float]]:
    """Register a function as a metric; its name is the column, the first line of its docstring the meaning.

    The function takes one `Sample`, or a `Sample` and the baseline's `Sample` at the same prompt and seed. It returns
    a number, the same on every call, and nan if there is nothing to measure. The other arguments are those of `Metric`.
    Tables, the page, figures and trackers read `METRICS`.

        @metric("contrast", unit="0..1", shown=3)
        def contrast(image: Sample) -> float:
            "Standard deviation of the luma."
            return float(image.luma.std())

    Raises ValueError for a name that is taken, a function with another number of parameters, and unknown `better` or
    `needs`.
    """

    def register(function: Callable[..., float]) -> Callable[..., float]:
        name, lines = function.__name__, inspect.getdoc(function)
        parameters = len(inspect.signature(function).parameters)
        if name in METRICS:
            raise ValueError(f"metric {name!r} is already registered")
        if parameters not in (1, 2):
            raise ValueError(f"metric {name!r}: {parameters} parameters, expected (image) or (image, baseline)")
        if better not in BETTER or needs not in NEEDS or not lines:
            raise ValueError(
                f"metric {name!r}: expected better in {BETTER}, needs in {NEEDS} and a docstring, "
                f"not {better!r}, {needs!r} and {lines!r}"
            )
        meaning = lines.splitlines()[0].rstrip(".")
        if meaning[1:2].islower():
            meaning = meaning[0].lower() + meaning[1:]
        METRICS[name] = Metric(
            unit, meaning, title, better, share, int(shown), parameters == 1, pooled, absent, needs, function
        )
        return function

    return register


def about(name: str) -> Metric:
    """Return the registered metric, or for a column of an unknown one a description that has only its name."""
    return METRICS[name] if name in METRICS else Metric("", "", name.replace("_", " "))


def shown_metrics() -> list[str]:
    """Return the metrics that tables show if there is no room for all, most important first."""
    ranked = [name for name, entry in METRICS.items() if entry.shown]
    return sorted(ranked, key=lambda name: METRICS[name].shown)


def columns(available: Collection[str] = ()) -> list[str]:
    """Return the metrics that can be computed if `available` of `NEEDS` are there, in the order of the columns."""
    return [name for name, entry in METRICS.items() if not entry.needs or entry.needs in available]


def evaluate(name: str, image: Sample, baseline: Sample | None = None) -> float:
    """Return one metric of an image."""
    entry = METRICS[name]
    return float(entry.function(image) if entry.alone else entry.function(image, baseline))


def check_pixels(image: np.ndarray, name: str) -> np.ndarray:
    """Return the image as an array. Raises UserError if it is not uint8 (H, W, 3) of at least `MIN_SIDE`."""
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or min(array.shape[:2]) < MIN_SIDE:
        raise UserError(
            f"{name}: {array.dtype} {array.shape}, expected uint8 (height, width, 3) with sides of at least "
            f"{MIN_SIDE} px"
        )
    return array


def check_pair(image: np.ndarray, baseline: np.ndarray) -> None:
    """Raise UserError for images that `check_pixels` rejects, and for two of different sizes."""
    image, baseline = check_pixels(image, "image"), check_pixels(baseline, "baseline")
    if image.shape != baseline.shape:
        sizes = [f"{array.shape[0]} x {array.shape[1]} px" for array in (image, baseline)]
        raise UserError(f"image: {sizes[0]}, but the baseline has {sizes[1]}; expected equal sizes")
