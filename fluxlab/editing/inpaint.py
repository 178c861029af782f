"""Inpainting: known tokens follow a path that ends at the image, and the tokens of the hole are sampled from noise."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fluxlab import batching
from fluxlab.editing.known import check_inversion, check_path, hold, inverted_path, noised_path, one_way, start
from fluxlab.errors import UserError
from fluxlab.pixels import Images, image_tensor
from fluxlab.positions import Program
from fluxlab.sampling import OnStep, Sampling
from fluxlab.select.masks import read_mask

if TYPE_CHECKING:
    from PIL import Image


def inpaint(
    pipe: Any,
    image: Images,
    mask: Any,
    prompt: str | Sequence[str],
    seed: int | Sequence[int] = 0,
    *,
    source_prompt: str | Sequence[str] | None = None,
    path: str = "noised",
    attention: str = "one_way",
    programs: batching.Programs = None,
    steps: int | None = None,
    guidance: float | None = None,
    true_cfg: float | None = None,
    negative_prompts: str | Sequence[str] | None = None,
    iterations: int | None = None,
    output: str = "pil",
    max_sequence_length: int | None = None,
    truncate: bool = False,
    unknown_words: str = "warn",
    on_step: OnStep | None = None,
) -> "list[Image.Image] | Tensor":
    """Return the image with the part under a mask sampled again, one image for each prompt and seed.

    The tokens outside of the hole are known. At each step their latents are those of the path of the image, so that
    after the last step they are those of the encoded image, bit for bit. The tokens of the hole start from noise, the
    same as in `generate` with this seed. Nothing depends on what the image shows under the mask.

    image: as in `encode`; its size is that of the result. A batch has one image per prompt and seed.
    mask: white where the image is sampled again. An image file, a PIL image, an array or rows of 0 and 1, of the size
        of the image in pixels or in tokens. One mask serves all images. A token is sampled again if the mask covers
        any part of it.
    path: "noised" mixes the image with the noise of the seed, (1 - t)·x + t·noise, as in Blended Latent Diffusion
        (arXiv 2206.02779). "inverted" takes the known tokens from an inversion of the image (`invert`): slower, and
        with few steps or iterations it is too smooth at high noise, so that the hole tends to stay empty
        (`experiments.inpaint`).
    attention: "one_way" keeps text and known tokens from attending to the hole, in the inversion too. "image_one_way"
        does so for known image tokens only. "both_ways" changes nothing.
    programs: further edits of ids and attention, in the inversion too.
    source_prompt, iterations: of the inversion, by default `prompt` and 3. With path="inverted" only.
    true_cfg, negative_prompts: as in `generate`, in the inversion too. The other arguments: as in `generate`.

    Raises `UserError` for a mask of another size, one that covers no or every token, arguments of an inversion without
    one, and for arguments that do not fit the model.
    """
    check_arguments(path, attention, iterations, source_prompt)
    images = image_tensor(image)
    grid = pipe.grid(*images.shape[-2:])
    hole = hole_tokens(mask, tuple(images.shape[-2:]), grid)
    known = ~hole.flatten()
    images = filled(
        images, hole.repeat_interleave(pipe.pixels_per_token, 0).repeat_interleave(pipe.pixels_per_token, 1)
    )
    given = [Program()] if programs is None else batching.read_programs(programs)
    held = given if attention == "both_ways" else [one + one_way(known, text=attention == "one_way") for one in given]
    batch = batching.zipped(
        prompts=prompt,
        seeds=seed,
        images=images,
        programs=held,
        source_prompts=source_prompt,
        negative_prompts=negative_prompts,
    )
    settings = {
        "steps": steps,
        "guidance": guidance,
        "true_cfg": true_cfg,
        "negative_prompts": batch["negative_prompts"],
        "max_sequence_length": max_sequence_length,
        "truncate": truncate,
        "unknown_words": unknown_words,
    }
    channels = pipe.family.channels(pipe.autoencoder.params)
    noise = batching.start(batch["seeds"], None, len(batch["prompts"]), channels, grid, pipe.dtype, pipe.family)
    noise = noise.to(pipe.device)
    if path == "inverted":
        options = {**settings, "programs": batch["programs"], "iterations": 3 if iterations is None else iterations}
        latents = inverted_path(
            pipe, torch.stack(batch["images"]), batch["source_prompts"] or batch["prompts"], options
        )
    else:
        encoded, rows, cols = pipe.encode(torch.stack(batch["images"]))
        sigmas = pipe.schedule.times(pipe.resolve(Sampling(steps=steps)).steps, rows * cols)
        latents = noised_path(encoded, noise, sigmas)
    return pipe.generate(
        batch["prompts"],
        programs=batch["programs"],
        height=images.shape[-2],
        width=images.shape[-1],
        latents=start(noise, latents, known),
        output=output,
        on_step=hold(latents, known, on_step),
        **settings,
    )


ATTENTION = ("one_way", "image_one_way", "both_ways")


def check_arguments(
    path: str = "noised",
    attention: str = "one_way",
    iterations: int | None = None,
    source_prompt: str | Sequence[str] | None = None,
) -> None:
    """Raise `UserError` for arguments of `inpaint` that no model accepts."""
    check_path(path)
    check_inversion(path, {"source_prompt": source_prompt, "iterations": iterations})
    if attention not in ATTENTION:
        raise UserError(f"attention={attention!r}: expected {', '.join(ATTENTION[:-1])} or {ATTENTION[-1]}")


def hole_tokens(mask: Any, size: tuple[int, int], grid: tuple[int, int]) -> Bool[Tensor, "rows cols"]:
    """Return the tokens that a mask touches. size: (height, width) of the image in pixels.

    Raises `UserError` for a mask of another size than the image's in pixels or tokens, and if it touches none or all.
    """
    selected = torch.from_numpy(read_mask(mask, "mask"))
    if tuple(selected.shape) not in (size, grid):
        raise UserError(
            f"mask of {selected.shape[0]} × {selected.shape[1]} (height × width): expected the size of the image, "
            f"{size[0]} × {size[1]} pixels, or {grid[0]} × {grid[1]} tokens"
        )
    hole = F.adaptive_max_pool2d(selected.float()[None, None], grid)[0, 0] > 0
    if not hole.any() or hole.all():
        raise UserError(
            f"mask covers {'no' if not hole.any() else 'every'} token: expected a part of the image, white where it is "
            "sampled again"
        )
    return hole


def filled(images: Float[Tensor, "b 3 h w"], hole: Bool[Tensor, "h w"]) -> Float[Tensor, "b 3 h w"]:
    """Return images with each pixel of the hole replaced by the nearest one outside.

    The autoencoder's convolutions read over the border of the hole: what they read there must not depend on what the
    image shows in it.
    """
    from scipy.ndimage import distance_transform_edt

    rows, cols = distance_transform_edt(hole.cpu().numpy(), return_distances=False, return_indices=True)
    rows, cols = (torch.from_numpy(np.asarray(part, dtype=np.int64)).to(images.device) for part in (rows, cols))
    return images[..., rows, cols]
