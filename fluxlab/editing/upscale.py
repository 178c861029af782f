"""Super-resolution through ids: an image of twice the size, or more, of which one token in four is given.

The tokens of the small image are the known tokens of a grid that is `factor` times as large: token (r, c) becomes
token (factor·r, factor·c), and the tokens between are new. What the methods differ in is which positions both have.
"""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fluxlab import batching
from fluxlab.editing.known import Path, check_path, hold, inverted_path, noised_path, numbers, one_way, start
from fluxlab.errors import UserError
from fluxlab.pixels import Images, image_tensor
from fluxlab.positions import Program
from fluxlab.sampling import OnStep, Sampling

if TYPE_CHECKING:
    from PIL import Image

METHODS = ("spacing", "half_steps", "aligned", "resized")
UNTIL = {"spacing": 0.0, "half_steps": 0.0, "aligned": 0.0, "resized": 0.8}
"""The σ until which known tokens are held, by method."""

KNOWN = ("small", "enlarged")
ATTENTION = ("one_way", "both_ways")
GRID = ("row", "col")


def upscale(
    pipe: Any,
    image: Images,
    prompt: str | Sequence[str],
    seed: int | Sequence[int] = 0,
    *,
    factor: int = 2,
    method: str | None = None,
    until: float | None = None,
    known: str = "small",
    path: str | None = None,
    source_prompt: str | Sequence[str] | None = None,
    attention: str = "one_way",
    programs: batching.Programs = None,
    source_programs: batching.Programs = None,
    steps: int | None = None,
    guidance: float | None = None,
    true_cfg: float | None = None,
    negative_prompts: str | Sequence[str] | None = None,
    iterations: int = 3,
    output: str = "pil",
    max_sequence_length: int | None = None,
    truncate: bool = False,
    unknown_words: str = "warn",
    on_step: OnStep | None = None,
) -> "list[Image.Image] | Tensor":
    """Return the image at `factor` times its size, one image for each prompt and seed.

    The tokens of the image are the known ones: token (r, c) is token (factor·r, factor·c) of the large grid. At each
    step their latents are those of the path of the small image, at the noise levels of the large one. The tokens
    between start from noise, the same as in `generate` with this seed and size. A known token keeps the latents of its
    own patch, which shows `factor` times as much as it has room for. Where a patch is not of one colour, that is only
    right at its corner: see `known` and `until`.

    image: as in `encode`. A batch has one image per prompt and seed.
    factor: a whole number. With 1 nothing is new, and the result is the encoded image.
    method: "spacing": the small image has positions `factor` apart in its inversion, and the large one the usual ones,
        1 apart. "half_steps": the small image has the usual positions, and new tokens lie between, 1/factor apart.
        "aligned": as half_steps, but each query sees all positions in the spacing of its own group, as in CRPA (arXiv
        2511.19778): known tokens are 1 apart where known ones see them, and `factor` apart where new ones do.
        "resized": all tokens are known, those of the bicubic enlargement, and have the usual positions.
        None: spacing up to the model's own size, half_steps beyond it: on the embedded model the better ones of those
        that edit ids. There "resized", which edits none, is closer to the image up to the model's size, and bicubic
        enlargement beyond it (`experiments.upscale`).
    until: the noise level, from 0 to below 1, down to which known tokens are on their path and attention is one-way.
        Below it they are sampled like the others. None: 0, and 0.8 with "resized", where 0 would change nothing.
    known: "small": known tokens have the latents of the small image's tokens. "enlarged": those at the same places of
        its bicubic enlargement, encoded, which show as much as they have room for. With "resized" always the latter.
    path: "inverted" takes known tokens from an inversion (`invert`), "noised" from the image mixed with noise, as in
        `inpaint`. None: inverted, and noised with "resized", which is then SDEdit (arXiv 2108.01073).
    attention: "one_way" keeps text and known tokens from attending to new ones. "both_ways" changes nothing.
    programs: further edits of ids and attention on the large grid, after those of the method. source_programs: further
        edits in the inversion; None means `programs`.
    source_prompt: the prompt of the inversion, by default `prompt`. iterations: as in `invert`. Unused with
        path="noised". true_cfg, negative_prompts: as in `generate`, in the inversion too. The other arguments: as in
        `generate`.

    Raises `UserError` for arguments that do not fit together or do not fit the model.
    """
    check_arguments(factor, method, until, known, path, attention, iterations)
    images = image_tensor(image)
    grid = tuple(side * factor for side in pipe.grid(*images.shape[-2:]))
    if method is None:
        own = pipe.grid(None, None)
        method = "spacing" if grid[0] <= own[0] and grid[1] <= own[1] and known == "small" else "half_steps"
    until = UNTIL[method] if until is None else until
    path = ("noised" if method == "resized" else "inverted") if path is None else path
    height, width = (side * factor for side in images.shape[-2:])
    given = known_tokens(grid, 1 if method == "resized" else factor)
    large = known == "enlarged" or method == "resized"
    settings = Sampling(
        steps=steps,
        height=height,
        width=width,
        guidance=guidance,
        true_cfg=true_cfg,
        max_sequence_length=max_sequence_length,
        truncate=truncate,
        unknown_words=unknown_words,
    )
    sigmas = pipe.schedule.times(pipe.resolve(settings).steps, grid[0] * grid[1])
    held = max(i for i, t in enumerate(sigmas) if t >= until)
    ids, mask = arranged(given, factor, method), Program()
    if attention == "one_way" and held and not given.all():
        mask = one_way(given, range(held))
    edits = [Program()] if programs is None else batching.read_programs(programs)
    batch = batching.zipped(
        prompts=prompt,
        seeds=seed,
        images=enlarged(images, factor) if large else images,
        programs=[ids + one + mask for one in edits],
        source_prompts=source_prompt,
        source_programs=edits if source_programs is None else batching.read_programs(source_programs),
        negative_prompts=negative_prompts,
    )
    channels = pipe.family.channels(pipe.autoencoder.params)
    noise = batching.start(batch["seeds"], None, len(batch["prompts"]), channels, grid, pipe.dtype, pipe.family)
    noise, source = noise.to(pipe.device), torch.stack(batch["images"])
    if path == "inverted":
        before = ids if large else spacing(factor) if method == "spacing" else Program()
        options = {
            "steps": steps,
            "guidance": guidance,
            "true_cfg": true_cfg,
            "negative_prompts": batch["negative_prompts"],
            "max_sequence_length": max_sequence_length,
            "truncate": truncate,
            "unknown_words": unknown_words,
            "programs": [before + one for one in batch["source_programs"]],
            "iterations": iterations,
            "sigmas": sigmas,
        }
        latents = inverted_path(pipe, source, batch["source_prompts"] or batch["prompts"], options)
    else:
        latents = noised_path(
            pipe.encode(source)[0], noise if large else noise[:, numbers(given, noise.device)], sigmas
        )
    latents = latents if large else spread(latents, given)
    return pipe.sample(
        batch["prompts"],
        0,
        batch["programs"],
        settings,
        negative_prompts=batch["negative_prompts"],
        latents=latents[held] if given.all() else start(noise, latents, given),
        output=output,
        on_step=hold(latents, given, on_step, steps=held),
        first=held if given.all() else 0,
    )


