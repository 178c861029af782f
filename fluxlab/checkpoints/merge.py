"""Merge LoRAs into a transformer: computed in fp32 and rounded once. Weights that nothing is added to stay mapped."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fluxlab.checkpoints.casting import check_finite
from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.files import Entry
from fluxlab.checkpoints.keys import Rows
from fluxlab.checkpoints.lora import Addition, lora_file, matrix, read_additions
from fluxlab.checkpoints.memory import Scratch
from fluxlab.checkpoints.read import JOIN_IN_MEMORY
from fluxlab.config import Lora
from fluxlab.model.protocols import Transformer


def check_loras(model: Transformer, loras: Sequence[Lora] | None) -> None:
    """Raise the `CheckpointError` that `merge_loras` would raise for names and shapes. Weights may be on "meta"."""
    for lora in loras or ():
        _additions(model, lora)


def merge_loras(model: Transformer, loras: Sequence[Lora] | None) -> None:
    """Add LoRAs to the weights of a transformer, in place: W + Σ scale · alpha / rank · up · down.

    The sum is computed in fp32 (fp64 for an fp64 model) and rounded to the weight's dtype once. On the CPU, large
    results lie on the pages of a scratch file, and weights without a LoRA are left as they are, mapped from their file.
    Norm scales in a file, as in BFL's control LoRAs, replace those of the model whatever the scale. Raises
    `CheckpointError` for files that do not fit, and for values that are not finite.
    """
    merge_changes(model, loras, changes_of(model, loras))


def changes_of(model: Transformer, loras: Sequence[Lora] | None) -> dict[str, list[Addition]]:
    """Return what LoRAs add to each weight, by its name. Weights may be on "meta". Errors as of `merge_loras`."""
    changes: dict[str, list[Addition]] = defaultdict(list)
    for lora in loras or ():
        for addition in _additions(model, lora):
            changes[addition.ours].append(addition)
    return dict(changes)


def merge_changes(model: Transformer, loras: Sequence[Lora] | None, changes: Mapping[str, Sequence[Addition]]) -> None:
    """Add what `changes_of` returned, or a part of it, to the weights of a transformer, as `merge_loras` does."""
    if not changes:
        return
    where = ", ".join(str(lora_file(lora)) for lora in loras)
    weights = dict(model.named_parameters())
    on_cpu = {name for name in changes if weights[name].device.type == "cpu"}
    size = sum(weights[name].nbytes for name in on_cpu)
    scratch = Scratch(size, "for weights with a LoRA") if size > JOIN_IN_MEMORY else None
    stored: list[str] = []
    for name, additions in changes.items():
        merged = merge(weights[name].detach(), additions)
        sources = ((entry.name, entry.read()) for a in additions for entry in (a.up, a.down) if entry)
        check_finite(merged, sources, where)
        if name in on_cpu and scratch:
            scratch.add([merged], tuple(merged.shape))
            stored.append(name)
        else:
            weights[name].data = merged
    for name, merged in zip(stored, scratch.tensors() if scratch else (), strict=True):
        weights[name].data = merged


@contextmanager
def merged(model: Transformer, loras: Sequence[Lora] | None) -> Iterator[None]:
    """Add LoRAs to the weights of a transformer as `merge_loras` does, and put the weights themselves back at the end.

    Nothing is subtracted, so that the weights are the same to the bit. Raises `CheckpointError` also for a transformer
    whose weights are not all on its device, such as one that is streamed.
    """
    if not loras:
        yield
        return
    device = model.img_in.weight.device
    absent = [name for name, w in model.named_parameters() if w.device != device]
    if absent:
        raise CheckpointError(
            f"lora: {len(absent)} weights of this transformer are not on {device}; merge it when the model is loaded: "
            "load_pipeline(lora=…)"
        )
    before = {name: w.data for name, w in model.named_parameters()}
    try:
        merge_loras(model, loras)
        yield
    finally:
        for name, w in model.named_parameters():
            w.data = before[name]


def _additions(model: Transformer, lora: Lora) -> list[Addition]:
    return read_additions(lora, model.params, {name: tuple(w.shape) for name, w in model.named_parameters()})


def merge(weight: Tensor, additions: Sequence[Addition]) -> Tensor:
    """Return the sum of a weight and its additions, in the weight's dtype."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    total = weight.to(dtype, copy=True)
    for a in additions:
        rows = total if a.our_rows is None else total[slice(*a.our_rows)]
        up = _read(a.up, a.up_rows, total)
        if a.replaces:
            rows.copy_(up)
        else:
            rows.add_(up if a.down is None else up @ _read(a.down, None, total), alpha=a.factor)
    return total.to(weight.dtype)


def _read(entry: Entry, rows: Rows, like: Tensor) -> Tensor:
    values = entry.read().reshape(matrix(entry.shape))
    return (values if rows is None else values[slice(*rows)]).to(like.device, like.dtype)
