"""Verification: which nodes of a tree the target accepts, and the text that grows by them.

`accept` walks from the root; at each node the target's own sampler picks the next token exactly as plain `generate`
would, so any tree and any processor give the same text. Knows trees and logits, not models or caches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from .tree_longspec import TokenTree, children


class Text:
    """The sequence as plain `generate` holds it: one `emit` per token runs processors, sampler, streamer and criteria.

    The random generator is asked once per emitted token, in order, so the same seed gives the same text.
    """

    def __init__(
        self, input_ids: Tensor, processors: Any, criteria: Any, generation_config: GenerationConfig, streamer: Any
    ):
        self.ids = input_ids  # (1, L)
        self.processors, self.criteria, self.streamer = processors, criteria, streamer
        self.do_sample = generation_config.do_sample
        record = generation_config.return_dict_in_generate
        self.scores: tuple | None = () if record and generation_config.output_scores else None
        self.logits: tuple | None = () if record and generation_config.output_logits else None
        self.finished = False

    @property
    def last_token(self) -> Tensor:
        return self.ids[:, -1]

    @property
    def is_argmax(self) -> bool:
        """Whether a token is the argmax of its logits, whatever came before it, and nobody asked to see them."""
        return not self.do_sample and len(self.processors) == 0 and self.scores is None and self.logits is None

    def emit(self, logits: Tensor) -> int:
        """Pick the next token from the target's logits (1, vocab) and append it."""
        logits = logits.to(copy=True, dtype=torch.float32, device=self.ids.device)
        scores = self.processors(self.ids, logits)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        if self.do_sample:
            probabilities = nn.functional.softmax(scores, dim=-1)
            return self.append(torch.multinomial(probabilities, num_samples=1).squeeze(1))
        return self.append(torch.argmax(scores, dim=-1))

    def append(self, token: Tensor) -> int:
        """Append `token` (1,): ask the stopping criteria, then stream it, as `generate` does. Returns it."""
        self.ids = torch.cat([self.ids, token[:, None]], dim=-1)
        self.finished = bool(self.criteria(self.ids, self.scores).all())
        if self.streamer is not None:
            self.streamer.put(token.cpu())
        return int(token)


def accept(tree: TokenTree, logits: Tensor, text: Text, path: list[int]) -> None:
    """Extend `text` along the tree as far as the target agrees, and by the target's own next token (batch 1).

    path: the accepted nodes so far, just the root `[0]`; grows in place, so that it is right even if `text` raises.

    logits: (1, T, vocab) of the target at each node. In the end there are as many nodes in `path` as tokens emitted.
    """
    # the walk needs the tree on the host: one transfer a round
    tokens, parents = torch.stack([tree.tokens[0], tree.parents[0]]).tolist()
    below = children(tokens, parents)
    best = logits[0].float().argmax(dim=-1).to(text.ids.device) if text.is_argmax else None
    while True:
        node = path[-1]
        token = text.append(best[node : node + 1]) if best is not None else text.emit(logits[:, node])
        child = below[node].get(token)
        if text.finished or child is None:
            return
        path.append(child)
