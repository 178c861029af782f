"""What `plan=true` prints: what a run would do, from headers and configs. Reads no weights and writes nothing."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fluxlab import checkpoints, placement
from fluxlab.checkpoints.memory import free_memory, total_memory
from fluxlab.checkpoints.stored import Stored, published, stored
from fluxlab.config import Lora, ModelRow
from fluxlab.experiment import captures, reference_images, runner, settings
from fluxlab.experiment.cells import Settings
from fluxlab.experiment.costs import EFFICIENCY, decode_flops, duration, flop, forward_flops, gb, matmul_speed, number
from fluxlab.experiment.notes import notes
from fluxlab.experiment.outlook import Outlook, outlook
from fluxlab.experiment.spec import REFERENCE_NAMES, Experiment
from fluxlab.experiment.store import find_store
from fluxlab.experiment.work import unused_images
from fluxlab.families import family_of
from fluxlab.loading import pipeline_without_weights, schedule_of, streamed_sizes
from fluxlab.memory import Memory, ModelSizes, Room, make_plan
from fluxlab.memory.costs import decode_bytes
from fluxlab.memory.sizes import sizes_of
from fluxlab.memory.streaming import room_of
from fluxlab.pipeline import Pipeline
from fluxlab.probes import WORKING, Probe, memory, resolve
from fluxlab.references import Grids
from fluxlab.select.tokens import names_words


def plan(
    experiment: Experiment,
    out: Path | None = None,
    batch_tokens: int | None = None,
    threads: int | None = None,
    memory: Memory | Mapping[str, Any] | str | None = None,
) -> str:
    """Return what the same run without plan=true would do: settings, images, batches, time and memory.

    out: the run folder; None if its name depends on a model that is not downloaded yet. Raises the `UserError`s that
    the run would raise for what does not fit the model or the folder. Those about prompts, programs and words need
    the model's files.
    """
    settings.check_counts(batch_tokens=batch_tokens, threads=threads)
    store = find_store(out) if out else None
    if store:
        runner.check_name(experiment, store)
    known = store.settings() if store else None
    parts = stored(experiment.model)
    downloaded, parts = parts is not None, parts or published(experiment.model)
    dtype = checkpoints.dtype_of(experiment.dtype, experiment.model)
    device = checkpoints.check_device(settings.device_of(experiment, known))
    pipe = pipeline_without_weights(experiment.model, parts, dtype, device)
    same = known is not None and store.record["digest"] == experiment.digest
    request, room = Memory.from_config(memory), room_of(device)
    placed = streamed_sizes(experiment.model, parts, dtype, device, request, room)
    sizes = placed or sizes_of(experiment.model, parts, dtype, device)
    if same:
        resolved = known
    else:
        same_device = known is not None and known.device.split(":")[0] == device.type
        unloaded = sum(part.bytes_as(dtype) for part in parts.values())
        default = None if same_device else settings.default_batch_tokens(pipe, unloaded, placed is not None)
        resolved = settings.resolve(experiment, pipe, known, batch_tokens or default, threads)
    settings.check_unchanged(resolved, out, batch_tokens=batch_tokens, threads=threads)
    seen = outlook(experiment, resolved, store)
    if seen.left and downloaded:
        runner.check(experiment, pipe, resolved)
        captures.check(experiment, pipe, resolved, fixed=same)
    content = f"holds {seen.stored} of {seen.every} images" if seen.stored else "new"
    changed = unused_images(experiment, resolved, store) if store and not same else ""
    return "\n".join(
        [
            f"{experiment.name}: {experiment.caption}".removesuffix(": "),
            f"folder     {out or 'named once the model is downloaded'} ({content})",
            *([f"           {changed}"] if changed else []),
            *_model_lines(experiment.model, parts, resolved),
            *_reference_lines(experiment, resolved),
            *_input_lines(experiment),
            *_count_lines(experiment, resolved, seen),
            *_headed("notes", notes(experiment, pipe, resolved)),
            _time_line(resolved, pipe, parts, seen, _most_tokens(experiment, resolved)),
            _memory_line(resolved, pipe, parts, dtype, seen.together, _most_tokens(experiment, resolved))
            if sizes is None
            else _planned_line(experiment, resolved, pipe, sizes, request, room, seen, placed is not None),
            *_attention_lines(experiment, resolved, pipe, seen),
        ]
    )


def _model_lines(row: ModelRow, parts: dict[str, Stored], s: Settings) -> list[str]:
    def files(name: str, *names: str) -> str:
        every_file = [file for part in names for file in parts[part].files]
        size = sum(file.stat().st_size for file in every_file) or sum(parts[part].bytes_as(None) for part in names)
        dtypes = "+".join(sorted({str(dtype)[6:] for part in names for dtype in parts[part].parameters}))
        return f"{name} {gb(size)} {dtypes}" + (f" in {number(len(every_file), 'file')}" if every_file else "")

    rows, cols = s.height // s.pixels_per_token, s.width // s.pixels_per_token
    guidance = {"guidance": s.guidance, "true_cfg": s.true_cfg}
    extra = "".join(f", {key} {value:g}" for key, value in guidance.items() if value is not None)
    texts = [name for name in parts if name not in ("transformer", "autoencoder")]
    download = "" if parts[texts[-1]].files else ", not downloaded yet"
    listed = (
        files("transformer", "transformer"),
        files("autoencoder", "autoencoder"),
        files(family_of(parts["transformer"].params).text_files().TITLE, *texts),
    )
    path = f"{row.name}: {row.path}" if row.name != row.path else row.path
    return [
        f"model      {path}{download}",
        f"files      {', '.join(listed)}",
        *(f"lora       {lora.scale:g} × {lora.path}{_without_text(lora)}" for lora in row.lora or ()),
        f"image      {s.height} × {s.width} px, {s.steps} steps{extra}; "
        f"{s.tokens:,} tokens: {rows} × {cols} image + {s.max_sequence_length} text",
        f"schedule   {schedule_of(row, parts).describe()}",
        f"computed   {s.device}, {s.dtype}, attention {s.kernel}, {number(s.threads, 'thread')}",
    ]


def _reference_lines(experiment: Experiment, s: Settings) -> list[str]:
    """Return the sizes of reference images, and how many tokens they add."""
    lines = []
    for images in dict.fromkeys(experiment.references):
        listed = ", ".join(f"{height} × {width}" for height, width in (image.size for image in images))
        lines.append(f"{listed or 'none'} px: {reference_images.tokens(images, s.pixels_per_token):,} tokens more")
    return _headed("references", lines)


def _input_lines(experiment: Experiment) -> list[str]:
    """Return what tasks work on, and what the number of forwards leaves out; no line without tasks."""
    if not experiment.tasks:
        return []
    sizes = {"{} × {}".format(*one.image.size): None for one in experiment.inputs}
    lines = [f"{number(len(experiment.inputs), 'image')} of {', '.join(sizes)} px"]
    inverted = [name for name, task in experiment.tasks.items() if task.inverts]
    if inverted:
        lines.append(f"not counted below: inversions, one for each image of {', '.join(inverted)}")
    return _headed("inputs", lines)


def _most_tokens(experiment: Experiment, s: Settings) -> int:
    """Return the tokens of the longest sequence, with reference images and texts of regions."""
    return s.tokens + runner.most_further_tokens(experiment, s)


def _without_text(lora: Lora) -> str:
    return ", without its text encoders" if lora.text_encoders == "ignore" else ""


def _count_lines(experiment: Experiment, s: Settings, seen: Outlook) -> list[str]:
    counts = {"variant": experiment.variants, "prompt": experiment.prompts, "seed": experiment.seeds}
    product = " × ".join(number(len(values), word) for word, values in counts.items())
    every_cell = math.prod(map(len, counts.values()))
    names = [name for name in REFERENCE_NAMES if name in seen.controls]
    width = max(map(len, experiment.variants))
    to_do = "" if seen.left == seen.batches else f", {seen.left:,} of them to do"
    size = number(seen.largest, "image") + (f", {seen.together} at once" if seen.together < seen.largest else "")
    without = s.steps * seen.images
    shared = f"           {seen.rows:,} of {without:,} steps: variants share those before they act differently"
    return [
        f"cells      {product} = {every_cell:,}, {seen.distinct:,} distinct; "
        f"and {number(sum(seen.controls.values()), 'control')}: {', '.join(names)}",
        f"batches    {seen.batches:,} of up to {size} ({seen.together * _most_tokens(experiment, s):,} tokens){to_do}; "
        f"{number(seen.forwards * evaluations(s), 'forward')}",
        *([shared] if seen.rows < without and not experiment.tasks else []),
        "variants",
        *(f"  {name:<{width}}  {experiment.describe(name)}" for name in experiment.variants),
    ]


def evaluations(s: Settings) -> int:
    """Return the number of forwards per step: 2 with true_cfg."""
    return 1 if s.true_cfg in (None, 1) else 2


def _time_line(s: Settings, pipe: Pipeline, parts: dict[str, Stored], seen: Outlook, tokens: int) -> str:
    p = pipe.transformer.params
    if not seen.images:
        return "time       nothing to do"
    speed = EFFICIENCY * matmul_speed(p, tokens * seen.left_together, pipe.dtype, pipe.device, s.threads)
    forward = forward_flops(p, s.max_sequence_length, tokens - s.max_sequence_length)
    decoding = seen.images * decode_flops(pipe.family, pipe.autoencoder.params, s.height, s.width)
    sampling = (seen.rows + seen.picking) * evaluations(s) * forward + decoding
    prompts = len(seen.prompts) + evaluations(s) - 1
    reader = list(parts.values())[-1]  # T5, or the language model
    encoding = 2 * reader.parameters.total() * s.max_sequence_length * prompts
    return (
        f"time       about {duration((sampling + encoding) / speed)}, plus loading and measuring: "
        f"{flop(forward)} per forward and image, {flop(speed)}/s"
    )


def _memory_line(
    s: Settings, pipe: Pipeline, parts: dict[str, Stored], dtype: torch.dtype | None, most: int, tokens: int
) -> str:
    a = pipe.autoencoder.params
    weights = sum(part.bytes_as(dtype) for part in parts.values())
    decoding = decode_bytes(a, most, s.height, s.width, pipe.dtype.itemsize)
    batch = max(settings.bytes_per_token(pipe) * tokens * most, decoding)
    mapped = dtype is None and pipe.device.type == "cpu"  # weights mapped from the file need no free memory
    available = total_memory() if mapped else free_memory(pipe.device)
    device = "" if available is None else f"; {s.device} has {gb(available)}{'' if mapped else ' free'}"
    short = ", not enough" if available is not None and weights + batch > available else ""
    return f"memory     about {gb(weights + batch)}: weights {gb(weights)}, a batch {gb(batch)}{device}{short}"


def _planned_line(
    experiment: Experiment,
    s: Settings,
    pipe: Pipeline,
    sizes: ModelSizes,
    request: Memory,
    room: Room,
    seen: Outlook,
    streams: bool,
) -> str:
    """Return where a model is kept, and what that takes. Word maps need the tokenizer."""
    prompts, probes = [cell.prompt for cell in seen.group], 0
    if experiment.captures and prompts and pipe.text.tokenizer:
        rows, cols = pipe.grid(s.height, s.width)
        context = pipe.context(prompts, s.max_sequence_length, (rows, cols), pipe.schedule.times(s.steps, rows * cols))
        probes = placement.probe_bytes(Probe(experiment.capture), context, len(prompts), pipe.device)
    references = runner.most_further_tokens(experiment, s)
    work = placement.workload(s, max(1, len(prompts)), max(1, seen.left), probes, references, seen.left_together)
    if streams:
        return f"memory     {make_plan(sizes, work, request, room, streams=True).describe()}"
    plan = make_plan(sizes, work, Memory("resident"), room)
    short = ", not enough" if plan.free is not None and plan.peak_bytes > plan.free else ""
    return f"memory     {plan.describe()}{short}"


def _attention_lines(experiment: Experiment, s: Settings, pipe: Pipeline, seen: Outlook) -> list[str]:
    """Return what a capture takes of disk and memory; no line without a capture. Words need the tokenizer."""
    capture, tokenizer = experiment.capture, pipe.text.tokenizer is not None
    known = replace(capture, requests=tuple(r for r in capture.requests if tokenizer or not names_words(r.arguments)))
    later = [request.name for request in capture.requests if request not in known.requests]
    lines = [f"{', '.join(later)}: unknown until the tokenizer is downloaded"] if later else []
    if known:
        rows, cols = pipe.grid(s.height, s.width)
        sigmas = pipe.schedule.times(s.steps, rows * cols)

        def bytes_of(prompts: tuple[str, ...]) -> dict[str, int]:
            images = experiment.references_of(prompts[0])  # a batch has one token layout
            grid = Grids((rows, cols), reference_images.grids(images, s.pixels_per_token))
            context = pipe.context(prompts if tokenizer else None, s.max_sequence_length, grid, sigmas)
            if not tokenizer:  # with a tokenizer, `captures.check` has raised already
                Probe(known).begin(context, len(prompts))
            return memory(resolve(known, context, len(prompts)), context)

        files, disk, most = seen.distinct // len(experiment.prompts), 0, {}  # files of each prompt
        for prompt in experiment.prompts:
            alone = bytes_of((prompt,))
            del alone[WORKING]
            most = {name: max(size, most.get(name, 0)) for name, size in alone.items()}
            disk += files * sum(alone.values())
        largest = max(map(bytes_of, captures.compositions(experiment, s)), key=lambda sizes: sum(sizes.values()))
        working = largest.pop(WORKING)
        per_image = ", ".join(f"{name} {gb(size)}" for name, size in most.items())
        lines += [
            f"{per_image} per image; {number(seen.distinct, 'file')}, {gb(disk)} on disk"
            + (f", {seen.arrays:,} stored already" if seen.arrays else ""),
            f"a batch {gb(sum(largest.values()))}, and {gb(working)} of working memory, "
            f"of capture.max_mb={known.max_mb:g} MB",
        ]
    return _headed("attention", lines)


def _headed(heading: str, lines: list[str]) -> list[str]:
    return [f"{'' if i else heading:<11}{line}" for i, line in enumerate(lines)]
