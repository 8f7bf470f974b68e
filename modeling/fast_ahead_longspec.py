"""Rounds ahead of the host: where only ends of text and lengths decide, the device stops by itself.

A whole round is one phase, so one CUDA graph. The host launches the next one before it reads what the last one has
accepted; a round that begins behind the end of the text changes nothing. So the device does not wait for the host.
Serves one row: several keep a device busy enough, and how far each may go is the host's word.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .cache_layers_longspec import SlidingLayer
from .call_longspec import Call
from .choice_longspec import Outcome
from .fast_draw_longspec import Drawing, draw_paths
from .generation_longspec import commit, find_paths, grow, verify
from .tree_longspec import TokenTree, TreeForm
from .verification_longspec import Accepted, RowWalk, Verified, Walk, accept, along_walk

MOST_AHEAD = 2  # rounds that are launched and not read


class Ends(NamedTuple):
    """Where a text ends: behind the tokens (E,), or at a length (); origin (): as in `Drawing`."""

    tokens: Tensor
    longest: Tensor
    origin: Tensor

    @classmethod
    def of(cls, call: Call, device: torch.device) -> Ends:
        """Read the ends off a call that `can_fly`, whose prompt has been read."""
        stops, text = call.text.stops, call.text
        assert stops is not None, "criteria that are no numbers are asked by the host"
        numbers = [int(min(stops.longest, 2**62)), text.lengths[0] - call.cache.lengths[0]]
        return cls(
            torch.tensor(sorted(stops.ends), dtype=torch.long, device=device), *torch.tensor(numbers, device=device)
        )


class Flight(NamedTuple):
    """A round that is launched: its table (see `Walk`) on the way to the host, and what tells that it has come.

    form: of its tree.
    """

    form: TreeForm
    table: Tensor
    come: torch.cuda.Event | None


def can_fly(call: Call) -> bool:
    """Tell whether the host can be a round behind in all rounds of a call."""
    text, plan = call.text, call.sampler.plan
    by_numbers = text.batch == 1 and text.stops is not None and text.streamer is None and text.records.empty
    # an interrupted call leaves a cache as long as the host knows it, and a ring has forgotten what came before
    rings = text.keeps_cache and any(isinstance(layer, SlidingLayer) for layer in call.cache.owners)
    # a round ahead knows its largest position only roughly, which a table does not forgive
    places = call.positions.by_length or call.positions.table is not None
    profiled = call.generator.draft.config.profile
    return by_numbers and (plan.by_argmax or plan.drawn) and not (rings or profiled or places)


def whole_round(call: Call, ends: Ends) -> Tensor:
    """Grow, verify, accept and commit. Returns the table of what was accepted; nothing, once the text has ended."""
    return _whole(call, ends, find_paths)


def drawn_round(call: Call, ends: Ends, drawing: Drawing) -> Tensor:
    """Do the same where tokens are drawn."""
    return _whole(call, ends, partial(draw_paths, drawing=drawing))


def _whole(call: Call, ends: Ends, find: Callable[[Call, TokenTree, Verified], Walk]) -> Tensor:
    roots = call.roots
    tree = grow(call) if call.form.nodes > 1 else roots.stump
    verified = verify(call, tree)
    walk = find(call, tree, verified)
    (accepted, table), ended = up_to_the_end(call, walk, ends)
    commit(call, tree, accepted, verified.hidden)
    roots.stopped.logical_or_(ended)
    return table


def up_to_the_end(call: Call, walk: Walk, ends: Ends) -> tuple[Walk, Tensor]:
    """Return the walk up to the end of the text, and which rows have ended (B,).

    A token that is none ends the text: the host will raise an error.
    """
    roots, (path, counts, _) = call.roots, walk.accepted
    steps = path.shape[1]
    picked = walk.table[:, steps : 2 * steps]
    lengths = call.cache.bounds_on(path.device)[1] + ends.origin
    last = (picked[:, :, None] == ends.tokens).any(dim=-1) | (picked < 0)
    first = torch.where(last, torch.arange(steps, device=path.device), steps).amin(dim=1)
    counts = torch.minimum(torch.minimum(counts, first + 1), ends.longest - lengths).masked_fill(roots.stopped, 0)
    newest = picked.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0].clamp(min=0)
    newest = torch.where(counts > 0, newest, roots.tokens)
    ended = (counts > first) | (lengths + counts >= ends.longest)
    walk = Walk(Accepted(path, counts, newest), torch.cat([path, picked, counts[:, None]], dim=1))
    return walk.reporting(roots.written), ended


class Flights:
    """The rounds of a call that are launched and not read."""

    def __init__(self, call: Call, device: torch.device):
        self.steps = call.chooser.deepest + 1  # the most tokens that a round can write
        self.device = device
        self.rounds: deque[Flight] = deque()
        self.grounded = False  # whether the host has to pick the next tokens
        call.cache.ahead = MOST_AHEAD * self.steps

    def may_launch(self, call: Call) -> bool:
        """Tell whether another round can begin before the end of the text, for all that the host knows."""
        if self.grounded or len(self.rounds) == MOST_AHEAD:
            return False
        assert call.text.stops is not None, "see `Ends.of`"
        unread = sum(flight.form.steps for flight in self.rounds)
        return not self.rounds or call.text.lengths[0] + unread < call.text.stops.longest

    def launch(self, call: Call, table: Tensor) -> None:
        """Send the table of a round that was just launched on its way to the host."""
        call.cache.placement = None
        if self.device.type != "cuda":
            self.rounds.append(Flight(call.form, table.clone(), None))
            return
        host = torch.empty(table.shape, dtype=table.dtype, device="cpu", pin_memory=True)
        host.copy_(table, non_blocking=True)
        come = torch.cuda.Event()
        come.record(torch.cuda.current_stream(self.device))
        self.rounds.append(Flight(call.form, host, come))

    def land(self, call: Call) -> Outcome:
        """Read the round that was launched first, and write its tokens."""
        form, table, come = self.rounds.popleft()
        if come is not None:
            come.synchronize()
        row = RowWalk.of(table[0].tolist(), form.steps)
        count = len(row.nodes)
        self.grounded = not count and not call.text.finished
        paths = [[0]]
        try:
            if count:
                accept(call.text, paths, along_walk([row], None, call.text))
        finally:  # also when a token is none: the cache keeps up with the text
            counts = [len(paths[0]) if count else 0]
            call.cache.end_round(counts)
        assert counts == [count], f"the device wrote {count} tokens, the criteria {counts}"
        call.sampler.forget(call.text.slowest)
        return Outcome(counts, form, [row.report])
