"""Triton kernels that draw a token: top-k, top-p and min-p one after the other in any order, then `multinomial`.

Each of the three keeps the tokens above a place in the order of their scores, so that together they keep the first few
of that order: chunks of the vocabulary give up their best tokens, and one program a row goes down from the best until
the first of the three lets a token go. No row is sorted. Imported only when a backend with Triton kernels is chosen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fast_triton_attention_longspec import tl, triton
from .fast_triton_tree_longspec import LOWEST, best_of, value_of
from .sampling_longspec import is_of

CHUNK, BEST = 1024, 8  # tokens of a program of the first launch, and how many of them it gives up
GROUP = tl.constexpr(4)  # tokens of a chunk that follow each other: the likely ones of a vocabulary lie together
MOST = 256  # tokens that a row may keep
UNSURE = -2  # no token: one that is kept may not be known
TOP_K, TOP_P, MIN_P = 0, 1, 2
_KINDS = {"TopKLogitsWarper": TOP_K, "TopPLogitsWarper": TOP_P, "MinPLogitsWarper": MIN_P}


class Cuts(NamedTuple):
    """Some of top-k, top-p and min-p in the order in which they act; least: how many tokens each keeps in any case."""

    kinds: Tensor  # (N,) int32
    limits: Tensor  # (N,) float32: k, 1 - p as top-p compares it, min-p
    least: Tensor  # (N,) int32

    @classmethod
    def of(cls, processors: list, device: torch.device) -> tuple[int, Cuts | None]:
        """Return how many of a call's processors come before the cuts at their end, and the cuts, if there are any."""
        before = len(processors)
        while before and _is_cut(processors[before - 1]):
            before -= 1
        cuts: list[Any] = processors[before:]
        kinds = [_KINDS[type(cut).__name__] for cut in cuts]
        if not cuts or (kinds[0] == TOP_K and cuts[0].top_k > MOST - 32):  # with room for tokens of one score
            return len(processors), None
        limits = [_limit(cut) for cut in cuts]
        least = [getattr(cut, "min_tokens_to_keep", 1) for cut in cuts]
        return before, cls(
            torch.tensor(kinds, dtype=torch.int32, device=device),
            torch.tensor(limits, dtype=torch.float32, device=device),
            torch.tensor(least, dtype=torch.int32, device=device),
        )


def _is_cut(processor: Any) -> bool:
    """Tell whether the kernels know a processor; of tokens of one score, a min-p that keeps several keeps any."""
    if type(processor).__name__ == "MinPLogitsWarper" and processor.min_tokens_to_keep > 1:
        return False
    return is_of(processor, "logits_process", set(_KINDS))


def _limit(cut: Any) -> float:
    kind = _KINDS[type(cut).__name__]
    return cut.top_k if kind == TOP_K else 1 - cut.top_p if kind == TOP_P else cut.min_p


@triton.jit
def order_key(x, index):
    """Pack a float32 and its index into an int64 that sorts by value, and of equal values the larger index first.

    That is the order in which `torch.sort` puts the last ones, the likeliest.
    """
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # minus zero is zero
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return (ordered << 32) | index.to(tl.int64)


