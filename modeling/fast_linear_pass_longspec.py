"""A pass over Inductor's graphs that gives products of few rows to the kernels of `fast_triton_linear_longspec`.

Products by 16-bit weights of the target on a CUDA device are replaced where two or three share their rows, as queries,
keys and values do; those of one row also where they stand alone. Every other product stays as it is, since cuBLAS is
as fast. The target's modules are not touched. Imported only when a target is compiled.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.nn.functional import linear

aten = torch.ops.aten
DEVICE = "cuda"
FEW = 96  # rows, at most, of a product that the kernels compute
MOST = 3  # weights of a launch
# Each copy of this file registers an operator of its own: every draft of the Hub carries a copy.
NAME = f"{__name__.replace('.', '_')}::linears"


@torch.library.custom_op(NAME, mutates_args=())
def linears(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    """Multiply x (M, K) by each weight (N, K), and add the biases (N,), if there are any: an operator for graphs.

    A graph may have been made for fewer rows than it meets.
    """
    if x.shape[0] > FEW:
        added: list[Any] = biases or [None] * len(weights)
        return [linear(x, weight, bias) for weight, bias in zip(weights, added, strict=True)]
    from .fast_triton_linear_longspec import linears as run

    return run(x, weights, biases)


@linears.register_fake
def _(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


class Product(NamedTuple):
    """A product that the kernels compute, and its parts."""

    node: Node
    x: Node  # (M, K)
    weight: Node  # (N, K)
    bias: Node | None  # (N,)


class LinearPass(CustomGraphPass):
    """Replace the products that `groups` finds by `linears`; an Inductor `post_grad_custom_pre_pass`."""

    def __call__(self, graph: Graph) -> None:
        for group in groups(graph):
            weights = [product.weight for product in group]
            biases = [product.bias for product in group if product.bias is not None]
            with graph.inserting_before(group[0].node):
                ours = graph.call_function(linears._opoverload, (group[0].x, weights, biases))
                outs = [graph.call_function(operator.getitem, (ours, index)) for index in range(len(group))]
            ours.meta["val"] = [product.node.meta["val"] for product in group]
            for product, out in zip(group, outs, strict=True):
                out.meta.update(product.node.meta)
                product.node.replace_all_uses_with(out)
                graph.erase_node(product.node)
        graph.eliminate_dead_code()

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,), extra=NAME)


def groups(graph: Graph) -> list[list[Product]]:
    """Return the products to compute together, in the order of the graph: up to three that share their rows.

    Weights and biases are the graph's inputs, so all that a group needs is there at the first of its products.
    """
    found: dict[Any, list[Product]] = {}
    for node in graph.nodes:
        if (product := served(node)) is not None:
            # each linear layer makes rows of its input by itself
            views = product.x.target in (aten.reshape.default, aten.view.default)
            source = product.x.args[0] if views else product.x
            key = source, product.weight.meta["val"].shape[1], product.bias is None
            found.setdefault(key, []).append(product)
    parts = [some[start : start + MOST] for some in found.values() for start in range(0, len(some), MOST)]
    return [part for part in parts if len(part) > 1 or rows_of(part[0].x) == 1]


def served(node: Node) -> Product | None:
    """Return the parts of a product that the kernels compute; None for another node."""
    inputs: Any = node.args
    if node.target == aten.mm.default:
        bias, (x, transposed) = None, inputs
    elif node.target == aten.addmm.default and not node.kwargs:  # no factors
        bias, x, transposed = inputs
    else:
        return None
    if transposed.target != aten.permute.default or list(transposed.args[1]) != [1, 0]:
        return None
    weight = transposed.args[0]
    if weight.op != "placeholder":  # computed in the graph, as from a quantized weight
        return None
    values = weight.meta["val"]
    if values.device.type != DEVICE or values.dtype not in (torch.float16, torch.bfloat16):
        return None
    if not all(isinstance(size, int) for size in values.shape) or not values.is_contiguous():
        return None
    if bias is not None:
        added = bias.meta["val"]
        if bias.op != "placeholder" or added.shape != values.shape[:1] or added.dtype != values.dtype:
            return None
    rows = rows_of(x)
    return Product(node, x, weight, bias) if rows is not None and rows <= FEW else None


def rows_of(x: Node) -> int | None:
    """Return the number of rows; where it is symbolic, the one that the graph was made for, or None for none."""
    rows = x.meta["val"].shape[0]
    return rows if isinstance(rows, int) else rows.node.hint
