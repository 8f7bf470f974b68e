"""Drawing on the device: the tokens along the paths of a round's trees, processed and sampled as in plain `generate`.

From the root on, a level at a time: the logits behind the node where each row stands, the logits processors with the
row's own text, the noise of its step, the token, the child that carries it. So no node that is not reached costs
anything, a processor sees what it would see in plain decoding, and the host reads the result once a round.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .call_longspec import Call
from .copies_longspec import SPARE, room_for
from .fast_processors_longspec import Texts, begin, follow, on_device
from .sampling_longspec import IMPOSSIBLE, largest
from .tree_longspec import TokenTree
from .verification_longspec import Accepted, Verified, Walk


class Drawing(NamedTuple):
    """What a call's rounds draw with.

    processors: see `on_device`; ending: those at their end that the backend's kernels take over with the draw; None
    where it has none. ids: (B, C), the texts. origin: (), how many tokens longer than the cached prefix a text with
    its root is; prompt: (), the length of the prompts. noise: (N, B, vocab), the draws of `Noise`, each at its step
    modulo N; None where the largest score is picked.
    """

    processors: tuple[Any, ...]
    ending: Any
    ids: Tensor
    origin: Tensor
    prompt: Tensor
    noise: Tensor | None

    @classmethod
    def of(cls, call: Call, vocab: int, fused: bool) -> Drawing:
        """Make what the next rounds of a call need; without noise. fused: whether kernels may draw, where they can."""
        text, device = call.text, call.text.device
        spare = max(SPARE, 2 * call.chooser.deepest + 2)
        room = room_for(max(text.lengths) + spare)
        ids = torch.zeros(text.batch, room, dtype=torch.long, device=device)
        texts = Texts(ids, torch.tensor(text.lengths, device=device))
        origin, prompt = torch.tensor([text.lengths[0] - call.cache.lengths[0], text.prompt], device=device)
        drawing = cls((), None, ids, origin, prompt, None)
        drawing.follow(call)
        processors, ending = on_device(call.sampler.processors, vocab, texts), None
        if fused and call.backend.draw is not None:
            from .fast_triton_draw_longspec import Ending

            processors, ending = Ending.of(call.sampler.processors, processors, device, call.sampler.do_sample)
        return drawing._replace(processors=processors, ending=ending)

    def follow(self, call: Call) -> None:
        """Take the texts over from the host."""
        ids = call.text.sequences
        self.ids[:, : ids.shape[1]] = ids

    def has_room(self, call: Call, levels: int) -> bool:
        """Tell whether a walk of so many levels fits behind the longest text."""
        return max(call.text.lengths) + levels < self.ids.shape[1]


def draw_paths(call: Call, tree: TokenTree, verified: Verified, drawing: Drawing) -> Walk:
    """Draw the tokens along the paths. A row of which kernels do not know a token has a count of 0."""
    if drawing.ending is not None:
        assert call.backend.draw is not None, "see `Drawing.of`"
        return call.backend.draw(call, tree, verified, drawing)
    device, nodes = drawing.ids.device, tree.tokens.shape[1]
    rows, index = torch.arange(len(drawing.ids), device=device), torch.arange(nodes, device=device)
    lengths = call.cache.bounds_on(device)[1] + drawing.origin
    processors = begin(drawing.processors, Texts(drawing.ids, lengths), tree.levels + 1)
    node, counts = torch.zeros_like(rows), torch.zeros_like(rows)
    alive = torch.ones_like(rows, dtype=torch.bool)
    path, tokens = [], []
    for level in range(tree.levels + 1):
        scores = verified.logits[rows, node].to(device, torch.float32)
        texts = Texts(drawing.ids, lengths)
        for processor in processors:
            scores = processor(scores, texts)
        token = pick(scores, drawing, lengths, rows)
        if call.text.padding is not None:
            token = token.masked_fill(call.roots.stopped & (token != IMPOSSIBLE), call.text.padding)
        path.append(node)
        tokens.append(token)
        counts = counts + alive
        drawing.ids.scatter_(1, lengths[:, None], token.clamp(min=0)[:, None])
        if level == tree.levels:
            break
        follow(processors, token, lengths)
        below = (tree.parents == node[:, None]) & (tree.tokens == token[:, None]) & (index > 0)
        child = torch.where(below, index, nodes).amin(dim=1)  # of siblings with the same token, the first
        alive = alive & (child < nodes)
        node = torch.where(alive, child, node)
        lengths = lengths + 1
    steps, picked = torch.stack(path, dim=1), torch.stack(tokens, dim=1)
    newest = picked.gather(1, counts[:, None] - 1)[:, 0]
    return Walk(Accepted(steps, counts, newest), torch.cat([steps, picked, counts[:, None]], dim=1))


def pick(scores: Tensor, drawing: Drawing, lengths: Tensor, rows: Tensor) -> Tensor:
    """Pick the tokens (B,) behind texts of `lengths` (B,) from processed scores (B, vocab)."""
    if drawing.noise is None:
        return scores.argmax(dim=-1)
    slots = (lengths - drawing.prompt) % len(drawing.noise)
    return largest(scores.softmax(dim=-1), drawing.noise[slots, rows])
