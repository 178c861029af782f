"""The names that LoRA files give to the layers of a transformer, and where each layer is in our tensors."""

import re
from collections.abc import Callable
from typing import NamedTuple

from fluxlab.checkpoints.keys import Rows
from fluxlab.checkpoints.networks import architecture_of
from fluxlab.model import Flux2Params, FluxParams

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


def layers(p: FluxParams | Flux2Params) -> dict[str, list[Where]]:
    """Return where each layer of every naming is in our tensors. Names have underscores for dots, as in kohya."""
    found: dict[str, list[Where]] = {}

    def add(module: str, *where: Where) -> None:
        found.setdefault(module.replace(".", "_"), []).extend(where)

    pieces = architecture_of(p).pieces(p)
    whole = dict.fromkeys(piece.ours for piece in pieces)
    for ours in whole:
        add(re.sub(r"\.(?:weight|scale)$", "", ours), *([] if ours.endswith(".bias") else [Where(ours, None, None)]))
    for piece in pieces:
        if piece.theirs.endswith(".weight"):
            place = Where(piece.ours, piece.our_rows, piece.their_rows)
            add(piece.theirs.removesuffix(".weight"), place)
    _add_adapters(p, add) if isinstance(p, FluxParams) else _add_aliases(p, found, add)
    return {module: places for module, places in found.items() if places}


Add = Callable[..., None]


def _add_adapters(p: FluxParams, add: Add) -> None:
    """Add XLabs' names, of attention processors."""
    for i in range(p.depth):
        for number, stream in ((1, "img"), (2, "txt")):
            for layer in ("qkv", "proj"):
                ours = f"double_blocks.{i}.{stream}_attn.{layer}.weight"
                add(f"double_blocks.{i}.processor.{layer}_lora{number}", Where(ours, None, None))
    for i in range(p.depth_single_blocks):
        qkv = Where(f"single_blocks.{i}.linear1.weight", (0, 3 * p.hidden_size), None)
        add(f"single_blocks.{i}.processor.qkv_lora", qkv)
        add(f"single_blocks.{i}.processor.proj_lora", Where(f"single_blocks.{i}.linear2.weight", None, None))


def _add_aliases(p: Flux2Params, found: dict[str, list[Where]], add: Add) -> None:
    """Add Diffusers' names of fused projections, and a prefix of its blocks that some tools have cut off."""
    for i in range(p.depth):
        for stream, layer in (("img", "to_qkv"), ("txt", "to_added_qkv")):
            ours = f"double_blocks.{i}.{stream}_attn.qkv.weight"
            add(f"transformer_blocks.{i}.attn.{layer}", Where(ours, None, None))
    for module in [name for name in found if name.startswith("transformer_blocks_")]:
        add(module.removeprefix("tran"), *found[module])
