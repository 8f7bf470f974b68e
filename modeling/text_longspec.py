"""Text: the sequences of a call as plain `generate` holds them, row by row, and what it records about each step.

Rows may be of different lengths between rounds. In the end they are what plain `generate` leaves: each is written up
to the step at which the last row stopped, with padding behind its own end.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .records_longspec import Records
from .sampling_longspec import (
    IMPOSSIBLE,
    Noise,
    Picks,
    Sampler,
    are_by_row,
    are_criteria_by_row,
    are_without_history,
    pays_by_tree,
)
from .stops_longspec import Stops

# Tokens that a row may be ahead of the slowest one: their noise, and in sliding layers their room, is kept.
LEAD = 64


class Text:
    """The sequences of a call; `emit` writes tokens as one step of plain `generate` does, for some of the rows.

    together: all rows are written step by step together, because a processor, a stopping criterion, a streamer or the
        target needs them to be.
    by_tree: the tokens behind all nodes of a tree are picked at once; else those of the path, one by one.
    by_argmax: and they are just the largest logits.
    """

    def __init__(
        self,
        input_ids: Tensor,
        processors: Any,
        criteria: Any,
        generation_config: GenerationConfig,
        streamer: Any,
        *,
        nodes: int,
        vocab: int,
        keeps_cache: bool = True,
        together: bool = False,
    ):
        """input_ids: (B, L); nodes: of the largest tree; vocab: of the target's logits.

        keeps_cache: somebody will see the cache, so that it must hold the padding of finished rows too.
        together: the target needs rows of one length.
        """
        self.batch, self.prompt = input_ids.shape
        self.device = input_ids.device
        self.criteria, self.stops, self.streamer = criteria, Stops.of(criteria), streamer
        do_sample = generation_config.do_sample
        without_history = are_without_history(processors)
        known_criteria = are_criteria_by_row(criteria)
        by_row = are_by_row(processors) and known_criteria and streamer is None and not together
        self.together = self.batch == 1 or not by_row
        self.by_argmax = not do_sample and len(processors) == 0
        alone = without_history and known_criteria  # a user's own criteria may draw random numbers between ours
        self.by_tree = self.by_argmax or (alone and pays_by_tree(self.device, self.batch * nodes * vocab))
        noise = do_sample and (self.by_tree or not self.together)
        self.sampler = Sampler(processors, do_sample, Noise(self.batch, self.device) if noise else None)
        ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.pad = int(generation_config._pad_token_tensor) if ends else None
        self.records = Records(self.batch, generation_config)
        self.keeps_tails = keeps_cache or not self.records.empty or self.pad is None
        # nobody needs the tokens on the device where they are picked on the host
        host = self.by_tree and known_criteria
        self._ids = input_ids.cpu() if host else input_ids  # (B, room)
        self._fresh: list[list[int]] = [
            [] for _ in range(self.batch)
        ]  # the last tokens of each row, not yet in `_ids`
        self.lead = LEAD + nodes
        self.newest = [0] * self.batch  # the last token of each row
        self.lengths = [self.prompt] * self.batch
        self.ends: list[int | None] = [None] * self.batch  # the length at which each row stopped

    @property
    def finished(self) -> bool:
        """Whether every row has stopped and is as far as it has to be."""
        stopped = [end for end in self.ends if end is not None]
        return len(stopped) == self.batch and (not self.keeps_tails or min(self.lengths) == max(stopped))

    @property
    def sequences(self) -> Tensor:
        """(B, L): all rows up to the longest, on the device of the prompt; contiguous, for a user may view it."""
        self._settle()
        return self._ids[:, : max(self.lengths)].to(self.device).contiguous()

    @property
    def padding(self) -> int | None:
        """The token that rows go on with once they have stopped; None if they do not."""
        return self.pad if self.batch > 1 and (self.keeps_tails or self.together) else None

    @property
    def stopped(self) -> list[bool]:
        return [end is not None for end in self.ends]

    def rewind_noise(self) -> None:
        """Leave the random generator as plain `generate` would: after a failure, at the step of the slowest row."""
        if self.sampler.noise is not None:
            self.sampler.noise.rewind(self._slowest)

    @property
    def steps(self) -> list[int]:
        """The step of plain `generate` that each row is at."""
        return [length - self.prompt for length in self.lengths]

    def ids(self, rows: list[int]) -> Tensor:
        """(R, L): rows that are of one length."""
        self._settle()
        length = self.lengths[rows[0]]
        return self._ids[: self.batch, :length].contiguous() if len(rows) == self.batch else self._ids[rows, :length]

    def room(self) -> list[int]:
        """How many tokens each row may write in the next round.

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

    def pick_tree(self, logits: Tensor, depths: Tensor, levels: int) -> Picks:
        """The tokens behind all nodes of a batch of trees: logits (B, T, vocab), depths (B, T) up to `levels`."""
        logits, depths = logits.to(self.device), depths.to(self.device)
        return self.sampler.pick_tree(self._ids[:1, :1], self.steps, logits, depths, levels)

    def emit(self, rows: list[int], logits: Tensor, hidden_states: tuple | None = None) -> list[int]:
        """Pick the next token of `rows` from the target's logits (R, vocab) and write it. Returns the tokens.

        hidden_states: (…, R, length, hidden) of each layer, of the forward that the logits are from.
        """
        logits = logits.to(copy=True, dtype=torch.float32, device=self.device)
        picks = self.sampler.pick(self.ids, rows, [self.steps[row] for row in rows], logits)
        self.record(rows, picks.scores, logits, hidden_states)
        return self.write(rows, picks.tokens.tolist())

    def record(self, rows: list[int], scores: Tensor, logits: Tensor, hidden_states: tuple | None) -> None:
        """Keep, of what was asked for, that of the next token of `rows`: scores and logits (R, vocab)."""
        steps = [self.lengths[row] - self.prompt for row in rows]
        records = self.records
        for steps_of, values in ((records.scores, scores), (records.logits, logits)):
            if steps_of is not None:
                steps_of.put(rows, steps, values.to(self.device, torch.float32))
        if hidden_states is not None:
            records.put_hidden_states(rows, steps, tuple(states.to(self.device) for states in hidden_states))

    def write(self, rows: list[int], tokens: list[int]) -> list[int]:
        """Append one token to each of `rows`, padding where a row has stopped: ask the criteria, then stream, as
        `generate` does. Returns what was appended."""
        if IMPOSSIBLE in tokens:
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        if self.pad is not None:
            tokens = [token if self.ends[row] is None else self.pad for row, token in zip(rows, tokens, strict=True)]
        for row, token in zip(rows, tokens, strict=True):
            self._fresh[row].append(token)
            self.newest[row] = token
            self.lengths[row] += 1
        self._ask(rows)
        if self.streamer is not None:
            self.streamer.put(torch.tensor(tokens))
        if self.sampler.noise is not None:
            self.sampler.noise.forget(self._slowest)
        return tokens

    @property
    def _slowest(self) -> int:
        """The step of the last of the rows that go on; that of the first where none does."""
        moving = [step for step, end in zip(self.steps, self.ends, strict=True) if end is None or self.keeps_tails]
        return min(moving, default=max(self.steps))

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

    def _settle(self) -> None:
        """Bring `_ids` up to date."""
        if not any(self._fresh):
            return
        length = max(self.lengths)
        if length > self._ids.shape[1]:
            longer = self._ids.new_full((self.batch, max(length + 64, 2 * length - self.prompt)), self.pad or 0)
            longer[:, : self._ids.shape[1]] = self._ids
            self._ids = longer
        if len(set(self.lengths)) == len({len(fresh) for fresh in self._fresh}) == 1:
            self._ids[:, length - len(self._fresh[0]) : length] = torch.tensor(self._fresh)
        else:
            for row, (end, fresh) in enumerate(zip(self.lengths, self._fresh, strict=True)):
                self._ids[row, end - len(fresh) : end] = torch.tensor(fresh, dtype=torch.long)
        for fresh in self._fresh:
            fresh.clear()