@triton.jit
def best_kernel(scores, keys, peaks, totals, vocab, chunks, BLOCK: tl.constexpr, K: tl.constexpr):
    """Store the order keys of the K best tokens of a chunk, its largest score and the sum of exp(score − largest).

    Programs are (chunk, row); groups of tokens are dealt to the chunks in turn. No number counts as infinity, as both
    make the probabilities of a row none.
    """
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = tl.arange(0, BLOCK)
    token = (place // GROUP * chunks + chunk) * GROUP + place % GROUP
    real = token < vocab
    x = tl.load(scores + row * vocab + token, mask=real, other=float("-inf"))
    x = tl.where(x == x, x, float("inf"))
    peak = tl.max(x, 0)
    offset = row * chunks + chunk
    tl.store(peaks + offset, peak)
    shift = tl.where(tl.abs(peak) == float("inf"), 0.0, peak)
    tl.store(totals + offset, tl.sum(tl.exp(x - shift), 0))
    best = best_of(tl.where(real, order_key(x, token), LOWEST), LOWEST, K)
    tl.store(keys + offset * K + tl.arange(0, K), best)


@triton.jit
def cut_kernel(
    keys, peaks, totals, noise, slots, kinds, limits, least, tokens, chunks, cuts, noise_n, noise_b,
    N: tl.constexpr, CHUNKS: tl.constexpr, K: tl.constexpr, M: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Store the token drawn for a row, one program each; -1 where there are no probabilities, -2 where unsure."""
    row = tl.program_id(0).to(tl.int64)
    chunk, candidate, slot = tl.arange(0, CHUNKS), tl.arange(0, N), tl.arange(0, M)
    peak = tl.load(peaks + row * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
    total = tl.load(totals + row * chunks + chunk, mask=chunk < chunks, other=0.0)
    top = tl.max(peak, 0)
    possible = tl.abs(top) != float("inf")
    shift = tl.where(possible, top, 0.0)
    whole = tl.sum(total * tl.exp(tl.where(peak == float("-inf"), float("-inf"), peak - shift)), 0)
    known = tl.load(keys + row * chunks * K + candidate, mask=candidate < chunks * K, other=LOWEST)
    bound = LOWEST  # what no chunk gave up is less
    if not ALL:
        bound = tl.max(tl.where(candidate % K == K - 1, known, LOWEST), 0)

    # the first cut, going down from the best token
    kind, limit, kept_least = tl.load(kinds), tl.load(limits), tl.load(least)
    best = tl.full([M], LOWEST, tl.int64)
    rank, mass, kth = 0, 0.0, float("-inf")
    sure = tl.full([], ALL, tl.int1)
    going = possible
    while going:
        key = tl.max(known, 0)
        score = value_of(key)
        share = tl.exp(score - shift)
        gone_k = (rank >= limit) & (score < kth)
        gone_p = (((whole - mass) / whole) <= limit) & (rank >= kept_least)
        gone_m = ((share / whole) < limit * (1.0 / whole)) & (rank >= kept_least)
        gone = tl.where(kind == 0, gone_k, tl.where(kind == 1, gone_p, gone_m)) | (score == float("-inf"))
        listed = (key >= bound) & (key != LOWEST)
        taken = listed & (gone == 0) & (rank < M)
        best = tl.where((slot == rank) & taken, key, best)
        known = tl.where(known == key, LOWEST, known)
        kth = tl.where(rank + 1 == limit, score, kth)
        mass += tl.where(taken, share, 0.0)
        rank += taken.to(tl.int32)
        sure = tl.where(listed & (taken == 0), gone, sure)  # a token that would stay but finds no slot is in doubt
        going = taken

    # the others
    kept = slot < rank
    score = value_of(best)
    share = tl.where(kept, tl.exp(score - shift), 0.0)
    for cut in range(1, cuts):
        kind, limit, kept_least = tl.load(kinds + cut), tl.load(limits + cut), tl.load(least + cut)
        total_kept = tl.sum(share, 0)
        probability = share / total_kept
        count = tl.sum(kept.to(tl.int32), 0)
        place = tl.minimum(limit, count.to(tl.float32)).to(tl.int32) - 1
        last = tl.sum(tl.where(slot == place, score, 0.0), 0)
        first = tl.sum(tl.where(slot == 0, probability, 0.0), 0)
        stays_k = score >= last
        stays_p = (tl.cumsum(probability, 0, reverse=True) > limit) | (slot < kept_least)
        stays_m = (probability >= limit * first) | (slot < kept_least)
        kept = kept & tl.where(kind == 0, stays_k, tl.where(kind == 1, stays_p, stays_m))
        share = tl.where(kept, share, 0.0)

    token = (best & 0xFFFFFFFF).to(tl.int64)
    place = tl.load(slots + row) * noise_n + row * noise_b
    drawn = tl.load(noise + place + token, mask=kept, other=1.0)
    race = tl.where(kept, tl.div_rn(tl.div_rn(share, tl.zeros_like(share) + tl.sum(share, 0)), drawn), -1.0)
    winner = tl.min(tl.where(race == tl.max(race, 0), token, 0x7FFFFFFF), 0)
    tl.store(tokens + row, tl.where(possible, tl.where(sure, winner, -2), -1))


@triton.jit
def race_kernel(scores, noise, slots, peaks, times, winners, vocab, chunks, noise_n, noise_b, BLOCK: tl.constexpr):
    """Store a chunk's largest score, the best of exp(score − largest) / noise, and its token; programs as above."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    real = token < vocab
    x = tl.load(scores + row * vocab + token, mask=real, other=float("-inf"))
    x = tl.where(x == x, x, float("inf"))
    peak = tl.max(x, 0)
    shift = tl.where(tl.abs(peak) == float("inf"), 0.0, peak)
    drawn = tl.load(noise + tl.load(slots + row) * noise_n + row * noise_b + token, mask=real, other=1.0)
    race = tl.where(real, tl.div_rn(tl.exp(x - shift), drawn), -1.0)
    best = tl.max(race, 0)
    offset = row * chunks + chunk
    tl.store(peaks + offset, peak)
    tl.store(times + offset, best)
    tl.store(winners + offset, tl.min(tl.where(race == best, token, 0x7FFFFFFF), 0))


@triton.jit
def winner_kernel(peaks, times, winners, tokens, chunks, CHUNKS: tl.constexpr):
    """Store the token that wins among the chunks of a row, one program each; -1 where there are no probabilities."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS)
    real = chunk < chunks
    peak = tl.load(peaks + row * chunks + chunk, mask=real, other=float("-inf"))
    time = tl.load(times + row * chunks + chunk, mask=real, other=-1.0)
    token = tl.load(winners + row * chunks + chunk, mask=real, other=0x7FFFFFFF)
    top = tl.max(peak, 0)
    possible = tl.abs(top) != float("inf")
    race = tl.where(real & (peak != float("-inf")), time * tl.exp(peak - tl.where(possible, top, 0.0)), -1.0)
    winner = tl.min(tl.where(race == tl.max(race, 0), token, 0x7FFFFFFF), 0)
    tl.store(tokens + row, tl.where(possible, winner, -1).to(tl.int64))


def draw_any(scores: Tensor, noise: Tensor, slots: Tensor) -> Tensor:
    """Draw tokens (B,) from processed scores (B, vocab) with the noise (N, B, vocab) of each row at slots (B,).

    `IMPOSSIBLE` where a row has no probabilities.
    """
    batch, vocab = scores.shape
    chunks, device = triton.cdiv(vocab, CHUNK), scores.device
    peaks, times = torch.empty(2, batch, chunks, dtype=torch.float32, device=device)
    winners = torch.empty(batch, chunks, dtype=torch.int32, device=device)
    tokens = torch.empty(batch, dtype=torch.int64, device=device)
    race_kernel[(chunks, batch)](
        scores.contiguous(), noise, slots, peaks, times, winners, vocab, chunks, noise.stride(0), noise.stride(1),
        BLOCK=CHUNK, num_warps=4,
    )  # fmt: skip
    winner_kernel[(batch,)](peaks, times, winners, tokens, chunks, CHUNKS=triton.next_power_of_2(chunks), num_warps=4)
    return tokens


def draw(scores: Tensor, cuts: Cuts | None, noise: Tensor, slots: Tensor) -> Tensor:
    """Draw tokens (B,) from processed scores (B, vocab), cut first if there are cuts; see `draw_cut`."""
    return draw_any(scores, noise, slots) if cuts is None else draw_cut(scores, cuts, noise, slots)


def draw_cut(scores: Tensor, cuts: Cuts, noise: Tensor, slots: Tensor) -> Tensor:
    """Draw tokens (B,) from processed scores (B, vocab), which `cuts` cut first.

    noise: (N, B, vocab) as `Noise` has it, that of each row at slots (B,). `IMPOSSIBLE` where a row has no
    probabilities, `UNSURE` where it keeps more tokens than the kernels can hold.
    """
    batch, vocab = scores.shape
    block = CHUNK if vocab > 2 * CHUNK else BEST  # small vocabularies are known whole
    chunks, device = triton.cdiv(vocab, block), scores.device
    keys = torch.empty(batch, chunks, BEST, dtype=torch.int64, device=device)
    peaks, totals = torch.empty(2, batch, chunks, dtype=torch.float32, device=device)
    best_kernel[(chunks, batch)](
        scores.contiguous(), keys, peaks, totals, vocab, chunks, BLOCK=block, K=BEST, num_warps=4
    )
    tokens = torch.empty(batch, dtype=torch.int64, device=device)
    cut_kernel[(batch,)](
        keys, peaks, totals, noise, slots, *cuts, tokens, chunks, len(cuts.kinds), noise.stride(0), noise.stride(1),
        N=triton.next_power_of_2(chunks * BEST), CHUNKS=triton.next_power_of_2(chunks), K=BEST, M=MOST,
        ALL=block == BEST, num_warps=8,
    )  # fmt: skip
    return tokens
