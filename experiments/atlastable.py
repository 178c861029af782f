"""The numbers of `experiments.atlas`: the part of the rotary tables on which the place of the thing depends."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fluxlab.attribution import of_gains, with_gains
from fluxlab.gradients import Make, Prepared, Score, denoising, sampled
from fluxlab.measure.oracle import inspect
from fluxlab.measure.summary import summarise
from fluxlab.sampling import Sampling
from fluxlab.scenes import parse

if TYPE_CHECKING:
    from fluxlab.pipeline import Pipeline

PROMPTS = (
    "a red fox on the left holding a sign that says open",
    "a blue heart on the right holding a sign that says rain",
    "a yellow cat at the top holding a sign that says taxi",
    "a purple circle at the bottom holding a sign that says moon",
    "a green fox on the right holding a sign that says book",
    "an orange heart on the left holding a sign that says cafe",
    "a blue cat at the bottom holding a sign that says free",
    "a yellow circle at the top holding a sign that says jazz",
)
"""Prompts of the attribution: those of +exp=trace."""

HELD_OUT = (
    "a green cat on the left holding a sign that says moon",
    "a yellow fox on the right holding a sign that says cafe",
    "a blue circle at the top holding a sign that says open",
    "a red heart at the bottom holding a sign that says jazz",
    "an orange circle on the right holding a sign that says taxi",
    "a purple cat on the left holding a sign that says rain",
    "a green heart at the bottom holding a sign that says book",
    "a red fox at the top holding a sign that says free",
)
"""Prompts of the ablation: the same places, other things, colours and words."""

SIDES = {"left": ("col", -1), "right": ("col", 1), "top": ("row", -1), "bottom": ("row", 1)}
"""Place → the axis along which it lies, and the sign of its direction."""

ORDERS = ("place", "loss", "random")
"""How the ablated sites are chosen: by the place, by the denoising loss, or at random."""

Row = dict[str, Any]


def centre(latents: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return where the content of images is: the centre of mass `(B, 2)`, row and column in tokens.

    latents: packed, `(B, N, C)`. The mass of a token is its squared distance to the background, which is the median of
    the tokens in each channel. It stands in for the place that the oracle reads, because it has gradients.
    """
    mass = (latents - latents.detach().median(1, keepdim=True).values).square().sum(-1)
    mass = (mass / mass.sum(1, keepdim=True)).unflatten(1, grid)
    rows, cols = (torch.arange(n, dtype=mass.dtype, device=mass.device) for n in grid)
    return torch.stack(((mass.sum(2) * rows).sum(1), (mass.sum(1) * cols).sum(1)), 1)


def towards(latents: Tensor, grid: tuple[int, int], places: Sequence[str]) -> Tensor:
    """Return how far the content lies towards the named place of each image, `(B,)` in tokens."""
    found = centre(latents, grid)
    signs = [SIDES[place] for place in places]
    return torch.stack([sign * found[b, int(axis == "col")] for b, (axis, sign) in enumerate(signs)])


def place_score(places: Sequence[str]) -> Score:
    """Return the score `towards` of the sampled images."""

    def score(prepared: Prepared, make: Make) -> Tensor:
        return towards(sampled(prepared, make()), prepared.context.layout.grid, places)

    return score


def images(prepared: Prepared, make: Make) -> Tensor:
    """A score that is the sampled latents themselves."""
    return sampled(prepared, make())


