"""The fast engine: memory and CUDA graphs that outlive a call, compiled layers, and backends of other packages.

A capture costs some rounds, and it is worth nothing once a tensor it works on has moved. So the engine keeps the
memory of its last call for the next one: the target's keys and values, the draft's window, the roots.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .cache_layers_longspec import Stores
from .cache_longspec import SpeculativeCache
from .call_longspec import Call
from .choice_longspec import Outcome
from .configuration_longspec import LongSpecConfig
from .engine_longspec import Backend, Demand, Engine
from .fast_ahead_longspec import MOST_AHEAD, Ends, Flights, can_fly, drawn_round, whole_round
from .fast_choose_longspec import resolve_backend
from .fast_draw_longspec import Drawing, draw_paths
from .fast_graphs_longspec import Graphs, Settled, captured_values, graphs_misfit, plain
from .fast_processors_longspec import are_on_device
from .tree_longspec import TokenTree
from .verification_longspec import RowWalk, Verified, Walk

logger = logging.get_logger(__name__)
SPARE_NOISE = 16  # steps
MOST_UNSURE = 4  # rounds in which the host picks the tokens after the device has tried; then a call has it sort


class FastEngine(Engine):
    """Run rounds as CUDA graphs over memory that is kept from call to call; see `Engine`.

    memory: the stores of a cache that is no more. settled: the small tensors of a call. graphs: captured over both.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stream = _stream(device)
        self.memory: list[Stores] = []
        self.settled = Settled()
        self.graphs = Graphs()
        self.drawing: Drawing | None = None  # of this call
        self.drawn = Settled()  # the drawing's tensors, but for the noise
        self.noise: Tensor | None = None
        self.drawn_with: Any = None  # what the graph of `draw_paths` has taken from its drawing
        self.astray = False  # whether the host has picked tokens that the drawing does not know
        self.unsure = 0  # rounds of this call in which kernels did not know a token
        self.flights: Flights | None = None  # where this call's rounds run ahead of the host
        self.ends: Ends | None = None

    def suits(self, device: torch.device) -> bool:
        # work on one stream does not wait for work on another
        return device == self.device and self.stream == _stream(device)

    @staticmethod
    def check(config: LongSpecConfig, target: PreTrainedModel, device: torch.device, synced_gpus: bool) -> None:
        if config.cuda_graphs is True:
            check_graphs(True, graphs_misfit(target, device, synced_gpus))
        if config.compile_target:
            from .fast_compiled_longspec import check_compilable

            check_compilable(target)

    @staticmethod
    def backend(name: str, demand: Demand) -> Backend:
        return resolve_backend(name, demand)

    def give_memory(self, cache: SpeculativeCache) -> None:
        memory, self.memory = self.memory, []
        cache.reuse(memory)

    def begin(self, call: Call, synced_gpus: bool) -> Call:
        """Move the tensors that rounds read or write into the memory kept from the last call."""
        wanted, target = call.generator.draft.config.cuda_graphs, call.target
        reason = graphs_misfit(target, self.device, synced_gpus)
        check_graphs(wanted, reason)
        if wanted == "auto" and reason and self.device.type == "cuda":
            logger.warning_once(f"LongSpec runs without CUDA graphs: {reason}")
        self.graphs.captures = wanted is not False and reason is None
        self.drawing, self.unsure, self.flights = None, 0, None
        if self.graphs.captures and can_fly(call):
            self.flights = Flights(call, self.device)
            self.ends = self.settled.put("ends", Ends.of(call, self.device))
        cache, generator = call.cache, call.generator
        cache.on_device = self.graphs.captures
        cache.bounds_on(call.roots.positions.device)
        for holder in (cache, generator, generator.window):
            vars(holder).update(self.settled.put(type(holder).__name__, _tensors_in(vars(holder))))
        extras = call.extras | self.settled.put("extras", _tensors_in(call.extras))
        call = call._replace(roots=self.settled.put("roots", call.roots), extras=extras)
        self.moved(call)
        return call

    def moved(self, call: Call) -> None:
        """Forget the graphs if anything they took as a constant is no longer as it was."""
        values = captured_values(call) if self.graphs.captures else None
        self.graphs.require((values, self.settled.location))

    def run(self, phase: Callable[..., Any], call: Call, *inputs: Any) -> Any:
        if call.form not in call.chooser.ladder:  # cut off near the end of positions
            return phase(call, *inputs)
        return self.graphs.run(phase, call, *inputs)

    def draws(self, processors: list, device: torch.device) -> bool:
        return draws_on(device) and device == self.device and are_on_device(processors)

    def round(self, call: Call) -> Outcome | None:
        flights = self.flights
        if flights is None or not (flights.rounds or self.graphs.captures):
            return None
        while flights.may_launch(call):
            if not call.sampler.plan.drawn:
                table = self.run(whole_round, call, self.ends)
            elif (drawing := self._drawing(call, len(flights.rounds) * flights.steps)) is not None:
                table = self.run(drawn_round, call, self.ends, drawing)
            else:
                break
            flights.launch(call, table)
        if not flights.rounds:
            flights.grounded = False
            return None
        landed = flights.land(call)
        self.unsure += flights.grounded
        return landed

    def draw(self, call: Call, tree: TokenTree, verified: Verified) -> tuple[Walk, list[RowWalk]] | None:
        drawing = self._drawing(call, 0)
        walk = self.run(draw_paths, call, tree, verified, drawing)
        walks = walk.on_host(call.roots.written)
        self.astray = not all(row.nodes for row in walks)
        self.unsure += self.astray
        return None if self.astray else (walk, walks)

    def _drawing(self, call: Call, unread: int) -> Drawing | None:
        """Return what the next round draws with, its noise drawn; unread: tokens that the host may not know yet.

        None where it must be made anew, for which the host has to know all.
        """
        levels, noise, vocab = call.chooser.deepest, call.sampler.noise, call.sampler.vocab
        fused = self.unsure <= MOST_UNSURE
        drawing = self.drawing
        fits = drawing is not None and drawing.has_room(call, unread + levels) and (fused or drawing.ending is None)
        if drawing is None or not fits:
            if unread:
                return None
            drawing = self.drawing = self._settled(Drawing.of(call, vocab, fused), call, levels)
        elif self.astray:
            drawing.follow(call)
            self.astray = False
        last = max(call.text.steps) + unread + levels
        if noise is not None and not noise.holds(last):
            noise.draw_until(last + _spare(call), vocab)
        return drawing

    def _settled(self, drawing: Drawing, call: Call, levels: int) -> Drawing:
        """Move a drawing into the memory of the last one, and forget the graph of the last one if it differs."""
        noise, text = call.sampler.noise, call.text
        drawing = self.drawn.put("drawing", drawing)
        if noise is not None:
            lead = MOST_AHEAD * (levels + 1) if text.together else text.lead + levels + 1
            form = (lead + _spare(call), text.batch, call.sampler.vocab)
            kept = self.noise
            forbidden = kept is not None and kept.is_inference() and not torch.is_inference_mode_enabled()
            if kept is None or kept.shape != form or forbidden:
                self.graphs.drop(draw_paths, drawn_round)
                self.noise = kept = None  # before as much is taken again
                self.noise = kept = torch.empty(form, dtype=torch.float32, device=text.device)
            noise.keep_in(kept)
            drawing = drawing._replace(noise=kept)
        if (drawn_with := plain(drawing)) != self.drawn_with:
            self.graphs.drop(draw_paths, drawn_round)
        self.drawn_with, self.astray = drawn_with, False
        return drawing

    def layers(self, call: Call) -> AbstractContextManager:
        if not call.generator.draft.config.compile_target:
            return nullcontext()
        from .fast_compiled_longspec import compiled_layers

        return compiled_layers(call.target)

    def draft_layer(self, call: Call) -> AbstractContextManager:
        draft = call.generator.draft
        if not draft.config.compile_target:
            return nullcontext()
        from .fast_compiled_longspec import compiled_draft

        return compiled_draft(draft)

    def end(self, call: Call) -> None:
        self.memory = call.cache.memory


def _spare(call: Call) -> int:
    """Return of how many steps noise is drawn at once beyond what is needed: the device idles before each launch."""
    return SPARE_NOISE if call.text.batch == 1 else 0


def draws_on(device: torch.device) -> bool:
    """Tell whether drawing on the device pays: a CPU would pay for all levels, a GPU saves a round trip a token.

    Of other devices nobody has looked whether `Noise` is their `multinomial`.
    """
    return device.type == "cuda"


def check_graphs(wanted: str | bool, reason: str | None) -> None:
    """Raise `ValueError` where `cuda_graphs=True` cannot be had, for this reason."""
    if wanted is True and reason is not None:
        raise ValueError(f"cuda_graphs=True cannot be had here: {reason}; use 'auto' or False")


def _stream(device: torch.device) -> int | None:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def _tensors_in(values: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
