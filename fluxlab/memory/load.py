"""Open a transformer whose blocks are placed on the device later, or one by one."""

from dataclasses import replace
from os import PathLike

import torch

from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.files import FLOAT8
from fluxlab.checkpoints.networks import TRANSFORMER
from fluxlab.checkpoints.read import OpenWeights, open_weights
from fluxlab.memory.costs import is_modulation
from fluxlab.memory.pages import let_go
from fluxlab.memory.residency import Residency
from fluxlab.memory.ring import Engine
from fluxlab.memory.source import WeightSource


def open_transformer(
    path: "str | PathLike[str]",
    *,
    dtype: torch.dtype | None = None,
    device: "str | torch.device" = "cpu",
    variant: str | None = None,
    engine: Engine | None = None,
) -> Residency:
    """Return a transformer without its blocks' weights, and what places them. Call `Residency.place` before a forward.

    Arguments and errors as for `load_transformer`. Weights of blocks are checked for NaN and infinity when they are
    first used. On a CPU, blocks that lie in the file as they are computed are mapped.
    """
    opened = open_weights(TRANSFORMER, path, dtype=dtype, device=device, variant=variant, unread=True)
    if opened.net.family != "flux1":
        raise CheckpointError(f"{opened.net.path}: blocks of FLUX.2 cannot be streamed; use memory=resident")
    names = list(opened.recipe)
    late = [name for name in names if "_blocks." in name or is_modulation(name)]
    if is_mapped(opened):
        state = opened.assemble(late)
    else:
        meta = opened.model.state_dict()
        state = {name: meta[name] for name in late}
    checked = replace(opened, target=replace(opened.target, unread=False))
    state |= checked.assemble([name for name in names if name not in state])
    opened.model.load_state_dict(state, strict=True, assign=True)
    opened.model.eval().requires_grad_(False)
    let_go(weight for weight in opened.model.parameters() if not weight.is_meta)
    source = WeightSource(opened.net, opened.recipe, opened.shapes, opened.model.params)
    return Residency(opened.model, source, opened.target.device, engine)


def is_mapped(opened: OpenWeights) -> bool:
    """Return whether a CPU computes blocks from the pages of their file: every tensor in one piece, and no cast."""
    entries = opened.net.entries.values()
    in_one_piece = all(len(parts) == 1 and parts[0][1] is None for parts in opened.recipe.values())
    return in_one_piece and all(opened.target.keeps(entry) for entry in entries)


def is_float8(dtypes: "set[torch.dtype]") -> bool:
    """Return whether weights are stored in a dtype that nothing is computed in."""
    return bool(dtypes & set(FLOAT8.values()))
