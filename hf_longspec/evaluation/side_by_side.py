"""One target with and without its draft on one prompt: the time of each run, and whether the texts are the same.

Knows `generate` and what a draft adds to its output; does not load models and prints nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from hf_longspec.modeling.interface_longspec import CACHE
from hf_longspec.modeling.tree_longspec import TreeForm

# The target's rounding noise is measured over so many tokens before the place where two texts part.
NOISE_TOKENS = 64
# A CPU is warm after so many tokens of a prompt.
WARM_UP_TOKENS = 512


@dataclass(frozen=True)
class Run:
    """One call of `generate`, batch 1.

    Seconds are wall-clock; prefill ends and decoding begins at the first token.
    """

    tokens: list[int]
    prefill_seconds: float
    decode_seconds: float
    accept_lengths: list[int] = field(default_factory=list)
    trees: list[TreeForm] = field(default_factory=list)
    phase_seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """The speed of decoding: the first token belongs to prefill. 0 if there was nothing to decode."""
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 else 0.0

    @property
    def accept_length(self) -> float:
        """τ, the mean of tokens per round; 1 for a run without a draft."""
        return fmean(self.accept_lengths) if self.accept_lengths else 1.0


@dataclass(frozen=True)
class Verdict:
    """The comparison of two texts, with the target's logits at the place where the texts part.

    position: the first new token that differs; None where the texts are equal. gap: the difference of the target's
    logits of the two tokens chosen there. noise: how far such gaps move when the target alone reads the same text in
    one piece and in two; None where the noise was not measured (see `judge`).
    """

    position: int | None = None
    gap: float = 0.0
    noise: float | None = None

    @property
    def equal(self) -> bool:
        return self.position is None

    @property
    def tie(self) -> bool:
        """Whether the gap is within twice the noise: with noise in both texts, the gap has no sure sign."""
        return self.noise is not None and self.gap <= 2 * self.noise


class Stopwatch(BaseStreamer):
    """A streamer that notes when each token arrives and hands everything on to `inner`."""

    def __init__(self, inner: BaseStreamer | None = None):
        self.inner = inner
        self.prompt_seen = False
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if self.prompt_seen:
            self.times.append(time.perf_counter())
        self.prompt_seen = True  # `generate` hands over the prompt before anything else
        if self.inner is not None:
            self.inner.put(value)

    def end(self) -> None:
        if self.inner is not None:
            self.inner.end()


def run(
    target: PreTrainedModel,
    inputs: dict[str, Tensor],
    draft: Any = None,
    *,
    seed: int = 0,
    streamer: BaseStreamer | None = None,
    **options: Any,
) -> Run:
    """Call `target.generate(**inputs, **options)`, with the draft if there is one, and time the call.

    inputs: `input_ids` (1, L) and the other tensors of the tokenizer. seed: set before the call, so that two runs that
    sample draw the same numbers. Raises whatever `generate` raises.
    """
    watch = Stopwatch(streamer)
    torch.manual_seed(seed)
    start = time.perf_counter()
    output = target.generate(**inputs, **options, assistant_model=draft, streamer=watch, return_dict_in_generate=True)
    assert watch.times, "generate emitted nothing"
    return Run(
        tokens=output.sequences[0, inputs["input_ids"].shape[1] :].tolist(),
        prefill_seconds=watch.times[0] - start,
        decode_seconds=watch.times[-1] - watch.times[0],
        accept_lengths=[] if draft is None else output.accept_lengths[0],
        trees=[] if draft is None else output.trees[0],
        phase_seconds=(draft is not None and output.phase_seconds) or {},
    )


def warm_up(target: PreTrainedModel, inputs: dict[str, Tensor], draft: Any, **options: Any) -> None:
    """Write a few tokens with and without the draft.

    An accelerator reads the prompt at full length, since kernels are chosen by shape.
    """
    if target.device.type == "cpu":
        inputs = {name: value[:, -WARM_UP_TOKENS:] for name, value in inputs.items()}
    for assistant in (None, draft):
        run(target, inputs, assistant, **(options | {"max_new_tokens": 4}))


def judge(
    target: PreTrainedModel,
    inputs: dict[str, Tensor],
    plain: list[int],
    speculative: list[int],
    *,
    sampled: bool = False,
    plain_logits: Tensor | None = None,
) -> Verdict:
    """Compare two continuations of the prompt and, where they part, weigh the two tokens.

    In float32 any difference is an error, and a sampled text may part at a draw that logits alone do not explain; so
    noise is measured only for greedy text in a shorter format. The noise is the largest change of the gap between the
    two best tokens over the last `NOISE_TOKENS` places before the parting; and no less than a rounding unit of the
    best logit, as logits are rounded to the format.

    plain_logits: (new tokens, vocab) of plain `generate` itself, where it read the prompt in another way than alone,
    as a row of a padded batch: then the change by this reading is noise too.
    """
    if plain == speculative:
        return Verdict()
    pairs = zip(plain, speculative, strict=False)
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(plain), len(speculative)))
    if sampled or target.dtype == torch.float32 or position == min(len(plain), len(speculative)):
        return Verdict(position)
    prompt = inputs["input_ids"]
    text = torch.cat([prompt, prompt.new_tensor([plain[:position]])], dim=1)
    if text.shape[1] == 1:  # there is no second way to read a single token
        return Verdict(position)
    whole, pieces = logits_in_one_piece(target, text), logits_in_two_pieces(target, text)
    best = whole.topk(2).indices
    noise = (gaps(whole, best) - gaps(pieces, best)).abs().max()
    noise = torch.maximum(noise, torch.finfo(target.dtype).eps * whole[-1].max().abs())
    if plain_logits is not None:
        own = plain_logits[max(position + 1 - len(whole), 0) : position + 1].float()
        noise = torch.maximum(noise, (gaps(whole, best)[-len(own) :] - gaps(own, best[-len(own) :])).abs().max())
    gap = whole[-1, plain[position]] - whole[-1, speculative[position]]
    return Verdict(position, abs(float(gap)), float(noise))


def gaps(logits: Tensor, pairs: Tensor) -> Tensor:
    """Return how far the logit of each pair's first token is above the logit of the second.

    logits (K, vocab), pairs (K, 2) of tokens -> (K,).
    """
    first, second = logits.gather(1, pairs).unbind(1)
    return first - second


@torch.no_grad()
def logits_in_one_piece(target: PreTrainedModel, text: Tensor) -> Tensor:
    """Return the logits after each of the last tokens of text (1, L), read in one forward.

    The logits are (K, vocab) in float32 for the last K = min(NOISE_TOKENS, L - 1) tokens.
    """
    keep = min(NOISE_TOKENS, text.shape[1] - 1)
    return target(input_ids=text, logits_to_keep=keep).logits[0].float()


@torch.no_grad()
def logits_in_two_pieces(target: PreTrainedModel, text: Tensor) -> Tensor:
    """Return the same logits, read with all earlier tokens in the cache.

    Decoding and verification read the text in this way.
    """
    keep = min(NOISE_TOKENS, text.shape[1] - 1)
    past = target(input_ids=text[:, :-keep], use_cache=True, logits_to_keep=1)[CACHE]
    return target(input_ids=text[:, -keep:], use_cache=True, **{CACHE: past}).logits[0].float()
