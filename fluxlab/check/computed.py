"""Whether a loaded model computes what FLUX should: a function a check, which raises or says what it found."""

import time
from collections.abc import Callable

import torch

from fluxlab import sampling, scenes
from fluxlab.check.held import memory
from fluxlab.checkpoints.stored import Stored
from fluxlab.errors import UserError
from fluxlab.experiment.costs import decode_flops, duration, forward_flops
from fluxlab.pipeline import Pipeline
from fluxlab.positions import Program, noise_floor

PROMPTS = ("a red cat holding a sign", "a blue dog on the left")
SIDE = 16  # tokens: enough for every axis to matter, 256 px for FLUX.1
STEPS = 20  # of the picture that times are quoted for

ROUNDINGS = 4
"""How many times as much as rounding the latents once a shift of all ids may change the velocity.

A shift rounds queries and keys anew in every block. How much that is depends on dtype, depth and weights: 1e-6 to 0.8
deviations in models of random weights, of 4 to 57 blocks, in fp32, fp16 and bf16. But they magnify a rounding of the
latents alike: in all of them the shift changed 0.2 to 1.6 times as much.
"""

STD = (0.2, 5.0)
"""Of a velocity, noise minus picture: about 1 once trained, about 0.6 with random weights."""


def text_encoders(pipe: Pipeline, parts: dict[str, Stored]) -> tuple[str, None]:
    """Finite states, other ones for another prompt."""
    (txt, y), (other_txt, other_y) = (pipe.encode_prompt(prompt, truncate=True) for prompt in PROMPTS)
    for name, states, others in (("T5", txt, other_txt), ("CLIP", y, other_y)):
        if not states.isfinite().all():
            hint = "T5 overflows in float16 on some devices: try dtype=bfloat16" if name == "T5" else "fetch it again"
            raise UserError(f"{name} gives values that are not finite\n{hint}.")
        if states.equal(others):
            raise UserError(
                f"{name} gives the same for {PROMPTS[0]!r} and {PROMPTS[1]!r}\nFetch it and its tokenizer again."
            )
    numbers = [f"{parts[name].parameters.total():,}" for name in ("clip", "t5")]
    return (
        f"CLIP {numbers[0]}, T5 {numbers[1]} parameters; finite, and differ between prompts; "
        f"T5 {tuple(txt.shape)} std {txt.float().std():.2f}, CLIP {tuple(y.shape)} std {y.float().std():.2f}",
        None,
    )


