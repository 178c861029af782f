"""The planner: what is kept on the device, what is streamed, and how much memory that takes, from sizes alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fluxlab.errors import UserError
from fluxlab.families import family_of
from fluxlab.memory import costs
from fluxlab.memory.costs import gb
from fluxlab.memory.request import Memory
from fluxlab.memory.scatter import most
from fluxlab.model.protocols import AutoEncoderSizes, TransformerSizes

SPARE = 10**9
"""Bytes of a GPU that stay free if no limit is given: for its kernels' workspaces and other programs."""

SLOTS = 2
"""Blocks of a device's ring: one is computed while the next one is copied."""

PINNED = 3
"""Blocks of the host's ring: one is copied to the device while the next two are read from their file."""

CPU_SLOTS, CPU_DEPTH = 1, 1
"""The same two numbers where the host is the device, and blocks cannot be used as their files have them."""

KEPT = 256 * 10**6
"""Bytes of modulation tables that are kept on the host for the batches of a run."""

TOGETHER = 8
"""Most batches that go through the streamed blocks in turn."""


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model's parts, as the headers of their files give them.

    dtype: of the computation. stored: of the transformer's blocks in their files, which may be float8.
    stored_blocks: bytes of each block as its file has it, without modulations; None means all tensors in `stored`.
    mapped: whether a CPU can compute from the pages of the files, because they hold every tensor in one piece and in
        `dtype`. changed: whether LoRAs are added to blocks as they are used.
    text_bytes: all text encoders once loaded. text_layer_bytes: the largest layer of the largest one, its embeddings
        included.
    """

    transformer: TransformerSizes
    autoencoder: AutoEncoderSizes
    dtype: torch.dtype
    stored: torch.dtype
    autoencoder_dtype: torch.dtype
    text_bytes: int
    text_layer_bytes: int
    stored_blocks: tuple[int, ...] | None = None
    mapped: bool = False
    changed: bool = False

    @property
    def blocks(self) -> int:
        return self.transformer.depth + self.transformer.depth_single_blocks

    @property
    def keeps_stored(self) -> bool:
        """Whether blocks stay as the file has them, and are cast or changed as they are used."""
        return self.stored != self.dtype or self.changed

    def block_bytes(self, block: int, dtype: torch.dtype) -> int:
        """Return the bytes of a block without its modulations."""
        counts = costs.block_counts(self.transformer, block < self.transformer.depth)
        return costs.buffer_bytes(counts, dtype.itemsize)


@dataclass(frozen=True)
class Workload:
    """What a run asks of the model at once.

    batch: samples in one forward. height, width: pixels. text: text tokens. references: tokens of reference images.
    steps: for which modulations are kept. probe_bytes: arrays and working memory of probes, a batch.
    batches: how many batches are to be computed. samples: of a whole batch, if not all of them are in one forward.
    """

    batch: int
    height: int
    width: int
    text: int
    steps: int
    references: int = 0
    probe_bytes: int = 0
    batches: int = 1
    samples: int | None = None

    @property
    def rows(self) -> int:
        """The samples of a batch."""
        return self.samples or self.batch


@dataclass(frozen=True)
class Room:
    """The memory of a device. free: bytes that weights and activations may take; None if unknown, which is no limit.

    used: bytes of the process that are part of a CPU's limit, before anything is loaded.
    """

    device: str
    free: int | None
    used: int = 0


@dataclass(frozen=True)
class Plan:
    """Where everything is kept, and the bytes that it takes on the device.

    streams: whether blocks are placed one by one; False: all weights are on the device from the start.
    resident: indices of blocks that stay on the device, double blocks first. The others are streamed.
    together: batches that go through a streamed block before the next one is loaded.
    text: "first" (encoded before the transformer is on the device, then the encoders are gone), or "layers" (as first,
        one layer of T5 or of the language model at a time).
    decoder: "device", or "host" if an image cannot be decoded in what the device has.
    parts: bytes on the device by name. phases: bytes in use while text is encoded, while the transformer runs and
        while images are decoded. pinned_bytes: of the host's ring. step_bytes: read from files in one pass over all
        blocks. free: the bytes that the plan was made for.
    """

    device: str
    streams: bool
    blocks: int
    resident: tuple[int, ...]
    together: int
    text: str
    decoder: str
    parts: Mapping[str, int] = field(default_factory=dict)
    phases: Mapping[str, int] = field(default_factory=dict)
    pinned_bytes: int = 0
    step_bytes: int = 0
    free: int | None = None

    @property
    def peak_bytes(self) -> int:
        """The largest memory of any phase."""
        return max(self.phases.values())

    @property
    def streamed(self) -> tuple[int, ...]:
        """Indices of the blocks that are loaded as they are used."""
        kept = set(self.resident)
        return tuple(block for block in range(self.blocks) if block not in kept) if self.streams else ()

    def describe(self) -> str:
        """Return the plan as one line of text."""
        p = self.parts
        room = "" if self.free is None else f" of {gb(self.free)}"
        head = f"{gb(self.peak_bytes)}{room} on {self.device}"
        batch = f"a batch {gb(p['activations'] + p['probes'])}, decoding {gb(p['decoding'])}"
        if not self.streams:
            return f"resident, {head}: weights {gb(p['transformer'] + p['autoencoder'])}, text first, {batch}"
        kept = f"{len(self.resident)} of {self.blocks} blocks resident ({gb(p['resident'])}), the others streamed"
        kept = kept if self.resident else f"all {self.blocks} blocks streamed"
        streamed = f" ({gb(self.step_bytes)} a step)"
        if not self.streamed:
            kept, streamed = f"all {self.blocks} blocks resident ({gb(p['resident'])})", ""
        together = f" for {self.together} batches at a time" if self.together > 1 and self.streamed else ""
        text = {"first": "text first", "layers": "text first, layer by layer"}
        decoder = "" if self.decoder == "device" else ", decoded on the host"
        return (
            f"{'streamed' if self.streamed else 'auto'}, {head}: {kept}{streamed}{together}, modulations known in "
            f"advance ({gb(p['tables'])}), {text[self.text]}, {batch}{decoder}"
        )


def make_plan(sizes: ModelSizes, work: Workload, memory: Memory, room: Room, streams: bool = False) -> Plan:
    """Return where the weights go. The same sizes give the same plan: nothing is measured here.

    Everything is resident if it fits. Else modulations are computed in advance, the text is encoded first, and as many
    blocks are resident as fit, scattered evenly. streams: the model was loaded block by block already, so that it is
    never resident as a whole. Raises `UserError` if even one block at a time does not fit.
    """
    free = room.free if memory.limit_bytes is None else memory.limit_bytes
    resident = _resident(sizes, work, room, free)
    fits = memory.mode == "auto" and (free is None or resident.peak_bytes <= free)
    if not streams and (memory.mode == "resident" or fits):
        return resident
    return _streamed(sizes, work, memory, room, free)


def _common(sizes: ModelSizes, work: Workload) -> dict[str, int]:
    p, size = sizes.transformer, sizes.dtype.itemsize
    side = family_of(p).pixels_per_token(sizes.autoencoder)
    tokens = (work.height // side) * (work.width // side) + work.references + work.text
    decoder = sizes.autoencoder_dtype.itemsize
    return {
        "text": sizes.text_bytes,
        "autoencoder": costs.autoencoder_counts(sizes.autoencoder) * decoder,
        "activations": costs.activation_bytes(p, work.batch, tokens, size),
        "waiting": costs.waiting_bytes(p, work.batch, tokens, size),
        "conditioning": work.rows * costs.sample_bytes(p, work.text, tokens, size),
        "probes": work.probe_bytes,
        "encoding": costs.text_activation_bytes(p, work.text, size),
        "decoding": costs.decode_bytes(sizes.autoencoder, work.batch, work.height, work.width, decoder),
    }


def _resident(sizes: ModelSizes, work: Workload, room: Room, free: int | None) -> Plan:
    p, parts = sizes.transformer, _common(sizes, work)
    parts["transformer"] = costs.transformer_bytes(p, sizes.dtype.itemsize)
    parts["packed"] = costs.packed_bytes(p, sizes.dtype.itemsize, room.device)
    kept = room.used + parts["transformer"] + parts["autoencoder"] + parts["conditioning"] + parts["probes"]
    phases = {
        "text": room.used + parts["text"] + parts["encoding"],
        "transformer": kept + parts["packed"] + parts["activations"],
        "decoder": kept + parts["decoding"],
    }
    every = tuple(range(sizes.blocks))
    return Plan(room.device, False, sizes.blocks, every, 1, "first", "device", parts, phases, free=free)


def _streamed(sizes: ModelSizes, work: Workload, memory: Memory, room: Room, free: int | None) -> Plan:
    p, size, parts = sizes.transformer, sizes.dtype.itemsize, _common(sizes, work)
    every = range(sizes.blocks)
    cast = max(sizes.block_bytes(block, sizes.dtype) for block in every) if sizes.keeps_stored else 0
    if sizes.changed:  # the largest weight and what is added to it, in fp32
        cast += 2 * 4 * max(*costs.block_counts(p, True), *costs.block_counts(p, False))
    stored = list(sizes.stored_blocks or [sizes.block_bytes(block, sizes.stored) for block in every])
    on_cpu = room.device == "cpu"
    table = work.rows * work.steps * costs.modulation_width(p) * size
    parts |= {
        "ends": sum(costs.end_counts(p)) * size,
        "tables": table * (1 if room.device != "cpu" else max(1, min(work.batches, KEPT // table))),
        # while the tables are made: those of several batches, and the weights of one block
        "modulations": max(table, min(KEPT, table * work.batches)) + 4 * 6 * p.hidden_size * (p.hidden_size + 1) * size,
        "cast": cast,
    }
    fixed = room.used + parts["ends"] + parts["tables"] + parts["autoencoder"] + parts["conditioning"]
    running = fixed + cast + parts["activations"] + parts["probes"]
    decoding = fixed + parts["decoding"] + parts["probes"]  # ring and casts are freed before
    making = room.used + parts["ends"] + parts["autoencoder"] + parts["modulations"]
    ring = max(stored) * SLOTS
    if on_cpu:  # the pages of one block, or a buffer that is filled and the one that is computed from
        ring = max(stored) * (1 if sizes.mapped else CPU_SLOTS + CPU_DEPTH)

    def left(with_ring: int, decoder: int) -> int:
        return (1 << 62) if free is None else free - max(running + with_ring, decoder, making)

    decoder = "device" if left(ring, decoding) >= 0 or on_cpu else "host"
    decode_peak = decoding if decoder == "device" else 0
    everything = sum(stored) <= left(0, decode_peak) and memory.mode != "streamed"
    if everything and not on_cpu:
        resident, ring = tuple(every), 0
    elif on_cpu or (memory.mode == "streamed" and memory.limit_bytes is None):
        resident = ()
    else:
        resident = most(stored, left(ring, decode_peak))
    parts |= {"resident": sum(stored[block] for block in resident), "ring": ring}
    phases = {
        "modulations": making + parts["resident"],
        "transformer": running + ring + parts["resident"],
        "decoder": (fixed if decoder == "host" else decoding) + parts["resident"],
    }
    least = max(phases.values())
    if free is not None and least > free:
        limit = f"memory.limit_gb={memory.limit_gb:g}" if memory.limit_bytes else f"memory: {gb(free)} free"
        raise UserError(
            f"{limit}: one block at a time needs {gb(least)} on {room.device}, {gb(least - free)} more: "
            f"activations {gb(parts['activations'])}, probes {gb(parts['probes'])}, "
            f"decoding {gb(parts['decoding'])}\n"
            "Raise memory.limit_gb, or use smaller batch_tokens=, height= and width=."
        )
    alone = room.used + parts["encoding"]
    text = "first" if free is None or alone + parts["text"] <= free else "layers"
    phases["text"] = alone + (parts["text"] if text == "first" else sizes.text_layer_bytes)
    room_for_more = 0 if free is None else free - max(phases["transformer"], phases["decoder"])
    each = max(1, parts["waiting"] + parts["probes"] + parts["tables"] + parts["conditioning"])
    streamed = sum(stored) - parts["resident"]
    together = 1 + max(0, min(TOGETHER - 1, work.batches - 1, room_for_more // each)) if streamed else 1
    phases["transformer"] += (together - 1) * each
    phases["decoder"] += (together - 1) * each
    return Plan(
        room.device,
        True,
        sizes.blocks,
        resident,
        together,
        text,
        decoder,
        parts,
        phases,
        pinned_bytes=0 if on_cpu or not streamed else PINNED * max(stored),
        step_bytes=streamed,
        free=free,
    )
