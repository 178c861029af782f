"""What `plan=true` prints: what a run would do, told by headers and configs. No weights are read, no folder is made."""

import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fluxlab import checkpoints, sampling
from fluxlab.checkpoints.memory import free_memory, total_memory
from fluxlab.checkpoints.stored import ENCODERS, Stored, here, on_meta, published, stored
from fluxlab.config import ModelRow
from fluxlab.experiment import runner
from fluxlab.experiment.cells import Cell, Settings, batches, cells, references
from fluxlab.experiment.spec import REFERENCE_NAMES, Experiment
from fluxlab.experiment.store import CELLS, EXPERIMENT, LOCK, REFERENCES, Store
from fluxlab.model import AutoEncoderParams, FluxParams
from fluxlab.model.layers import linear
from fluxlab.model.text import TextEncoders
from fluxlab.pipeline import Pipeline

__all__ = ["here", "plan"]

EFFICIENCY = 0.5
"""Of the speed of one matrix product, what a run keeps. Measured on a CPU: 0.3 for 64 channels in bf16, 0.9 for 768."""


def plan(
    experiment: Experiment, out: Path | None = None, batch_tokens: int | None = None, threads: int | None = None
) -> str:
    """What the same run without plan=true would do, in lines: settings, pictures, batches, time and memory.

    out: the run folder; None where its name depends on a model that is still to be fetched. Raises the run's own
    `ValueError`s for what fits neither the model nor the folder; those of prompts and programs once the model is here.
    """
    store = _store(out)
    known = store.settings() if store else None
    parts = stored(experiment.model)
    fetched, parts = parts is not None, parts or published(experiment.model)
    dtype, device = runner.dtype_of(experiment.dtype), checkpoints.check_device(runner.device_of(experiment, known))
    pipe = hollow(experiment.model, parts, dtype, device)
    if known is not None and store.record["digest"] == experiment.digest:
        settings = known
    else:
        told = known is not None and known.device.split(":")[0] == device.type
        room = None if told or device.type != "cuda" else batch_tokens_beside(pipe, parts, dtype)
        settings = runner.resolve(experiment, pipe, known, batch_tokens or room, threads)
    _refuse_others(settings, out, batch_tokens=batch_tokens, threads=threads)
    if fetched:
        runner.check(experiment, pipe, settings)
    work = [(cells(experiment, settings), CELLS), (references(experiment, settings), REFERENCES)]
    made = [[(cell, folder) for cell in batch] for part, folder in work for batch in batches(part, settings)]
    done = {(c.key, folder) for batch in made for c, folder in batch if store and store.has(c, folder)}
    left = [[c for c, _ in batch] for batch in made if any((c.key, folder) not in done for c, folder in batch)]
    most = max(map(len, made))
    return "\n".join(
        [
            f"{experiment.name}: {experiment.caption}".removesuffix(": "),
            f"folder     {out or 'named once the model is here'} "
            f"({f'holds {len(done)} of {sum(map(len, made))} pictures already' if done else 'new'})",
            *_model_lines(experiment.model, parts, settings),
            *_count_lines(experiment, settings, [part for part, _ in work], made, left),
            _time_line(settings, pipe, parts, left),
            _memory_line(settings, pipe, parts, dtype, most),
        ]
    )


def hollow(row: ModelRow, parts: dict[str, Stored], dtype: torch.dtype | None, device: torch.device) -> Pipeline:
    """The pipeline that `load_row` makes, but without weights: enough to settle sizes, and to check prompts, programs.

    Only the transformer's first layer lies on `device`: a pipeline knows its device and dtype by it.
    """
    transformer, autoencoder = (
        on_meta(parts[name].params).to(dtype or parts[name].dtype) for name in ("transformer", "autoencoder")
    )
    transformer.img_in.to_empty(device=device)
    p, like = transformer.params, transformer.img_in.weight
    clip = _Silent(p.vec_in_dim, dtype or parts["clip"].dtype, like)
    t5 = _Silent(p.context_in_dim, dtype or parts["t5"].dtype, like)
    schedule = replace(sampling.FLUX_SCHEDULE, use_dynamic_shifting=p.guidance_embed, shift=1.0)
    tokenizers = dict.fromkeys(ENCODERS)
    if parts["t5"].files:
        from transformers import AutoTokenizer

        root = parts["t5"].files[0].parents[1]
        tokenizers = {
            name: AutoTokenizer.from_pretrained(root / folder, local_files_only=True)
            for name, (_, folder) in ENCODERS.items()
        }
        scheduler = parts["transformer"].files[0].parents[1] / "scheduler"
        if scheduler.is_dir():
            schedule = sampling.read_schedule(scheduler)
    side = 128 * autoencoder.params.factor
    return Pipeline(
        transformer,
        autoencoder,
        TextEncoders(tokenizers["clip"], clip, tokenizers["t5"], t5),
        schedule,
        steps=row.steps or (28 if p.guidance_embed else 4),
        guidance=(3.5 if row.guidance is None else row.guidance) if p.guidance_embed else None,
        max_sequence_length=row.max_sequence_length or 512,
        size=row.size or (side, side),
        name=row.name,
    )


