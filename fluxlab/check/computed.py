"""Checks of what a loaded model computes: each raises, or returns what it measured."""

import time
from collections.abc import Callable

import torch

from fluxlab import scenes
from fluxlab.check.results import Result
from fluxlab.check.weights import memory
from fluxlab.checkpoints.stored import Stored
from fluxlab.errors import NonFiniteError, UserError
from fluxlab.experiment.costs import decode_flops, duration, forward_flops
from fluxlab.model.protocols import Transformer
from fluxlab.pipeline import Pipeline
from fluxlab.positions import Program, noise_floor

PROMPTS = ("a red cat holding a sign", "a blue fox on the left")
SIDE = 16  # tokens: enough for every axis to matter, 256 px for FLUX.1
STEPS = 20  # of the image that times are quoted for

ROUNDINGS = 4
"""How much more than rounding the latents once a shift of all ids may change the velocity.

A shift rounds queries and keys anew in every block. How much that is depends on dtype, depth and weights: 1e-6 to 0.8
standard deviations in models of random weights, of 4 to 57 blocks, in fp32, fp16 and bf16. But they amplify a rounding
of the latents alike: in all of them the shift changed 0.2 to 1.6 times as much.
"""

STD = (0.2, 5.0)
"""Standard deviation of a velocity, which is noise minus image: about 1 after training, 0.6 with random weights."""

TRAINED_CORRELATION = 0.5  # of the velocity with the noise
TRAINED_PSNR = 25  # in dB, of an image encoded and decoded again

Velocity = Callable[..., torch.Tensor]


def text_encoders(pipe: Pipeline, parts: dict[str, Stored]) -> Result:
    """Check that states are finite, and differ between two prompts."""
    encoded = [pipe.encode_prompt(prompt, truncate=True, unknown_words="allow") for prompt in PROMPTS]
    for name, states, others in zip(pipe.text.titles, *encoded, strict=True):
        if not states.isfinite().all():
            hint = "T5 overflows in float16 on some devices: try dtype=bfloat16" if name == "T5" else "fetch it again"
            raise UserError(f"{name} returns values that are not finite\n{hint}.")
        if states.equal(others):
            raise UserError(
                f"{name} returns the same for {PROMPTS[0]!r} and {PROMPTS[1]!r}\nFetch it and its tokenizer again."
            )
    pairs = zip(pipe.text.titles, encoded[0], strict=True)
    described = [f"{title} {tuple(x.shape)} std {x.float().std():.2f}" for title, x in pairs]
    counts = {name.upper(): f"{p.parameters.total():,}" for name, p in parts.items() if p.params is None}
    listed = ", ".join(f"{name} {count}" if len(counts) > 1 else count for name, count in counts.items())
    return Result(f"{listed} parameters; finite, and differ between prompts; {', '.join(described)}")


