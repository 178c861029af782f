"""Blocks compiled by `torch.compile`: what is before attention and what is after it, once for each kind of block.

Attention itself, rotation and the tables stay as they are. So no program, mask, probe or edit of activations needs
another compilation, and every block of a kind runs the same code with its own weights.
"""

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from shutil import which
from types import MethodType

import torch
from torch import nn

from fluxlab.errors import UserError
from fluxlab.model.graph_pass import graph_pass
from fluxlab.model.packing import can_be_packed
from fluxlab.model.torch_ops import GRAPH_PASSES, inductor_vector_bits

REGIONS = ("project", "update")
"""The methods of a block that are compiled. Neither sees rotary tables, masks, probes or sites."""


def compile_blocks(model: nn.Module, on: bool = True, backend: str | Callable = "inductor") -> None:
    """Let the blocks of a transformer run compiled, or as they are. Compilation happens in the first forwards.

    Sizes are dynamic: another batch size, image size or text length compiles nothing, except that a batch of one and
    larger ones are compiled separately. Results differ from those of uncompiled blocks in their last bits. backend: of
    `torch.compile`. Raises `UserError` if there is no compiler for the device of the model.
    """
    device = next(model.parameters()).device.type
    if on and backend == "inductor":
        _check_compiler(device)
    packed = on and can_be_packed(model)
    for block in (*model.double_blocks, *model.single_blocks):
        for name in REGIONS:
            if on:
                setattr(block, name, MethodType(_compiled(getattr(type(block), name), backend, device, packed), block))
            else:
                block.__dict__.pop(name, None)


def compile_options(backend: str | Callable, device: str, packed: bool = True) -> dict[str, object] | None:
    """Return the options of `torch.compile` for a device. packed: whether weights are packed during a run.

    On a CPU the calls of kernels are C++ too, and do not check sizes again: for small models this takes 0.9 of the
    time, and compiles as fast. If weights are packed, `graph_pass` is applied; otherwise it would pack all weights of
    a graph at once. One option is needed for right results:

    Inductor keeps its code in a folder, for other processes. On a CPU the code steps over as many numbers as a vector
    register holds, but the key under which it is kept does not say how many (PyTorch 2.13). A processor with shorter
    vectors that finds the code in a shared folder would leave part of each result unwritten. With the length as an
    option, the key says it.
    """
    if backend != "inductor" or device != "cpu":
        return None
    options = {"cpp.simdlen": inductor_vector_bits(), "cpp_wrapper": True, "size_asserts": False}
    return options | {"post_grad_custom_pre_pass": graph_pass(packed)} if GRAPH_PASSES else options


@cache
def _compiled(region: Callable, backend: str | Callable, device: str, packed: bool) -> Callable:
    options = compile_options(backend, device, packed)
    return torch.compile(region, dynamic=True, fullgraph=True, backend=backend, options=options)


def _check_compiler(device: str) -> None:
    if device == "cuda" and find_spec("triton") is None:
        raise UserError("compile=true needs triton on a GPU: install it, or leave compile out")
    if device == "cpu" and not any(which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "cl")):
        raise UserError("compile=true needs a C++ compiler on a CPU: install g++ or clang++, or leave compile out")
