"""Networks from checkpoints: built on the meta device, then given memory-mapped tensors."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from fluxlab.checkpoints.errors import CheckpointError, few, first_line
from fluxlab.checkpoints.files import DTYPES, Entry, open_tensors, read_json
from fluxlab.checkpoints.finding import find_network, networks, no_network
from fluxlab.checkpoints.keys import (
    Piece,
    Recipe,
    autoencoder_pieces,
    new_autoencoder_name,
    their_shapes,
    to_ours,
    transformer_pieces,
)
from fluxlab.checkpoints.memory import Scratch, check_device, check_fits
from fluxlab.checkpoints.params import METADATA_KEY, autoencoder_params, from_metadata, transformer_params
from fluxlab.checkpoints.shapes import autoencoder_params_from_shapes, transformer_params_from_shapes
from fluxlab.model import AutoEncoder, AutoEncoderParams, Flux, FluxParams

JOIN_IN_MEMORY = 64 * 2**20
"""Joined tensors of up to so many bytes are not worth a scratch file."""


@dataclass(frozen=True)
class _Part:
    """What differs between the two networks."""

    name: str
    build: Callable
    params: type
    pieces: Callable[..., list[Piece]]
    from_config: Callable
    from_shapes: Callable


_TRANSFORMER = _Part(
    "transformer", Flux, FluxParams, transformer_pieces, transformer_params, transformer_params_from_shapes
)
_AUTOENCODER = _Part(
    "autoencoder",
    AutoEncoder,
    AutoEncoderParams,
    autoencoder_pieces,
    autoencoder_params,
    autoencoder_params_from_shapes,
)


def load_transformer(
    path: "str | PathLike[str]",
    *,
    dtype: torch.dtype | None = None,
    device: "str | torch.device" = "cpu",
    variant: str | None = None,
    params: FluxParams | None = None,
    check_memory: bool = True,
) -> Flux:
    """FLUX.1's transformer from a Diffusers pipeline or transformer folder, an original single file, or a hub id.

    dtype: None keeps each tensor's own. On the CPU without a cast the weights stay mapped from the file and are read
    when used; writing to them never changes it. variant: for files such as `….fp16.safetensors`. params: the sizes of
    a single file, where its metadata and tensor shapes cannot tell them. check_memory: refuse what does not fit
    before reading it. Raises `CheckpointError` (a `UserError`) naming the file and what to do.
    """
    return _load(_TRANSFORMER, path, dtype, device, variant, params, check_memory)


def load_autoencoder(
    path: "str | PathLike[str]",
    *,
    dtype: torch.dtype | None = None,
    device: "str | torch.device" = "cpu",
    variant: str | None = None,
    params: AutoEncoderParams | None = None,
    check_memory: bool = True,
) -> AutoEncoder:
    """FLUX.1's autoencoder from a Diffusers pipeline or vae folder, `ae.safetensors`, or a hub id.

    Arguments and errors as for `load_transformer`. A single file's latent scale and shift are FLUX.1's unless its
    metadata tells others.
    """
    return _load(_AUTOENCODER, path, dtype, device, variant, params, check_memory)


def _load(
    part: _Part,
    path: "str | PathLike[str]",
    dtype: torch.dtype | None,
    device: "str | torch.device",
    variant: str | None,
    params: FluxParams | AutoEncoderParams | None,
    check_memory: bool,
) -> nn.Module:
    if dtype is not None and dtype not in DTYPES.values():
        names = ", ".join(str(known) for known in DTYPES.values())
        raise CheckpointError(f"dtype {dtype}: weights can be read as {names}")
    device = check_device(device)
    net = find_network(path, part.name, variant)
    entries, metadata = open_tensors(net.files)
    if net.layout == "diffusers":
        params = params or part.from_config(read_json(net.path / "config.json"), net.path / "config.json")
    else:
        entries = _out_of_file(entries, part.name, net.path)
        if params is None and METADATA_KEY in metadata:
            params = from_metadata(part.params, metadata[METADATA_KEY], net.path)
        shapes = {name: entry.shape for name, entry in entries.items()}
        params = params or part.from_shapes(shapes, net.path)
    blocks = getattr(params, "depth", 0) + getattr(params, "depth_single_blocks", 0)
    if blocks > len(entries):  # before a million blocks are built
        raise CheckpointError(
            f"{net.path}: {blocks} blocks by its sizes, but only {len(entries)} tensors\n"
            "The config or params are wrong, or the file is incomplete."
        )
    model = _on_meta(part, params, net.path)

    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if net.layout == "diffusers":
        pieces = part.pieces(params)
        recipe, expected = to_ours(pieces), their_shapes(pieces, ours)
        if part.name == "autoencoder":
            entries = {new_autoencoder_name(name): entry for name, entry in entries.items()}
    else:
        recipe, expected = {name: [(name, None)] for name in ours}, ours
    _check_tensors(entries, expected, net.path)
    if check_memory:
        _check_memory(entries, dtype, device, net.path)
    model.load_state_dict(_assemble(recipe, entries, ours, dtype, device, net.path), strict=True, assign=True)
    return model.eval()


def _on_meta(part: _Part, params: FluxParams | AutoEncoderParams, path: Path) -> nn.Module:
    try:
        with torch.device("meta"):
            return part.build(params)
    except (RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: no {part.name} can have these sizes: {params} ({first_line(error)})") from None


def _out_of_file(entries: Mapping[str, Entry], part: str, path: Path) -> dict[str, Entry]:
    """One network's tensors, out of a file in the original layout that may hold more, under prefixes."""
    held = networks(entries)
    if part not in held:
        raise no_network(path, part, entries)
    prefix = held[part]
    return {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}