def known_tokens(grid: tuple[int, int], factor: int) -> Bool[Tensor, " n"]:
    """Return which tokens of a large grid are those of the small image: rows and columns 0, factor, 2·factor …"""
    known = torch.zeros(grid, dtype=torch.bool)
    known[::factor, ::factor] = True
    return known.flatten()


def spacing(factor: float) -> Program:
    """Return the program in which image tokens are `factor` apart."""
    return Program.from_config({"spacing": {"op": "scale", "factor": factor, "axes": list(GRID)}})


def arranged(known: Bool[Tensor, " n"], factor: int, method: str) -> Program:
    """Return the positions of a method on the large grid, as a program.

    aligned: two groups of queries with a key table each. New queries see the usual positions of the large grid, known
    ones see all positions divided by `factor`.
    """
    if method in ("spacing", "resized") or factor == 1:
        return Program()
    if method == "half_steps":
        return spacing(1 / factor)
    group = {"indices": [int(n) for n in known.nonzero()[:, 0]]}
    divided = {"op": "scale", "factor": 1 / factor, "axes": list(GRID)}
    return Program.from_config(
        {
            "queries": divided | {"tokens": group, "side": "queries"},
            "keys": divided | {"tokens": "image", "side": "keys", "seen_by": group},
        }
    )


def spread(path: Path, known: Bool[Tensor, " n"]) -> Path:
    """Return a path on the large grid. The other tokens have 0."""
    large, which = [], numbers(known, path[0].device)
    for latents in path:
        large.append(latents.new_zeros(len(latents), len(known), latents.shape[-1]))
        large[-1][:, which] = latents
    return large


def enlarged(images: Float[Tensor, "b 3 h w"], factor: int) -> Float[Tensor, "b 3 hh ww"]:
    """Return images at `factor` times their size, by Pillow's bicubic filter (a = -0.5, which antialias selects)."""
    return F.interpolate(images, scale_factor=factor, mode="bicubic", antialias=True).clamp(0, 1)


def check_arguments(
    factor: int = 2,
    method: str | None = None,
    until: float | None = None,
    known: str = "small",
    path: str | None = None,
    attention: str = "one_way",
    iterations: int = 3,
) -> None:
    """Raise `UserError` for arguments of `upscale` that no model accepts."""
    for key, value, names in (
        ("method", method, METHODS),
        ("known", known, KNOWN),
        ("attention", attention, ATTENTION),
    ):
        if value not in names and (key, value) != ("method", None):
            raise UserError(f"{key}={value!r}: expected {', '.join(names[:-1])} or {names[-1]}")
    if known == "enlarged" and method == "spacing":
        raise UserError(f"known={known!r}: spacing inverts the small image; leave it out, or choose another method")
    if isinstance(factor, bool) or not isinstance(factor, Integral) or factor < 1:
        raise UserError(f"factor={factor!r}: expected a whole number from 1, such as 2")
    if until is not None and (isinstance(until, bool) or not isinstance(until, Real) or not 0 <= until < 1):
        raise UserError(f"until={until!r}: expected a noise level, from 0 to below 1")
    if path is not None:
        check_path(path)
