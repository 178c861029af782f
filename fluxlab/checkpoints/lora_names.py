"""The names that LoRA files give to the layers of a transformer, and where each layer is in our tensors."""

import re
from typing import NamedTuple

from fluxlab.checkpoints.keys import Rows
from fluxlab.families import family_of
from fluxlab.model.protocols import TransformerSizes

_PREFIX = re.compile(
    r"(?:base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|transformer\.|unet\.|lora_unet_|lora_transformer_)"
)


class Where(NamedTuple):
    """A layer of some naming in ours. our_rows: of our weight. up_rows: of the file's matrix that belongs there."""

    ours: str
    our_rows: Rows
    up_rows: Rows


def bare(module: str) -> str:
    """Return the name of a layer without the prefixes that tools put before it."""
    while match := _PREFIX.match(module):
        module = module[match.end() :]
    return module


def layers(p: TransformerSizes) -> dict[str, list[Where]]:
    """Return where each layer of every naming is in our tensors. Names have underscores for dots, as in kohya."""
    found: dict[str, list[Where]] = {}

    def add(module: str, *where: Where) -> None:
        found.setdefault(module.replace(".", "_"), []).extend(where)

    files = family_of(p).files()
    pieces = files.TRANSFORMER.pieces(p)
    whole = dict.fromkeys(piece.ours for piece in pieces)
    for ours in whole:
        add(re.sub(r"\.(?:weight|scale)$", "", ours), *([] if ours.endswith(".bias") else [Where(ours, None, None)]))
    for piece in pieces:
        if piece.theirs.endswith(".weight"):
            place = Where(piece.ours, piece.our_rows, piece.their_rows)
            add(piece.theirs.removesuffix(".weight"), place)
    for module, places in files.lora_aliases(p, found).items():
        add(module, *places)
    return {module: places for module, places in found.items() if places}
