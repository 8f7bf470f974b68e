"""Text: the sequences of a call as plain `generate` holds them, row by row, and what it records about each step.

Rows may be of different lengths between rounds. In the end they are what plain `generate` leaves: each is written up
to the step at which the last row stopped, with padding behind its own end. Writes what it is given: which tokens, the
verification decides.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .interface_longspec import padding_token
from .output_longspec import Records
from .sampling_longspec import IMPOSSIBLE, Plan, Stops

# Tokens that a row may be ahead of the slowest row, whose noise, and in sliding layers whose room, is kept; with much
# noise (bytes) for a token, fewer, but some rounds.
LEAD, LEAST_LEAD, NOISE_BYTES = 64, 32, 2**28


class Text:
    """The sequences of a call; `write` appends tokens as one step of plain `generate` does, for some of the rows."""

    def __init__(
        self,
        input_ids: Tensor,
        criteria: Any,
        generation_config: GenerationConfig,
        streamer: Any,
        plan: Plan,
        *,
        nodes: int,
        vocab: int,
        keeps_cache: bool = True,
    ):
        """Begin with prompts (B, L).

        nodes: of the largest tree. vocab: tokens that the target can embed. keeps_cache: the user sees the cache, and
        it holds finished rows' padding.
        """
        self.batch, self.prompt = input_ids.shape
        self.device = input_ids.device
        self.together = plan.together
        self.criteria, self.stops, self.streamer = criteria, Stops.of(criteria), streamer
        ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.pad = padding_token(generation_config) if ends else None
        # a token that models can embed in the place of padding that they cannot; no token of a text sees either
        self.stand_in: dict[int | None, int] = {} if self.pad is None or 0 <= self.pad < vocab else {self.pad: 0}
        self.records = Records(self.batch, generation_config)
        self.keeps_cache = keeps_cache
        self.keeps_tails = keeps_cache or not self.records.empty or self.pad is None
        ids = input_ids.long()  # as plain `generate` has them behind its first token
        self._ids = ids.cpu() if plan.on_host else ids  # (B, room)
        self._fresh: list[list[int]] = [[] for _ in range(self.batch)]  # each row's last tokens, not yet in `_ids`
        self.lead = LEAD + nodes
        if plan.draws_ahead:
            self.lead = min(self.lead, max(LEAST_LEAD, NOISE_BYTES // (4 * self.batch * vocab)))
        self.newest = [0] * self.batch  # the last token of each row, as a model can embed it
        self.lengths = [self.prompt] * self.batch
        self.ends: list[int | None] = [None] * self.batch  # the length at which each row stopped

    @property
    def finished(self) -> bool:
        """Whether every row has stopped and is as far as it has to be."""
        stopped = [end for end in self.ends if end is not None]
        return len(stopped) == self.batch and (not self.keeps_tails or min(self.lengths) == max(stopped))

    @property
    def sequences(self) -> Tensor:
        """All rows (B, L) up to the longest, on the device of the prompt; a copy without room for more."""
        self._write_fresh()
        return self._ids[:, : max(self.lengths)].to(self.device).clone()

    @property
    def padding(self) -> int | None:
        """The token that trees hold of rows that go on once they have stopped; None if such rows do not go on."""
        continues = self.batch > 1 and (self.keeps_tails or self.together)
        return self.stand_in.get(self.pad, self.pad) if continues else None

    @property
    def stopped(self) -> list[bool]:
        return [end is not None for end in self.ends]

    @property
    def steps(self) -> list[int]:
        """The step of plain `generate` that each row is at."""
        return [length - self.prompt for length in self.lengths]

    @property
    def slowest(self) -> int:
        """The step of the last of the rows that continue; the step of the first row where none does."""
        moving = [step for step, end in zip(self.steps, self.ends, strict=True) if end is None or self.keeps_tails]
        return min(moving, default=max(self.steps))

    def ids(self, rows: list[int]) -> Tensor:
        """Return the ids (R, L) of rows of one length."""
        self._write_fresh()
        length = self.lengths[rows[0]]
        return self._ids[: self.batch, :length].contiguous() if len(rows) == self.batch else self._ids[rows, :length]

    def room(self) -> list[int]:
        """Return how many tokens each row may write in the next round.

        No row gets ahead of the slowest by more than `lead`, and none beyond the step at which the last row stops.
        """
        if self.finished:
            return [0] * self.batch
        if self.together:
            return [self.lead] * self.batch
        running = [length for length, end in zip(self.lengths, self.ends, strict=True) if end is None]
        reach = max(running + [end for end in self.ends if end is not None])
        goals = [
            math.inf if end is None else reach if self.keeps_tails else length
            for length, end in zip(self.lengths, self.ends, strict=True)
        ]
        moving = [length for length, goal in zip(self.lengths, goals, strict=True) if length < goal]
        limit = min(moving, default=reach) + self.lead
        return [int(min(goal, limit)) - length for length, goal in zip(self.lengths, goals, strict=True)]

    def record(self, rows: list[int], scores: Tensor, logits: Tensor, hidden_states: tuple | None) -> None:
        """Record the next step of `rows`: scores and logits (R, vocab), (…, R, length, hidden) of each layer."""
        steps = [self.lengths[row] - self.prompt for row in rows]
        for steps_of, values in ((self.records.scores, scores), (self.records.logits, logits)):
            if steps_of is not None:
                steps_of.put(rows, steps, values.to(self.device, torch.float32))
        if hidden_states is not None:
            self.records.put_hidden_states(rows, steps, tuple(states.to(self.device) for states in hidden_states))

    def write(self, rows: list[int], tokens: list[int]) -> list[int]:
        """Append one token to each of `rows`, padding where a row has stopped; ask the criteria, then stream.

        Returns what was appended, as models can embed it. Raises what `multinomial` raises for `IMPOSSIBLE`.
        """
        if IMPOSSIBLE in tokens:
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        if self.pad is not None:
            tokens = [token if self.ends[row] is None else self.pad for row, token in zip(rows, tokens, strict=True)]
        for row, token in zip(rows, tokens, strict=True):
            self._fresh[row].append(token)
            self.newest[row] = self.stand_in.get(token, token)
            self.lengths[row] += 1
        self._ask(rows)
        if self.streamer is not None:
            self.streamer.put(torch.tensor(tokens, device="cpu"))
        return [self.newest[row] for row in rows]

    def _ask(self, rows: list[int]) -> None:
        """Ask the stopping criteria about the newest tokens; the first length at which they stop a row is its end."""
        if self.stops is None:
            done = self._ask_criteria(rows)
        else:
            done = [self.stops.at(self.lengths[row], self.newest[row]) for row in rows]
            if self.lengths[rows[0]] > self.stops.reminds and not done[0]:
                self._ask_criteria(rows[:1])
                self.stops = self.stops._replace(reminds=math.inf)  # once
        for row, stops in zip(rows, done, strict=True):
            if stops and self.ends[row] is None:
                self.ends[row] = self.lengths[row]

    def _ask_criteria(self, rows: list[int]) -> list[bool]:
        scores = None if self.records.scores is None else self.records.scores.values
        if len({self.lengths[row] for row in rows}) == 1:
            return self.criteria(self.ids(rows), scores).tolist()
        return [bool(self.criteria(self.ids([row]), scores)) for row in rows]

    def _write_fresh(self) -> None:
        """Bring `_ids` up to date."""
        if not any(self._fresh):
            return
        length = max(self.lengths)
        if length > self._ids.shape[1]:
            longer = self._ids.new_full((self.batch, max(length + 64, 2 * length - self.prompt)), self.pad or 0)
            longer[:, : self._ids.shape[1]] = self._ids
            self._ids = longer
        if len(set(self.lengths)) == len({len(fresh) for fresh in self._fresh}) == 1:
            self._ids[:, length - len(self._fresh[0]) : length] = torch.tensor(self._fresh, device="cpu")
        else:
            for row, (end, fresh) in enumerate(zip(self.lengths, self._fresh, strict=True)):
                self._ids[row, end - len(fresh) : end] = torch.tensor(fresh, dtype=torch.long, device="cpu")
        for fresh in self._fresh:
            fresh.clear()
