"""How the files of a network relate to it, in one family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fluxlab.checkpoints.keys import Piece
from fluxlab.families import family_and_part


@dataclass(frozen=True)
class Format:
    """How a network's tensors correspond to Diffusers', and where its sizes are read.

    to_config, from_config: between sizes and a Diffusers config.json. from_shapes: (shapes of tensors by our names,
    file) → sizes. renamed: patterns of Diffusers' names, and our names of the tensors from which sizes are read.
    """

    pieces: Callable[[Any], list[Piece]]
    to_config: Callable[[Any], dict[str, Any]]
    from_config: Callable[..., Any]
    from_shapes: Callable[..., Any]
    renamed: Mapping[str, str]


def format_of(params: object) -> Format:
    """Return the format of a transformer or an autoencoder with these sizes."""
    family, part = family_and_part(params)
    return getattr(family.files(), part.upper())
