"""Triton kernels that draw tokens: a level of a walk is three launches, whatever the vocabulary.

Top-k, top-p and min-p, in any order, each keep the tokens above a place in the order of their scores, so that together
they keep the first few of that order. Chunks of the vocabulary give up their best tokens, and one program a row goes
down from the best until the first of the three lets a token go. No row is sorted. Imported only when a backend with
Triton kernels is chosen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fast_processors_longspec import Penalty, Texts, begin
from .fast_triton_attention_longspec import tl, triton
from .fast_triton_tree_longspec import LOWEST, best_of, value_of
from .sampling_longspec import is_of
from .tree_longspec import TokenTree
from .verification_longspec import Accepted, Walk

CHUNK, BEST = 1024, 8  # tokens of a program of the first launch, and how many of them it gives up
# Tokens with neighbouring ids that go to one program: the likeliest are neighbours too often for one to have them all.
GROUP = tl.constexpr(4)
MOST = 256  # tokens that a row may keep
UNSURE = -2  # no token: one that is kept may not be known
TOP_K, TOP_P, MIN_P = 0, 1, 2
_KINDS = {"TopKLogitsWarper": TOP_K, "TopPLogitsWarper": TOP_P, "MinPLogitsWarper": MIN_P}


class Cuts(NamedTuple):
    """Some of top-k, top-p and min-p in the order in which they act; least: how many tokens each keeps in any case."""

    kinds: Tensor  # (N,) int32
    limits: Tensor  # (N,) float32: k, 1 - p as top-p compares it, min-p
    least: Tensor  # (N,) int32


class Ending(NamedTuple):
    """The processors at the end of a call's that the kernels take over: a penalty, a temperature, cuts."""

    penalty: Penalty | None
    temperature: float
    cuts: Cuts | None

    @classmethod
    def of(
        cls, processors: list, versions: tuple[Any, ...], device: torch.device, do_sample: bool = True
    ) -> tuple[tuple[Any, ...], Ending | None]:
        """Return the versions (see `on_device`) of the processors that come before, and the ending.

        None for an ending that the kernels cannot take over. Without sampling no cuts are: of largest scores that are
        equal, top-p may let the first go, which is the token otherwise.
        """
        if sum(isinstance(version, Penalty) for version in versions) > 1:
            return versions, None
        end = len(processors)
        while end and do_sample and _is_cut(processors[end - 1]):
            end -= 1
        cuts = processors[end:]
        if cuts and is_of(cuts[0], "logits_process", {"TopKLogitsWarper"}) and cuts[0].top_k > MOST - 32:
            return versions, cls(None, 1.0, None)  # no room for tokens of one score
        temperature, penalty = 1.0, None
        if end and is_of(processors[end - 1], "logits_process", {"TemperatureLogitsWarper"}):
            end -= 1
            temperature = processors[end].temperature
        if end and isinstance(versions[end - 1], Penalty):
            end -= 1
            penalty = versions[end]
        return versions[:end], cls(penalty, temperature, _cuts(cuts, device))


def _is_cut(processor: Any) -> bool:
    """Tell whether the kernels know a processor; of tokens of one score, a min-p that keeps several keeps any."""
    if type(processor).__name__ == "MinPLogitsWarper" and processor.min_tokens_to_keep > 1:
        return False
    return is_of(processor, "logits_process", set(_KINDS))


def _cuts(processors: list, device: torch.device) -> Cuts | None:
    if not processors:
        return None
    kinds = [_KINDS[type(cut).__name__] for cut in processors]
    limits = [
        cut.top_k if kind == TOP_K else 1 - cut.top_p if kind == TOP_P else cut.min_p
        for kind, cut in zip(kinds, processors, strict=True)
    ]
    least = [cut.min_tokens_to_keep for cut in processors]
    return Cuts(
        torch.tensor(kinds, dtype=torch.int32, device=device),
        torch.tensor(limits, dtype=torch.float32, device=device),
        torch.tensor(least, dtype=torch.int32, device=device),
    )


# --- the state of a walk ---------------------------------------------------------------------------------------------

# Fields (B, 8) of a walk's state. A row is alive while its path is in the tree; behind that, nothing is computed.
NODE, LENGTH, COUNT, ALIVE, DOUBT = (tl.constexpr(index) for index in range(5))
FIELDS = tl.constexpr(8)


