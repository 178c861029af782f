"""A transformer or autoencoder as its files describe it: layout, sizes and tensors. No weights are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.files import Entry, open_tensors, read_json
from fluxlab.checkpoints.finding import find_network, no_network
from fluxlab.checkpoints.flux2_keys import autoencoder2_pieces, transformer2_pieces
from fluxlab.checkpoints.flux2_params import (
    autoencoder2_config,
    autoencoder2_params,
    transformer2_config,
    transformer2_params,
)
from fluxlab.checkpoints.keys import Piece, autoencoder_pieces, new_autoencoder_name, transformer_pieces
from fluxlab.checkpoints.params import (
    METADATA_KEY,
    autoencoder_config,
    autoencoder_params,
    check_class,
    from_metadata,
    transformer_config,
    transformer_params,
)
from fluxlab.checkpoints.recognise import FAMILIES, recognise
from fluxlab.checkpoints.shapes import (
    autoencoder2_params_from_shapes,
    autoencoder_params_from_shapes,
    bfl_shapes,
    transformer2_params_from_shapes,
    transformer_params_from_shapes,
)
from fluxlab.model import (
    AutoEncoder,
    AutoEncoder2,
    AutoEncoder2Params,
    AutoEncoderParams,
    Flux,
    Flux2,
    Flux2Params,
    FluxParams,
)

Params = FluxParams | Flux2Params | AutoEncoderParams | AutoEncoder2Params


@dataclass(frozen=True)
class Architecture:
    """A network of one family: its class and sizes, how its tensors correspond to Diffusers', and where sizes are read.

    to_config, from_config: between sizes and a Diffusers config.json. from_shapes: sizes from the shapes of tensors.
    """

    build: Callable
    params: type
    pieces: Callable[..., list[Piece]]
    to_config: Callable
    from_config: Callable
    from_shapes: Callable


@dataclass(frozen=True)
class Part:
    """One of the two networks of a model, in every family."""

    name: str
    architectures: Mapping[str, Architecture]


TRANSFORMER = Part(
    "transformer",
    {
        "flux1": Architecture(
            Flux,
            FluxParams,
            transformer_pieces,
            transformer_config,
            transformer_params,
            transformer_params_from_shapes,
        ),
        "flux2": Architecture(
            Flux2,
            Flux2Params,
            transformer2_pieces,
            transformer2_config,
            transformer2_params,
            transformer2_params_from_shapes,
        ),
    },
)
AUTOENCODER = Part(
    "autoencoder",
    {
        "flux1": Architecture(
            AutoEncoder,
            AutoEncoderParams,
            autoencoder_pieces,
            autoencoder_config,
            autoencoder_params,
            autoencoder_params_from_shapes,
        ),
        "flux2": Architecture(
            AutoEncoder2,
            AutoEncoder2Params,
            autoencoder2_pieces,
            autoencoder2_config,
            autoencoder2_params,
            autoencoder2_params_from_shapes,
        ),
    },
)


def architecture_of(params: Params) -> Architecture:
    """Return the architecture that has these sizes."""
    known = (*TRANSFORMER.architectures.values(), *AUTOENCODER.architectures.values())
    return next(architecture for architecture in known if isinstance(params, architecture.params))


@dataclass(frozen=True)
class OpenNetwork:
    """One network in open files.

    path: for messages. family: "flux1" or "flux2". layout: "bfl" or "diffusers", by its tensors' names. entries: by the
    names of that layout.
    unknown: names in the files that belong to no network.
    """

    path: Path
    files: list[Path]
    family: str
    architecture: Architecture
    layout: str
    entries: dict[str, Entry]
    unknown: tuple[str, ...]
    params: Params


def open_network(
    part: Part,
    path: "str | PathLike[str]",
    variant: str | None = None,
    params: Params | None = None,
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
    tensors, architecture = network.tensors, part.architectures[network.family]
    if network.layout == "diffusers" and part is AUTOENCODER:
        tensors = {new_autoencoder_name(name): entry for name, entry in tensors.items()}
    if params is None and net.config:
        params = architecture.from_config(read_json(net.config), net.config)
    elif params is None and METADATA_KEY in metadata:
        params = from_metadata(architecture.params, metadata[METADATA_KEY], net.path)
    elif params is None:
        shapes = {name: entry.shape for name, entry in tensors.items()}
        params = architecture.from_shapes(bfl_shapes(shapes) if network.layout == "diffusers" else shapes, net.path)
    if not isinstance(params, architecture.params):
        raise CheckpointError(
            f"{net.path}: params is a {type(params).__name__}, but the file holds {FAMILIES[network.family]}'s "
            f"{part.name}; pass {architecture.params.__name__}(…)"
        )
    blocks = getattr(params, "depth", 0) + getattr(params, "depth_single_blocks", 0)
    if blocks > len(tensors):  # before a million blocks are built
        raise CheckpointError(
            f"{net.path}: {blocks} blocks by its sizes, but only {len(tensors)} tensors\n"
            "The config or params are wrong, or the file is incomplete."
        )
    return OpenNetwork(
        net.path, net.files, network.family, architecture, network.layout, tensors, contents.unknown, params
    )


def family_of(path: "str | PathLike[str]", variant: str | None = None) -> str:
    """Return the family of the transformer at `path`: "flux1" or "flux2". Raises `CheckpointError` as `find` does."""
    net = find_network(path, "transformer", variant)
    if net.config:
        return check_class(read_json(net.config), "transformer", net.config)
    return recognise(open_tensors(net.files)[0], net.path).networks["transformer"].family
