"""Hybrid tree attention: prefix ++ tree, as two attentions merged by their log-sum-exp.

The prefix needs no mask, so it runs at flash-decoding speed; only the small tree block is masked. `attend` is the
reference, slow and readable; every backend (backends_longspec.py) must agree with it. Knows nothing of models or of
the decoding loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .slots_longspec import write_slots

NEG_INF = float("-inf")


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Masked attention with its log-sum-exp, in float32: the reference.

    Args:
        query: (B, H, T, D); key, value: (B, K, S, D) with H a multiple of K; not expanded.
        mask: (B, T, S) bool, true where a query may look; None: everywhere.
        scaling: factor of the scores. softcap: scores become `softcap · tanh(scores / softcap)`.
    Returns: out (B, H, T, D) float32, zero where a row sees nothing; lse (B, H, T) float32, −inf there.
    """
    scores = pack_heads(query, key.shape[1]).float() @ key.float().transpose(-1, -2) * scaling  # (B, K, G·T, S)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        groups = query.shape[1] // key.shape[1]
        scores = scores.masked_fill(~mask.repeat(1, groups, 1)[:, None], NEG_INF)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == NEG_INF, 0.0)[..., None])
    return unpack_heads(weights @ value.float(), query), lse.reshape(query.shape[:3])


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets from the attentions over each, in float32.

    out (B, H, T, D), lse (B, H, T) of either; a side with lse −inf has no keys and no weight.
    Returns: out, lse of the union. Source: LongSpec section 3.3; Dao et al., Flash-Decoding.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    shift = lse.masked_fill(lse == NEG_INF, 0.0)
    weight_a, weight_b = torch.exp(lse_a - shift)[..., None], torch.exp(lse_b - shift)[..., None]
    return out_a.float() * weight_a + out_b.float() * weight_b, lse


def apply_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Attention sinks (gpt_oss): one more key per head with score `sinks` (H,) and value zero."""
    return out * torch.sigmoid(lse - sinks.float()[None, :, None])[..., None]


def pack_heads(query: Tensor, kv_heads: int) -> Tensor:
    """(B, H, T, D) -> (B, K, G·T, D): the queries that share a K/V head become rows of one matrix."""
    batch, heads, length, dim = query.shape
    return query.reshape(batch, kv_heads, heads // kv_heads * length, dim)


def unpack_heads(packed: Tensor, query: Tensor) -> Tensor:
    """The inverse of `pack_heads` for a tensor shaped as the packed `query`."""
    return packed.reshape(query.shape)


class Spans(NamedTuple):
    """Which keys each row of a batch may see: those from its start up to its end, in slots of a key store.

    starts, ends: (B,) int64 on the device; host: the same pairs, None where only the device shall know them, as in a
    CUDA graph; derived: what kernels make of them, once a round.
    """

    starts: Tensor
    ends: Tensor
    host: tuple[tuple[int, int], ...] | None
    derived: dict[Any, Any]

    def to(self, device: torch.device) -> Spans:
        return Spans(self.starts.to(device), self.ends.to(device), self.host, {})

    @property
    def common(self) -> slice | None:
        """The slots of every row, if they are known to be the same."""
        return slice(*self.host[0]) if self.host is not None and len(set(self.host)) == 1 else None

    @property
    def longer(self) -> Spans:
        """The same with one slot more behind each."""
        if "longer" not in self.derived:
            host = None if self.host is None else tuple((start, end + 1) for start, end in self.host)
            self.derived["longer"] = Spans(self.starts, self.ends + 1, host, {})
        return self.derived["longer"]

    def cover(self, slots: int) -> slice:
        """The slots from the first that any row may see to the last; all `slots` of a store if that is not known."""
        if self.host is None:
            return slice(0, slots)
        return slice(min(start for start, _ in self.host), max(end for _, end in self.host))


class Prefix(NamedTuple):
    """Keys and values of the text so far: stores (B, K, S, D), and who may see which slots.

    mask: (B, T, S) bool, what each node may see within its row's span; None: all of it. It may end where spans end.
    """

    key: Tensor
    value: Tensor
    spans: Spans
    mask: Tensor | None

    def to(self, device: torch.device) -> Prefix:
        """The same for a layer that shares it on another device."""
        if self.key.device == device:
            return self
        mask = None if self.mask is None else self.mask.to(device)
        return Prefix(self.key.to(device), self.value.to(device), self.spans.to(device), mask)


class Nodes(NamedTuple):
    """Keys and values (B, K, T, D) of a tree, and mask (B, T, T) bool: which of them each node sees.

    slots: (B,), the first slot of each row of the prefix's stores that they go to; None: they are there.
    """

    key: Tensor
    value: Tensor
    mask: Tensor
    slots: Tensor | None


def eager_prefix(query: Tensor, prefix: Prefix, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """The reference over a prefix: (out, lse) as `attend`."""
    key, value, spans, mask = prefix
    cover = spans.cover(key.shape[2])
    if mask is None and spans.common is None:
        slot = torch.arange(cover.start, cover.stop, device=query.device)
        mask = (slot >= spans.starts[:, None]) & (slot < spans.ends[:, None])
        mask = mask[:, None].expand(-1, query.shape[2], -1)
    elif mask is not None:
        mask = mask[:, :, cover]
    return attend(query, key[:, :, cover], value[:, :, cover], mask, scaling, softcap)


def alone(nodes: Nodes, prefix: Prefix) -> bool:
    """Whether a tree is one node that comes right behind what all it sees: plain decoding, without a merge."""
    return nodes.key.shape[2] == 1 and nodes.slots is prefix.spans.ends and prefix.mask is None


def place(nodes: Nodes, prefix: Prefix) -> None:
    """Put a tree into the stores of its prefix, where `nodes.slots` says."""
    if nodes.slots is not None:
        slots = nodes.slots[:, None] + torch.arange(nodes.key.shape[2], device=nodes.slots.device)
        write_slots(prefix.key, slots, nodes.key)
        write_slots(prefix.value, slots, nodes.value)


PrefixAttention = Callable[[Tensor, Prefix, float, float | None], tuple[Tensor, Tensor]]


def merged_attention(
    prefix_attention: PrefixAttention,
    query: Tensor,
    prefix: Prefix,
    nodes: Nodes | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Hybrid attention, step by step: the tree goes into the stores, two attentions, the merge.

    query: (B, H, T, D); nodes: the tree, None to attend to the prefix alone; sinks: (H,), see `apply_sinks`.
    Returns (B, T, H, D) in the query's dtype.
    """
    if nodes is not None and alone(nodes, prefix):
        place(nodes, prefix)
        prefix, nodes = prefix._replace(spans=prefix.spans.longer), None
    # under autocast keys and values may be of other formats than queries, and only then are these copies
    states = prefix._replace(key=prefix.key.to(query.dtype), value=prefix.value.to(query.dtype))
    out, lse = prefix_attention(query, states, scaling, softcap)
    if nodes is not None:
        place(nodes, prefix)
        out, lse = merge(out, lse, *attend(query, nodes.key, nodes.value, nodes.mask, scaling, softcap))
    if sinks is not None:
        out = apply_sinks(out, lse, sinks)
    return out.transpose(1, 2).to(query.dtype).contiguous()
