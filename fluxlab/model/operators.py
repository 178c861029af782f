"""Operators of torch.compile: functions that it calls as they are, instead of tracing into them."""

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("fluxlab", "FRAGMENT")


def operator(schema: str, function: Callable, empty: Callable) -> Callable:
    """Return a function without gradients as an operator of PyTorch. It must not return its arguments.

    schema: `name(Tensor x, int n) -> Tensor`. It changes an argument that is written as `Tensor(a!) x`. empty: takes
    the same arguments and returns a tensor of the result's shape, strides and dtype. `torch.library.custom_op` does
    the same with more work per call.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, empty, "Meta")
    return getattr(torch.ops.fluxlab, name).default
