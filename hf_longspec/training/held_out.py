"""Measurements of a draft on the held-out split: accept lengths by real tree decoding, and the loss at real positions.

Knows a target, a draft and held-out samples, but not the run that made the draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_longspec.evaluation import side_by_side

from .batch import batch_of
from .data import Sample
from .distillation import Distillation
from .recipe import Evaluation, Signal

# A sample with this share of text is as good as a prompt of the sample's whole length.
FULL = 0.9


def prompts_of(held_out: Any, evaluation: Evaluation) -> list[Tensor]:
    """Return texts (L,), L close to the longest context: evenly spread samples of the split, without their filling.

    Raises `ValueError` where the split has too few.
    """
    least = FULL * evaluation.length
    texts = [text for sample in held_out if len(text := without_filling(sample)) >= least]
    if len(texts) < evaluation.prompts:
        raise ValueError(
            f"recipe.evaluation: expected {evaluation.prompts} held-out samples with {evaluation.length} tokens of "
            f"text, the split has {len(texts)}"
        )
    return [texts[index] for index in np.linspace(0, len(texts) - 1, evaluation.prompts, dtype=int)]


def without_filling(sample: Sample) -> Tensor:
    """Return input_ids up to the last token that is learned."""
    learned = sample["loss_mask"].nonzero()
    return sample["input_ids"][: int(learned[-1]) + 1] if len(learned) else sample["input_ids"][:0]


def measure_acceptance(
    target: PreTrainedModel, draft: Any, prompts: Sequence[Tensor], evaluation: Evaluation
) -> dict[str, float]:
    """Measure accept lengths in greedy decoding behind the last tokens of each prompt.

    accept_length_C: τ, tokens a round behind contexts of C tokens; accept_length: the mean over all C.
    accept_level_J: share of rounds that accepted a guess of level J, among the rounds that came that far.
    """
    metrics, every = {}, []
    for context in evaluation.contexts:
        rounds: list[int] = []
        for prompt in prompts:
            ids = prompt[-context:][None].to(target.device)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            options: dict[str, Any] = {
                "max_new_tokens": evaluation.max_new_tokens,
                "do_sample": False,
                "eos_token_id": None,
                # under ZeRO-3 `generate` would wait in each forward for the processes that do not measure
                "synced_gpus": False,
            }
            rounds += side_by_side.run(target, inputs, draft, **options).accept_lengths
        metrics[f"accept_length_{context}"] = sum(rounds) / len(rounds)
        every += rounds
    metrics["accept_length"] = sum(metrics.values()) / len(metrics)
    for level in range(1, len(draft.config.tree_on(target.device)) + 1):
        tried = sum(length >= level for length in every)
        metrics[f"accept_level_{level}"] = sum(length > level for length in every) / max(tried, 1)
    return metrics


@torch.no_grad()
def measure_loss(distillation: Distillation, samples: Sequence[Any], signal: Signal) -> dict[str, float]:
    """Measure loss, kl and cross_entropy over all lags, and agreement_lag_D for each lag D.

    agreement_lag_D is the share of tokens where draft and target have the same first guess. Samples are taken at their
    real positions, so that a run is judged on long contexts whatever it is trained on.
    """
    sums = torch.zeros(signal.max_lag, 4, dtype=torch.float64)  # kl, cross-entropy, agreements, tokens
    for sample in samples:
        batch = batch_of([sample]).to(distillation.bound.device)
        states = distillation.read(batch)
        for lag in range(1, signal.max_lag + 1):
            found = distillation.sums(states, batch.with_lag(lag))
            tokens = (batch.labels >= 0).sum(1)
            terms = torch.stack([found.kl, found.cross_entropy, found.agreements, tokens])
            sums[lag - 1] += terms.sum(1).double().cpu()
    kl, ce = (sums[:, :2].sum(0) / sums[:, 3].sum()).tolist()
    metrics = {"loss": signal.kl_weight * kl + signal.ce_weight * ce, "kl": kl, "cross_entropy": ce}
    agreements = (sums[:, 2] / sums[:, 3]).tolist()
    return metrics | {f"agreement_lag_{lag}": share for lag, share in enumerate(agreements, start=1)}
