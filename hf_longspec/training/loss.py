"""Distillation loss whose logits never exist for all tokens: KL(target ‖ draft) + weight · cross-entropy.

At 49k words, 65k tokens of float32 logits are 13 GB; a chunk of them is made, used and dropped. The gradient by the
draft's hidden states is computed chunk by chunk during the forward pass, so backward recomputes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

# draft hidden (n, hidden), target hidden (n, hidden), labels (n,) -> kl, cross-entropy, agreements, each summed over n
ChunkSums = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class DistillationLoss(NamedTuple):
    """Means over tokens; only ``loss`` carries a gradient."""

    loss: Tensor
    kl: Tensor
    cross_entropy: Tensor
    agreement: Tensor  # share of tokens where the draft's first guess is the target's


def chunk_sums(logits: Callable[[Tensor], Tensor]) -> ChunkSums:
    """The loss terms of one chunk through the target's LM head ``logits``: what the trainer may compile."""

    def sums(draft_hidden: Tensor, target_hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            target_logits = logits(target_hidden)
            target_logp = log_softmax(target_logits, dim=-1, dtype=_wide(target_logits))
        draft_logits = logits(draft_hidden)
        draft_logp = log_softmax(draft_logits, dim=-1, dtype=_wide(draft_logits))
        kl = (target_logp.exp() * (target_logp - draft_logp)).sum()
        ce = -draft_logp.gather(-1, labels[:, None]).sum()
        agreements = (draft_logits.argmax(-1) == target_logits.argmax(-1)).sum()
        return kl, ce, agreements

    return sums


def distillation_loss(
    sums: ChunkSums, draft_hidden: Tensor, target_hidden: Tensor, labels: Tensor, ce_weight: float, chunk: int
) -> DistillationLoss:
    """``draft_hidden`` and ``target_hidden`` are (B, T, hidden), ``labels`` (B, T) the tokens that really follow."""
    loss, kl, ce, agreement = _ChunkedLoss.apply(
        draft_hidden.flatten(0, 1), target_hidden.flatten(0, 1), labels.flatten(), sums, ce_weight, chunk
    )
    return DistillationLoss(loss, kl, ce, agreement)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, draft: Tensor, target: Tensor, labels: Tensor, sums: ChunkSums, ce_weight: float, chunk: int
    ) -> tuple[Tensor, ...]:
        tokens = len(labels)
        gradient = torch.empty_like(draft)
        totals = torch.zeros(3, dtype=_wide(draft), device=draft.device)
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            leaf = draft[part].detach().requires_grad_()
            with torch.enable_grad():
                kl, ce, agreements = sums(leaf, target[part], labels[part])
                (gradient[part],) = torch.autograd.grad((kl + ce_weight * ce) / tokens, leaf)
            totals += torch.stack([kl.detach(), ce.detach(), agreements])
        ctx.save_for_backward(gradient)
        kl, ce, agreement = (totals / tokens).unbind()
        loss = kl + ce_weight * ce
        ctx.mark_non_differentiable(kl, ce, agreement)
        return loss, kl, ce, agreement

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, None, None, None, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
