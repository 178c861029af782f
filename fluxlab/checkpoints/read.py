"""Load networks: built on the meta device, then given memory-mapped tensors."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from fluxlab.checkpoints.casting import check_finite, dtype_for
from fluxlab.checkpoints.errors import CheckpointError, few, first_line
from fluxlab.checkpoints.files import Entry
from fluxlab.checkpoints.keys import Recipe, their_shapes, to_ours
from fluxlab.checkpoints.memory import Scratch, check_device, check_fits
from fluxlab.checkpoints.networks import AUTOENCODER, TRANSFORMER, OpenNetwork, Params, open_network
from fluxlab.checkpoints.recognise import is_counter
from fluxlab.model import AutoEncoder
from fluxlab.model.protocols import AutoEncoderSizes, Transformer, TransformerSizes

JOIN_IN_MEMORY = 64 * 2**20
"""Joined tensors of up to this many bytes are not worth a scratch file."""


def load_transformer(
    path: "str | PathLike[str]",
    *,
    dtype: torch.dtype | None = None,
    device: "str | torch.device" = "cpu",
    variant: str | None = None,
    params: TransformerSizes | None = None,
    check_memory: bool = True,
) -> Transformer:
    """Load a transformer of FLUX.1 or FLUX.2: a Diffusers pipeline or transformer folder, a single file, or a hub id.

    dtype: None means the dtype of most parameters in the files (float8 counts as bfloat16). On the CPU without a cast
    the weights stay mapped from the file; writing to them never changes it. variant: for files such as
    `….fp16.safetensors`. params: the sizes of a single file, where its metadata and tensor shapes do not give them.
    check_memory: refuse a network that does not fit before reading it; False also leaves mapped weights unread, so
    that they are not checked for NaN and infinity.

    Raises `CheckpointError` (a `UserError`) naming the file and what to do: for files that are missing, damaged or of
    another model, for weights that are not finite, and for finite weights that the dtype would make infinite.
    """
    return _load(TRANSFORMER, path, dtype, device, variant, params, check_memory)


def load_autoencoder(
    path: "str | PathLike[str]",
    *,
    dtype: torch.dtype | None = None,
    device: "str | torch.device" = "cpu",
    variant: str | None = None,
    params: AutoEncoderSizes | None = None,
    check_memory: bool = True,
) -> AutoEncoder:
    """Load an autoencoder of FLUX.1 or FLUX.2: a Diffusers pipeline or vae folder, a single file, or a hub id.

    Arguments and errors as for `load_transformer`. The latent scale and shift of a single file are FLUX.1's unless its
    metadata gives others.
    """
    return _load(AUTOENCODER, path, dtype, device, variant, params, check_memory)


@dataclass(frozen=True)
class _Target:
    """How weights are loaded. unread: leave mapped weights unread, and so unchecked."""

    dtype: torch.dtype
    device: torch.device
    path: Path
    unread: bool

    def keeps(self, entry: Entry) -> bool:
        """Whether a tensor is used as it lies in the file."""
        return self.device.type == "cpu" and entry.dtype == self.dtype


def _load(
    part: str,
    path: "str | PathLike[str]",
    dtype: torch.dtype | None,
    device: "str | torch.device",
    variant: str | None,
    params: Params | None,
    check_memory: bool,
) -> nn.Module:
    opened = open_weights(
        part, path, dtype=dtype, device=device, variant=variant, params=params, unread=not check_memory
    )
    if check_memory:
        _check_memory(opened.net.entries, opened.target)
    opened.model.load_state_dict(opened.assemble(opened.recipe), strict=True, assign=True)
    return opened.model.eval()


@dataclass(frozen=True)
class OpenWeights:
    """A network that was found and recognised, before its weights are read.

    model: on the meta device. recipe: how its tensors are formed from those in the files. shapes: of its tensors.
    """

    net: OpenNetwork
    target: _Target
    model: nn.Module
    recipe: Recipe
    shapes: Mapping[str, tuple[int, ...]]

    def assemble(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return these tensors of the model: mapped where the file holds them in one piece, else joined or cast."""
        return _assemble({name: self.recipe[name] for name in names}, self.net.entries, self.shapes, self.target)


def open_weights(
    part: str,
    path: "str | PathLike[str]",
    *,
    dtype: torch.dtype | None,
    device: "str | torch.device",
    variant: str | None = None,
    params: Params | None = None,
    unread: bool = False,
) -> OpenWeights:
    """Open a network and check the names and shapes of its tensors. Arguments and errors as for `load_transformer`."""
    device = check_device(device)
    dtype_for((), dtype or torch.float32, device, str(path))  # before a hub id is fetched
    net = open_network(part, path, variant, params)
    target = _Target(dtype_for(net.entries.values(), dtype, device, net.path), device, net.path, unread)
    model = _on_meta(part, net)
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if net.layout == "diffusers":
        pieces = net.format.pieces(net.params)
        recipe, expected = to_ours(pieces), their_shapes(pieces, ours)
    else:
        recipe, expected = {name: [(name, None)] for name in ours}, ours
    check_tensors(net.entries, expected, net.unknown, net.path)
    return OpenWeights(net, target, model, recipe, ours)


