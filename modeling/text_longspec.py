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
    Noise,
    Picks,
    Sampler,
    are_by_row,
    are_criteria_by_row,
    are_without_history,
    pays_by_tree,
)

# Tokens that a row may be ahead of the slowest one: their noise, and in sliding layers their room, is kept.
LEAD = 64


class Text:
    """The sequences of a call; `emit` writes tokens as one step of plain `generate` does, for some of the rows.

    together: all rows are written step by step together, because a processor, a stopping criterion, a streamer or the
        target needs them to be.
    by_tree: the tokens behind all nodes of a tree are picked at once; else those of the path, one by one.
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
        self.criteria, self.streamer = criteria, streamer
        do_sample = generation_config.do_sample
        without_history = are_without_history(processors)
        known_criteria = are_criteria_by_row(criteria)
        by_row = are_by_row(processors) and known_criteria and streamer is None and not together
        self.together = self.batch == 1 or not by_row
        is_argmax = not do_sample and len(processors) == 0
        alone = without_history and known_criteria  # a user's own criteria may draw random numbers between ours
        self.by_tree = is_argmax or (alone and pays_by_tree(self.device, self.batch * nodes * vocab))
        noise = do_sample and (self.by_tree or not self.together)
        self.sampler = Sampler(processors, do_sample, Noise(self.batch, self.device) if noise else None)
        ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.pad = int(generation_config._pad_token_tensor) if ends else None
        self.records = Records(self.batch, generation_config)
        self.keeps_tails = keeps_cache or not self.records.empty or self.pad is None
        # nobody needs the tokens on the device where they are picked on the host
        host = self.by_tree and known_criteria
        self._ids = input_ids.cpu() if host else input_ids  # (B, room)
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
        return self._ids[:, : max(self.lengths)].to(self.device).contiguous()

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
        picks = self.sampler.pick_tree(self._ids[:1, :1], self.steps, logits, depths, levels)
        if self.records.scores is not None and picks.scores is None:
            return picks._replace(scores=logits.float())
        return picks

    def emit(self, rows: list[int], logits: Tensor, hidden_states: tuple | None = None) -> list[int]:
        """Pick the next token of `rows` from the target's logits (R, vocab) and write it. Returns the tokens.

        hidden_states: (…, R, length, hidden) of each layer, of the forward that the logits are from.
        """
        logits = logits.to(copy=True, dtype=torch.float32, device=self.device)
        picks = self.sampler.pick(self.ids, rows, [self.steps[row] for row in rows], logits)
        return self.write(rows, picks, logits, hidden_states)

    def write(
        self, rows: list[int], picks: Picks, logits: Tensor | None = None, hidden_states: tuple | None = None
    ) -> list[int]:
        """Write one token (R,) to each of `rows`, as `emit` does once they are picked."""
        steps = [self.steps[row] for row in rows]
        records = self.records
        if records.scores is not None and picks.scores is not None:
            records.scores.put(rows, steps, picks.scores)
        if records.logits is not None and logits is not None:
            records.logits.put(rows, steps, logits)
        if hidden_states is not None:
            records.put_hidden_states(rows, steps, tuple(states.to(self.device) for states in hidden_states))
        if picks.valid is not None and not bool(picks.valid.all()):
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        return self._append(rows, picks.tokens)

    def _append(self, rows: list[int], tokens: Tensor) -> list[int]:
        """Append `tokens` (R,), padding where a row has stopped: ask the criteria, then stream, as `generate` does."""
        stopped = [self.ends[row] is not None for row in rows]
        if self.pad is not None and any(stopped):
            tokens = tokens.masked_fill(torch.tensor(stopped, device=tokens.device), self.pad)
        places = [self.lengths[row] for row in rows]
        self._make_room(max(places) + 1)
        if len(rows) == self.batch and len(set(places)) == 1:
            self._ids[:, places[0]] = tokens
        else:
            self._ids[rows, places] = tokens.to(self._ids.device)
        for row in rows:
            self.lengths[row] += 1
        self._ask(rows)
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        host = tokens.tolist()
        for row, token in zip(rows, host, strict=True):
            self.newest[row] = token
        if self.sampler.noise is not None:
            self.sampler.noise.forget(self._slowest)
        return host

    @property
    def _slowest(self) -> int:
        """The step of the last of the rows that go on; that of the first where none does."""
        moving = [step for step, end in zip(self.steps, self.ends, strict=True) if end is None or self.keeps_tails]
        return min(moving, default=max(self.steps))

    def _ask(self, rows: list[int]) -> None:
        """Ask the stopping criteria about the newest tokens; the first length at which they stop a row is its end."""
        scores = None if self.records.scores is None else self.records.scores.values
        if len({self.lengths[row] for row in rows}) == 1:
            done = self.criteria(self.ids(rows), scores).tolist()
        else:
            done = [self.criteria(self.ids([row]), scores).item() for row in rows]
        for row, stops in zip(rows, done, strict=True):
            if stops and self.ends[row] is None:
                self.ends[row] = self.lengths[row]

    def _make_room(self, length: int) -> None:
        if length > self._ids.shape[1]:
            longer = self._ids.new_full((self.batch, max(length + 64, 2 * length - self.prompt)), self.pad or 0)
            longer[:, : self._ids.shape[1]] = self._ids
            self._ids = longer
