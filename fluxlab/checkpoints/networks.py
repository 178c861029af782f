"""A transformer or autoencoder as its files describe it: layout, sizes and tensors. No weights are read."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.files import Entry, open_tensors, read_json
from fluxlab.checkpoints.finding import find_network, no_network
from fluxlab.checkpoints.formats import Format
from fluxlab.checkpoints.keys import new_autoencoder_name
from fluxlab.checkpoints.params import METADATA_KEY, check_class, from_metadata
from fluxlab.checkpoints.recognise import recognise
from fluxlab.checkpoints.shapes import renamed_shapes
from fluxlab.families import FAMILIES, Architecture, Family
from fluxlab.model.protocols import AutoEncoderSizes, TransformerSizes

Params = TransformerSizes | AutoEncoderSizes
TRANSFORMER, AUTOENCODER = "transformer", "autoencoder"


@dataclass(frozen=True)
class OpenNetwork:
    """One network in open files.

    path: for messages. layout: "bfl" or "diffusers", by its tensors' names. entries: by the names of that layout.
    unknown: names in the files that belong to no network.
    """

    path: Path
    files: list[Path]
    family: Family
    architecture: Architecture
    format: Format
    layout: str
    entries: dict[str, Entry]
    unknown: tuple[str, ...]
    params: Params


def open_network(
    part: str,
    path: "str | PathLike[str]",
    variant: str | None = None,
    params: Params | None = None,
) -> OpenNetwork:
    """Open the files of a transformer or an autoencoder and read its sizes.

    The sizes come from `params`, else config.json, else the file's metadata, else the tensors' shapes. Raises
    `CheckpointError` for what is missing, damaged, quantised or of another model.
    """
    net = find_network(path, part, variant)
    entries, metadata = open_tensors(net.files)
    contents = recognise(entries, net.path)
    if part not in contents.networks:
        raise no_network(net.files[0], part, frozenset(contents.networks))
    network = contents.networks[part]
    tensors, family = network.tensors, FAMILIES[network.family]
    architecture, form = family.networks[part], getattr(family.files(), part.upper())
    if network.layout == "diffusers" and part == AUTOENCODER:
        tensors = {new_autoencoder_name(name): entry for name, entry in tensors.items()}
    if params is None and net.config:
        params = form.from_config(read_json(net.config), net.config)
    elif params is None and METADATA_KEY in metadata:
        params = from_metadata(architecture.params, metadata[METADATA_KEY], net.path)
    elif params is None:
        shapes = {name: entry.shape for name, entry in tensors.items()}
        renamed = renamed_shapes(shapes, form.renamed) if network.layout == "diffusers" else shapes
        params = form.from_shapes(renamed, net.path)
    if not isinstance(params, architecture.params):
        raise CheckpointError(
            f"{net.path}: params is a {type(params).__name__}, but the file holds {family.title}'s "
            f"{part}; pass {architecture.params.__name__}(…)"
        )
    blocks = getattr(params, "depth", 0) + getattr(params, "depth_single_blocks", 0)
    if blocks > len(tensors):  # before a million blocks are built
        raise CheckpointError(
            f"{net.path}: {blocks} blocks by its sizes, but only {len(tensors)} tensors\n"
            "The config or params are wrong, or the file is incomplete."
        )
    return OpenNetwork(
        net.path, net.files, family, architecture, form, network.layout, tensors, contents.unknown, params
    )


def family_at(path: "str | PathLike[str]", variant: str | None = None) -> Family:
    """Return the family of the transformer at `path`. Raises `CheckpointError` as `find` does."""
    net = find_network(path, TRANSFORMER, variant)
    if net.config:
        return FAMILIES[check_class(read_json(net.config), TRANSFORMER, net.config)]
    return FAMILIES[recognise(open_tensors(net.files)[0], net.path).networks[TRANSFORMER].family]
