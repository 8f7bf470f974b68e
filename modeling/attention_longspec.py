"""Hybrid tree attention: prefix ++ tree, as two attentions merged by their log-sum-exp.

The prefix needs no mask, so it runs at flash-decoding speed; only the small tree block is masked. `attend` is the
reference, slow and readable; every backend must agree with it. Keys and values lie in stores (B, K, S, D) of S slots,
written in place by index. Shapes never depend on values, so a CUDA graph can capture all of this. Knows nothing of
models or of the decoding loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

NEG_INF = float("-inf")


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attend with a mask, in float32 or the query's wider format, and return the log-sum-exp too: the reference.

    Args:
        query: (B, H, T, D); key, value: (B, K, S, D) with H a multiple of K; not expanded.
        mask: (B, T, S) bool, true where a query may look; None: everywhere.
        scaling: factor of the scores. softcap: scores become `softcap · tanh(scores / softcap)`.
    Returns: out (B, H, T, D), zero where a row sees nothing; lse (B, H, T), −inf there; both in that format.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = pack_heads(query, key.shape[1]).to(wide) @ key.to(wide).transpose(-1, -2) * scaling  # (B, K, G·T, S)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        groups = query.shape[1] // key.shape[1]
        scores = scores.masked_fill(~mask.repeat(1, groups, 1)[:, None], NEG_INF)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == NEG_INF, 0.0)[..., None])
    return unpack_heads(weights @ value.to(wide), query), lse.reshape(query.shape[:3])


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the attentions over two disjoint key sets into the attention over their union.

    out_a, out_b: (B, H, T, D); lse_a, lse_b: (B, H, T), in whose format (float32 or wider) it is merged; a side with
    lse −inf has no keys and no weight.
    Returns: out, lse of the union. Source: LongSpec section 3.3; Dao et al., Flash-Decoding.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    shift = lse.masked_fill(lse == NEG_INF, 0.0)
    weight_a, weight_b = torch.exp(lse_a - shift)[..., None], torch.exp(lse_b - shift)[..., None]
    return out_a * weight_a + out_b * weight_b, lse


def apply_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Add an attention sink to each head (gpt_oss): one more key with score `sinks` (H,) and value zero."""
    return out * torch.sigmoid(lse - sinks[None, :, None])[..., None]


