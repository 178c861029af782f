"""`python -m fluxlab.check model=<name>`: whether a model's files are whole, and it computes what FLUX should."""

import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fluxlab.compose import compose, flags, guarded
from fluxlab.config import ModelRow, model_names, model_row

if TYPE_CHECKING:
    import torch

    from fluxlab.checkpoints import Found
    from fluxlab.checkpoints.stored import Stored
    from fluxlab.pipeline import Pipeline
    from fluxlab.positions import Program

T = TypeVar("T")

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


@dataclass
class CheckConfig:
    """The schema of the command line."""

    defaults: list[Any] = field(default_factory=lambda: [{"model": "local"}, "_self_"])
    model: dict[str, Any] = field(default_factory=dict)
    device: str | None = None
    dtype: str | None = None


def main(arguments: list[str] | None = None) -> int:
    """0 when every check is ok, 2 for the first that fails, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return guarded(lambda: _main(arguments), "interrupted")


def _main(arguments: list[str]) -> None:
    asked = flags(arguments)
    if asked.multirun or asked.shell_completion:
        raise ValueError("-m, -sc: one model at a time is checked, see --help")
    if asked.help or not asked.overrides:
        print(_USAGE.format(names=", ".join(model_names())))
    elif asked.cfg:
        print(compose("check", CheckConfig, "check", asked.overrides, asked.config_dir, show=True), end="")
    else:
        run(compose("check", CheckConfig, "check", asked.overrides, asked.config_dir))


_USAGE = """python -m fluxlab.check model=<name> [device=cuda] [dtype=bfloat16]

