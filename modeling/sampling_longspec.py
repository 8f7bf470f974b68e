"""Sampling: how the target's next token is picked from its logits, and where a text stops, exactly as in `generate`.

The way to pick depends on the logits processors and stopping criteria, and is planned once a call. Knows logits and
token ids, no models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Processors of transformers that look at one row's ids and logits and at no other's.
_BY_ROW = set(
    "EpsilonLogitsWarper EtaLogitsWarper ExponentialDecayLengthPenalty ForcedBOSTokenLogitsProcessor "
    "ForcedEOSTokenLogitsProcessor InfNanRemoveLogitsProcessor LogitNormalization MinLengthLogitsProcessor "
    "MinNewTokensLengthLogitsProcessor MinPLogitsWarper NoBadWordsLogitsProcessor NoRepeatNGramLogitsProcessor "
    "RepetitionPenaltyLogitsProcessor SequenceBiasLogitsProcessor SuppressTokensAtBeginLogitsProcessor "
    "SuppressTokensLogitsProcessor TemperatureLogitsWarper TopHLogitsWarper TopKLogitsWarper TopPLogitsWarper "
    "TypicalLogitsWarper WatermarkLogitsProcessor".split()
)
_CRITERIA_BY_ROW = {"EosTokenCriteria", "MaxLengthCriteria", "MaxTimeCriteria", "StopStringCriteria"}
IMPOSSIBLE = -1  # no token: what is picked from scores that are no distribution


def are_by_row(processors: list) -> bool:
    """Tell whether the processors treat each row by itself and keep nothing between calls; unknown ones do not."""
    return all(
        is_of(processor, "logits_process", _BY_ROW)
        # given as a tensor, one length a row
        and not isinstance(getattr(processor, "prompt_ignore_length", None), Tensor)
        for processor in processors
    )


def are_criteria_by_row(criteria: list) -> bool:
    """Tell the same of stopping criteria."""
    return all(is_of(criterion, "stopping_criteria", _CRITERIA_BY_ROW) for criterion in criteria)


def is_of(instance: Any, module: str, names: set[str]) -> bool:
    """Tell whether the class of `instance` is one of `names` in transformers' `module`, and no subclass of one."""
    kind = type(instance)  # a subclass may keep a state
    return kind.__module__ == f"transformers.generation.{module}" and kind.__name__ in names


class Plan(NamedTuple):
    """How the tokens of a call are picked.

    together: all rows are written step by step together, because a processor, a stopping criterion, a streamer or the
        target needs rows of one length.
    by_argmax: each token is just the largest logit.
    drawn: the engine picks the tokens along all paths of a round on the device; else the host does, one by one.
    draws_ahead: rows or nodes at different steps need random numbers drawn ahead, see `Noise`.
    on_host: nothing on the device reads the text.
    """

    together: bool
    by_argmax: bool
    drawn: bool
    draws_ahead: bool
    on_host: bool

    @classmethod
    def of(
        cls, processors: list, criteria: list, do_sample: bool, batch: int, *, together: bool, can_draw: bool
    ) -> Plan:
        """Plan a call on `batch` rows.

        together: a streamer or the target needs rows of one length. can_draw: the engine knows these processors.
        """
        known_criteria = are_criteria_by_row(criteria)
        together = batch == 1 or together or not (are_by_row(processors) and known_criteria)
        by_argmax = not do_sample and len(processors) == 0
        # a user's own criteria may draw random numbers between ours
        drawn = can_draw and known_criteria and not by_argmax
        draws_ahead = do_sample and (drawn or not together)
        return cls(together, by_argmax, drawn, draws_ahead, (by_argmax or drawn) and known_criteria)