def _on_meta(part: str, net: OpenNetwork) -> nn.Module:
    try:
        with torch.device("meta"):
            return net.architecture.build(net.params)
    except (RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{net.path}: no {part} can have these sizes: {net.params} ({first_line(error)})"
        ) from None


def check_tensors(
    entries: Mapping[str, Entry], expected: Mapping[str, tuple[int, ...]], unknown: tuple[str, ...], path: Path
) -> None:
    """Raise `CheckpointError` unless the tensors are those expected. unknown: names that belong to no network."""
    missing = [name for name in expected if name not in entries]
    unexpected = [*(name for name in entries if name not in expected), *unknown]
    reshaped = [
        f"{name} {entries[name].shape} instead of {shape}"
        for name, shape in expected.items()
        # some tools write Diffusers' linear attention layers as 1×1 convolutions
        if name in entries and entries[name].shape not in (shape, (*shape, 1, 1))
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    if any(kinds.values()):
        counts = "; ".join(f"{len(names)} {kind} ({few(names, 3)})" for kind, names in kinds.items() if names)
        remedy = (
            "The file is incomplete, or of another model; download it again, or check its config or params."
            if missing or reshaped
            else "The file holds more than FLUX.1 has: it is of another model, or a tool added tensors to it."
        )
        raise CheckpointError(f"{path}: of {len(expected)} tensors {counts}\n{remedy}")


def _check_memory(entries: Mapping[str, Entry], target: _Target) -> None:
    total = mapped = 0
    for entry in entries.values():
        size = torch.Size(entry.shape).numel() * target.dtype.itemsize
        total += size
        mapped += size if target.keeps(entry) else 0
    check_fits({target.dtype: total}, target.device, str(target.path), mapped)


def _assemble(
    recipe: Recipe, entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]], target: _Target
) -> dict[str, Tensor]:
    """Return our tensors: mapped where the file holds them in one piece, else joined in scratch or on the device.

    One at a time, so that a cast costs no more than its result.
    """
    state: dict[str, Tensor] = {}
    joined: dict[str, list[tuple[Entry, tuple[int, int] | None]]] = {}
    for name, parts in recipe.items():
        sources = [(entries[had], rows) for had, rows in parts]
        if is_counter(name):
            state[name] = sources[0][0].read().to(target.device)
            continue
        kept = all(target.keeps(entry) for entry, _ in sources)
        if kept and len(parts) == 1:
            state[name] = sources[0][0].read().view(shapes[name])
        elif kept:
            joined[name] = sources
        else:
            state[name] = _cast(sources, shapes[name], target)
        if name in state and not (kept and target.unread):
            _check(state[name], sources, target)
    for name, weight in _join(joined, shapes).items():
        _check(weight, joined[name], target)
        state[name] = weight
    return state


def _cast(sources: list[tuple[Entry, tuple[int, int] | None]], shape: tuple[int, ...], target: _Target) -> Tensor:
    weight = torch.empty(shape, dtype=target.dtype, device=target.device)
    row = 0
    for entry, rows in sources:
        part = _rows(entry, rows)
        if target.device.type != "cpu":  # devices without float8 or float64 are given what they have
            part = part.to(target.dtype)
        weight[row : row + len(part)].copy_(part.view(-1, *shape[1:]))
        row += len(part)
    return weight


def _check(weight: Tensor, sources: list[tuple[Entry, tuple[int, int] | None]], target: _Target) -> None:
    check_finite(weight, ((entry.name, entry.read()) for entry, _ in sources), target.path)


def _join(
    joined: Mapping[str, list[tuple[Entry, tuple[int, int] | None]]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Join tensors that the file holds in pieces: in main memory if small, else on the pages of a scratch file."""
    size = sum(torch.Size(shapes[name]).numel() * sources[0][0].dtype.itemsize for name, sources in joined.items())
    if size <= JOIN_IN_MEMORY:
        return {name: torch.cat([_rows(*source) for source in sources]) for name, sources in joined.items()}
    scratch = Scratch(size)
    for name, sources in joined.items():
        scratch.add([_rows(*source) for source in sources], shapes[name])
    return dict(zip(joined, scratch.tensors(), strict=True))


def _rows(entry: Entry, rows: tuple[int, int] | None) -> Tensor:
    tensor = entry.read()
    return tensor if rows is None else tensor[slice(*rows)]
