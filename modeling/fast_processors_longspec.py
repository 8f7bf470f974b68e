"""Logits processors on the device: what transformers' own do to the scores of a step, without a word from the host.

Transformers' objects are the specification. Those that look at the logits alone are called as they are; those that
look at the text are written anew here over tensors of fixed shape, so that they can be part of a CUDA graph: a text is
its ids in a buffer and its length. What a call says of lengths is a tensor too, so that one graph serves many calls.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation import ExponentialDecayLengthPenalty

from .sampling_longspec import is_of


class Texts(NamedTuple):
    """The texts of the rows: the first `lengths` (B,) of ids (B, C); what lies behind is of no text."""

    ids: Tensor
    lengths: Tensor

    def last(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the last tokens (B, count) of the texts, and which of them there are (B, count)."""
        index = self.lengths[:, None] - count + torch.arange(count, device=self.ids.device)
        return self.ids.gather(1, index.clamp(min=0)), index >= 0


# --- by the logits alone ---------------------------------------------------------------------------------------------


class ByLogits(NamedTuple):
    """A processor of transformers that looks at the logits alone, and asks the host nothing."""

    processor: Any

    def __call__(self, scores: Tensor, texts: Texts) -> Tensor:
        return self.processor(texts.ids[:, :1], scores)

    @classmethod
    def of(cls, processor: Any, **_: Any) -> ByLogits:
        kind: Any = type(processor)
        return cls(_shared(kind, tuple(sorted(vars(processor).items()))))


@functools.lru_cache(maxsize=256)
def _shared(kind: Any, settings: tuple[tuple[str, Any], ...]) -> Any:
    """Return one processor for all calls with these settings, as graphs know it by its identity."""
    processor = kind.__new__(kind)
    vars(processor).update(settings)
    return processor


class TopP(NamedTuple):
    """`TopPLogitsWarper`: without the assignment of a number, which the host would send."""

    limit: float
    least: int

    def __call__(self, scores: Tensor, texts: Texts) -> Tensor:
        ordered, tokens = scores.sort(dim=-1)
        unlikely = ordered.softmax(dim=-1).cumsum(dim=-1) <= self.limit
        unlikely = unlikely & (torch.arange(scores.shape[1], device=scores.device) < scores.shape[1] - self.least)
        return scores.masked_fill(torch.zeros_like(unlikely).scatter(1, tokens, unlikely), -math.inf)

    @classmethod
    def of(cls, processor: Any, **_: Any) -> TopP:
        return cls(1 - processor.top_p, processor.min_tokens_to_keep)


class Typical(NamedTuple):
    """`TypicalLogitsWarper`, likewise."""

    mass: float
    least: int

    def __call__(self, scores: Tensor, texts: Texts) -> Tensor:
        normalized = scores.log_softmax(dim=-1)
        entropy = -(normalized * normalized.exp()).nansum(dim=-1, keepdim=True)
        surprise, tokens = (-normalized - entropy).abs().sort(dim=-1)
        reached = scores.gather(-1, tokens).softmax(dim=-1).cumsum(dim=-1)
        last = (reached < self.mass).sum(dim=1, keepdim=True).clamp(max=scores.shape[1] - 1)
        odd = surprise > surprise.gather(1, last)
        odd = odd & (torch.arange(scores.shape[1], device=scores.device) >= self.least)
        return scores.masked_fill(torch.zeros_like(odd).scatter(1, tokens, odd), -math.inf)

    @classmethod
    def of(cls, processor: Any, **_: Any) -> Typical:
        return cls(processor.mass, processor.min_tokens_to_keep)


class Eta(NamedTuple):
    """`EtaLogitsWarper`."""

    epsilon: Tensor
    kept: int

    def __call__(self, scores: Tensor, texts: Texts) -> Tensor:
        probabilities = scores.softmax(dim=-1)
        limit = torch.minimum(self.epsilon, self.epsilon.sqrt() * torch.exp(-_entropy(scores)[1]))
        unlikely = (probabilities < limit) & (scores < scores.topk(self.kept).values[:, -1:])
        return scores.masked_fill(unlikely, -math.inf)

    @classmethod
    def of(cls, processor: Any, vocab: int, device: torch.device, **_: Any) -> Eta:
        return cls(processor.epsilon.to(device), min(processor.min_tokens_to_keep, vocab))