def probe(pipe: Pipeline) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
    """Packed noise `(1, N, C)`, and the velocity at it (or at other latents) under a program, both fp32."""
    side = pipe.pixels_per_token * min(SIDE, *(pixels // pipe.pixels_per_token for pixels in pipe.size))
    rows, cols = pipe.grid(side, side)
    z = sampling.noise([0], pipe.autoencoder.params.z_channels, 2 * rows, 2 * cols, torch.float32)
    start = sampling.pack(z)

    def velocity(program: Program | None = None, at: torch.Tensor = start) -> torch.Tensor:
        made = pipe.generate(PROMPTS[0], 0, program, side, side, steps=1, latents=at, output="latent", truncate=True)
        return at - made.cpu()  # one step from t = 1 to 0 takes the whole velocity off

    return start, velocity


def one_step(start: torch.Tensor, velocity: Callable[..., torch.Tensor]) -> tuple[str, tuple[torch.Tensor, float]]:
    """The velocity at pure noise: finite, and as large as flow matching has it. It predicts noise minus picture."""
    velocity()  # the first one sets things up
    began = time.perf_counter()
    v = velocity()
    seconds = time.perf_counter() - began
    if not v.isfinite().all():
        raise UserError("the velocity is not finite\nTry dtype=bfloat16 or float32; else fetch the transformer again.")
    std, alike = v.std().item(), torch.corrcoef(torch.stack((v.flatten(), start.flatten())))[0, 1].item()
    if not STD[0] <= std <= STD[1]:
        raise UserError(
            f"the velocity's deviation is {std:.3g}, {STD[0]:g} to {STD[1]:g} is expected of noise minus picture\n"
            "The weights are damaged, or not a flow matching model's; fetch them again."
        )
    kind = "as trained weights have it" if alike > 0.5 else "trained weights have more than 0.5"
    return f"velocity finite, std {std:.2f}, correlation with the noise {alike:.2f}: {kind}", (v, seconds)


def shifting(
    start: torch.Tensor, velocity: Callable[..., torch.Tensor], untouched: torch.Tensor, dtype: torch.dtype
) -> tuple[str, float]:
    """The noise floor: a constant added to all ids changes no more than rounding does."""
    floor = noise_floor(lambda program: velocity(program) if program else untouched)
    nudge = torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
    nudged = velocity(at=start * (1 + torch.finfo(dtype).eps * nudge))
    rounding = change(nudged, untouched)
    told = f"shifting all ids changes the velocity by {floor:.1e} std, rounding the latents once by {rounding:.1e}"
    if not floor <= ROUNDINGS * rounding:
        raise UserError(
            f"{told}\nIt should be rounding alone, for attention sees differences of positions only. "
            "See whether dtype=float32 device=cpu fails too, and report both."
        )
    return told, floor


def zeroing(velocity: Callable[..., torch.Tensor], untouched: torch.Tensor, floor: float) -> tuple[str, None]:
    """Ids matter: without the image's, the velocity is another."""
    effect = change(velocity(Program.from_config({"zero": {"op": "zero"}})), untouched)
    if not effect > floor:
        raise UserError(
            f"setting all image ids to 0 changes the velocity by {effect:.1e} std, no more than shifting all ids does "
            f"({floor:.1e})\nThe ids are not used, or their effect is below rounding: try dtype=float32."
        )
    return f"setting all image ids to 0 changes it by {effect:.1e} std", None


def change(v: torch.Tensor, untouched: torch.Tensor) -> float:
    """The largest difference in deviations, as `noise_floor` has it."""
    return ((v - untouched).abs().max() / untouched.std()).item()


def pictures(pipe: Pipeline, tokens: int) -> tuple[str, None]:
    """A drawn picture through the autoencoder and back: finite; how near only trained weights can tell."""
    cat = scenes.Scene((64, 64), "sand", (scenes.Thing("cat", "red", None, 32, 32, 24),))
    side = round(tokens**0.5) * pipe.pixels_per_token
    drawn = torch.from_numpy(scenes.render(cat)).permute(2, 0, 1)[None] / 255
    picture = torch.nn.functional.interpolate(drawn, (side, side))
    latents, rows, cols = pipe.encode(picture)
    back = pipe.decode(latents, rows, cols, "pt").cpu()
    if not (latents.isfinite().all() and back.isfinite().all()):
        raise UserError("the autoencoder gives values that are not finite\nTry dtype=bfloat16 or float32.")
    psnr = -10 * torch.log10((back - picture).square().mean()).item()
    kind = "as trained weights have it" if psnr > 25 else "trained weights have more than 25"
    return f"encoded and decoded again: {psnr:.1f} dB: {kind}; latents std {latents.std():.2f}", None


def speed(pipe: Pipeline, tokens: int, seconds: float) -> tuple[str, None]:
    """What a step takes, and so a picture of the model's own size."""
    height, width = pipe.size
    rows, cols = pipe.grid(height, width)
    small, full = (forward_flops(pipe.transformer.params, pipe.max_sequence_length, n) for n in (tokens, rows * cols))
    picture = seconds * (STEPS * full + decode_flops(pipe.autoencoder.params, height, width)) / small
    side = round(tokens**0.5) * pipe.pixels_per_token
    return (
        f"{duration(seconds)} a step of {side} × {side} px; {STEPS} steps of {height} × {width} px: "
        f"about {duration(picture)}; {memory(pipe.device)}",
        None,
    )
