"""The chunked distillation loss against the same formula over all tokens at once, in float64."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from hf_longspec.training.loss import chunk_sums, distillation_loss

HIDDEN, VOCAB, WEIGHT = 6, 11, 0.1


def random_inputs(dtype=torch.float64):
    head = nn.Linear(HIDDEN, VOCAB, bias=False, dtype=dtype).requires_grad_(False)
    draft, target = torch.randn(2, 3, 7, HIDDEN, dtype=dtype)
    return head, draft.requires_grad_(), target, torch.randint(VOCAB, (3, 7))


def unchunked(head, draft, target, labels):
    draft_logp, target_logp = (log_softmax(head(x), dim=-1).flatten(0, 1) for x in (draft, target))
    kl = kl_div(draft_logp, target_logp, reduction="batchmean", log_target=True)
    return kl, cross_entropy(head(draft).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("chunk", [1, 4, 20, 21, 100])
def test_value_and_gradient_equal_the_unchunked_ones(chunk):
    head, draft, target, labels = random_inputs()
    loss = distillation_loss(chunk_sums(head), draft, target, labels, WEIGHT, chunk)
    (gradient,) = torch.autograd.grad(3 * loss.loss, draft)
    kl, ce = unchunked(head, draft, target, labels)
    torch.testing.assert_close((loss.kl, loss.cross_entropy, loss.loss), (kl, ce, kl + WEIGHT * ce))
    torch.testing.assert_close(gradient, torch.autograd.grad(3 * (kl + WEIGHT * ce), draft)[0])
    agreement = (head(draft).argmax(-1) == head(target).argmax(-1)).double().mean()
    torch.testing.assert_close(loss.agreement, agreement)


def test_a_draft_equal_to_its_target_has_no_kl():
    head, _, target, labels = random_inputs(torch.float32)
    loss = distillation_loss(chunk_sums(head), target.clone().requires_grad_(), target, labels, 0.0, 8)
    assert abs(loss.kl) < 1e-6 and loss.agreement == 1


def test_logits_never_exist_for_more_tokens_than_a_chunk():
    head, draft, target, labels = random_inputs()
    seen = []
    head.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    distillation_loss(chunk_sums(head), draft, target, labels, WEIGHT, 4).loss.backward()
    assert max(seen) == 4
    assert len(seen) == 2 * 6, "one pass for the target and one for the draft a chunk: nothing is recomputed"


def test_the_logits_function_is_used_whole():
    """A target's logit cap is part of the loss: it is a function, not a weight matrix."""
    head, draft, target, labels = random_inputs()

    def capped(hidden):
        return torch.tanh(head(hidden) / 2) * 2

    loss = distillation_loss(chunk_sums(capped), draft, target, labels, WEIGHT, 5)
    kl, ce = unchunked(capped, draft, target, labels)
    torch.testing.assert_close(loss.loss, kl + WEIGHT * ce)
