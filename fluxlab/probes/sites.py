"""The kind of request that reads activations at a site of the blocks (`fluxlab.model.sites`)."""

from typing import Any

import torch
from torch import Tensor

from fluxlab.errors import UserError, join
from fluxlab.model.groups import KeyGroups
from fluxlab.model.rope import Rotary
from fluxlab.model.sites import OF_HEADS, SITES, unrotate
from fluxlab.model.varied import Keys, Varied, plain_keys
from fluxlab.probes.outputs import Add, Measure, ProbeContext, named_axis, select_tokens, token_axes
from fluxlab.probes.registry import AVERAGES, probe
from fluxlab.probes.stream import take
from fluxlab.select.arguments import choice
from fluxlab.select.tokens import parse_tokens


@probe(
    "activation",
    {"site": choice(*SITES), "tokens": parse_tokens, "rotation": choice("after", "before")},
    averages=(*AVERAGES, "tokens"),
)
def activation(context: ProbeContext, site: str, tokens: Any = "all", rotation: str = "after") -> Measure:
    """Activations at a site of the blocks: input, queries, keys, values, attention, mlp or residual.

    rotation: whether queries and keys are read after or before they are rotated.
    """
    if rotation == "before" and site not in ("queries", "keys"):
        raise UserError(f"{join(context.path, 'rotation')}: 'before', but {site} are not rotated; leave it out")
    selected = select_tokens(tokens, context, "tokens")
    width = named_axis("channel", range(channels(site, context)))
    axes = width if context.averages_tokens else token_axes(selected, context, "tokens") + width

    def observe(x: Tensor, b: int, heads: Tensor | None, add: Add) -> None:
        x = take(x, 1, selected[b].indexer)
        add("", (), x.mean(1) if context.averages_tokens else x)

    return Measure({"": axes}, observe, "activation", site=site, unrotated=rotation == "before")


def channels(site: str, context: ProbeContext) -> int:
    """Return the channels of a token at a site of the requested blocks, per head at a site with heads."""
    head = sum(context.run.axes_dim)
    if site in OF_HEADS:
        return head
    width = head * context.run.heads
    if site != "mlp":
        return width
    inner = int(width * context.run.mlp_ratio)
    double = [block < context.run.double for block in context.blocks]
    if any(double) and not all(double):
        raise UserError(
            f"{join(context.path, 'blocks')}: mlp has {width} channels in double blocks and {inner} in single blocks: "
            "make one request with blocks: double and one with blocks: single"
        )
    return width if all(double) else inner


def at_site(measure: Measure, x: Tensor, b: int, heads: Tensor | None, keys: Keys) -> Tensor:
    """Return the activations `(heads or 1, N, C)` of sample b, in fp32 or fp64, as the request wants them.

    keys: the block's table of the queries or the keys.
    """
    x = x[b] if measure.site in OF_HEADS else x[b][None]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if measure.site not in ("queries", "keys"):
        return take(x, 0, heads)
    if isinstance(keys, Varied) and any(v.sample == b and v.windows for v in keys.variations):
        raise UserError(f"capture: {measure.site} have several positions with the op windows; leave one out")
    keys = plain_keys(keys)
    groups = measure.site == "keys" and isinstance(keys, KeyGroups)
    if measure.unrotated and not groups:
        x = unrotate(x, of_sample(keys, b))
    elif groups and not measure.unrotated:
        raise UserError("capture: keys after rotation differ between queries (seen_by): use rotation: before")
    return take(x, 0, heads)


def of_sample(table: Rotary, b: int) -> Rotary:
    """Return one sample's table, `(H or 1, N, d/2)`."""
    return Rotary(*(part[b if len(part) > 1 else 0] for part in table))