Checks a model on this machine, a line a check: files, sizes, loading, text encoders, one step, that position ids act
and that only their differences do, the autoencoder; and says how long a picture takes. Nothing is written, but for a
hub id that is fetched. Exits 0 when all is ok, 2 with what failed and what to do.

  model    {names}; or model=local model.path=<folder, file or hub id>
           (a single file: also model.autoencoder=<ae.safetensors> model.text=<Diffusers folder or hub id>)
  device   null: a GPU where there is one
  dtype    float32, bfloat16, float16; null: as stored"""


def run(config: CheckConfig) -> None:
    """Check after check; raises `ValueError` with the name of the first that fails, and what to do."""
    import torch

    from fluxlab.checkpoints import check_device
    from fluxlab.experiment.spec import DTYPES

    if config.dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={config.dtype}: expected {', '.join(DTYPES)} or null (as stored)")
    dtype = getattr(torch, config.dtype) if config.dtype else None
    device = check_device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    row = model_row(config.model, f"model {config.model.get('name', '')}".strip())
    found, parts = _checked("files", lambda: files(row))
    _checked("sha256", lambda: hashes(found.path, [file for part in parts.values() for file in part.files]))
    pipe = _checked("loading", lambda: loading(row, dtype, device))
    for name in ("transformer", "autoencoder"):
        _checked(name, lambda name=name: counts(getattr(pipe, name), parts[name]))
    _checked("text", lambda: text_encoders(pipe, parts))
    start, velocity = probe(pipe)
    untouched, seconds = _checked("step", lambda: one_step(start, velocity))
    floor = _checked("shift", lambda: shifting(start, velocity, untouched, pipe.dtype))
    _checked("ids", lambda: zeroing(velocity, untouched, floor))
    _checked("pictures", lambda: pictures(pipe, start.shape[1]))
    _checked("speed", lambda: speed(pipe, start.shape[1], seconds))


def _checked(name: str, check: Callable[[], tuple[str, T]]) -> T:
    """Run a check and print its line: what it says. Returns what else it gives."""
    import torch

    try:
        said, value = check()
    except (MemoryError, RuntimeError) as error:
        lack = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if not lack:
            raise
        raise ValueError(
            f"failed  {name}: out of memory ({str(error)[:120].splitlines()[0]})\n"
            "Close what else runs there, or try dtype=bfloat16, or device=cpu."
        ) from error
    except (ValueError, OSError) as error:
        raise ValueError(f"failed  {name}: {error}") from error
    print(f"ok  {name:<12}{said}", flush=True)
    return value


def files(row: ModelRow) -> "tuple[str, tuple[Found, dict[str, Stored]]]":
    """What is where; a hub id is fetched first. Raises for what is missing or damaged."""
    from fluxlab import checkpoints
    from fluxlab.checkpoints.finding import resolve
    from fluxlab.checkpoints.stored import stored
    from fluxlab.experiment.plan import gb, number

    found = checkpoints.find(row.path, row.variant)
    beside = {part: getattr(row, part) for part in ("autoencoder", "text")}
    at = {part: str(resolve(path, (part,), row.variant)) for part, path in beside.items() if path}
    parts = stored(replace(row, path=str(found.path), **at))
    kinds = {"pipeline": "a Diffusers folder", "originals": "original files", "transformer": "a transformer alone"}
    held = [
        f"{name} {gb(sum(file.stat().st_size for file in part.files))} in {number(len(part.files), 'file')}"
        for name, part in parts.items()
    ]
    return f"{found.path}: {kinds.get(found.kind, found.kind)}; {', '.join(held)}", (found, parts)


def hashes(path: Path, used: Iterable[Path]) -> tuple[str, None]:
    """Against the folder's manifest, or for what was fetched from a hub against the names that its cache gives files.

    Raises `CheckpointError` naming the files that differ. All bytes are read.
    """
    from fluxlab.checkpoints import CheckpointError
    from fluxlab.checkpoints.manifest import NAME, verify_manifest
    from fluxlab.experiment.plan import number
    from fluxlab.files import sha256_of

    if (path / NAME).is_file():
        verify_manifest(path)
        return f"every file is what {NAME} says", None
    named = [file for file in used if re.fullmatch(r"[0-9a-f]{64}", file.resolve().name)]
    wrong = [str(file) for file in named if sha256_of(file) != file.resolve().name]
    if wrong:
        raise CheckpointError(f"{', '.join(wrong)}: not what was published; delete and fetch again")
    if named:
        return f"{number(len(named), 'weight file')} as published", None
    return f"nothing to compare with: no {NAME}, and not from a hub; a flipped bit would not be seen", None


def loading(row: ModelRow, dtype: "torch.dtype | None", device: "torch.device") -> "tuple[str, Pipeline]":
    from fluxlab.loading import load_row

    start = time.perf_counter()
    pipe = load_row(row, dtype, device)
    seconds = time.perf_counter() - start
    return f"{seconds:.1f} s on {pipe.device}, as {str(pipe.dtype)[6:]}; {memory(pipe.device)}", pipe


def memory(device: "torch.device") -> str:
    """The most this process has held, in words; in main memory the pages of mapped files count too."""
    import torch

    from fluxlab.experiment.plan import gb

    told = []
    if device.type == "cuda":
        told.append(f"{gb(torch.cuda.max_memory_allocated(device))} on the GPU at most")
    if sys.platform != "win32":
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        told.append(f"{gb(most)} of main memory at most")
    return ", ".join(told) or "memory unknown"


def counts(network: "torch.nn.Module", part: "Stored") -> tuple[str, None]:
    """Parameters and tensors, in the original layout, against what the sizes ask for and what the files hold."""
    from fluxlab.checkpoints.stored import on_meta
    from fluxlab.model import AUTOENCODERS, TRANSFORMERS

    expected = on_meta(network.params).state_dict()
    held = network.state_dict()
    numbers = [sum(tensor.numel() for tensor in some.values()) for some in (held, expected)]
    numbers.append(part.parameters.total())
    shapes = [{name: tuple(tensor.shape) for name, tensor in some.items()} for some in (held, expected)]
    if len(set(numbers)) > 1 or shapes[0] != shapes[1]:
        raise ValueError(
            f"{numbers[0]:,} parameters in {len(held)} tensors, {numbers[1]:,} in {len(expected)} expected, "
            f"{numbers[2]:,} in the files\nThe files are of another model than their config says; fetch them again."
        )
    same = [name for name, params in {**TRANSFORMERS, **AUTOENCODERS}.items() if params == network.params]
    size = f"the size of {', '.join(same)}" if same else "as its sizes ask for, which are not FLUX.1's"
    dtypes = " + ".join(sorted(str(dtype)[6:] for dtype in part.parameters))
    return f"{numbers[0]:,} parameters in {len(held)} tensors, {size}; stored as {dtypes}", None


def text_encoders(pipe: "Pipeline", parts: "dict[str, Stored]") -> tuple[str, None]:
    """Finite states, other ones for another prompt."""
    (txt, y), (other_txt, other_y) = (pipe.encode_prompt(prompt, truncate=True) for prompt in PROMPTS)
    for name, states, others in (("T5", txt, other_txt), ("CLIP", y, other_y)):
        if not states.isfinite().all():
            hint = "T5 overflows in float16 on some devices: try dtype=bfloat16" if name == "T5" else "fetch it again"
            raise ValueError(f"{name} gives values that are not finite\n{hint}.")
        if states.equal(others):
            raise ValueError(
                f"{name} gives the same for {PROMPTS[0]!r} and {PROMPTS[1]!r}\nFetch it and its tokenizer again."
            )
    numbers = [f"{parts[name].parameters.total():,}" for name in ("clip", "t5")]
    return (
        f"CLIP {numbers[0]}, T5 {numbers[1]} parameters; finite, and differ between prompts; "
        f"T5 {tuple(txt.shape)} std {txt.float().std():.2f}, CLIP {tuple(y.shape)} std {y.float().std():.2f}",
        None,
    )


def probe(pipe: "Pipeline") -> "tuple[torch.Tensor, Callable[..., torch.Tensor]]":
    """Packed noise `(1, N, C)`, and the velocity at it (or at other latents) under a program, both fp32."""
    import torch

    from fluxlab import sampling

    side = pipe.pixels_per_token * min(SIDE, *(pixels // pipe.pixels_per_token for pixels in pipe.size))
    rows, cols = pipe.grid(side, side)
    z = sampling.noise([0], pipe.autoencoder.params.z_channels, 2 * rows, 2 * cols, torch.float32)
    start = sampling.pack(z)

    def velocity(program: "Program | None" = None, at: "torch.Tensor" = start) -> "torch.Tensor":
        made = pipe.generate(PROMPTS[0], 0, program, side, side, steps=1, latents=at, output="latent", truncate=True)
        return at - made.cpu()  # one step from t = 1 to 0 takes the whole velocity off

    return start, velocity


def one_step(
    start: "torch.Tensor", velocity: "Callable[..., torch.Tensor]"
) -> "tuple[str, tuple[torch.Tensor, float]]":
    """The velocity at pure noise: finite, and as large as flow matching has it. It predicts noise minus picture."""
    import torch

    velocity()  # the first one sets things up
    began = time.perf_counter()
    v = velocity()
    seconds = time.perf_counter() - began
    if not v.isfinite().all():
        raise ValueError("the velocity is not finite\nTry dtype=bfloat16 or float32; else fetch the transformer again.")
    std, alike = v.std().item(), torch.corrcoef(torch.stack((v.flatten(), start.flatten())))[0, 1].item()
    if not STD[0] <= std <= STD[1]:
        raise ValueError(
            f"the velocity's deviation is {std:.3g}, {STD[0]:g} to {STD[1]:g} is expected of noise minus picture\n"
            "The weights are damaged, or not a flow matching model's; fetch them again."
        )
    kind = "as trained weights have it" if alike > 0.5 else "trained weights have more than 0.5"
    return f"velocity finite, std {std:.2f}, correlation with the noise {alike:.2f}: {kind}", (v, seconds)


def shifting(
    start: "torch.Tensor", velocity: "Callable[..., torch.Tensor]", untouched: "torch.Tensor", dtype: "torch.dtype"
) -> tuple[str, float]:
    """The noise floor: a constant added to all ids changes no more than rounding does."""
    import torch

    from fluxlab.positions import noise_floor

    floor = noise_floor(lambda program: velocity(program) if program else untouched)
    nudge = torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
    nudged = velocity(at=start * (1 + torch.finfo(dtype).eps * nudge))
    rounding = change(nudged, untouched)
    told = f"shifting all ids changes the velocity by {floor:.1e} std, rounding the latents once by {rounding:.1e}"
    if not floor <= ROUNDINGS * rounding:
        raise ValueError(
            f"{told}\nIt should be rounding alone, for attention sees differences of positions only. "
            "See whether dtype=float32 device=cpu fails too, and report both."
        )
    return told, floor


def zeroing(velocity: "Callable[..., torch.Tensor]", untouched: "torch.Tensor", floor: float) -> tuple[str, None]:
    """Ids matter: without the image's, the velocity is another."""
    from fluxlab.positions import Program

    effect = change(velocity(Program.from_config({"zero": {"op": "zero"}})), untouched)
    if not effect > floor:
        raise ValueError(
            f"setting all image ids to 0 changes the velocity by {effect:.1e} std, no more than shifting all ids does "
            f"({floor:.1e})\nThe ids are not used, or their effect is below rounding: try dtype=float32."
        )
    return f"setting all image ids to 0 changes it by {effect:.1e} std", None