def pack_heads(query: Tensor, kv_heads: int) -> Tensor:
    """Make the queries that share a K/V head rows of one matrix: (B, H, T, D) -> (B, K, G·T, D)."""
    batch, heads, length, dim = query.shape
    return query.reshape(batch, kv_heads, heads // kv_heads * length, dim)


def unpack_heads(packed: Tensor, query: Tensor) -> Tensor:
    """Invert `pack_heads` for a tensor shaped as the packed `query`."""
    return packed.reshape(query.shape)


class Memo(dict):
    """Keep what all layers of a round share, made by the first layer that asks for it."""

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return the value under `key`, made by `make` on the first call."""
        if key not in self:
            self[key] = make()
        return self[key]


class Span(NamedTuple):
    """A range of slots, on the host."""

    start: int
    end: int


class Spans(NamedTuple):
    """The slots of a key store that each row of a batch may see: from its start up to its end.

    starts, ends: (B,) int64 on the device.
    host: the same numbers on the host; None where only the device shall know them, as in a CUDA graph.
    memo: values that kernels and layers derive from these spans, once a round.
    """

    starts: Tensor
    ends: Tensor
    host: tuple[Span, ...] | None
    memo: Memo

    def to(self, device: torch.device) -> Spans:
        return Spans(self.starts.to(device), self.ends.to(device), self.host, Memo())

    @property
    def common(self) -> slice | None:
        """The slots of every row, if the rows are known to have the same span."""
        return slice(*self.host[0]) if self.host is not None and len(set(self.host)) == 1 else None

    @property
    def longer(self) -> Spans:
        """The same spans with one more slot at each end."""
        return self.memo.once("longer", self._extended)

    def _extended(self) -> Spans:
        host = None if self.host is None else tuple(Span(start, end + 1) for start, end in self.host)
        return Spans(self.starts, self.ends + 1, host, Memo())

    def cover(self, slots: int) -> slice:
        """Return the slots between the first and the last that any row may see; all `slots` where that is unknown."""
        if self.host is None:
            return slice(0, slots)
        return slice(min(span.start for span in self.host), max(span.end for span in self.host))


class Prefix(NamedTuple):
    """Keys and values of the text so far: stores (B, K, S, D), and which slots each node may see.

    mask: (B, T, S) bool, the slots that each node may see within its row's span; None: the whole span. S may end where
        the spans end.
    """

    key: Tensor
    value: Tensor
    spans: Spans
    mask: Tensor | None

    def to(self, device: torch.device) -> Prefix:
        """Return the prefix on the device of a layer that shares these keys and values."""
        if self.key.device == device:
            return self
        mask = None if self.mask is None else self.mask.to(device)
        return Prefix(self.key.to(device), self.value.to(device), self.spans.to(device), mask)


class Nodes(NamedTuple):
    """Keys and values (B, K, T, D) of a tree, and mask (B, T, T) bool: which nodes each node sees.

    slots: (B,), the first slot of each row of the prefix's stores where the tree belongs; None: the tree lies there.
    """

    key: Tensor
    value: Tensor
    mask: Tensor
    slots: Tensor | None


def eager_prefix(query: Tensor, prefix: Prefix, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Attend to a prefix by the reference; returns (out, lse) as `attend`."""
    key, value, spans, mask = prefix
    cover = spans.cover(key.shape[2])
    if mask is None and spans.common is None:
        slot = torch.arange(cover.start, cover.stop, device=query.device)
        mask = (slot >= spans.starts[:, None]) & (slot < spans.ends[:, None])
        mask = mask[:, None].expand(-1, query.shape[2], -1)
    elif mask is not None:
        mask = mask[:, :, cover]
    return attend(query, key[:, :, cover], value[:, :, cover], mask, scaling, softcap)


def is_alone(nodes: Nodes, prefix: Prefix) -> bool:
    """Tell whether a tree is one node right behind all that the node sees: plain decoding, without a merge."""
    return nodes.key.shape[2] == 1 and nodes.slots is prefix.spans.ends and prefix.mask is None


def store_nodes(nodes: Nodes, prefix: Prefix) -> None:
    """Write a tree's keys and values into the stores of its prefix, where `nodes.slots` says."""
    if nodes.slots is not None:
        slots = nodes.slots[:, None] + torch.arange(nodes.key.shape[2], device=nodes.slots.device)
        write_slots(prefix.key, slots, nodes.key)
        write_slots(prefix.value, slots, nodes.value)


PrefixAttention = Callable[[Tensor, Prefix, float, float | None], tuple[Tensor, Tensor]]
Attention = Callable[[Tensor, Prefix, Nodes | None, float, float | None, Tensor | None], Tensor]
Move = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def merged_attention(
    prefix_attention: PrefixAttention,
    query: Tensor,
    prefix: Prefix,
    nodes: Nodes | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend to prefix and tree step by step: store the tree, two attentions, one merge.

    query: (B, H, T, D); nodes: the tree, None to attend to the prefix alone; sinks: (H,), see `apply_sinks`.
    Returns (B, T, H, D) in the query's dtype.
    """
    if nodes is not None and is_alone(nodes, prefix):
        store_nodes(nodes, prefix)
        prefix, nodes = prefix._replace(spans=prefix.spans.longer), None
    # under autocast keys and values may be of other formats than queries, and only then are these copies
    states = prefix._replace(key=prefix.key.to(query.dtype), value=prefix.value.to(query.dtype))
    out, lse = prefix_attention(query, states, scaling, softcap)
    if nodes is not None:
        store_nodes(nodes, prefix)
        out, lse = merge(out, lse, *attend(query, nodes.key, nodes.value, nodes.mask, scaling, softcap))
    if sinks is not None:
        out = apply_sinks(out, lse, sinks)
    return out.transpose(1, 2).to(query.dtype).contiguous()


def write_slots(store: Tensor, slots: Tensor, states: Tensor) -> None:
    """Set store (B, K, S, D)[b, :, slots[b, t]] = states (B, K, T, D)[b, :, t]."""
    _bits(store).scatter_(2, slots[:, None, :, None].expand_as(states), _bits(states.to(store.dtype)))


def move_slots(keys: Tensor, values: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy slots `source` (B, P) of both stores to slots `target` (B, P); all are read before any is written."""
    for store in map(_bits, (keys, values)):
        shape = -1, store.shape[1], -1, store.shape[3]
        store.scatter_(2, _everywhere(target, shape), store.gather(2, _everywhere(source, shape)))


def _bits(store: Tensor) -> Tensor:
    """View a store of 2-byte floats on a CPU as integers: torch's `scatter_` of such floats copies the whole store."""
    return store.view(torch.int16) if store.device.type == "cpu" and store.element_size() == 2 else store


def _everywhere(slots: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Expand slots (B, P) over all heads and dimensions."""
    return slots[:, None, :, None].expand(shape)


def ring_contents(lengths: Tensor, ring: int) -> Tensor:
    """Return (B, ring) int64: the text position in each slot after `lengths` (B,) tokens, negative in unused slots."""
    slot = torch.arange(ring, device=lengths.device)
    last = lengths[:, None] - 1
    return last - (last - slot) % ring
