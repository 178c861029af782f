"""What a transformer is given per block: rotary tables, masks, taps and sites, checked against its sizes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.model.attention import additive_mask
from fluxlab.model.groups import KeyGroups
from fluxlab.model.layers import BlockTables
from fluxlab.model.protocols import TransformerSizes
from fluxlab.model.rope import Rotary, check_ids, rotary_table
from fluxlab.model.varied import Varied, plain_keys


def check_sizes(p: TransformerSizes, *names: str) -> None:
    """Raise `UserError` unless the sizes called `names` are at least 1 and the axes fill a head."""
    for name in names:
        if getattr(p, name) < 1:
            raise UserError(f"{name} {getattr(p, name)}: expected at least 1")
    if p.hidden_size % p.num_heads:
        raise UserError(f"hidden_size {p.hidden_size} is not divisible by num_heads {p.num_heads}")
    head = p.hidden_size // p.num_heads
    if sum(p.axes_dim) != head or any(dim % 2 or dim < 2 for dim in p.axes_dim):
        raise UserError(f"axes_dim {p.axes_dim}: expected even numbers that add up to the width of a head, {head}")


def per_block(p: TransformerSizes, name: str, values: Sequence | None) -> Sequence:
    """Return one value per block: `values`, or None for every block."""
    blocks = p.depth + p.depth_single_blocks
    if values is not None and len(values) != blocks:
        raise UserError(f"{name} has {len(values)} entries, the model has {blocks} blocks")
    return [None] * blocks if values is None else values


def block_masks(
    p: TransformerSizes, mask: Tensor | Sequence[Tensor | None] | None, dtype: torch.dtype
) -> Sequence[Tensor | None]:
    """Return one additive mask per block, in the model's dtype. Equal tensors stay one tensor."""
    blocks = p.depth + p.depth_single_blocks
    if mask is None or isinstance(mask, Tensor):
        return [mask if mask is None else additive_mask(mask, dtype)] * blocks
    if len(mask) != blocks:
        raise UserError(f"mask has {len(mask)} entries, the model has {blocks} blocks")
    converted = {id(part): additive_mask(part, dtype) for part in mask if part is not None}
    return [converted.get(id(part)) for part in mask]


def block_tables(
    p: TransformerSizes,
    img: Tensor,
    img_ids: Tensor | None,
    txt: Tensor,
    txt_ids: Tensor | None,
    rotary: Rotary | Sequence[BlockTables] | None,
    dtype: torch.dtype,
) -> Sequence[BlockTables]:
    """Return a (queries, keys) pair of rotary tables per block, from the ids or from `rotary`. dtype: of the model."""
    blocks = p.depth + p.depth_single_blocks
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if rotary is None:
        if img_ids is None or txt_ids is None:
            raise UserError("img_ids and txt_ids are needed without rotary tables")
        for name, ids, tokens in (("img_ids", img_ids, img), ("txt_ids", txt_ids, txt)):
            check_ids(name, ids, batch=len(img), tokens=tokens.shape[1], axes=len(p.axes_dim), dtype=dtype)
        batch = max(len(img_ids), len(txt_ids))
        ids = torch.cat((txt_ids.expand(batch, -1, -1), img_ids.expand(batch, -1, -1)), dim=1)
        rotary = rotary_table(ids, p.axes_dim, p.theta)
    elif img_ids is not None or txt_ids is not None:
        raise UserError("rotary tables replace img_ids and txt_ids: pass one or the other")
    pairs = [(rotary, rotary)] * blocks if isinstance(rotary, Rotary) else rotary
    if len(pairs) != blocks:
        raise UserError(f"rotary has {len(pairs)} pairs of tables, the model has {blocks} blocks")
    changes = [pair for i, pair in enumerate(pairs) if i == 0 or pair is not pairs[i - 1]]
    _check_tables(p, changes, batch=len(img), tokens=txt.shape[1] + img.shape[1], dtype=dtype)
    return pairs


def _check_tables(
    p: TransformerSizes, pairs: Sequence[BlockTables], *, batch: int, tokens: int, dtype: torch.dtype
) -> None:
    """Raise `UserError` for a table that does not fit this model and input."""
    width = p.hidden_size // p.num_heads // 2
    sides = [side for pair in pairs for side in (pair if isinstance(pair, tuple) else (pair,))]
    windows = [w for side in sides if isinstance(side, Varied) for v in side.variations for w in v.windows]
    sides = [plain_keys(side) for side in (*sides, *(side for window in windows for side in window))]
    for table in [t for side in sides for t in (side.tables if isinstance(side, KeyGroups) else (side,))]:
        if not isinstance(table, Rotary):
            raise UserError(f"rotary holds a {type(table).__name__}: expected a Rotary, or a pair of them per block")
        for x in table:
            fits = x.ndim == 4 and x.shape[0] in (1, batch) and x.shape[1] in (1, p.num_heads)
            if not fits or x.shape[2:] != (tokens, width) or x.dtype != dtype:
                raise UserError(
                    f"rotary table of shape {tuple(x.shape)} and {x.dtype}: expected ({batch} or 1, "
                    f"{p.num_heads} or 1, {tokens}, {width}) and {dtype}"
                )