class TopH(NamedTuple):
    """`TopHLogitsWarper`."""

    share: float
    most: int

    def __call__(self, scores: Tensor, texts: Texts) -> Tensor:
        best, tokens = scores.topk(self.most)
        probabilities, entropy = _entropy(best)
        spent = torch.cumsum(-probabilities * probabilities.log(), dim=-1)
        kept = spent <= entropy * self.share
        kept = kept | (torch.arange(self.most, device=scores.device) == 0)
        return scores.masked_fill(~torch.zeros_like(scores, dtype=torch.bool).scatter(1, tokens, kept), -math.inf)

    @classmethod
    def of(cls, processor: Any, vocab: int, **_: Any) -> TopH:
        return cls(processor.top_h, min(processor.top_n, vocab))


def _entropy(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities (B, N) and entropies (B, 1) of scores (B, N), in the steps of torch's `Categorical`."""
    logits = scores - scores.logsumexp(dim=-1, keepdim=True)
    probabilities = logits.softmax(dim=-1)
    products = logits.clamp(min=torch.finfo(logits.dtype).min) * probabilities
    return probabilities, -products.sum(dim=-1, keepdim=True)


class Suppress(NamedTuple):
    """`SuppressTokensLogitsProcessor`; with `at`, the length at which it acts, `SuppressTokensAtBegin…`."""

    tokens: Tensor  # (vocab,) bool
    at: Tensor | None

    def __call__(self, scores: Tensor, texts: Texts) -> Tensor:
        tokens = self.tokens if self.at is None else self.tokens & (texts.lengths == self.at)[:, None]
        return scores.masked_fill(tokens, -math.inf)

    @classmethod
    def of(cls, processor: Any, vocab: int, device: torch.device, **_: Any) -> Suppress:
        return cls(_mask(processor.suppress_tokens, vocab, device), None)

    @classmethod
    def at_begin(cls, processor: Any, vocab: int, device: torch.device, **_: Any) -> Suppress:
        return cls(_mask(processor.begin_suppress_tokens, vocab, device), _number(processor.begin_index, device))


# --- by the length ---------------------------------------------------------------------------------------------------


class NoEnd(NamedTuple):
    """`MinLengthLogitsProcessor` and `MinNewTokensLengthLogitsProcessor`: no end of text below a length."""

    ends: Tensor  # (vocab,) bool
    shortest: Tensor

    def __call__(self, scores: Tensor, texts: Texts) -> Tensor:
        return scores.masked_fill(self.ends & (texts.lengths < self.shortest)[:, None], -math.inf)

    @classmethod
    def of(cls, processor: Any, vocab: int, device: torch.device, **_: Any) -> NoEnd:
        return cls(_mask(processor.eos_token_id, vocab, device), _number(processor.min_length, device))

    @classmethod
    def of_new(cls, processor: Any, vocab: int, device: torch.device, **_: Any) -> NoEnd:
        shortest = processor.prompt_length_to_skip + processor.min_new_tokens
        return cls(_mask(processor.eos_token_id, vocab, device), _number(shortest, device))


class Forced(NamedTuple):
    """`ForcedBOSTokenLogitsProcessor` and `ForcedEOSTokenLogitsProcessor`: nothing but `tokens` at a length."""

    tokens: Tensor  # (vocab,) bool
    at: Tensor

    def __call__(self, scores: Tensor, texts: Texts) -> Tensor:
        forced = torch.zeros_like(scores).masked_fill(~self.tokens, -math.inf)
        return torch.where((texts.lengths == self.at)[:, None], forced, scores)

    @classmethod
    def of_first(cls, processor: Any, vocab: int, device: torch.device, **_: Any) -> Forced:
        return cls(_mask(torch.tensor([processor.bos_token_id], device=device), vocab, device), _number(1, device))

    @classmethod
    def of_last(cls, processor: Any, vocab: int, device: torch.device, **_: Any) -> Forced:
        return cls(_mask(processor.eos_token_id, vocab, device), _number(processor.max_length - 1, device))


class Decay(NamedTuple):
    """`ExponentialDecayLengthPenalty`: ends of text grow likelier beyond a length; `guarded`: only possible ones."""

    ends: Tensor  # (vocab,) bool
    start: Tensor
    factor: float
    guarded: bool

    def __call__(self, scores: Tensor, texts: Texts) -> Tensor:
        beyond = (texts.lengths - self.start)[:, None]
        growth = torch.pow(self.factor, beyond.double()) - 1  # as the host computes it, in float64
        penalty = scores.abs() * growth.to(scores.dtype)
        grows = self.ends & (beyond > 0)
        return torch.where(grows & scores.isfinite() if self.guarded else grows, scores + penalty, scores)

    @classmethod
    def of(cls, processor: Any, vocab: int, device: torch.device, **_: Any) -> Decay:
        start = _number(processor.regulation_start, device)
        return cls(_mask(processor.eos_token_id, vocab, device), start, float(processor.regulation_factor), _guards())


@functools.cache
def _guards() -> bool:
    """Tell whether this transformers leaves the scores of impossible ends of text alone; some make them no numbers."""
    text = torch.zeros(1, 1, dtype=torch.long, device="cpu")
    score = torch.full((1, 1), -math.inf, dtype=torch.float32, device="cpu")
    return bool(ExponentialDecayLengthPenalty((0, 2.0), 0, 0)(text, score).isinf())


# --- by the tokens ---------------------------------------------------------------------------------------------------


class Penalty(NamedTuple):
    """`RepetitionPenaltyLogitsProcessor`: seen (B, vocab + 1) bool, the tokens from each row's index `first` on."""

    penalty: float
    first: Tensor  # (B,)
    seen: Tensor

    def __call__(self, scores: Tensor, texts: Texts) -> Tensor:
        penalized = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(self.seen[:, :-1], penalized, scores)

    def begin(self, texts: Texts, steps: int) -> Penalty:
        """Note in place what has become text since the last walk, and return a copy for what this walk may add."""
        tokens, there = texts.last(steps)
        index = texts.lengths[:, None] - steps + torch.arange(steps, device=tokens.device)
        self._see(self.seen, tokens, there & (index >= self.first[:, None]))
        return self._replace(seen=self.seen.clone())

    def follow(self, tokens: Tensor, lengths: Tensor) -> None:
        self._see(self.seen, tokens[:, None], (lengths >= self.first)[:, None])

    @staticmethod
    def _see(seen: Tensor, tokens: Tensor, real: Tensor) -> None:
        spare = seen.shape[1] - 1  # where all goes that is no token of a text, or none of the vocabulary
        seen.scatter_(1, torch.where(real & (tokens >= 0), tokens.clamp(0, spare), spare), True)

    @classmethod
    def of(cls, processor: Any, vocab: int, texts: Texts, **_: Any) -> Penalty:
        ids = texts.ids
        first = processor.prompt_ignore_length
        first = torch.as_tensor(0 if first is None else first, device=ids.device).expand(len(ids)).clone()
        index = torch.arange(ids.shape[1], device=ids.device)
        seen = torch.zeros(len(ids), vocab + 1, dtype=torch.bool, device=ids.device)
        cls._see(seen, ids, (index >= first[:, None]) & (index < texts.lengths[:, None]))
        return cls(processor.penalty, first, seen)


class NoRepeat(NamedTuple):
    """`NoRepeatNGramLogitsProcessor`: no n-gram of `size` tokens twice."""

    size: int

    def __call__(self, scores: Tensor, texts: Texts) -> Tensor:
        ids, lengths = texts
        before = self.size - 1
        count = ids.shape[1] - before  # windows, of which most lie behind a text's end
        newest, _ = texts.last(max(before, 1))
        repeats = torch.arange(count, device=ids.device) < (lengths - before)[:, None]
        for index in range(before):
            repeats = repeats & (ids[:, index : index + count] == newest[:, index : index + 1])
        spare = scores.shape[1]
        banned = torch.zeros(len(ids), spare + 1, dtype=torch.bool, device=ids.device)
        banned.scatter_(1, torch.where(repeats, ids[:, before:].clamp(0, spare), spare), True)
        return scores.masked_fill(banned[:, :-1], -math.inf)

    @classmethod
    def of(cls, processor: Any, **_: Any) -> NoRepeat:
        return cls(processor.ngram_size)


class Sequences(NamedTuple):
    """Sequences (N, P + 1) of one length with their biases (N,): the last token is biased behind the P others.

    shortest: the length of a text below which transformers does not look.
    """

    before: Tensor
    last: Tensor
    biases: Tensor
    shortest: int


class Biases(NamedTuple):
    """`SequenceBiasLogitsProcessor` and `NoBadWordsLogitsProcessor`: single tokens (vocab,), and longer sequences."""

    single: Tensor
    longer: tuple[Sequences, ...]

    def __call__(self, scores: Tensor, texts: Texts) -> Tensor:
        bias = self.single.expand_as(scores).clone()
        for group in self.longer:
            newest, _ = texts.last(group.before.shape[1])
            matches = (newest[:, None] == group.before).all(dim=-1) & (texts.lengths >= group.shortest)[:, None]
            bias.index_add_(1, group.last, torch.where(matches, group.biases, 0.0))
        return scores + bias

    @classmethod
    def of(cls, processor: Any, vocab: int, device: torch.device, **_: Any) -> Biases:
        biases = {tuple(tokens): float(bias) for tokens, bias in processor.sequence_bias.items()}
        single = torch.zeros(vocab, dtype=torch.float32, device="cpu")
        by_length: dict[int, list[tuple[tuple[int, ...], float]]] = {}
        for tokens, bias in biases.items():
            if len(tokens) == 1:
                single[tokens[0]] = bias
            else:
                by_length.setdefault(len(tokens), []).append((tokens, bias))
        whole = not hasattr(processor, "multi_token_biases")  # before transformers 5.24
        longer = tuple(
            Sequences(
                torch.tensor([tokens[:-1] for tokens, _ in group], device=device),
                torch.tensor([tokens[-1] for tokens, _ in group], device=device),
                torch.tensor([bias for _, bias in group], dtype=torch.float32, device=device),
                length if whole else length - 1,
            )
            for length, group in by_length.items()
        )
        return cls(single.to(device), longer)


# --- the table -------------------------------------------------------------------------------------------------------


def _mask(tokens: Tensor, vocab: int, device: torch.device) -> Tensor:
    """Return (vocab,) bool, true at `tokens`; tokens that no logits have are left out, as `isin` does."""
    return torch.isin(torch.arange(vocab, device=device), tokens.to(device))


def _number(value: int, device: torch.device) -> Tensor:
    return torch.tensor(value, device=device)


_ON_DEVICE: dict[str, Callable[..., Any]] = {
    "EpsilonLogitsWarper": ByLogits.of,
    "EtaLogitsWarper": Eta.of,
    "ExponentialDecayLengthPenalty": Decay.of,
    "ForcedBOSTokenLogitsProcessor": Forced.of_first,
    "ForcedEOSTokenLogitsProcessor": Forced.of_last,
    "InfNanRemoveLogitsProcessor": ByLogits.of,
    "LogitNormalization": ByLogits.of,
    "MinLengthLogitsProcessor": NoEnd.of,
    "MinNewTokensLengthLogitsProcessor": NoEnd.of_new,
    "MinPLogitsWarper": ByLogits.of,
    "NoBadWordsLogitsProcessor": Biases.of,
    "NoRepeatNGramLogitsProcessor": NoRepeat.of,
    "RepetitionPenaltyLogitsProcessor": Penalty.of,
    "SequenceBiasLogitsProcessor": Biases.of,
    "SuppressTokensAtBeginLogitsProcessor": Suppress.at_begin,
    "SuppressTokensLogitsProcessor": Suppress.of,
    "TemperatureLogitsWarper": ByLogits.of,
    "TopHLogitsWarper": TopH.of,
    "TopKLogitsWarper": ByLogits.of,
    "TopPLogitsWarper": TopP.of,
    "TypicalLogitsWarper": Typical.of,
}


def are_on_device(processors: list) -> bool:
    """Tell whether all processors have a version for the device; subclasses and unknown ones have not."""
    known = set(_ON_DEVICE)
    return all(
        is_of(processor, "logits_process", known) and getattr(processor, "filter_value", -math.inf) == -math.inf
        for processor in processors
    )


def on_device(processors: list, vocab: int, texts: Texts) -> tuple[Any, ...]:
    """Return the versions for the device of processors of which `are_on_device` is true."""
    where: dict[str, Any] = {"vocab": vocab, "texts": texts, "device": texts.ids.device}
    return tuple(_ON_DEVICE[type(processor).__name__](processor, **where) for processor in processors)


def begin(processors: tuple[Any, ...], texts: Texts, steps: int) -> tuple[Any, ...]:
    """Return the processors at the root of a walk, whose texts have grown by at most `steps` since the last walk."""
    return tuple(each.begin(texts, steps) if isinstance(each, Penalty) else each for each in processors)


def follow(processors: tuple[Any, ...], tokens: Tensor, lengths: Tensor) -> None:
    """Tell processors of tokens (B,) that a walk has added to texts of `lengths` (B,)."""
    for each in processors:
        if isinstance(each, Penalty):
            each.follow(tokens, lengths)
