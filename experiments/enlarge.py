"""Scenes at two sizes, and everything that makes the large one of the small: what `experiments.upscale` compares."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fluxlab.scenes import render, sample_scene, wanted_of, write

FACTOR, STEPS = 2, 6
"""How many times as large as the given image the result is, and sampling steps."""

SIDE = 64
"""Pixels of the embedded model's own images, for which the sizes of `SETTINGS` are."""

TWICE = {"factor": FACTOR}
YARN, DYPE, PI = ({"a": {"op": name, **TWICE}} for name in ("yarn", "dype", "pi"))
HALF = {"half": {"op": "scale", "factor": 1 / FACTOR, "axes": ["row", "col"]}}


@dataclass(frozen=True)
class Setting:
    """What is compared at one size.

    side: of the scene, in pixels. given: of the image that is enlarged; the scene is drawn at `FACTOR` times that.
    prompted: row of the figure → program with which the prompt alone is sampled at the large size. upscaled: row of the
    figure → arguments of `pipe.upscale`.
    """

    side: int
    given: int
    prompted: dict[str, dict[str, Any] | None]
    upscaled: dict[str, dict[str, Any]]


SETTINGS = {
    "own": Setting(
        64,
        32,
        {"prompt": None},
        {
            "spacing": {"method": "spacing"},
            "spacing, both ways": {"method": "spacing", "attention": "both_ways"},
            "spacing, YaRN": {"method": "spacing", "source_programs": YARN},
            "spacing, until 0.8": {"method": "spacing", "until": 0.8},
            "half steps": {"method": "half_steps"},
            "half steps, aligned": {"method": "aligned"},
            "resized": {"method": "resized", "until": 0.8},
        },
    ),
    "beyond": Setting(
        48,
        48,
        {"prompt": None, "prompt, PI": PI, "prompt, YaRN": YARN, "prompt, DyPE": DYPE},
        {
            "spacing": {"method": "spacing"},
            "spacing, YaRN": {"method": "spacing", "programs": YARN},
            "spacing, DyPE": {"method": "spacing", "programs": DYPE},
            "half steps": {"method": "half_steps"},
            "half steps, both ways": {"method": "half_steps", "attention": "both_ways"},
            "half steps, aligned": {"method": "aligned"},
            "half steps, enlarged": {"method": "half_steps", "known": "enlarged", "path": "noised"},
            "resized": {"method": "resized", "until": 0.7},
            "resized, half steps": {"method": "resized", "until": 0.7, "programs": HALF},
        },
    ),
}

ABOUT = {
    "own": "Images of {given} × {given} px, which are scenes of {side} × {side} px reduced by averaging, at twice "
    "their size, the model's own.",
    "beyond": "Images of {given} × {given} px at twice their size, beyond the model's own.",
}

BICUBIC, DECODED, DRAWN = "bicubic", "bicubic, decoded", "scene, decoded"
"""The floor, what the autoencoder leaves of it, and what it leaves of the scene drawn at the large size."""

MEASURES = {
    "psnr_scene": "PSNR to the scene, dB",
    "ssim_scene": "SSIM to the scene",
    "shape": "right shapes",
    "letters": "letters right",
    "object": "things found",
    "colour": "right colours",
    "sharpness": "sharpness, 1/px",
}
ORACLE = ("shape", "letters", "object", "colour")
"""Measures that the scene oracle reads."""

SHOWN = tuple(MEASURES)[:4]


@dataclass(frozen=True)
class Case:
    """A scene of the split that the embedded model was not trained on. small: the image that is given. large: the scene
    at `FACTOR` times its size. side: at which the oracle reads, which is that of the font."""

    number: int
    prompt: str
    small: np.ndarray
    large: np.ndarray
    side: int


def case(setting: Setting, number: int, times: int = 1) -> Case:
    """Return a scene. The same number gives the same case. times: how many times as large it is drawn."""
    from PIL import Image

    side = setting.side
    scene = sample_scene(np.random.default_rng([side, number]), (side, side), "heldout")
    small, large = (render(scene, scale=times * scale) for scale in (1, FACTOR * setting.given // side))
    if setting.given < side:
        small = np.asarray(Image.fromarray(small).reduce(side // setting.given))
    return Case(number, write(wanted_of(scene)), small, large, side)


def images_of(
    pipe: Any, setting: Setting, cases: Sequence[Case], steps: int | None
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Yield the name and the images of everything that is compared, one image per case."""
    from PIL import Image

    given = [one.small for one in cases]
    height, width = (FACTOR * side for side in given[0].shape[:2])
    bicubic = [np.asarray(Image.fromarray(a).resize((width, height), Image.Resampling.BICUBIC)) for a in given]
    yield BICUBIC, bicubic
    for name, images in ((DECODED, bicubic), (DRAWN, [one.large for one in cases])):
        yield name, [np.asarray(image) for image in pipe.decode(*pipe.encode(images))]
    prompts, seeds = [one.prompt for one in cases], [one.number for one in cases]
    for name, program in setting.prompted.items():
        size = {"height": height, "width": width, "steps": steps}
        yield name, [np.asarray(image) for image in pipe.generate(prompts, seeds, program, **size)]
    for name, options in setting.upscaled.items():
        found = pipe.upscale(given, prompts, seeds, factor=FACTOR, steps=steps, **options)
        yield name, [np.asarray(image) for image in found]


def scores(image: np.ndarray, one: Case, oracle: bool = True) -> dict[str, float]:
    """Return the `MEASURES` of an image, those of the oracle too if its model is one of scenes."""
    from PIL import Image

    from fluxlab.measure import compare, describe, oracle_columns

    def reduced(side: int) -> np.ndarray:
        times = image.shape[0] // side
        return np.asarray(Image.fromarray(image).reduce(times)) if times > 1 else image

    image = reduced(len(one.large))
    found, read = compare(image, one.large), oracle_columns(reduced(one.side), one.prompt) if oracle else {}
    return {
        "psnr_scene": found["psnr"],
        "ssim_scene": found["ssim"],
        **{name: read[name] for name in ORACLE if name in read},
        "sharpness": describe(image, 4)["sharpness"],
    }
