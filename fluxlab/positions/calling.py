"""Calls of ops: their results are checked, and their exceptions say which edit failed."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.positions.registry import bugs_named
from fluxlab.positions.resolved import Resolved
from fluxlab.select.layout import token_name

MOST_TRIED = 1024
"""Tokens with which an op on scores is tried before a run."""


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


def check_finite(edit: Resolved, result: Tensor, tokens: Tensor | None = None) -> None:
    """Raise UserError that names the first row with NaN or inf. tokens: of the rows, by default those of the edit."""
    finite = torch.isfinite(result.detach()).reshape(len(result), -1).all(1)
    if not finite.all():
        wrong = (~finite).nonzero()[:, 0].tolist()
        scope = edit.scope if tokens is None else edit.context.layout.scope(tokens)
        raise UserError(
            f"{edit.path}: {edit.described} gave NaN or inf for {len(wrong)} of them, first for "
            f"{token_name(scope, wrong[0])}"
        )


def score_factor(
    edit: Resolved, strength: float, queries: Tensor, keys: Tensor, tokens: Tensor | None = None
) -> Tensor:
    """Return the factors `(N, N)` of scores of a `scores` edit, for queries and keys at these positions `(N, A)`.

    tokens: the indices of the N tokens, by default all of them.
    """
    factor = call(edit, queries, keys, edit.context.trained, edit.scope.axes)
    check_type(edit, factor, torch.Size((len(queries), len(keys))), queries.dtype)
    check_finite(edit, factor, torch.arange(len(queries), device=queries.device) if tokens is None else tokens)
    return factor if strength == 1 else 1 + strength * (factor - 1)


def try_score_factor(edit: Resolved, ids: Tensor) -> None:
    """Raise what `score_factor` raises, from some tokens of a long sequence: `(N, N)` factors of all take seconds."""
    n, some = len(ids), None
    if n > MOST_TRIED:
        some = torch.arange(MOST_TRIED, device=ids.device) * (n - 1) // (MOST_TRIED - 1)
        arguments = {
            key: value[some]
            if isinstance(value, Tensor) and value.dtype == torch.bool and value.shape == (n,)
            else value
            for key, value in edit.arguments.items()
        }
        edit, ids = replace(edit, arguments=arguments), ids[some]
    score_factor(edit, 1.0, ids, ids, some)


def head_factor(edit: Resolved, entropy: Tensor) -> Tensor:
    """Return the factors `(H,)` of a `heads` edit for the entropies of heads `(H,)`."""
    factor = call(edit, entropy)
    check_type(edit, factor, entropy.shape, entropy.dtype)
    return factor
