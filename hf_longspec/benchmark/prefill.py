"""Reading a whole prompt: seconds, and the most memory that is allocated meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

CHUNK = 8192
NEW_TOKENS = 8  # so that rounds, and graphs, are in the peak


@dataclass(frozen=True)
class Prefill:
    """One call of `generate`. peak_bytes: with weights and cache; 0 where the device does not tell."""

    name: str
    context: int
    seconds: float
    peak_bytes: int


def measure(target: PreTrainedModel, draft: Any, context: int) -> Iterator[Prefill]:
    """Random prompts of `context` tokens, read by plain `generate` and by ours, at once and in chunks."""
    ids = torch.randint(1, target.config.vocab_size, (1, context), device=target.device)
    on_gpu = target.device.type == "cuda"
    for name, assistant in (("generate", None), ("LongSpec", draft)):
        for chunk in (None, CHUNK):
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                assistant_model=assistant,
                prefill_chunk_size=chunk,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
            if on_gpu:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            peak = torch.cuda.max_memory_allocated() if on_gpu else 0
            yield Prefill(name + (f", chunks of {chunk:,}" if chunk else ""), context, seconds, peak)
