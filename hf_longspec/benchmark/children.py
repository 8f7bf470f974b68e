"""The draft's choice of a level's nodes among all tokens: torch's operations and the Triton kernels, side by side."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..modeling.tree_longspec import Children, best_children
from .timing import Speed, milliseconds

CALLS = 8  # calls that are timed together, each on logits of its own


@dataclass(frozen=True)
class Choice:
    """The times of choosing `width` nodes below `nodes` nodes from logits of `vocab` tokens each.

    floor: milliseconds that it takes to read the logits; milliseconds: the time of each way to choose, by its name.
    """

    nodes: int
    width: int
    vocab: int
    floor: float
    milliseconds: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def ways(device: torch.device, chunks: Sequence[int]) -> dict[str, Children]:
    """Return the ways to choose that can run here, by name: torch's, and on a GPU with Triton the kernels.

    chunks: tokens of a program of the kernels; there is one way for each.
    """
    found: dict[str, Children] = {"torch": best_children}
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from ..modeling.fast_triton_tree_longspec import fused_best_children

        found |= {f"triton, {chunk}": functools.partial(fused_best_children, chunk=chunk) for chunk in chunks}
    return found


@torch.no_grad()
def measure(
    nodes: int,
    width: int,
    vocab: int,
    chunks: Sequence[int],
    speed: Speed,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> Choice:
    """Time all ways to choose a level's nodes on the same random logits.

    Raises `RuntimeError` where two ways choose nodes of different scores.
    """
    many = [(3 * torch.randn(1, nodes, vocab, device=device)).to(dtype) for _ in range(CALLS)]
    scores = -torch.rand(1, nodes, device=device)
    spans, chosen = {}, []
    for name, children in ways(device, chunks).items():
        chosen.append(children(many[0], scores, width, None).scores)
        if not torch.allclose(chosen[-1], chosen[0], atol=1e-4):
            raise RuntimeError(f"expected scores {chosen[0].tolist()}, got {chosen[-1].tolist()} from {name!r}")
        calls = [functools.partial(children, logits, scores, width, None) for logits in many]
        spans[name] = milliseconds(calls, device, repeats)
    return Choice(nodes, width, vocab, speed.floor(many[0].nbytes), spans)
