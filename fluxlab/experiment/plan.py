"""What `plan=true` prints: what a run would do, told by headers and configs. No weights are read, no folder is made."""

from dataclasses import replace
from pathlib import Path

import torch

from fluxlab import checkpoints
from fluxlab.checkpoints.memory import free_memory, total_memory
from fluxlab.checkpoints.stored import Stored, published, stored
from fluxlab.config import ModelRow
from fluxlab.experiment import captures, runner
from fluxlab.experiment.cells import Cell, Settings, batches, cells, references
from fluxlab.experiment.costs import EFFICIENCY, decode_flops, duration, flop, forward_flops, gb, matmul_speed, number
from fluxlab.experiment.spec import REFERENCE_NAMES, Experiment
from fluxlab.experiment.store import CELLS, REFERENCES, Store, look
from fluxlab.loading import pipeline_without_weights
from fluxlab.pipeline import Pipeline
from fluxlab.probes import WORKING, Probe, memory, settle
from fluxlab.select.tokens import names_words


def plan(
    experiment: Experiment, out: Path | None = None, batch_tokens: int | None = None, threads: int | None = None
) -> str:
    """What the same run without plan=true would do, in lines: settings, pictures, batches, time and memory.

    out: the run folder; None where its name depends on a model that is still to be fetched. Raises the run's own
    `UserError`s for what fits neither the model nor the folder; those of prompts, programs and words once the model is
    here.
    """
    runner.check_counts(batch_tokens=batch_tokens, threads=threads)
    store = look(out) if out else None
    known = store.settings() if store else None
    parts = stored(experiment.model)
    fetched, parts = parts is not None, parts or published(experiment.model)
    dtype, device = runner.dtype_of(experiment.dtype), checkpoints.check_device(runner.device_of(experiment, known))
    pipe = pipeline_without_weights(experiment.model, parts, dtype, device)
    same = known is not None and store.record["digest"] == experiment.digest
    if same:
        settings = known
    else:
        told = known is not None and known.device.split(":")[0] == device.type
        unloaded = sum(part.bytes_as(dtype) for part in parts.values())
        room = None if told else runner.default_batch_tokens(pipe, unloaded)
        settings = runner.resolve(experiment, pipe, known, batch_tokens or room, threads)
    runner.refuse_others(settings, out, batch_tokens=batch_tokens, threads=threads)
    work = [(cells(experiment, settings), CELLS), (references(experiment, settings), REFERENCES)]
    made = [[(cell, folder) for cell in batch] for part, folder in work for batch in batches(part, settings)]
    held = {(c.key, folder) for batch in made for c, folder in batch if store and store.has(c, folder)}
    done = {(c.key, f) for batch in made for c, f in batch if store and runner.there(store, experiment, c, f)}
    left = [[c for c, _ in batch] for batch in made if any((c.key, folder) not in done for c, folder in batch)]
    if left and fetched:
        runner.check(experiment, pipe, settings)
        captures.check(experiment, pipe, settings, fixed=same)
    most = max(map(len, made))
    return "\n".join(
        [
            f"{experiment.name}: {experiment.caption}".removesuffix(": "),
            f"folder     {out or 'named once the model is here'} "
            f"({f'holds {len(held)} of {sum(map(len, made))} pictures already' if held else 'new'})",
            *_model_lines(experiment.model, parts, settings),
            *_count_lines(experiment, settings, [part for part, _ in work], made, left),
            _time_line(settings, pipe, parts, left),
            _memory_line(settings, pipe, parts, dtype, most),
            *_attention_lines(experiment, settings, pipe, store, batches(work[0][0], settings)),
        ]
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
        f"{flop(forward)} a forward of one picture, {flop(speed)}/s"
    )


def _memory_line(s: Settings, pipe: Pipeline, parts: dict[str, Stored], dtype: torch.dtype | None, most: int) -> str:
    a = pipe.autoencoder.params
    weights = sum(part.bytes_as(dtype) for part in parts.values())
    decoding = 3 * a.ch * a.ch_mult[min(1, len(a.ch_mult) - 1)] * most * s.height * s.width * pipe.dtype.itemsize
    batch = max(runner.bytes_a_token(pipe) * s.tokens * most, min(decoding, 4e9))  # from 4 GB on it decodes in tiles
    mapped = dtype is None and pipe.device.type == "cpu"  # such weights need main memory, not free memory
    room = total_memory() if mapped else free_memory(pipe.device)
    told = "" if room is None else f"; {s.device} has {gb(room)}{'' if mapped else ' free'}"
    short = ", too little" if room is not None and weights + batch > room else ""
    return f"memory     about {gb(weights + batch)}: weights {gb(weights)}, a batch {gb(batch)}{told}{short}"


def _attention_lines(
    experiment: Experiment, s: Settings, pipe: Pipeline, store: Store | None, made: list[list[Cell]]
) -> list[str]:
    """What a capture takes of disk and memory; nothing where nothing is captured. Words need the tokenizer."""
    asked, tokenizer = experiment.capture, pipe.text.t5_tokenizer
    known = replace(asked, requests=tuple(r for r in asked.requests if tokenizer or not names_words(r.arguments)))
    later = [request.name for request in asked.requests if request not in known.requests]
    lines = [f"{', '.join(later)}: unknown until the tokenizer is there"] if later else []
    if known:
        rows, cols = pipe.grid(s.height, s.width)
        sigmas = pipe.schedule.times(s.steps, rows * cols)

        def needed(prompts: tuple[str, ...]) -> dict[str, int]:
            context = pipe.context(prompts if tokenizer else None, s.max_sequence_length, (rows, cols), sigmas)
            if tokenizer is None:  # else `captures.check` has refused what is to be refused
                Probe(known).begin(context, len(prompts))
            return memory(settle(known, context, len(prompts)), context)

        prompts = {cell.key: cell.prompt for batch in made for cell in batch}
        alone = {prompt: needed((prompt,)) for prompt in dict.fromkeys(prompts.values())}
        together = {tuple(cell.prompt for cell in batch) for batch in made}
        batch = max(map(needed, together), key=lambda parts: sum(parts.values()))
        working = batch.pop(WORKING)
        each = ", ".join(f"{name} {gb(max(one[name] for one in alone.values()))}" for name in batch)
        disk = sum(alone[prompt][name] for prompt in prompts.values() for name in batch)
        there = sum(store.has_arrays(cell, experiment.captures) for one in made for cell in one) if store else 0
        lines += [
            f"{each} a picture; {number(len(prompts), 'file')}, {gb(disk)} on disk"
            + (f", {there:,} there already" if there else ""),
            f"a batch {gb(sum(batch.values()))}, and {gb(working)} to work with, of capture.max_mb={known.max_mb:g} MB",
        ]
    return [f"{'' if i else 'attention':<11}{line}" for i, line in enumerate(lines)]