class Noise:
    """Hold the random numbers of `torch.multinomial`, one draw of (B, vocab) for each step of plain `generate`.

    `multinomial(p, 1)` is argmax(p / q) with q ~ Exp(1), of the shape of p. Rows of different lengths, and nodes of
    one tree, need the draws of different steps: each is drawn in order, when the first row needs it.
    """

    def __init__(self, batch: int, device: torch.device):
        self.batch, self.device = batch, device
        self.first = 0  # the step of the earliest draw still held
        self.draws: list[Tensor] = []
        self.states: list[Tensor] = []  # of the generator, before each draw
        self.ring: Tensor | None = None

    def keep_in(self, ring: Tensor) -> None:
        """Hold the draws in `ring` (N, B, vocab) from now on, each at its step modulo N; no more than N are held."""
        self.ring = ring
        for index, draw in enumerate(self.draws):
            self.draws[index] = self._place(self.first + index, draw.shape[1]).copy_(draw)

    def at(self, rows: list[int], steps: list[int], vocab: int) -> Tensor:
        """Return (R, vocab), the draws for `rows` at their `steps`."""
        self.draw_until(max(steps), vocab)
        return torch.stack([self.draws[step - self.first][row] for row, step in zip(rows, steps, strict=True)])

    def holds(self, step: int) -> bool:
        """Tell whether the draw of a step is made."""
        return step < self.first + len(self.draws)

    def draw_until(self, step: int, vocab: int) -> None:
        """Draw what is not yet drawn of the steps up to `step`."""
        while not self.holds(step):
            cuda = self.device.type == "cuda"
            self.states.append(torch.cuda.get_rng_state(self.device) if cuda else torch.get_rng_state())
            self.draws.append(self._place(self.first + len(self.draws), vocab).exponential_(1))

    def _place(self, step: int, vocab: int) -> Tensor:
        if self.ring is None:
            return torch.empty(self.batch, vocab, dtype=torch.float32, device=self.device)
        return self.ring[step % len(self.ring)]

    def forget(self, step: int) -> None:
        """Drop the draws before `step`, which no row needs any more."""
        del self.draws[: step - self.first], self.states[: step - self.first]
        self.first = max(self.first, step)

    def rewind(self, step: int) -> None:
        """Leave the generator as plain `generate` would after `step` steps: unused draws are undone."""
        if step < self.first + len(self.draws):
            state = self.states[step - self.first]
            torch.cuda.set_rng_state(state, self.device) if self.device.type == "cuda" else torch.set_rng_state(state)


class Picks(NamedTuple):
    """tokens (…) picked from scores (…, vocab); `IMPOSSIBLE` where the scores are no distribution."""

    tokens: Tensor
    scores: Tensor


class Sampler:
    """Pick the next token from logits on the host's word, step by step; see `Plan` for who else picks."""

    def __init__(self, processors: Any, do_sample: bool, plan: Plan, batch: int, device: torch.device):
        self.processors, self.do_sample, self.plan = processors, do_sample, plan
        self.noise = Noise(batch, device) if plan.draws_ahead else None
        self.vocab = 0  # of the logits; known behind the first token

    def pick(self, ids: Callable[[list[int]], Tensor], rows: list[int], steps: list[int], logits: Tensor) -> Picks:
        """Pick from logits (R, vocab) float32 of `rows`, each at its step; ids(rows): (R, L) of rows of one length."""
        self.vocab = logits.shape[-1]
        if len(set(steps)) == 1:
            scores = self.processors(ids(rows), logits)
        else:
            scores = torch.cat([self.processors(ids([row]), logits[i : i + 1]) for i, row in enumerate(rows)])
        if not self.do_sample:
            return Picks(scores.argmax(dim=-1), scores)
        probabilities = scores.softmax(dim=-1)
        if self.noise is None:
            return Picks(torch.multinomial(probabilities, num_samples=1).squeeze(1), scores)
        return Picks(largest(probabilities, self.noise.at(rows, steps, logits.shape[-1])), scores)

    def forget(self, step: int) -> None:
        """Drop the random numbers of the steps before `step`, which all rows have passed."""
        if self.noise is not None:
            self.noise.forget(step)

    def rewind(self, step: int) -> None:
        """Leave the random generator as plain `generate` would after `step` steps."""
        if self.noise is not None:
            self.noise.rewind(step)


def largest(probabilities: Tensor, noise: Tensor) -> Tensor:
    """Return what `multinomial` draws from probabilities (…, vocab) with this noise; see `Noise`."""
    possible = probabilities.sum(dim=-1).isfinite()
    return (probabilities / noise).argmax(dim=-1).masked_fill(~possible, IMPOSSIBLE)


class Stops(NamedTuple):
    """What transformers' `EosTokenCriteria` and `MaxLengthCriteria` say, as numbers that the host compares.

    ends: the tokens behind which a text ends; longest: its largest length; reminds: the length beyond which a
    criterion warns the user, and is therefore asked itself.
    """

    ends: frozenset[int]
    longest: float
    reminds: float

    @classmethod
    def of(cls, criteria: list) -> Stops | None:
        """Read the numbers off `criteria`; None if there are other criteria, subclasses of these two included."""
        ends: set[int] = set()
        lengths, reminds = [math.inf], [math.inf]
        for criterion in criteria:
            if is_of(criterion, "stopping_criteria", {"EosTokenCriteria"}):
                ends.update(criterion.eos_token_id.flatten().tolist())
            elif is_of(criterion, "stopping_criteria", {"MaxLengthCriteria"}):
                lengths.append(criterion.max_length)
                limit = criterion.max_position_embeddings
                reminds.append(math.inf if limit is None else limit)
            else:
                return None
        return cls(frozenset(ends), min(lengths), min(reminds))

    def at(self, length: int, newest: int) -> bool:
        """Tell whether a text of this length ends with its newest token."""
        return newest in self.ends or length >= self.longest
