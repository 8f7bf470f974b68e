"""Distillation loss, a · KL(target ‖ draft) + b · cross-entropy, whose logits never exist for all tokens at once.

With a vocabulary of 49k tokens, the float32 logits of 65k tokens take 13 GB; a chunk of logits is made, used and
dropped. The gradient by the draft's hidden states is computed chunk by chunk during the forward pass, so the backward
pass recomputes nothing. Fused losses such as Liger's want the LM head's weight matrix; here a target's head is called
as a module, with its hooks, adapters, quantization, scale and cap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

IGNORED = -100  # the label of a token that is not learned, as everywhere in transformers

# draft hidden (n, hidden), target hidden (n, hidden), labels (n,) -> kl, cross-entropy, agreements, each (n,)
Terms = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class LossWeights(NamedTuple):
    kl: float
    ce: float


class DistillationSums(NamedTuple):
    """The loss of a batch, and sums (B,) over the learned tokens of each sample.

    ``loss`` is a mean over tokens and alone has a gradient.
    """

    loss: Tensor
    kl: Tensor
    cross_entropy: Tensor
    agreements: Tensor  # tokens where the draft's first guess is the target's


def token_terms(logits: Callable[[Tensor], Tensor], places: Tensor | None = None) -> Terms:
    """Return the function that computes the loss of each token of a chunk; it may be compiled.

    logits: the target's LM head, or only the rows that the draft guesses with. For such rows, `places` (vocab,) gives
    the row of each token, or -1: the target's distribution is then taken among the rows, and a text that continues
    with another token adds no cross-entropy.
    """

    def terms(draft_hidden: Tensor, target_hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        learned = labels != IGNORED
        labels = labels.clamp(min=0) if places is None else places[labels.clamp(min=0)]
        with torch.no_grad():
            target_logits = logits(target_hidden)
            target_logp = log_softmax(target_logits, dim=-1, dtype=_wide(target_logits))
        draft_logits = logits(draft_hidden)
        draft_logp = log_softmax(draft_logits, dim=-1, dtype=_wide(draft_logits))
        kl = (target_logp.exp() * (target_logp - draft_logp)).sum(-1) * learned
        ce = -draft_logp.gather(-1, labels.clamp(min=0)[:, None])[:, 0] * (learned & (labels >= 0))
        return kl, ce, (draft_logits.argmax(-1) == target_logits.argmax(-1)) & learned

    return terms


def distillation_loss(
    terms: Terms,
    draft_hidden: Tensor,
    target_hidden: Tensor,
    labels: Tensor,
    weights: LossWeights,
    chunk: int,
    items: Tensor | None = None,
) -> DistillationSums:
    """Compute the loss of ``draft_hidden`` against ``target_hidden``, both (B, T, hidden), ``chunk`` tokens at a time.

    labels: (B, T), the tokens that really follow.
    items: what the loss is divided by where these samples are a part of a larger batch; None: their learned tokens.
    """
    items = (labels != IGNORED).sum().clamp(min=1) if items is None else items
    given = draft_hidden.flatten(0, 1), target_hidden.flatten(0, 1), labels.flatten()
    loss, *every = _ChunkedLoss.apply(*given, items, terms, weights, chunk)
    return DistillationSums(loss, *(term.view_as(labels).sum(1) for term in every))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        draft: Tensor,
        target: Tensor,
        labels: Tensor,
        items: Tensor,
        terms: Terms,
        weights: LossWeights,
        chunk: int,
    ) -> tuple[Tensor, ...]:
        gradient = torch.empty_like(draft)
        every = torch.empty(3, len(labels), dtype=_wide(draft), device=draft.device)
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            leaf = draft[part].detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                kl, ce, agreements = terms(leaf, target[part], labels[part])
                if ctx.needs_input_grad[0]:
                    loss = (weights.kl * kl + weights.ce * ce).sum() / items
                    (gradient[part],) = torch.autograd.grad(loss, leaf)
            for row, term in zip(every, (kl, ce, agreements), strict=True):
                row[part] = term.detach()
        ctx.save_for_backward(gradient)
        kl, ce, agreements = every
        loss = (weights.kl * kl + weights.ce * ce).sum() / items
        ctx.mark_non_differentiable(kl, ce, agreements)
        return loss, kl, ce, agreements

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, None, None, None, None, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
