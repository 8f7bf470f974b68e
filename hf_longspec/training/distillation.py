"""The forward pass of a draft in training: read the frozen target, run the draft, compute the loss in chunks.

The target is held beside the draft, never in it: no optimizer, checkpoint or wrapper (DDP, FSDP) finds the target's
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hf_longspec.modeling.fast_compiled_longspec import compiled_layers
from hf_longspec.modeling.modeling_longspec import LongSpecForCausalLM

from .batch import Batch
from .documents import LONGEST_MASKED, spans_of, target_masks
from .forward import draft_hidden
from .loss import DistillationSums, LossWeights, distillation_loss, token_terms
from .recipe import Signal
from .teacher import TargetStates, read_target, read_target_by_span, read_target_in_pieces


class Distillation:
    """One draft, its target and the training signal between them.

    piece: tokens of a sample that the target reads at a time; None: all.
    compiled: `torch.compile` the target's layers, the draft and the loss, for each shape of batch.
    recompute: keep none of the draft's activations for the backward pass.
    Raises `ValueError` if the draft does not fit the target.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: LongSpecForCausalLM,
        signal: Signal,
        *,
        piece: int | None = None,
        compiled: bool = False,
        recompute: bool = False,
    ):
        self.bound = draft.bind(target)
        self.target = target.eval().requires_grad_(False)
        self.draft, self.signal, self.piece, self.recompute = draft, signal, piece, recompute
        self.compiled = compiled
        compiled_as = torch.compile(dynamic=False) if compiled else lambda function: function
        self._draft_hidden, self.terms = compiled_as(draft_hidden), compiled_as(token_terms(*self._guesses()))

    def _guesses(self) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
        """Return the LM head that the draft guesses with and, if only some rows are used, each token's row or -1."""
        bound, vocabulary = self.bound, self.draft.draft_vocab
        rows = self.draft.head_rows(bound)
        if rows is None or vocabulary is None:
            return bound.logits, None
        places = torch.full((self.draft.config.vocab_size,), -1, device=bound.device)
        places[vocabulary] = torch.arange(len(vocabulary), device=bound.device)
        return (lambda hidden: bound.scaled(rows(hidden))), places

    def __call__(self, num_items_in_batch: Tensor | None = None, **batch: Any) -> dict[str, Tensor]:
        """Compute the loss of the fields of a `Batch`; returns a mapping, as `Trainer` wants it."""
        given = Batch(**batch)
        return self.sums(self.read(given), given, num_items_in_batch)._asdict()

    def read(self, batch: Batch) -> TargetStates:
        """Read the target's states; long samples of several documents are read one document at a time."""
        layer, ids, positions, document_ids = self.bound.layer, batch.input_ids, batch.positions, batch.document_ids
        if self.piece is not None:
            by_piece = partial(read_target_in_pieces, self.target, layer, piece=self.piece)
            # without document ids each row is one document
            every = batch.spans or spans_of(torch.zeros_like(ids) if document_ids is None else document_ids)
            return read_target_by_span(by_piece, ids, positions, every)
        if batch.spans:
            return read_target_by_span(partial(read_target, self.target, layer), ids, positions, batch.spans)
        masks = None if document_ids is None else target_masks(self.target, document_ids)
        with compiled_layers(self.target) if self.compiled else nullcontext():
            return read_target(self.target, layer, ids, positions, masks)

    def sums(self, states: TargetStates, batch: Batch, items: Tensor | None = None) -> DistillationSums:
        """Compute the loss of a batch; items: the learned tokens to divide the loss by, see `distillation_loss`."""
        # spans differ from batch to batch, and a graph for each would not pay
        run = draft_hidden if batch.input_ids.shape[1] > LONGEST_MASKED else self._draft_hidden
        arguments = self.draft, self.bound, batch, states
        hidden = checkpoint(run, *arguments, use_reentrant=False) if self.recompute else run(*arguments)
        hidden = hidden.to(states.hidden.dtype)  # FSDP and ZeRO may hold the draft in another format than the target
        weights, chunk = LossWeights(self.signal.kl_weight, self.signal.ce_weight), self.signal.loss_chunk
        return distillation_loss(self.terms, hidden, states.hidden, batch.labels, weights, chunk, items)
