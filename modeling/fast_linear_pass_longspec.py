"""A pass over Inductor's graphs that gives products of one row to the Triton kernel of `fast_triton_linear_longspec`.

Products of one row by a 16-bit weight of the target on a CUDA device are replaced; every other product stays as it
is, since with more rows cuBLAS is as fast. The target's modules are not touched. Imported only when a target is
compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

aten = torch.ops.aten
DEVICE = "cuda"
# Each copy of this file registers an operator of its own: every draft of the Hub carries a copy.
NAME = f"{__name__.replace('.', '_')}::one_row_linear"


@torch.library.custom_op(NAME, mutates_args=())
def one_row_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x (1, K) by weight (N, K) and add bias (N,) or None, as an operator that graphs can hold."""
    from .fast_triton_linear_longspec import one_row_linear as run

    return run(x, weight, bias)


@one_row_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


class OneRowPass(CustomGraphPass):
    """Replace the products that `served` finds by `one_row_linear`; an Inductor `post_grad_custom_pre_pass`."""

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if (parts := served(node)) is not None:
                with graph.inserting_before(node):
                    ours = graph.call_function(one_row_linear._opoverload, parts)
                ours.meta.update(node.meta)
                transposed: Any = node.args[-1]
                node.replace_all_uses_with(ours)
                graph.erase_node(node)
                if not transposed.users:
                    graph.erase_node(transposed)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,), extra=NAME)


def served(node: Node) -> tuple[Node, Node, Node | None] | None:
    """Find x (1, K), weight (N, K) and bias (N,) or None of a product that the kernel computes; None for another node.

    A graph with a symbolic number of rows always has more than one: torch specializes on 1.
    """
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
    states, values = x.meta["val"], weight.meta["val"]
    if values.device.type != DEVICE or values.dtype not in (torch.float16, torch.bfloat16):
        return None
    if not all(isinstance(size, int) for size in values.shape) or not values.is_contiguous():
        return None
    if bias is not None and (bias.meta["val"].shape != values.shape[:1] or bias.meta["val"].dtype != values.dtype):
        return None
    if not isinstance(states.shape[0], int) or states.shape[0] != 1:
        return None
    return x, weight, bias
