"""What is changed in a graph of torch.compile before inductor generates code for a CPU.

A call of Python from compiled code takes about 10 µs. `linear` would be such a call for each product, because its
packed weight is not known before the run. So one operator looks up all packed weights of a graph, and the products are
calls of C++. Queries and keys are normalised, rotated and converted in one loop.
"""

import operator as python
from functools import cache
from math import prod

import torch
from torch import SymInt, fx

from fluxlab.model import norm_rotate
from fluxlab.model.linear import compiled_linear
from fluxlab.model.operators import operator
from fluxlab.model.packing import all_packed
from fluxlab.model.torch_ops import (
    CONVERSION,
    inductor_pass,
    lower_norm_rotate,
    lower_packed_linear,
    packed_linear,
    uses_mkl,
)

_all_packed = operator(
    "all_packed(Tensor(a)[] weights, SymInt[] rows, bool[] mkl) -> Tensor(a)[]",
    all_packed,
    lambda weights, rows, mkl: [torch.empty_like(weight) for weight in weights],
)
_packed_linear = operator(
    "packed_linear(Tensor x, Tensor packed, Tensor weight, Tensor? bias, bool gelu) -> Tensor",
    packed_linear,
    lambda x, packed, weight, bias, gelu: x.new_empty(*x.shape[:-1], weight.shape[0]),
)


@cache
def graph_pass(packed: bool) -> object:
    """Return the pass, for inductor's option `post_grad_custom_pre_pass`. packed: whether weights are looked up."""
    _lower_operators()

    def change(graph: fx.Graph) -> None:
        _convert_inside(graph)
        if packed:
            _look_up_together(graph)

    return inductor_pass(change, (__file__, norm_rotate.__file__), str(packed))


@cache
def _lower_operators() -> None:
    lower_packed_linear(_packed_linear)
    lower_norm_rotate(norm_rotate.compiled_norm_rotate, norm_rotate.CODE)


def _convert_inside(graph: fx.Graph) -> None:
    """Let queries, or keys, be rotated into the dtype to which they are converted later."""
    for node in graph.find_nodes(op="call_function", target=norm_rotate.compiled_norm_rotate):
        dtypes = {user.args[1] if user.target is CONVERSION else None for user in node.users}
        if len(dtypes) != 1 or None in dtypes:
            continue
        *others, _, by_token = node.args
        node.args = (*others, *dtypes, by_token)
        node.meta["val"] = node.meta["val"].to(*dtypes)
        for user in list(node.users):
            user.replace_all_uses_with(node)
            graph.erase_node(user)


def _look_up_together(graph: fx.Graph) -> None:
    """Let one operator look up the weights of all products whose number of rows is known at the start of the graph."""
    inputs = graph.find_nodes(op="placeholder")
    sizes = {node.meta["val"].node.expr: node for node in inputs if isinstance(node.meta["val"], SymInt)}
    linears = graph.find_nodes(op="call_function", target=compiled_linear)
    linears = [node for node in linears if all(isinstance(n, int) or n.node.expr in sizes for n in _batch(node))]
    if not linears:
        return
    weights = [node.args[1] for node in linears]
    start = _move_to_start(graph, weights)
    with graph.inserting_before(start):
        rows = [_rows(graph, node, sizes) for node in linears]
        mkl = [uses_mkl(node.args[0].meta["val"].dtype, node.args[3]) for node in linears]
        times = 2 if len(linears) == 1 else 1  # inductor's C++ reads a list of one tensor as a tensor (PyTorch 2.13)
        packed = graph.call_function(_all_packed, tuple(part * times for part in (weights, rows, mkl)))
        packed.meta["val"] = [weight.meta["val"] for weight in weights * times]
        items = [graph.call_function(python.getitem, (packed, i)) for i in range(len(weights))]
    for node, weight, item in zip(linears, weights, items, strict=True):
        item.meta["val"] = weight.meta["val"]
        with graph.inserting_before(node):
            new = graph.call_function(_packed_linear, (node.args[0], item, *node.args[1:]))
        new.meta = node.meta
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _batch(node: fx.Node) -> torch.Size:
    """Return the sizes of the input of a product, without its channels. They may be symbolic."""
    return node.args[0].meta["val"].shape[:-1]


def _rows(graph: fx.Graph, node: fx.Node, sizes: dict[object, fx.Node]) -> int | fx.Node:
    """Return the number of rows of a product, as a number or as a node that computes it."""
    rows: int | fx.Node = prod(n for n in _batch(node) if isinstance(n, int))
    for n in _batch(node):
        if isinstance(n, SymInt):
            size = sizes[n.node.expr]
            rows = size if rows == 1 else graph.call_function(python.mul, (rows, size))
    return rows


def _move_to_start(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
    """Move nodes, and what they are computed from, to the start of a graph. Return the node behind them.

    Weights are inputs of a graph or slices of them.
    """
    start = next(node for node in graph.nodes if node.op != "placeholder")
    needed: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node.op != "placeholder" and node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    for node in [node for node in graph.nodes if node in needed]:
        if node is start:
            start = start.next
        else:
            start.prepend(node)
    return start
