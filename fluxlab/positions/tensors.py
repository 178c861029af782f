"""Arguments that hold tensors, so that gradients reach them: nested lists of numbers and 0-dimensional tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def has_tensor(value: Any) -> bool:
    """Return whether a tensor is in a nested list or mapping, or is the value itself."""
    if isinstance(value, Tensor):
        return True
    if isinstance(value, Mapping):
        return any(map(has_tensor, value.values()))
    return isinstance(value, list | tuple) and any(map(has_tensor, value))


def as_tensor(value: Any, like: Tensor) -> Tensor:
    """Return nested lists of numbers as one tensor in the dtype and on the device of `like`, with their gradients."""
    if not has_tensor(value):
        return torch.tensor(value, dtype=like.dtype, device=like.device)
    if isinstance(value, Tensor):
        return value.to(like)
    return torch.stack([as_tensor(part, like) for part in value])
