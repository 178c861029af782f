"""A transformer or autoencoder as its files describe it: layout, sizes and tensors. No weights are read."""

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.files import Entry, open_tensors, read_json
from fluxlab.checkpoints.finding import find_network, no_network
from fluxlab.checkpoints.keys import Piece, autoencoder_pieces, new_autoencoder_name, transformer_pieces
from fluxlab.checkpoints.params import METADATA_KEY, autoencoder_params, from_metadata, transformer_params
from fluxlab.checkpoints.recognise import recognise
from fluxlab.checkpoints.shapes import autoencoder_params_from_shapes, bfl_shapes, transformer_params_from_shapes
from fluxlab.model import AutoEncoder, AutoEncoderParams, Flux, FluxParams


@dataclass(frozen=True)
class Part:
    """What differs between the two networks."""

    name: str
    build: Callable
    params: type
    pieces: Callable[..., list[Piece]]
    from_config: Callable
    from_shapes: Callable


TRANSFORMER = Part(
    "transformer", Flux, FluxParams, transformer_pieces, transformer_params, transformer_params_from_shapes
)
AUTOENCODER = Part(
    "autoencoder",
    AutoEncoder,
    AutoEncoderParams,
    autoencoder_pieces,
    autoencoder_params,
    autoencoder_params_from_shapes,
)


@dataclass(frozen=True)
class OpenNetwork:
    """One network in open files.

    path: for messages. layout: "bfl" or "diffusers", by its tensors' names. entries: by the names of that layout.
    unknown: names in the files that belong to no network.
    """

    path: Path
    files: list[Path]
    layout: str
    entries: dict[str, Entry]
    unknown: tuple[str, ...]
    params: FluxParams | AutoEncoderParams


def open_network(
    part: Part,
    path: "str | PathLike[str]",
    variant: str | None = None,
    params: FluxParams | AutoEncoderParams | None = None,
) -> OpenNetwork:
    """Open the files of a network and read its sizes.

    The sizes come from `params`, else config.json, else the file's metadata, else the tensors' shapes. Raises
    `CheckpointError` for what is missing, damaged, quantised or of another model.
    """
    net = find_network(path, part.name, variant)
    entries, metadata = open_tensors(net.files)
    contents = recognise(entries, net.path)
    if part.name not in contents.networks:
        raise no_network(net.files[0], part.name, frozenset(contents.networks))
    network = contents.networks[part.name]
    tensors = network.tensors
    if network.layout == "diffusers" and part is AUTOENCODER:
        tensors = {new_autoencoder_name(name): entry for name, entry in tensors.items()}
    if params is None and net.config:
        params = part.from_config(read_json(net.config), net.config)
    elif params is None and METADATA_KEY in metadata:
        params = from_metadata(part.params, metadata[METADATA_KEY], net.path)
    elif params is None:
        shapes = {name: entry.shape for name, entry in tensors.items()}
        params = part.from_shapes(bfl_shapes(shapes) if network.layout == "diffusers" else shapes, net.path)
    blocks = getattr(params, "depth", 0) + getattr(params, "depth_single_blocks", 0)
    if blocks > len(tensors):  # before a million blocks are built
        raise CheckpointError(
            f"{net.path}: {blocks} blocks by its sizes, but only {len(tensors)} tensors\n"
            "The config or params are wrong, or the file is incomplete."
        )
    return OpenNetwork(net.path, net.files, network.layout, tensors, contents.unknown, params)