def change(v: "torch.Tensor", untouched: "torch.Tensor") -> float:
    """The largest difference in deviations, as `noise_floor` has it."""
    return ((v - untouched).abs().max() / untouched.std()).item()


def pictures(pipe: "Pipeline", tokens: int) -> tuple[str, None]:
    """A drawn picture through the autoencoder and back: finite; how near only trained weights can tell."""
    import torch

    from fluxlab import scenes

    cat = scenes.Scene((64, 64), "sand", (scenes.Thing("cat", "red", None, 32, 32, 24),))
    side = round(tokens**0.5) * pipe.pixels_per_token
    drawn = torch.from_numpy(scenes.render(cat)).permute(2, 0, 1)[None] / 255
    picture = torch.nn.functional.interpolate(drawn, (side, side))
    latents, rows, cols = pipe.encode(picture)
    back = pipe.decode(latents, rows, cols, "pt").cpu()
    if not (latents.isfinite().all() and back.isfinite().all()):
        raise ValueError("the autoencoder gives values that are not finite\nTry dtype=bfloat16 or float32.")
    psnr = -10 * torch.log10((back - picture).square().mean()).item()
    kind = "as trained weights have it" if psnr > 25 else "trained weights have more than 25"
    return f"encoded and decoded again: {psnr:.1f} dB: {kind}; latents std {latents.std():.2f}", None


def speed(pipe: "Pipeline", tokens: int, seconds: float) -> tuple[str, None]:
    """What a step takes, and so a picture of the model's own size."""
    from fluxlab.experiment.plan import decode_flops, duration, forward_flops

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


if __name__ == "__main__":
    sys.exit(main())
