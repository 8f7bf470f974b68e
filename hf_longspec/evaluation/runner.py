"""The measurement of one prompt by plain `generate` and with the draft, in one process, and its record."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import side_by_side
from .records import Record
from .side_by_side import Run
from .task import Sample


def options_of(sample: Sample, temperature: float) -> dict[str, Any]:
    """Return the options of `generate`, which is greedy at temperature 0."""
    options: dict[str, Any] = {"max_new_tokens": sample.max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    if sample.end is not None or not sample.stops:
        options["eos_token_id"] = sample.end
    return options


def inputs_of(sample: Sample, device: torch.device) -> dict[str, Tensor]:
    ids = torch.tensor([sample.ids], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def warm_up(target: PreTrainedModel, draft: Any, sample: Sample, temperature: float) -> None:
    side_by_side.warm_up(target, inputs_of(sample, target.device), draft, **options_of(sample, temperature))


def measure(target: PreTrainedModel, draft: Any, sample: Sample, temperature: float, seed: int) -> Record:
    """Run plain `generate`, then the draft, and compare the texts. Raises what `generate` raises."""
    inputs, options = inputs_of(sample, target.device), options_of(sample, temperature)
    plain, plain_peak = run(target, inputs, None, seed=seed, **options)
    ours, peak = run(target, inputs, draft, seed=seed, **options)
    verdict = side_by_side.judge(target, inputs, plain.tokens, ours.tokens, sampled=temperature > 0)
    return {
        "task": sample.task,
        "context": sample.context,
        "id": sample.id,
        "prompt_tokens": len(sample.ids),
        "cut": sample.cut,
        "plain": noted(plain, plain_peak),
        "longspec": noted(ours, peak) | {"accept_lengths": ours.accept_lengths},
        "draft_state_bytes": draft.state_bytes,
        "load_average": load_average(),
        "outcome": "equal" if verdict.equal else "tie" if verdict.tie else "different",
        "parted_at": verdict.position,
        "gap": verdict.gap,
        "noise": verdict.noise,
        "tokens": {"plain": plain.tokens, "longspec": ours.tokens},
    }


def run(target: PreTrainedModel, inputs: dict[str, Tensor], draft: Any, **options: Any) -> tuple[Run, int | None]:
    """Return a run, and the most bytes that were allocated on the GPU at any time of it; None on a CPU."""
    on_gpu = target.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(target.device)
        torch.cuda.reset_peak_memory_stats(target.device)
    done = side_by_side.run(target, inputs, draft, **options)
    return done, torch.cuda.max_memory_allocated(target.device) if on_gpu else None


def load_average() -> float | None:
    """Return how many programs wanted a core in the last minute, this one included.

    None where the system does not tell.
    """
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def noted(done: Run, peak: int | None) -> dict[str, Any]:
    seconds = {"prefill_seconds": done.prefill_seconds, "decode_seconds": done.decode_seconds}
    return {"new_tokens": len(done.tokens), **seconds, "peak_bytes": peak}
