"""The cost of reading a whole prompt: seconds, and the most memory that is allocated meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from .engines import attending_by

CHUNK = 8192
NEW_TOKENS = 8  # enough that the peak includes rounds and CUDA graphs


@dataclass(frozen=True)
class Prefill:
    """One call of `generate`. peak_bytes: weights and cache included; 0 where the device does not tell."""

    name: str
    context: int
    seconds: float
    peak_bytes: int


def measure(target: PreTrainedModel, draft: Any, context: int) -> Iterator[Prefill]:
    """Time random prompts of `context` tokens, read by plain `generate` and by LongSpec, at once and in chunks.

    The target attends by its own implementation, and by FlashAttention-2 where that is installed: for chunks, other
    implementations need a mask.
    """
    ids = torch.randint(1, target.config.vocab_size, (1, context), device=target.device)
    flash = target.device.type == "cuda" and is_flash_attn_2_available()
    for attention in (None, "flash_attention_2") if flash else (None,):
        with attending_by(target, attention) if attention else nullcontext():
            for name, assistant in (("generate", None), ("LongSpec", draft)):
                for chunk in (None, CHUNK):
                    told = [name, attention, f"chunks of {chunk:,}" if chunk else None]
                    seconds, peak = read(target, assistant, ids, chunk)
                    yield Prefill(", ".join(part for part in told if part), context, seconds, peak)


def read(target: PreTrainedModel, assistant: Any, ids: Tensor, chunk: int | None) -> tuple[float, int]:
    """Return seconds and peak bytes of one call."""
    on_gpu = target.device.type == "cuda"
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
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() if on_gpu else 0