class _Silent(nn.Module):
    """In a text encoder's place: states of the right shape, always 0."""

    def __init__(self, width: int, dtype: torch.dtype, like: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype))
        self.zeros = like.new_zeros(width)
        self.device = like.device

    def forward(self, ids: torch.Tensor) -> "_States":
        return _States((self.zeros.expand(*ids.shape, -1),))


class _States(tuple):
    @property
    def pooler_output(self) -> torch.Tensor:
        return self[0][:, 0]


def forward_flops(p: FluxParams, text: int, image: int) -> float:
    """Of one forward of one sample: 2 · parameters · the tokens that meet them, and attention's two products."""
    d, tokens, blocks = p.hidden_size, text + image, p.depth + p.depth_single_blocks
    layers = tokens * blocks * (4 * d * d + 2 * d * int(d * p.mlp_ratio))  # the same in a single block and in a stream
    ends = image * d * (p.in_channels + p.out_channels) + text * d * p.context_in_dim
    once = d * d * (12 * p.depth + 3 * p.depth_single_blocks + 2)  # modulations: once a sample
    return 2 * (layers + ends + once) + 4 * tokens**2 * d * blocks


def decode_flops(p: AutoEncoderParams, height: int, width: int) -> int:
    """Of decoding one picture of so many pixels, counted on a network without weights."""
    with FlopCounterMode(display=False) as counted, torch.inference_mode():
        latents = torch.empty(1, p.z_channels, height // p.factor, width // p.factor, device="meta")
        on_meta(p).decode(latents, tile=None)
    return counted.get_total_flops()


def matmul_speed(p: FluxParams, tokens: int, dtype: torch.dtype, device: torch.device, threads: int) -> float:
    """FLOP/s of a product like the model's, from 0.1 s of trying."""
    most = 4096 if device.type == "cuda" else 1024
    rows, width, out = (min(n, most) for n in (tokens, p.hidden_size, int(p.hidden_size * p.mlp_ratio)))
    x, weight = (torch.ones(n, width, dtype=dtype, device=device) for n in (rows, out))
    took, before = [], torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.inference_mode():
        while len(took) < 4 or (sum(took) < 0.1 and len(took) < 100):  # the first ones set things up
            began = time.perf_counter()
            linear(x, weight, None)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took.append(time.perf_counter() - began)
    torch.set_num_threads(before)
    return 2 * rows * width * out / min(took)


def batch_tokens_beside(pipe: Pipeline, parts: dict[str, Stored], dtype: torch.dtype | None) -> int:
    """What `runner.default_batch_tokens` will find once the weights, too, are on the GPU."""
    free = torch.cuda.mem_get_info(pipe.device)[0] - sum(part.bytes_as(dtype) for part in parts.values())
    return max(1, int(free / 2 / _bytes_a_token(pipe)))


def _bytes_a_token(pipe: Pipeline) -> float:
    return pipe.dtype.itemsize * pipe.transformer.params.hidden_size * (12 + 4 * pipe.transformer.params.mlp_ratio)


def _store(out: Path | None) -> Store | None:
    """The store at `out` to look at, None where there is none yet. Raises what opening it would."""
    if out is None or not out.exists():
        return None
    if not out.is_dir():
        raise ValueError(f"out={out}: a file; name a folder")
    others = [p.name for p in out.iterdir() if p.name != LOCK and not p.name.startswith(f".{EXPERIMENT}")]
    if others and not (out / EXPERIMENT).is_file():
        raise ValueError(f"out={out}: holds {others[0]!r} and no {EXPERIMENT}, so it is no run folder; name a new one")
    return Store(out) if others else None


def _refuse_others(settings: Settings, out: Path | None, **asked: int | None) -> None:
    """Raise for what a store's pictures were not made with, as the run does."""
    for key, value in asked.items():
        if value is not None and value < 1:
            raise ValueError(f"{key}={value}: a whole number from 1 is needed, or null")
        if value is not None and value != getattr(settings, key):
            raise ValueError(
                f"{key}={value}: the pictures in {out} were made with {getattr(settings, key)}, and another value "
                "changes their last bits; leave it out, or name another out= folder"
            )


def _model_lines(row: ModelRow, parts: dict[str, Stored], s: Settings) -> list[str]:
    def files(name: str, *of: str) -> str:
        many = [file for part in of for file in parts[part].files]
        size = sum(file.stat().st_size for file in many) or sum(parts[part].bytes_as(None) for part in of)
        dtypes = "+".join(sorted({str(dtype)[6:] for part in of for dtype in parts[part].parameters}))
        return f"{name} {gb(size)} {dtypes}" + (f" in {number(len(many), 'file')}" if many else "")

    rows, cols = s.height // s.pixels_per_token, s.width // s.pixels_per_token
    numbers = {"guidance": s.guidance, "true_cfg": s.true_cfg}
    told = "".join(f", {key} {value:g}" for key, value in numbers.items() if value is not None)
    fetch = "" if parts["t5"].files else ", still to be fetched"
    held = (
        files("transformer", "transformer"),
        files("autoencoder", "autoencoder"),
        files("text encoders", "clip", "t5"),
    )
    return [
        f"model      {row.name}: {row.path}{fetch}" if row.name != row.path else f"model      {row.path}{fetch}",
        f"files      {', '.join(held)}",
        f"picture    {s.height} × {s.width} px, {s.steps} steps{told}; "
        f"{s.tokens:,} tokens: {rows} × {cols} image + {s.max_sequence_length} text",
        f"computed   {s.device}, {s.dtype}, attention {s.kernel}, {number(s.threads, 'thread')}",
    ]


def _count_lines(
    experiment: Experiment, s: Settings, work: list[list[Cell]], made: list[list], left: list[list]
) -> list[str]:
    ran, others = work
    counts = {"variant": experiment.variants, "prompt": experiment.prompts, "seed": experiment.seeds}
    names = [name for name in REFERENCE_NAMES if any(cell.variant == name for cell in others)]
    width, each = max(map(len, experiment.variants)), max(map(len, made))
    todo = "" if len(left) == len(made) else f", {len(left):,} of them to do"
    return [
        f"cells      {' × '.join(number(len(many), word) for word, many in counts.items())} = {len(ran):,}, "
        f"{len({cell.key for cell in ran}):,} distinct; and {number(len(others), 'reference')}: {', '.join(names)}",
        f"batches    {len(made):,} of up to {number(each, 'picture')} ({each * s.tokens:,} tokens){todo}; "
        f"{number(len(left) * s.steps * evaluations(s), 'forward')}",
        "variants",
        *(f"  {name:<{width}}  {program.describe()}" for name, program in experiment.variants.items()),
    ]


def evaluations(s: Settings) -> int:
    """Forwards a step: true guidance takes a second one."""
    return 1 if s.true_cfg in (None, 1) else 2


def _time_line(s: Settings, pipe: Pipeline, parts: dict[str, Stored], left: list[list[Cell]]) -> str:
    p, pictures = pipe.transformer.params, sum(map(len, left))
    if not pictures:
        return "time       nothing to do"
    speed = EFFICIENCY * matmul_speed(p, s.tokens * max(map(len, left)), pipe.dtype, pipe.device, s.threads)
    forward = forward_flops(p, s.max_sequence_length, s.tokens - s.max_sequence_length)
    picture = s.steps * evaluations(s) * forward + decode_flops(pipe.autoencoder.params, s.height, s.width)
    prompts = len({cell.prompt for batch in left for cell in batch}) + evaluations(s) - 1
    encoding = 2 * parts["t5"].parameters.total() * s.max_sequence_length * prompts
    return (
        f"time       about {duration((pictures * picture + encoding) / speed)}, and loading and measuring: "
        f"{_flop(forward)} a forward of one picture, {_flop(speed)}/s"
    )


def _memory_line(s: Settings, pipe: Pipeline, parts: dict[str, Stored], dtype: torch.dtype | None, most: int) -> str:
    a = pipe.autoencoder.params
    weights = sum(part.bytes_as(dtype) for part in parts.values())
    decoding = 3 * a.ch * a.ch_mult[min(1, len(a.ch_mult) - 1)] * most * s.height * s.width * pipe.dtype.itemsize
    batch = max(_bytes_a_token(pipe) * s.tokens * most, min(decoding, 4e9))  # from 4 GB on it decodes in tiles
    mapped = dtype is None and pipe.device.type == "cpu"  # such weights need main memory, not free memory
    room = total_memory() if mapped else free_memory(pipe.device)
    told = "" if room is None else f"; {s.device} has {gb(room)}{'' if mapped else ' free'}"
    short = ", too little" if room is not None and weights + batch > room else ""
    return f"memory     about {gb(weights + batch)}: weights {gb(weights)}, a batch {gb(batch)}{told}{short}"


def gb(size: float) -> str:
    """Bytes as a user reads them."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _flop(count: float) -> str:
    return f"{count / 1e12:.3g} TFLOP" if count >= 1e12 else f"{count / 1e9:.3g} GFLOP"


def duration(seconds: float) -> str:
    """With two digits, in the unit that suits."""
    length, unit = next(((n, unit) for n, unit in ((3600, "h"), (60, "min")) if seconds >= 1.5 * n), (1, "s"))
    return f"{float(f'{seconds / length:.2g}'):g} {unit}"


def number(count: int, word: str) -> str:
    """1 file, 2 files."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"
