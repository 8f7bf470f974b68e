"""Workspaces: memory that outlives a call, and the CUDA graphs that were captured over it.

A capture costs some rounds, and it is worth nothing once a tensor it works on has moved. So a draft keeps the memory
of its last call for the next one: the target's keys and values, the draft's window, the roots. Knows no models.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .fingerprint_longspec import plain
from .graphs_longspec import Graphs
from .memory_longspec import Memory


class Workspace:
    """The memory of one call at a time, on one CUDA stream.

    memory: of a cache that is no more; state: the small tensors of a call, by name; graphs: captured over both, while
    all that they have taken from elsewhere was as `mark` says.
    """

    def __init__(self, stream: int | None) -> None:
        self.stream = stream
        self.memory: list[Memory] = []
        self.state: dict[str, Any] = {}
        self.graphs = Graphs()
        self.mark: Any = None

    def lend(self) -> list[Memory]:
        """The memory, which is the call's from now on."""
        memory, self.memory = self.memory, []
        return memory

    def settle(self, name: str, value: Any) -> Any:
        """A copy of `value`, which has tensors in tuples and dicts; in the memory of the last call's, if alike."""
        ours = self.state.get(name)
        if ours is None or _form(ours) != _form(value):
            self.state[name] = pytree.tree_map_only(Tensor, Tensor.clone, value)
        else:
            for mine, other in zip(pytree.tree_leaves(ours), pytree.tree_leaves(value), strict=True):
                if isinstance(mine, Tensor):
                    mine.copy_(other)
        return self.state[name]

    def expect(self, mark: Any) -> None:
        """Forget the graphs if they were captured where `mark`, or the place of the state, was another."""
        mark = (mark, plain(self.state))
        if mark != self.mark:
            self.graphs.forget()
        self.mark = mark


class Workspaces:
    """Where a draft keeps the workspace of its last call; one in use is nobody else's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: Workspace | None = None

    def take(self, device: torch.device) -> Workspace:
        """The kept one, or an empty one; for work on the current stream of `device`."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        with self._lock:
            kept, self._kept = self._kept, None
        # work on one stream does not wait for that on another
        return Workspace(stream) if kept is None or kept.stream != stream else kept

    def keep(self, workspace: Workspace | None) -> None:
        with self._lock:
            self._kept = workspace

    def __reduce__(self) -> tuple[type, tuple]:
        return Workspaces, ()  # a copy of a draft begins without


def _form(value: Any) -> Any:
    """What two values must have in common for one to be written over the other."""
    leaves, form = pytree.tree_flatten(value)
    return form, [
        (leaf.shape, leaf.dtype, leaf.device, leaf.is_inference()) if isinstance(leaf, Tensor) else plain(leaf)
        for leaf in leaves
    ]
