"""How weights and hooks are attached to the modules of a transformer."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def eager(hook: Callable) -> Callable:
    """Return a hook that a compiled block does not trace. Without one, the large import of torch._dynamo is spared."""
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook


def needs_modulations(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if kwargs.get("modulations") is None:  # oneDNN would compute with weights that are not there
        raise RuntimeError("the weights of this transformer's modulations are not in memory: pass modulations=")


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._parameters[leaf] = parameter


def empty_parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