def _check_tensors(entries: Mapping[str, Entry], expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise `CheckpointError` unless the names and shapes are those expected."""
    missing = [name for name in expected if name not in entries]
    unexpected = [name for name in entries if name not in expected]
    shaped = [
        f"{name} {entries[name].shape} instead of {shape}"
        for name, shape in expected.items()
        # attention as 1×1 convolutions: some tools write Diffusers' linear layers so
        if name in entries and entries[name].shape not in (shape, (*shape, 1, 1))
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shaped}
    if any(kinds.values()):
        told = "; ".join(f"{len(names)} {kind} ({few(names, 3)})" for kind, names in kinds.items() if names)
        raise CheckpointError(
            f"{path}: of {len(expected)} tensors {told}\n"
            "The file is incomplete, or of another model; download it again, or check its config or params."
        )


def _check_memory(entries: Mapping[str, Entry], dtype: torch.dtype | None, device: torch.device, path: Path) -> None:
    sizes: Counter[torch.dtype] = Counter()
    mapped = 0
    for entry in entries.values():
        as_dtype = dtype or entry.dtype
        size = torch.Size(entry.shape).numel() * as_dtype.itemsize
        sizes[as_dtype] += size
        mapped += size if _stays(entry, dtype, device) else 0
    check_fits(dict(sizes), device, str(path), mapped)


def _stays(entry: Entry, dtype: torch.dtype | None, device: torch.device) -> bool:
    """Whether a tensor is used as it lies in the file."""
    return device.type == "cpu" and dtype in (None, entry.dtype)


def _assemble(
    recipe: Recipe,
    entries: Mapping[str, Entry],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype | None,
    device: torch.device,
    path: Path,
) -> dict[str, Tensor]:
    """Our tensors: mapped where they lie in the file in one piece, put together in scratch or on the device otherwise.

    One at a time, so that a cast costs no more than its result.
    """
    state: dict[str, Tensor] = {}
    joined: dict[str, list[tuple[Entry, tuple[int, int] | None]]] = {}
    for name, parts in recipe.items():
        sources = [(entries[had], rows) for had, rows in parts]
        dtypes = {dtype or entry.dtype for entry, _ in sources}
        if len(dtypes) > 1:
            raise CheckpointError(f"{path}: parts of {name} have different dtypes; pass dtype=")
        kept = all(_stays(entry, dtype, device) for entry, _ in sources)
        if kept and len(parts) == 1:
            state[name] = sources[0][0].read().view(shapes[name])
        elif kept:
            joined[name] = sources
        else:
            state[name] = torch.empty(shapes[name], dtype=dtypes.pop(), device=device)
            row = 0
            for entry, rows in sources:
                part = _rows(entry, rows)
                state[name][row : row + len(part)].copy_(part.view(-1, *shapes[name][1:]))
                row += len(part)
    return state | _join(joined, shapes)


def _join(
    joined: Mapping[str, list[tuple[Entry, tuple[int, int] | None]]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Tensors that the file holds in pieces: in main memory if small, else on the pages of a scratch file."""
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
