"""Calls of ops: their results are checked, and their exceptions say which edit failed."""

from typing import Any

import torch
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.positions.registry import bugs_named
from fluxlab.positions.resolved import Resolved
from fluxlab.select.layout import token_name


def call(edit: Resolved, *first: Any) -> Any:
    """Call the op. Its own exceptions keep their traceback, with a note that says which edit failed."""
    with bugs_named(f"in {edit.described}, edit {edit.path}"):
        try:
            return edit.op.function(*first, **edit.arguments)
        except UserError as error:
            raise UserError(f"{edit.path}.{error}") from None


def check_type(edit: Resolved, result: Any, shape: torch.Size, dtype: torch.dtype) -> None:
    """Raise TypeError, since it is a bug of the op, for a result of another shape or dtype."""
    if isinstance(result, Tensor) and result.shape == shape and result.dtype == dtype:
        return
    got = f"{tuple(result.shape)} {result.dtype}" if isinstance(result, Tensor) else type(result).__name__
    raise TypeError(
        f"{edit.path}: op {edit.op.name} ({edit.op.source}) returned {got}, expected a tensor {tuple(shape)} {dtype}"
    )


def check_finite(edit: Resolved, result: Tensor) -> None:
    finite = torch.isfinite(result.detach()).reshape(len(result), -1).all(1)
    if not finite.all():
        wrong = (~finite).nonzero()[:, 0].tolist()
        raise UserError(
            f"{edit.path}: {edit.described} gave NaN or inf for {len(wrong)} of them, first for "
            f"{token_name(edit.scope, wrong[0])}"
        )


def score_factor(edit: Resolved, strength: float, queries: Tensor, keys: Tensor) -> Tensor:
    """Return the factors `(N, N)` of scores of a `scores` edit, for queries and keys at these positions `(N, A)`."""
    factor = call(edit, queries, keys, edit.context.trained, edit.scope.axes)
    check_type(edit, factor, torch.Size((len(queries), len(keys))), queries.dtype)
    check_finite(edit, factor)
    return factor if strength == 1 else 1 + strength * (factor - 1)


def head_factor(edit: Resolved, entropy: Tensor) -> Tensor:
    """Return the factors `(H,)` of a `heads` edit for the entropies of heads `(H,)`."""
    factor = call(edit, entropy)
    check_type(edit, factor, entropy.shape, entropy.dtype)
    return factor