@triton.jit
def scores_of(
    source, state, seen, row, token, real, source_b, source_t, seen_b, penalty, over_penalty, over_temperature,
    BY_NODE: tl.constexpr, PENALIZED: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """Load scores (N,) of tokens behind the node where a row stands, in float32, NaN as infinity.

    Penalty and temperature are applied. A quotient is a product with the inverse, as torch has it on a GPU.
    """
    node = tl.load(state + row * FIELDS + NODE) if BY_NODE else 0
    x = tl.load(source + row * source_b + node * source_t + token, mask=real, other=float("-inf")).to(tl.float32)
    if PENALIZED:
        known = tl.load(seen + row * seen_b + token, mask=real, other=0) != 0
        x = tl.where(known, tl.where(x < 0, x * penalty, x * over_penalty), x)
    if TEMPERED:
        x = x * over_temperature
    return tl.where(x == x, x, float("inf"))


@triton.jit
def tokens_of(chunk, chunks, BLOCK: tl.constexpr):
    """Return the tokens (BLOCK,) of a chunk: small groups of neighbours, as far apart as there are chunks."""
    lane = tl.arange(0, BLOCK)
    return ((lane // GROUP) * chunks + chunk) * GROUP + lane % GROUP


@triton.jit
def noise_of(noise, state, prompt, row, slots, noise_n, noise_b):
    """Return where the noise of a row's step begins."""
    step = tl.load(state + row * FIELDS + LENGTH) - tl.load(prompt)
    return noise + (step % slots) * noise_n + row * noise_b


@triton.jit
def step_kernel(
    state, drawn, parents, tokens, path, picked, ids, stopped, seen, first, level, nodes, steps, padding,
    parents_b, tokens_b, ids_b, seen_b, vocab, NODES: tl.constexpr, PADDED: tl.constexpr, PENALIZED: tl.constexpr,
):  # fmt: skip
    """Note a row's token at a level of its walk, and go on to the node that carries it; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    own = state + row * FIELDS
    node, length, alive = tl.load(own + NODE), tl.load(own + LENGTH), tl.load(own + ALIVE)
    if alive == 0:
        tl.store(path + row * steps + level, node)
        tl.store(picked + row * steps + level, 0)
        return
    token, done = tl.load(drawn + row), tl.load(stopped + row).to(tl.int64)
    tl.store(own + DOUBT, tl.load(own + DOUBT) | (alive & (1 - done) & (token < -1).to(tl.int64)))
    if PADDED:
        token = tl.where((done != 0) & (token != -1), padding, token)
    tl.store(path + row * steps + level, node)
    tl.store(picked + row * steps + level, token)
    tl.store(own + COUNT, tl.load(own + COUNT) + alive)
    tl.store(ids + row * ids_b + length, tl.maximum(token, 0))
    if PENALIZED:
        real = (token >= 0) & (length >= tl.load(first + row))
        tl.store(seen + row * seen_b + tl.minimum(tl.maximum(token, 0), vocab), 1, mask=real)
    index = tl.arange(0, NODES)
    there = (index > 0) & (index < nodes)
    below = (tl.load(parents + row * parents_b + index, mask=there, other=-1) == node) & (
        tl.load(tokens + row * tokens_b + index, mask=there, other=-1) == token
    )
    child = tl.min(tl.where(below & there, index, NODES), 0).to(tl.int64)  # of siblings with one token, the first
    alive = alive & (child < NODES).to(tl.int64)
    tl.store(own + ALIVE, alive)
    tl.store(own + NODE, tl.where(alive != 0, child, node))
    tl.store(own + LENGTH, length + 1)


# --- a token without cuts --------------------------------------------------------------------------------------------


@triton.jit
def race_kernel(
    source, state, seen, noise, prompt, peaks, times, winners, vocab, chunks, slots, noise_n, noise_b,
    source_b, source_t, seen_b, penalty, over_penalty, over_temperature, BLOCK: tl.constexpr, DRAWN: tl.constexpr,
    BY_NODE: tl.constexpr, PENALIZED: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """Store a chunk's largest score, the best of exp(score − largest) / noise, and its token.

    Without noise, the best of the scores. Programs are (chunk, row).
    """
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(state + row * FIELDS + ALIVE) == 0:
        return
    token = tokens_of(chunk, chunks, BLOCK)
    real = token < vocab
    x = scores_of(
        source, state, seen, row, token, real, source_b, source_t, seen_b, penalty, over_penalty, over_temperature,
        BY_NODE, PENALIZED, TEMPERED,
    )  # fmt: skip
    peak = tl.max(x, 0)
    race = x
    if DRAWN:
        shift = tl.where(tl.abs(peak) == float("inf"), 0.0, peak)
        place = noise_of(noise, state, prompt, row, slots, noise_n, noise_b)
        race = tl.div_rn(tl.exp(x - shift), tl.load(place + token, mask=real, other=1.0))
    race = tl.where(real, race, float("-inf"))
    best = tl.max(race, 0)
    offset = row * chunks + chunk
    tl.store(peaks + offset, peak)
    tl.store(times + offset, best)
    tl.store(winners + offset, tl.min(tl.where(real & (race == best), token, 0x7FFFFFFF), 0))


@triton.jit
def winner_kernel(peaks, times, winners, drawn, chunks, CHUNKS: tl.constexpr, DRAWN: tl.constexpr):
    """Store the token that wins among the chunks of a row, one program each; -1 where there are no probabilities."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS)
    real = chunk < chunks
    peak = tl.load(peaks + row * chunks + chunk, mask=real, other=float("-inf"))
    race = tl.load(times + row * chunks + chunk, mask=real, other=float("-inf"))
    token = tl.load(winners + row * chunks + chunk, mask=real, other=0x7FFFFFFF)
    top = tl.max(peak, 0)
    possible = True
    if DRAWN:
        possible = tl.abs(top) != float("inf")
        shift = tl.where(possible, top, 0.0)
        race = tl.where(peak == float("-inf"), -1.0, race * tl.exp(peak - shift))
    winner = tl.min(tl.where(real & (race == tl.max(race, 0)), token, 0x7FFFFFFF), 0)
    tl.store(drawn + row, tl.where(possible, winner, -1).to(tl.int64))


# --- a token that cuts leave -----------------------------------------------------------------------------------------


@triton.jit
def order_key(x, index):
    """Pack a float32 and its index into an int64 that sorts by value, and of equal values the larger index first.

    That is the order in which `torch.sort` puts the last ones, the likeliest.
    """
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # minus zero is zero
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return (ordered << 32) | index.to(tl.int64)


@triton.jit
def best_kernel(
    source, state, seen, keys, peaks, totals, vocab, chunks,
    source_b, source_t, seen_b, penalty, over_penalty, over_temperature, BLOCK: tl.constexpr, K: tl.constexpr,
    BY_NODE: tl.constexpr, PENALIZED: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """Store the order keys of the K best tokens of a chunk, its largest score and the sum of exp(score − largest).

    Programs are (chunk, row).
    """
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(state + row * FIELDS + ALIVE) == 0:
        return
    token = tokens_of(chunk, chunks, BLOCK)
    real = token < vocab
    x = scores_of(
        source, state, seen, row, token, real, source_b, source_t, seen_b, penalty, over_penalty, over_temperature,
        BY_NODE, PENALIZED, TEMPERED,
    )  # fmt: skip
    peak = tl.max(x, 0)
    offset = row * chunks + chunk
    tl.store(peaks + offset, peak)
    shift = tl.where(tl.abs(peak) == float("inf"), 0.0, peak)
    tl.store(totals + offset, tl.sum(tl.where(real, tl.exp(x - shift), 0.0), 0))
    best = best_of(tl.where(real, order_key(x, token), LOWEST), LOWEST, K)
    tl.store(keys + offset * K + tl.arange(0, K), best)


@triton.jit
def cut_kernel(
    keys, peaks, totals, state, noise, prompt, kinds, limits, least, drawn, chunks, cuts, slots, noise_n, noise_b,
    N: tl.constexpr, CHUNKS: tl.constexpr, K: tl.constexpr, M: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Store the token drawn for a row, one program each; -1 where there are no probabilities, -2 where unsure."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(state + row * FIELDS + ALIVE) == 0:
        return
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
    place = noise_of(noise, state, prompt, row, slots, noise_n, noise_b)
    times = tl.load(place + token, mask=kept, other=1.0)
    race = tl.where(kept, tl.div_rn(tl.div_rn(share, tl.zeros_like(share) + tl.sum(share, 0)), times), -1.0)
    winner = tl.min(tl.where(race == tl.max(race, 0), token, 0x7FFFFFFF), 0)
    tl.store(drawn + row, tl.where(possible, tl.where(sure, winner, -2), -1))


# --- a walk ----------------------------------------------------------------------------------------------------------


def inverse(number: float) -> float:
    """Return 1 / number, rounded as torch rounds it on a GPU before it multiplies."""
    return torch.tensor(number, dtype=torch.float32, device="cpu").reciprocal().item()


def pick_tokens(
    source: Tensor, state: Tensor, ending: Ending, noise: Tensor | None, prompt: Tensor, by_node: bool
) -> Tensor:
    """Pick the next token of each row: (B,), -1 where a row has no probabilities, `UNSURE` where it keeps too many.

    source: logits (B, T, vocab) of the nodes, or with `by_node` false processed scores (B, 1, vocab). state: (B, 8).
    noise: (N, B, vocab) as `Noise` has it; None for the largest score. prompt: (), length.
    """
    batch, _, vocab = source.shape
    source = source if source.stride(2) == 1 else source.contiguous()
    device, penalty = source.device, ending.penalty
    drawn = torch.empty(batch, dtype=torch.int64, device=device)
    cut = ending.cuts is not None and noise is not None
    block = BEST if cut and vocab <= 2 * CHUNK else CHUNK  # small vocabularies are known whole
    chunks = triton.cdiv(vocab, block)
    chunks_power = triton.next_power_of_2(chunks)
    seen = state if penalty is None else penalty.seen
    factors = (1.0, 1.0) if penalty is None else (penalty.penalty, inverse(penalty.penalty))
    scoring = (source.stride(0), source.stride(1), seen.stride(0), *factors, inverse(ending.temperature))
    flags = {"BY_NODE": by_node, "PENALIZED": penalty is not None, "TEMPERED": ending.temperature != 1.0}
    floats = torch.empty(2, batch, chunks, dtype=torch.float32, device=device)
    ring = (1, 0, 0) if noise is None else (len(noise), noise.stride(0), noise.stride(1))
    if not cut:
        winners = torch.empty(batch, chunks, dtype=torch.int32, device=device)
        race_kernel[(chunks, batch)](
            source, state, seen, state if noise is None else noise, prompt, *floats, winners, vocab, chunks, *ring,
            *scoring, BLOCK=block, DRAWN=noise is not None, **flags, num_warps=4,
        )  # fmt: skip
        winner_kernel[(batch,)](*floats, winners, drawn, chunks, CHUNKS=chunks_power, DRAWN=noise is not None)
        return drawn
    assert ending.cuts is not None and noise is not None
    keys = torch.empty(batch, chunks, BEST, dtype=torch.int64, device=device)
    best_kernel[(chunks, batch)](
        source, state, seen, keys, *floats, vocab, chunks, *scoring, BLOCK=block, K=BEST, **flags, num_warps=4
    )
    cut_kernel[(batch,)](
        keys, *floats, state, noise, prompt, *ending.cuts, drawn, chunks, len(ending.cuts.kinds), *ring,
        N=triton.next_power_of_2(chunks * BEST), CHUNKS=chunks_power, K=BEST, M=MOST, ALL=block == BEST,
        num_warps=4,
    )  # fmt: skip
    return drawn


def fused_paths(call: Any, tree: TokenTree, verified: Any, drawing: Any) -> Walk:
    """Draw the tokens along the paths, as `draw_paths` without kernels."""
    ids, logits, steps, nodes = drawing.ids, verified.logits, tree.levels + 1, tree.tokens.shape[1]
    batch, device, ending = len(ids), ids.device, drawing.ending
    lengths = call.cache.bounds_on(device)[1] + drawing.origin
    growth = tree.levels + 1
    processors = begin(drawing.processors, Texts(ids, lengths), growth)
    if ending.penalty is not None:
        ending = ending._replace(penalty=ending.penalty.begin(Texts(ids, lengths), growth))
    penalties = [each for each in (*processors, ending.penalty) if isinstance(each, Penalty)]
    assert len(penalties) <= 1, "see `Ending.of`"
    penalty = penalties[0] if penalties else None
    state = torch.zeros(batch, FIELDS.value, dtype=torch.int64, device=device)
    state[:, LENGTH.value].copy_(lengths)
    state[:, ALIVE.value].fill_(1)
    path, picked = torch.empty(2, batch, steps, dtype=torch.int64, device=device)
    rows = torch.arange(batch, device=device)
    seen = state if penalty is None else penalty.seen
    padding = call.text.padding
    for level in range(steps):
        source = logits
        if processors:
            source = logits[rows, state[:, NODE.value]].float()
            texts = Texts(ids, state[:, LENGTH.value])
            for processor in processors:
                source = processor(source, texts)
            source = source[:, None]
        drawn = pick_tokens(source, state, ending, drawing.noise, drawing.prompt, by_node=not processors)
        step_kernel[(batch,)](
            state, drawn, tree.parents, tree.tokens, path, picked, ids, call.roots.stopped, seen,
            state if penalty is None else penalty.first, level, nodes, steps, padding or 0, tree.parents.stride(0),
            tree.tokens.stride(0), ids.stride(0), seen.stride(0), seen.shape[1] - 1,
            NODES=triton.next_power_of_2(nodes), PADDED=padding is not None, PENALIZED=penalty is not None,
            num_warps=1,
        )  # fmt: skip
    count = state[:, COUNT.value]
    newest = picked.gather(1, count[:, None] - 1)[:, 0]
    counts = count.masked_fill(state[:, DOUBT.value] != 0, 0)
    return Walk(Accepted(path, counts, newest), torch.cat([path, picked, counts[:, None]], dim=1))
