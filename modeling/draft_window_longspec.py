"""DraftWindow: the draft's own keys and values, of constant size."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_longspec import Prefix, Spans
from .slots_longspec import ring_contents, write_slots


class DraftWindow:
    """The draft's own keys and values: a ring of the last `window` tokens and the inner nodes of one tree.

    Token i of the text lies in slot i mod `window`; then one slot that swallows writes of padding; then the tree.
    The number of bytes does not depend on the context.
    """

    def __init__(
        self, window: int, tree_size: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
    ):
        """shape: (B, K, D)."""
        batch, heads, dim = shape
        self.window = window
        self.tree_start = window + 1
        self.keys = torch.zeros(batch, heads, self.tree_start + tree_size, dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.first = torch.zeros(batch, dtype=torch.long, device=device)  # position of each row's earliest token
        self.starts, self.ends = torch.zeros_like(self.first), torch.full_like(self.first, self.keys.shape[2])

    def write(self, key: Tensor, value: Tensor, positions: Tensor, real: Tensor | None = None) -> None:
        """Store keys and values (B, K, T, D) of tokens at `positions` (B, T): of more than the window holds, the last.

        real: (B, T), false where a token is padding; without it, T ≤ window.
        """
        slots = positions % self.window
        if real is not None:
            if positions.shape[1] > self.window:  # two writes to one slot would come in any order
                real = real & (positions > positions.masked_fill(~real, -1).amax(dim=1, keepdim=True) - self.window)
            slots = torch.where(real, slots, self.window)
        write_slots(self.keys, slots, key)
        write_slots(self.values, slots, value)

    def place(self, key: Tensor, value: Tensor, first_node: int) -> None:
        """Store keys and values (B, K, T, D) of the tree nodes `first_node`, `first_node` + 1, …"""
        slots = slice(self.tree_start + first_node, self.tree_start + first_node + key.shape[2])
        self.keys[:, :, slots] = key
        self.values[:, :, slots] = value

    def mask(self, positions: Tensor, root_position: Tensor, ancestry: Tensor) -> Tensor:
        """(B, T, slots) bool: what nodes at `positions` (B, T) may see when the root stands at `root_position` (B,).

        ancestry: (B, T, tree_size), true for a node itself and its ancestors.
        """
        held = ring_contents(root_position, self.window)[:, None]  # (B, 1, window)
        ring = (held >= self.first[:, None, None]) & (held > positions[:, :, None] - self.window)
        padding = torch.zeros_like(ring[:, :, :1])
        return torch.cat([ring, padding, ancestry], dim=-1)

    def prefix(self, mask: Tensor) -> Prefix:
        """All slots, as a prefix of which nodes see what `mask` (B, T, slots) says."""
        batch, _, slots, _ = self.keys.shape
        spans = Spans(self.starts, self.ends, ((0, slots),) * batch, {})
        return Prefix(self.keys, self.values, spans, mask)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes
