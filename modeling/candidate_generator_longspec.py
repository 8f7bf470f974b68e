"""LongSpecCandidateGenerator: lets the draft grow one tree of guesses a round, over the window of its own K/V.

Knows the draft's layer and the target's prefix; knows nothing of verification.
"""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention_longspec import Memo, Prefix, Span, Spans, ring_contents, write_slots
from .cache_longspec import SpeculativeCache
from .copies_longspec import Written
from .engine_longspec import Backend
from .target_longspec import Angles, BoundTarget
from .tree_longspec import Level, TokenTree, TreeForm, levels_above


class DraftWindow:
    """Keep the draft's own keys and values: a ring of the last `window` tokens, and the inner nodes of one tree.

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
        """Store keys and values (B, K, T, D) of tokens at `positions` (B, T); of more than `window`, the last ones.

        real: (B, T), false where a token is padding; without it, T ≤ window.
        """
        slots = positions % self.window
        if real is not None:
            if positions.shape[1] > self.window:  # two writes to one slot would come in any order
                real = real & (positions > positions.masked_fill(~real, -1).amax(dim=1, keepdim=True) - self.window)
            slots = torch.where(real, slots, self.window)
        write_slots(self.keys, slots, key)
        write_slots(self.values, slots, value)

    def write_nodes(self, key: Tensor, value: Tensor, first_node: int) -> None:
        """Store keys and values (B, K, T, D) of the tree nodes `first_node`, `first_node` + 1, …"""
        slots = slice(self.tree_start + first_node, self.tree_start + first_node + key.shape[2])
        self.keys[:, :, slots] = key
        self.values[:, :, slots] = value

    def mask(self, positions: Tensor, root_position: Tensor, ancestry: Tensor) -> Tensor:
        """Return (B, T, slots) bool: what nodes at `positions` (B, T) see; the root stands at `root_position` (B,).

        ancestry: (B, T, tree_size), true for a node itself and its ancestors.
        """
        held = ring_contents(root_position, self.window)[:, None]  # (B, 1, window)
        ring = (held >= self.first[:, None, None]) & (held > positions[:, :, None] - self.window)
        padding = torch.zeros_like(ring[:, :, :1])
        return torch.cat([ring, padding, ancestry], dim=-1)

    def as_prefix(self, mask: Tensor) -> Prefix:
        """Return all slots as a prefix that nodes see as `mask` (B, T, slots) says."""
        batch, _, slots, _ = self.keys.shape
        return Prefix(self.keys, self.values, Spans(self.starts, self.ends, (Span(0, slots),) * batch, Memo()), mask)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class LevelInputs(NamedTuple):
    """What the draft reads at the L levels of one round's tree, beside the tokens.

    angles, query_angles: (…, L, rotary dims), for the draft's own attention and for the target's rotation of queries
    mask: (B, N, slots) bool, what each of the N inner nodes may see of the window; filled as the tree grows
    prefix: the target's keys and values; a mask there is (B, L, S)
    read: (B, 1, hidden), what the draft makes of the target's last hidden state; None for drafts that do not read it
    """

    angles: Angles
    query_angles: Angles
    mask: Tensor
    prefix: Prefix
    read: Tensor | None


class LongSpecCandidateGenerator:
    """Grow token trees by beam search over cumulative draft log-probability, one draft forward a level."""

    def __init__(self, draft: Any, target: BoundTarget, backend: Backend, batch: int, shape: tuple[int, ...]):
        """shape: the nodes of each level of the deepest trees; others have its first levels."""
        config, device = draft.config, target.device
        self.draft, self.target, self.backend, self.shape = draft, target, backend, shape
        self.head_rows = draft.head_rows(target) if self.shape else None
        self.vocab = draft.draft_vocab
        # the levels that have children, as slices of the tree's nodes
        starts = [*accumulate((1, *self.shape[:-1]), initial=0)]
        self.inner = [slice(*ends) for ends in pairwise(starts)]
        # constants of all rounds: a host cannot send any while a CUDA graph is captured
        self.above = torch.tensor(levels_above(self.shape), device=device)
        self.depths = torch.arange(len(self.shape), device=device)
        depths = [depth for depth, nodes in enumerate(self.inner) for _ in range(nodes.start, nodes.stop)]
        self.inner_depths = torch.tensor(depths, dtype=torch.long, device=device)
        self.itself = torch.eye(starts[-1], dtype=torch.bool, device=device)
        self.scaling = config.head_dim**-0.5
        heads = (batch, config.num_key_value_heads, config.head_dim)
        self.window = DraftWindow(config.window, starts[-1], heads, draft.dtype, device)

    def fill_window(self, embeds: Tensor, last_position: Tensor, real: Tensor) -> None:
        """Fill the window from the prompt's embeddings (B, T, hidden); the last tokens stand at `last_position` (B,).

        real: (B, T), false where a token is padding.
        """
        if not self.shape:
            return
        tail = slice(-self.window.window, None)
        embeds, real = embeds[:, tail], real[:, tail]
        back = torch.arange(1 - embeds.shape[1], 1, device=embeds.device)
        positions = last_position[:, None] + back
        # counted back from the last one, padding inside a text can take them below zero
        real = real & (positions >= 0)
        self.window.first = positions.masked_fill(~real, last_position.max()).amin(dim=1)
        key, value = self.draft.window_kv(embeds, positions)
        self.window.write(key, value, positions, real)

    def advance(self, tokens: Tensor, positions: Tensor, real: Tensor | None = None) -> None:
        """Add emitted tokens (B, T) at `positions` (B, T) to the window; where `real` (B, T) is false, padding."""
        if self.shape:
            key, value = self.draft.window_kv(self.target.embed(tokens.to(positions.device)), positions)
            self.window.write(key, value, positions, real)

    def grow(
        self,
        root: Tensor,
        position: Tensor,
        cache: SpeculativeCache,
        form: TreeForm,
        hidden: Tensor | None = None,
        written: Written | None = None,
    ) -> TokenTree:
        """Grow a tree of this form below `root` (B,), which stands at `position` (B,).

        hidden: (B, hidden), the target's last hidden state at the token before the root, for drafts that read it.
        written: the texts that end with the roots, for forms with copies.
        """
        level = Level.of_root(root.to(position.device))
        grown, shape = [level], form.shape
        if shape:
            read = self.draft.read_hidden_state(None if hidden is None else hidden[:, None])
            inputs = self._level_inputs(position, cache, len(shape), read)
        for depth, width in enumerate(shape):
            logits = self._level_logits(level.tokens, depth, inputs)
            level = self.backend.children(logits, level.scores, width, self.vocab)
            self._hand_down(inputs.mask, level.parents, depth + 1)
            grown.append(level)
            if form.least and not bool((level.scores >= math.log(form.least)).any()):
                break
        tree = TokenTree.from_levels(grown, self.above[: sum(part.tokens.shape[1] for part in grown)])
        if form.copies:
            assert written is not None, "copies come from the text"
            return self.backend.join_copy(tree, written, form, self.draft.config.vocab_size)
        return tree.of_form(form)

    def _level_inputs(
        self, root_position: Tensor, cache: SpeculativeCache, levels: int, read: Tensor | None
    ) -> LevelInputs:
        depths = self.depths[:levels]  # of no level that is not grown: some rotations look at the largest position
        positions = root_position[:, None] + depths
        nodes = self.inner[levels - 1].stop
        inner = root_position[:, None] + self.inner_depths[:nodes]
        return LevelInputs(
            self.draft.angles(positions),
            self.target.angles(self.window.keys, positions),
            self.window.mask(inner, root_position, self.itself[:nodes].expand(len(inner), -1, -1)),
            cache.layers[self.target.layer].prefix_of(cache.placement_of(depths.expand_as(positions))),
            read,
        )

    def _hand_down(self, mask: Tensor, parents: Tensor, depth: int) -> None:
        """Let the nodes at `depth`, with parents (B, width), see what their parents see of the tree."""
        if self.inner[depth - 1].stop == mask.shape[1]:
            return  # leaves look at nothing
        above, nodes = self.inner[depth - 1], self.inner[depth]
        reach = slice(self.inner[max(depth - self.window.window + 1, 0)].start, nodes.start)
        tree = mask[:, :, self.window.tree_start :]
        seen = tree[:, above, reach]
        torch.gather(seen, 1, parents[:, :, None].expand(-1, -1, seen.shape[2]), out=tree[:, nodes, reach])

    def _level_logits(self, tokens: Tensor, depth: int, inputs: LevelInputs) -> Tensor:
        """Return logits (B, T, N) of what may follow the nodes at `depth`, which have `tokens` (B, T)."""
        window, nodes = self.window, self.inner[depth]
        here = slice(depth, depth + 1)
        angles, query_angles = (
            tuple(part[..., here, :] for part in parts) for parts in (inputs.angles, inputs.query_angles)
        )
        prefix = inputs.prefix
        if prefix.mask is not None:
            prefix = prefix._replace(mask=prefix.mask[:, here].expand(-1, tokens.shape[1], -1))

        def self_attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            window.write_nodes(key, value, nodes.start)
            return self._attend(query, window.as_prefix(inputs.mask[:, nodes]))

        def cross_attend(query: Tensor) -> Tensor:
            return self._attend(self.target.rotate(query, query_angles), prefix)

        hidden = self.draft.layer(self.target.embed(tokens), angles, self_attend, cross_attend, inputs.read)
        if self.head_rows is None:
            return self.target.logits(hidden)
        return self.target.scaled(self.head_rows(hidden))

    def _attend(self, query: Tensor, prefix: Prefix) -> Tensor:
        """Attend from (B, H, T, D) to a prefix, by the backend that verifies."""
        return self.backend.attention(query, prefix, None, self.scaling, None, None).transpose(1, 2)
