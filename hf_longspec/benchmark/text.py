"""Whole texts, end to end: a target with its draft beside transformers' own engines, in one process, in turn.

Prompts of different lengths end at evenly spaced places of a held-out text and are padded on the left, as a user's
batch would be. Calls that write one token only tell how long it takes to read the prompt. All engines get the same
seeds. Knows `generate`; loads no models.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..evaluation.text import places
from .engines import DEFAULT, engines_for
from .judging import DIFFERENT, EQUAL, TIE, judged
from .sampling import GREEDY, in_effect
from .timing import uncollected


@dataclass(frozen=True)
class Written:
    """One engine on all prompts of a batch size.

    seconds, prefill_seconds: medians over the repeats, of whole calls and of calls that write one token.
    The other fields have values for LongSpec engines only. accept_length: τ, tokens per round of a row. phases: median
    milliseconds of each phase of a round, if profiled. equal, ties, different: how many texts are equal to the text of
    plain `generate` under the same seed, part from it at a tie, or differ.
    """

    name: str
    stock: bool
    seconds: float
    prefill_seconds: float
    accept_length: float | None = None
    phases: dict[str, float] | None = None
    equal: int = 0
    ties: int = 0
    different: int = 0

    @property
    def decode_seconds(self) -> float:
        return self.seconds - self.prefill_seconds

    def over(self, other: Written) -> float:
        """Return how many times as fast as another engine this engine decodes."""
        return other.decode_seconds / self.decode_seconds


@dataclass(frozen=True)
class Comparison:
    """All engines at one batch size.

    sampling: the settings that the tokens were picked by, as `sampling.in_effect` returns them.
    """

    batch: int
    context: int
    prompts: int
    new_tokens: int
    sampling: dict[str, Any]
    engines: list[Written]

    @property
    def default(self) -> Written:
        return next(engine for engine in self.engines if engine.name == DEFAULT)

    @property
    def fastest_stock(self) -> Written:
        """The stock engine that decodes fastest."""
        return min((engine for engine in self.engines if engine.stock), key=lambda engine: engine.decode_seconds)

    def decoded_per_second(self, engine: Written) -> float:
        """Return decoded tokens per second; the tokens that the prefill writes do not count."""
        return self.prompts * (self.new_tokens - 1) / engine.decode_seconds

    def as_dict(self) -> dict[str, Any]:
        rows = [
            asdict(engine)
            | {"tokens_per_second": self.prompts * self.new_tokens / engine.seconds}
            | {"decoded_per_second": self.decoded_per_second(engine)}
            | {"speed_up": engine.over(self.default), "over_fastest_stock": engine.over(self.fastest_stock)}
            for engine in self.engines
        ]
        return asdict(self) | {"engines": rows, "fastest_stock": self.fastest_stock.name}


def padded_prompts(tokens: Tensor, ends: list[int], context: int, pad: int) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask` (B, context) of prompts that end at `ends` (B) of tokens (N,).

    Prompt lengths go from `context` down to ¾ of it.
    """
    batch = len(ends)
    ids, mask = torch.full((batch, context), pad), torch.zeros(batch, context, dtype=torch.long)
    for row, end in enumerate(ends):
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
    batches: int = 1,
    repeats: int = 3,
    assistant: PreTrainedModel | None = None,
    sampling: dict[str, Any] = GREEDY,
    pad: int = 0,
) -> Comparison:
    """Run all engines in turn on `batches` batches, `repeats` times after one run to warm up.

    sampling: options of `generate` that say how tokens are picked. The texts are as long as `max_new_tokens`, which is
    at least 2: no token ends them. Raises what `generate` raises.
    """
    ends = places(tokens, context, batch * batches)
    prompts = [padded_prompts(tokens, ends[first::batches], context, pad) for first in range(batches)]
    prompts = [{name: value.to(target.device) for name, value in inputs.items()} for inputs in prompts]
    options = {"pad_token_id": pad, "eos_token_id": None} | sampling
    settings = in_effect(target, options)
    engines = engines_for(target, draft, batch, assistant, context + max_new_tokens)
    whole: dict[str, list[float]] = defaultdict(list)
    first: dict[str, list[float]] = defaultdict(list)
    texts: dict[str, list[Tensor]] = {}
    for repeat in range(repeats + 1):
        for engine in engines:
            with engine.chosen(target):
                given = options | engine.options
                seconds, texts[engine.name] = timed(target, prompts, given | {"max_new_tokens": max_new_tokens})
                prefill, _ = timed(target, prompts, given | {"max_new_tokens": 1})
            if repeat:
                whole[engine.name].append(seconds)
                first[engine.name].append(prefill)
    options["max_new_tokens"] = max_new_tokens
    rows = []
    for engine in engines:
        pair = texts[DEFAULT], texts[engine.name]
        told = {} if engine.stock else what_ours_tells(target, prompts, *pair, engine.options, options)
        spans = median(whole[engine.name]), median(first[engine.name])
        rows.append(Written(engine.name, engine.stock, *spans, **told))
    return Comparison(batch, context, batch * batches, max_new_tokens, settings, rows)


def timed(
    target: PreTrainedModel, prompts: list[dict[str, Tensor]], options: dict[str, Any]
) -> tuple[float, list[Tensor]]:
    """Return the seconds that one call for each of `prompts` takes in all, and the sequences (B, L) of each call.

    The seed of a call is the number of its prompt.

    The calls return sequences only. After a call that also returned its cache, LongSpec's next call would begin
    without a cache and without CUDA graphs.
    """
    _wait(target)
    with uncollected():
        began = time.perf_counter()
        texts = [write(target, inputs, seed, **options) for seed, inputs in enumerate(prompts)]
        _wait(target)
        return time.perf_counter() - began, texts


def write(target: PreTrainedModel, inputs: dict[str, Tensor], seed: int, **options: Any) -> Any:
    """Call `generate` with a seed set before, so that calls that sample draw the same numbers."""
    torch.manual_seed(seed)
    return target.generate(**inputs, **options)


def what_ours_tells(
    target: PreTrainedModel,
    prompts: list[dict[str, Tensor]],
    plain: list[Tensor],
    ours: list[Tensor],
    own: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Return the fields of `Written` that only LongSpec engines fill, from one more call for each of `prompts`.

    plain, ours: sequences (B, L); own: options of this engine; options: options of plain `generate`.
    """
    verdicts: list[str] = []
    rounds: list[int] = []
    phases: dict[str, list[float]] = defaultdict(list)
    for seed, (inputs, theirs, text) in enumerate(zip(prompts, plain, ours, strict=True)):
        verdicts += judged(target, inputs, theirs, text, options, seed)
        output = write(target, inputs, seed, **options, **own, return_dict_in_generate=True)
        rounds += [count for row in output.accept_lengths for count in row]
        for phase, seconds in (output.phase_seconds or {}).items():
            phases[phase] += seconds
    return {
        "accept_length": fmean(rounds) if rounds else 1.0,
        "phases": {phase: 1000 * median(seconds) for phase, seconds in phases.items()} or None,
        "equal": verdicts.count(EQUAL),
        "ties": verdicts.count(TIE),
        "different": verdicts.count(DIFFERENT),
    }


def _wait(target: PreTrainedModel) -> None:
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)
