"""Sites: named places inside a block where activations can be read or changed. `Flux.forward(sites=…)` takes them.

Interpretability libraries call them hook points. A block without a site computes nothing more than before.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fluxlab.model.rope import Rotary, apply_rotary
from fluxlab.model.varied import joint_attention

SITES = ("input", "queries", "keys", "values", "attention", "mlp", "residual")
"""The sites of a block, in the order in which it reaches them. All cover text, then image.

input: the hidden states before the block, `(B, N, D)`. residual: those after it.
queries, keys, values: as attention reads them, `(B, H, N, d)`. Queries and keys are normalised and rotated.
attention: what each head returns, `(B, H, N, d)`, before the output projection.
mlp: the MLP's output before the gate, `(B, N, D)`, in a double block. A single block has one output projection for
attention and MLP: there it is what the MLP passes to this projection, `(B, N, mlp_ratio · D)`.
"""

OF_HEADS = ("queries", "keys", "values", "attention")
"""The sites that have heads."""


class Site:
    """What is done at the sites of one block. The methods of this class do nothing."""

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Return the activations to continue with at the site `name`. `x` may be changed in place without gradients."""
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keys: Any, mask: Tensor | None, tap: Any) -> Tensor:
        """Return the block's attention `(B, H, N, d)`, as `joint_attention` does."""
        return joint_attention(q, k, v, keys, mask, tap)


class Observed(Site):
    """A site that is read, after `inner` changed it. `observe` must not change the activations."""

    def __init__(self, observe: Callable[[str, Tensor], None], inner: Site | None = None):
        self.observe, self.inner = observe, inner or Site()

    def __call__(self, name: str, x: Tensor) -> Tensor:
        x = self.inner(name, x)
        self.observe(name, x)
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keys: Any, mask: Tensor | None, tap: Any) -> Tensor:
        return self.inner.attend(q, k, v, keys, mask, tap)


def at(site: Site | None, name: str, *parts: Tensor) -> tuple[Tensor, ...]:
    """Return the parts `(B, L, C)` of a sequence, text first, as `site` leaves them."""
    if site is None:
        return parts
    if len(parts) == 1:
        return (site(name, parts[0]),)
    return site(name, torch.cat(parts, dim=1)).split([part.shape[1] for part in parts], dim=1)


def unrotate(x: Tensor, table: Rotary) -> Tensor:
    """Return `x` `(…, N, d)` as it was before `apply_rotary(x, table)`, to rounding."""
    length = table.cos.square() + table.sin.square()
    return apply_rotary(x, Rotary(table.cos / length, -table.sin / length))
