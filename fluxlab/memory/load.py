"""A transformer whose blocks are placed on the device later, or one by one."""

from collections.abc import Sequence
from dataclasses import replace

from fluxlab.checkpoints.merge import changes_of, merge_changes
from fluxlab.checkpoints.read import OpenWeights
from fluxlab.config import Lora
from fluxlab.memory.costs import is_modulation
from fluxlab.memory.pages import let_go
from fluxlab.memory.residency import Residency
from fluxlab.memory.ring import Engine
from fluxlab.memory.source import WeightSource, is_mapped


def load_ends(opened: OpenWeights, loras: Sequence[Lora] | None = None, engine: Engine | None = None) -> Residency:
    """Return a transformer without its blocks' weights, and what places them. Call `Residency.place` before a forward.

    Weights of blocks are checked for NaN and infinity when they are first used; `CheckpointError` is raised then. On a
    CPU, blocks that lie in the file as they are computed are mapped. loras: are merged into each block as it is used.
    """
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
    changes = changes_of(opened.model, loras)
    now = changes if is_mapped(opened) else {name: changes[name] for name in changes if name not in late}
    merge_changes(opened.model, loras, now)
    let_go(weight for weight in opened.model.parameters() if not weight.is_meta)
    source = WeightSource(opened.net, opened.recipe, opened.shapes, opened.model.params)
    changes = {name: added for name, added in changes.items() if name not in now}
    return Residency(opened.model, source, opened.target.device, engine, changes)
