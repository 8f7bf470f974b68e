"""Total tokens per second of a batch, without and with a draft, and whether the texts are the same.

Prompts of different lengths end at evenly spaced places of a held-out text and are padded on the left, as a user's
batch would be. Knows `generate`; does not load models and prints nothing.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import side_by_side
from .acceptance import places


@dataclass(frozen=True)
class Throughput:
    """One batch. Seconds are the median of whole calls, prefill included; equal, ties, different count rows.

    accept_length: τ, tokens per round of a row, over all rows.
    """

    batch: int
    context: int
    new_tokens: int
    plain_seconds: float
    seconds: float
    accept_length: float
    phase_seconds: dict[str, float]
    equal: int
    ties: int
    different: int

    @property
    def plain_tokens_per_second(self) -> float:
        return self.batch * self.new_tokens / self.plain_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.batch * self.new_tokens / self.seconds

    @property
    def speed_up(self) -> float:
        return self.plain_seconds / self.seconds

    def as_dict(self) -> dict[str, Any]:
        rates = {"plain_tokens_per_second": self.plain_tokens_per_second, "tokens_per_second": self.tokens_per_second}
        return asdict(self) | rates | {"speed_up": self.speed_up}


def padded_prompts(tokens: Tensor, context: int, batch: int, pad: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (batch, context) of prompts from tokens (N,), of context down to ¾ of it."""
    ids, mask = torch.full((batch, context), pad), torch.zeros(batch, context, dtype=torch.long)
    for row, end in enumerate(places(tokens, context, batch)):
        length = context - row * (context // 4) // batch
        ids[row, context - length :] = tokens[end - length : end]
        mask[row, context - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def measure(
    target: PreTrainedModel,
    draft: Any,
    tokens: Tensor,
    context: int,
    batch: int,
    *,
    max_new_tokens: int,
    repeats: int = 3,
    **options: Any,
) -> Throughput:
    """Both engines in turn, `repeats` times after one call each to warm up. Raises what `generate` raises.

    `options` go to both; the texts are as long as `max_new_tokens` allows, whatever they say.
    """
    pad = options.setdefault("pad_token_id", 0)
    inputs = {name: value.to(target.device) for name, value in padded_prompts(tokens, context, batch, pad).items()}
    options |= {"max_new_tokens": max_new_tokens, "eos_token_id": None, "do_sample": False}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    outputs: dict[bool, Any] = {}
    for repeat in range(repeats + 1):
        for assistant in (None, draft):
            _wait(target)
            start = time.perf_counter()
            output = target.generate(**inputs, **options, assistant_model=assistant, return_dict_in_generate=True)
            _wait(target)
            if repeat:  # the first call of each warms up
                seconds[assistant is not None].append(time.perf_counter() - start)
            output.past_key_values = None
            outputs[assistant is not None] = output
    texts = [outputs[side].sequences[:, context:].tolist() for side in (False, True)]
    logits = plain_logits(target, inputs, **options) if texts[0] != texts[1] else [None] * batch
    verdicts = [
        side_by_side.judge(target, {"input_ids": ids[mask.bool()][None]}, *pair, plain_logits=own)
        for ids, mask, *pair, own in zip(*inputs.values(), *texts, logits, strict=True)
    ]
    rounds = [count for row in outputs[True].accept_lengths for count in row]
    return Throughput(
        batch=batch,
        context=context,
        new_tokens=max_new_tokens,
        plain_seconds=median(seconds[False]),
        seconds=median(seconds[True]),
        accept_length=sum(rounds) / max(len(rounds), 1),
        phase_seconds=outputs[True].phase_seconds or {},
        equal=sum(verdict.equal for verdict in verdicts),
        ties=sum(not verdict.equal and verdict.tie for verdict in verdicts),
        different=sum(not verdict.equal and not verdict.tie for verdict in verdicts),
    )


def plain_logits(target: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Of each row, the logits (new tokens, vocab) by which plain `generate` picks its tokens in this batch."""
    output = target.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return list(torch.stack(output.logits, dim=1))


def _wait(target: PreTrainedModel) -> None:
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)