def attribute(
    pipe: "Pipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    program: Mapping[str, Any] | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Return the derivatives of the place and of the denoising loss by every gain, image by image.

    place and loss: `(images, steps, blocks, heads, pairs)`. axis, wavelength: of the pairs. sigma: of the steps. The
    loss is measured on the image that the model makes, so that it says on which sites this image depends at all; only
    for the first two seeds, because it is used without intervals.
    """
    found: dict[str, list[np.ndarray]] = {"place": [], "loss": []}
    how, coords = {"program": program, "settings": Sampling(steps=steps)}, {}
    for prompt in prompts:
        place = parse(prompt).place
        assert place in SIDES, f"{prompt}: place {place!r}, expected one of {', '.join(SIDES)}"
        for seed in seeds:
            chosen = {"place": place_score([place])}
            if seed in seeds[:2]:
                own = pipe.sample([prompt], [seed], program, Sampling(steps=steps), output="latent").float().clone()
                chosen["loss"] = denoising(own)
            for name, score in chosen.items():
                values = of_gains(pipe, [prompt], [seed], score, **how)
                found[name].append(values.values)
                coords = {key: list(values.coords[key][1]) for key in ("axis", "wavelength", "sigma")}
        report(f"attribution: {prompt}")
    return {name: np.stack(values) for name, values in found.items()} | coords


def rankings(found: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the sites (block, head, pair), numbered in C order, by their size for the place and for the loss.

    An image is not counted more because it depends more on all sites: the size is the mean of `of_images`.
    """
    sizes = {name: of_images(found[name]).mean(0).ravel() for name in ("place", "loss")}
    return {name: np.argsort(-size, kind="stable") for name, size in sizes.items()}


def of_images(values: np.ndarray) -> np.ndarray:
    """Return the size of each site in each image, `(images, blocks, heads, pairs)`, with the mean 1 over sites.

    It is |the sum of the derivatives over steps|, since an ablation acts at all steps, over its mean over sites.
    """
    sizes = np.abs(values.sum(1))
    return sizes / sizes.mean((1, 2, 3), keepdims=True)


def ablate(
    pipe: "Pipeline",
    order: Mapping[str, np.ndarray],
    shape: tuple[int, int, int],
    counts: Sequence[int],
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    report: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Return what the oracle reads in images without the first k sites of each order, one row per image.

    variant: "none", or an order and k. Sites at random are drawn anew for each seed. found: there is a thing. place: it
    is where the caption says. moved: by how many pixels from that of the image without ablation, nan without a thing.
    along: the part of it towards the named place. centre: the same of `towards`, in pixels.
    """
    rows: list[Row] = []
    places = [parse(prompt).place for prompt in prompts]
    for seed in seeds:
        rng = np.random.default_rng(seed)
        orders = {**order, "random": rng.permutation(math.prod(shape))}
        names = ["none", *(f"{name} {k}" for k in counts for name in ORDERS)]
        gains = [torch.ones(1, *shape)]
        for k in counts:
            for name in ORDERS:
                gain = torch.ones(math.prod(shape))
                gain[torch.from_numpy(orders[name][:k].copy())] = 0
                gains.append(gain.reshape(1, *shape))
        every = [seed] * len(prompts)
        latents = with_gains(pipe, prompts, every, images, gains, settings=Sampling(steps=steps))
        reports, centres = [], []
        for x in latents:
            grid = _grid(x)
            shown = pipe.decode(x, *grid)
            reports.append([inspect(image, prompt) for image, prompt in zip(shown, prompts, strict=True)])
            centres.append((towards(x, grid, places) * (shown[0].height / grid[0])).tolist())
        for name, read, content in zip(names, reports, centres, strict=True):
            for b, prompt in enumerate(prompts):
                row = {"variant": name, "prompt": prompt, "seed": seed, "centre": content[b] - centres[0][b]}
                rows.append(row | _verdict(read[b], reports[0][b], places[b]))
        report(f"ablation: seed {seed}")
    return rows


def _verdict(report: Any, before: Any, place: str) -> Row:
    row = {
        "found": float(bool(report.things)),
        "place": float(bool(report.place)),
        "moved": math.nan,
        "along": math.nan,
    }
    if report.things and before.things:
        thing, own = report.things[0], before.things[0]
        axis, sign = SIDES[place]
        row["moved"] = float(np.hypot(thing.row - own.row, thing.col - own.col))
        row["along"] = sign * float(getattr(thing, axis) - getattr(own, axis))
    return row


def _grid(latents: Tensor) -> tuple[int, int]:
    side = math.isqrt(latents.shape[1])
    assert side * side == latents.shape[1], "the images are square, as the model's own size"
    return side, side


def outcomes(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Return variant → metric → n, mean, low, high over images, and of a random or a top choice the paired difference.

    difference: of "place k" and "loss k" to "random k", at equal prompt and seed.
    """
    metrics, found = ("place", "found", "moved"), {}
    for row in summarise(rows, "none", metrics):
        ends = {key: row[key] for key in ("n", "mean", "low", "high")}
        found.setdefault(row["variant"], {})[row["metric"]] = ends
    for name in [name for name in found if name.startswith("random")]:
        k = name.split()[1]
        part = [row for row in rows if row["variant"].split()[-1] == k]
        for row in summarise(part, name, ("place", "found", "moved")):
            if row["variant"] != name:
                ends = {key: row[f"paired_{key}"] for key in ("n", "mean", "low", "high")}
                found[row["variant"]][f"{row['metric']} - random"] = ends
    return found


def agreement(rows: Sequence[Row]) -> tuple[float, int]:
    """Return the correlation of the stand-in's and the oracle's movement towards the named place, and the images."""
    pairs = [(row["centre"], row["along"]) for row in rows if row["variant"] != "none" and not math.isnan(row["along"])]
    if len(pairs) < 3 or np.ptp(pairs, 0).min() == 0:
        return math.nan, len(pairs)
    return float(np.corrcoef(np.transpose(pairs))[0, 1]), len(pairs)


def shares(found: Mapping[str, Any], name: str = "place") -> dict[str, dict[str, float]]:
    """Return which share of the sum of sizes each block, step, axis and band of wavelengths has, with intervals.

    Bootstrap over images, 95 %. sites: the share of the sites that it has. Sizes of steps are |derivatives| of single
    steps; others are of their sum over steps.
    """
    single, summed = np.abs(found[name]), np.abs(found[name].sum(1))
    axis, waves = np.array(found["axis"]), np.array(found["wavelength"])
    blocks, _, pairs = summed.shape[1:]
    parts = {f"block {n}": (summed[:, n].sum((1, 2)), 1 / blocks) for n in range(blocks)}
    chosen = {f"axis {key}": axis == key for key in dict.fromkeys(axis)}
    chosen |= {f"wavelength {band}": (waves >= low) & (waves < high) for band, (low, high) in BANDS.items()}
    parts |= {key: (summed[..., some].sum((1, 2, 3)), some.sum() / pairs) for key, some in chosen.items()}
    total, rng = summed.sum((1, 2, 3)), np.random.default_rng(0)
    drawn = rng.integers(len(total), size=(2000, len(total)))
    rows = {
        key: {"n": len(total), **_moments(value / total, drawn), "sites": float(sites)}
        for key, (value, sites) in parts.items()
    }
    of_steps = single.sum((2, 3, 4))
    for n in range(of_steps.shape[1]):
        rows[f"step {n}"] = {"n": len(total), **_moments(of_steps[:, n] / of_steps.sum(1), drawn)}
    return rows


BANDS = {"below 8": (0, 8), "8 to 32": (8, 32), "above 32": (32, math.inf)}
"""Wavelengths in tokens, [low, high). The embedded model's images have 16 × 16 tokens."""


def _moments(values: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def table_rows(found: Mapping[str, Any]) -> list[Row]:
    """Return a row per site (block, head, pair): its axis, wavelength, and size for the place and for the loss.

    Sizes are means of `of_images`. low, high: 95 % over images, mean ± 1.96 standard errors. signed: the mean
    derivative of the place in tokens, positive where the pair moves the content towards the named place.
    """
    place, size, loss = found["place"].sum(1), of_images(found["place"]), of_images(found["loss"]).mean(0)
    mean, error = size.mean(0), size.std(0, ddof=1) / math.sqrt(len(size)) if len(size) > 1 else 0 * size[0]
    rows = []
    for (block, head, pair), value in np.ndenumerate(mean):
        far = 1.96 * error[block, head, pair]
        row = {"block": block, "head": head, "pair": pair, "axis": found["axis"][pair]}
        row |= {"wavelength": float(found["wavelength"][pair]), "place": float(value)}
        row |= {"place_low": float(value - far), "place_high": float(value + far)}
        rows.append(row | {"signed": float(place[:, block, head, pair].mean()), "loss": float(loss[block, head, pair])})
    return rows
