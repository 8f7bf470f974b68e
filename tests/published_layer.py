"""The layer of the published LongSpec drafts as plain equations, for one text: no transformers, none of our code.

    x = embed(token)
    x = x + O · attention(x)         over the last 513 tokens; queries, keys and values with bias, O without
    x = x + O · cross_attention(x)   queries with bias, over the target's cached keys and values
    x = x + down(silu(gate(x)) · up(x))

Each branch reads x through its own RMSNorm; only the target's LM head follows. `text` goes over a whole text, as
training does; `prefill` and `level` go as decoding does: first the keys and values of the text, then a tree by levels.
Shapes: a row for each token; keys and values (S, key/value heads, dimension).
"""

import math

import torch
from torch import Tensor

WINDOW = 513  # flash-attn's `window_size=(512, -1)`: 512 keys to the left, and the token's own


class PublishedLayer:
    def __init__(self, weights: dict[str, Tensor], target: dict, dtype: torch.dtype, angles: torch.dtype):
        """Take a checkpoint's weights and the target's config.json; angles: the number format of RoPE's angles."""
        self.weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        self.eps, self.dim = target["rms_norm_eps"], target["hidden_size"] // target["num_attention_heads"]
        self.theta = target.get("rope_theta", 10000.0)
        self.factor = target["rope_scaling"]["factor"] if "rope_scaling" in target else 1.0
        self.angles = angles

    def project(self, name: str, x: Tensor) -> Tensor:
        """Project tokens to heads: (T, in) -> (T, heads, dimension)."""
        rows = x @ self.weights[f"{name}_proj.weight"].T + self.weights[f"{name}_proj.bias"]
        return rows.view(len(x), -1, self.dim)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weights[f"{name}.weight"]

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn dimension i with dimension i + half (RoPE); linear scaling divides positions by its factor."""
        half = self.dim // 2
        speeds = self.theta ** (-torch.arange(half, dtype=self.angles) / half) / self.factor
        turns = (positions.to(self.angles)[:, None] * speeds)[:, None]
        cos, sin = turns.cos().to(x.dtype), turns.sin().to(x.dtype)
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        """Attend where `seen` (T, S) bool is true: (T, heads · dimension), zero for a token that sees nothing."""
        group = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(group, dim=1) for states in (key, value))
        scores = torch.einsum("thd,shd->hts", query, key) / math.sqrt(self.dim)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
        return torch.einsum("hts,shd->thd", weights, value).flatten(1)

    def own(self, embeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the self-attention, which depend on token and position alone."""
        x = self.norm("input_layernorm", embeds)
        return self.rotate(self.project("self_attn.k", x), positions), self.project("self_attn.v", x)

    def hidden(self, embeds, positions, own, seen, target, target_seen) -> Tensor:
        """Return the hidden states of tokens.

        own, target: pairs of keys and values; seen, target_seen: (T, S) bool, the keys that each token sees.
        """
        x = embeds
        query = self.rotate(self.project("self_attn.q", self.norm("input_layernorm", x)), positions)
        x = x + self.attend(query, *own, seen) @ self.weights["self_attn.o_proj.weight"].T
        query = self.project("cross_attn.q", self.norm("post_self_attention_layernorm", x))
        query = self.rotate(query, positions)
        x = x + self.attend(query, *target, target_seen) @ self.weights["cross_attn.o_proj.weight"].T
        normed = self.norm("post_cross_attention_layernorm", x)
        gate, up = (normed @ self.weights[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        return x + (gate / (1 + (-gate).exp()) * up) @ self.weights["mlp.down_proj.weight"].T

    def text(self, embeds: Tensor, target: tuple[Tensor, Tensor], lag: int) -> Tensor:
        """Return hidden states of a whole text; a token sees the target's keys of tokens at least `lag` back."""
        at = torch.arange(len(embeds))
        back = at[:, None] - at
        own = self.own(embeds, at)
        return self.hidden(embeds, at, own, (back >= 0) & (back < WINDOW), target, back >= lag)

    def prefill(self, embeds: Tensor, target: tuple[Tensor, Tensor]) -> None:
        """Read a text without its last token, which is the root of the next tree.

        embeds: the embeddings of these tokens; target: the target's keys and values of the text that it has read.
        """
        self.length, self.target = len(embeds), target
        self.keys, self.values = self.own(embeds, torch.arange(self.length))
        self.above = torch.zeros(0, 0, dtype=torch.bool)  # for each node, the nodes above it and itself

    def level(self, embeds: Tensor, depth: int, parents: Tensor | None) -> Tensor:
        """Return hidden states of one more level; parents: the parent of each of its nodes, None for the root."""
        count, nodes = len(embeds), len(self.above) + len(embeds)
        above = torch.zeros(nodes, nodes, dtype=torch.bool)
        above[:-count, :-count] = self.above
        if parents is not None:
            above[-count:, :-count] = self.above[parents]
        above[-count:, -count:] = torch.eye(count, dtype=torch.bool)
        self.above = above
        position = self.length + depth
        positions = torch.full((count,), position)
        key, value = self.own(embeds, positions)
        self.keys, self.values = torch.cat([self.keys, key]), torch.cat([self.values, value])
        near = (position - torch.arange(self.length) < WINDOW).expand(count, -1)
        seen = torch.cat([near, above[-count:]], dim=1)
        read = torch.ones(count, len(self.target[0]), dtype=torch.bool)
        return self.hidden(embeds, positions, (self.keys, self.values), seen, self.target, read)