def start(pipe: Pipeline) -> tuple[torch.Tensor, Velocity]:
    """Return packed noise `(1, N, C)`, and a function: the velocity at it (or at other latents) under a program, fp32.

    The function raises UserError, naming the first block, if the velocity is not finite.
    """
    side = pipe.pixels_per_token * min(SIDE, *(pixels // pipe.pixels_per_token for pixels in pipe.size))
    rows, cols = pipe.grid(side, side)
    noise = pipe.family.noise([0], pipe.autoencoder.params.z_channels, rows, cols, torch.float32)

    def sample(program: Program | None, at: torch.Tensor) -> torch.Tensor:
        settings = {"steps": 1, "latents": at, "output": "latent", "truncate": True, "unknown_words": "allow"}
        return pipe.generate(PROMPTS[0], 0, program, side, side, **settings)

    def velocity(program: Program | None = None, at: torch.Tensor = noise) -> torch.Tensor:
        try:
            result = sample(program, at)
        except NonFiniteError:
            block = first_nonfinite(pipe.transformer, lambda: sample(program, at))
            raise UserError(
                f"the velocity is not finite, first in {block}\n"
                "Try dtype=bfloat16 or float32; else fetch the transformer again."
            ) from None
        return at - result.cpu()  # one step from t = 1 to 0 subtracts the whole velocity

    return noise, velocity


def first_nonfinite(transformer: Transformer, run: Callable[[], object]) -> str:
    """Return the name of the first layer or block of a transformer whose output is not finite during `run`."""
    first: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: object, output: object) -> None:
            outputs = output if isinstance(output, tuple | list) else (output,)
            tensors = (part for part in outputs if isinstance(part, torch.Tensor))
            if not first and not all(tensor.isfinite().all() for tensor in tensors):
                first.append(name)

        return hook

    top = {name for name, _ in transformer.named_children()} - {"double_blocks", "single_blocks"}
    kinds = ("double_blocks", "single_blocks")
    blocks = {f"{kind}.{i}" for kind in kinds for i in range(len(getattr(transformer, kind)))}
    handles = [
        module.register_forward_hook(look(name)) for name, module in transformer.named_modules() if name in top | blocks
    ]
    try:
        run()
    except NonFiniteError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return first[0] if first else "the inputs of its first block"


def one_step(noise: torch.Tensor, velocity: Velocity) -> Result:
    """Check the velocity at pure noise: finite, and as large as in flow matching, which predicts noise minus image."""
    velocity()  # the first call includes one-time setup
    began = time.perf_counter()
    v = velocity()
    seconds = time.perf_counter() - began
    std, correlation = v.std().item(), torch.corrcoef(torch.stack((v.flatten(), noise.flatten())))[0, 1].item()
    if not STD[0] <= std <= STD[1]:
        raise UserError(
            f"the velocity's standard deviation is {std:.3g}, expected {STD[0]:g} to {STD[1]:g} for noise minus image\n"
            "The weights are damaged, or not a flow matching model's; fetch them again."
        )
    text = f"velocity finite, std {std:.2f}, correlation with the noise {correlation:.2f}"
    if correlation > TRAINED_CORRELATION:
        return Result(f"{text}: as with trained weights", (v, seconds))
    return Result(f"{text}: trained weights have more than {TRAINED_CORRELATION:g}", (v, seconds), warning=True)


def shifting(noise: torch.Tensor, velocity: Velocity, baseline: torch.Tensor, dtype: torch.dtype) -> Result:
    """Check that a constant added to all ids changes no more than rounding does. Returns this noise floor."""
    floor = noise_floor(lambda program: velocity(program) if program else baseline)
    nudge = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    nudged = velocity(at=noise * (1 + torch.finfo(dtype).eps * nudge))
    rounding = change(nudged, baseline)
    text = f"shifting all ids changes the velocity by {floor:.1e} std, rounding the latents once by {rounding:.1e}"
    if not floor <= ROUNDINGS * rounding:
        raise UserError(
            f"{text}\nIt should be rounding alone, for attention depends on differences of positions only. "
            "Check whether dtype=float32 device=cpu fails too, and report both."
        )
    return Result(text, floor)


def zeroing(velocity: Velocity, baseline: torch.Tensor, floor: float) -> Result:
    """Check that ids matter: setting those of the image to 0 changes the velocity."""
    effect = change(velocity(Program.from_config({"zero": {"op": "zero"}})), baseline)
    if not effect > floor:
        raise UserError(
            f"setting all image ids to 0 changes the velocity by {effect:.1e} std, no more than shifting all ids does "
            f"({floor:.1e})\nThe ids are not used, or their effect is below rounding: try dtype=float32."
        )
    return Result(f"setting all image ids to 0 changes it by {effect:.1e} std")


def change(v: torch.Tensor, baseline: torch.Tensor) -> float:
    """Return the largest difference in standard deviations, as `noise_floor` does."""
    return ((v - baseline).abs().max() / baseline.std()).item()


def images(pipe: Pipeline, tokens: int) -> Result:
    """Encode and decode a drawn image. The result must be finite; how close it is depends on training."""
    cat = scenes.Scene((64, 64), "sand", (scenes.Thing("cat", "red", None, 32, 32, 24),))
    side = round(tokens**0.5) * pipe.pixels_per_token
    drawn = torch.from_numpy(scenes.render(cat)).permute(2, 0, 1)[None].float() / 255
    image = torch.nn.functional.interpolate(drawn, (side, side))
    try:
        latents, rows, cols = pipe.encode(image)
        back = pipe.decode(latents, rows, cols, "pt").cpu()
    except NonFiniteError:
        raise UserError("the autoencoder returns values that are not finite\nTry dtype=bfloat16 or float32.") from None
    psnr = -10 * torch.log10((back - image).square().mean()).item()
    text, after = f"encoded and decoded again: {psnr:.1f} dB", f"; latents std {latents.std():.2f}"
    if psnr > TRAINED_PSNR:
        return Result(f"{text}: as with trained weights{after}")
    return Result(f"{text}: trained weights have more than {TRAINED_PSNR}{after}", warning=True)


def speed(pipe: Pipeline, tokens: int, seconds: float) -> Result:
    """Return how long a step takes, and from it an image of the model's own size."""
    height, width = pipe.size
    rows, cols = pipe.grid(height, width)
    small, full = (forward_flops(pipe.transformer.params, pipe.max_sequence_length, n) for n in (tokens, rows * cols))
    image = seconds * (STEPS * full + decode_flops(pipe.family, pipe.autoencoder.params, height, width)) / small
    side = round(tokens**0.5) * pipe.pixels_per_token
    return Result(
        f"{duration(seconds)} per step of {side} × {side} px; {STEPS} steps of {height} × {width} px: "
        f"about {duration(image)}; {memory(pipe.device)}"
    )
