"""Output: what a call returns besides its text, shaped as in plain `generate`, and the time of each phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from .tree_longspec import TreeForm


@dataclass
class LongSpecOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate`, and three fields more.

    accept_lengths: for each row, the number of tokens that each round emitted; the first token is in no round.
    trees: for each row, the form of the tree of each of these rounds.
    phase_seconds: the seconds of prefill, grow, verify, accept and commit, one list a phase, with
        `draft.config.profile`.
    """

    accept_lengths: list[list[int]] | None = None
    trees: list[list[TreeForm]] | None = None
    phase_seconds: dict[str, list[float]] | None = None


class StepTensors:
    """Collect one tensor for each step, filled row by row; dimension `dim` counts the rows.

    `values` is what plain `generate` collects.
    """

    def __init__(self, batch: int, dim: int = 0):
        self.batch, self.dim = batch, dim
        self.values: tuple[Tensor, ...] = ()

    def put(self, rows: list[int], steps: list[int], values: Tensor) -> None:
        """Store values (…, R, …) of R `rows`, each at its step."""
        if len(rows) == self.batch and set(steps) == {len(self.values)}:
            self.values += (values,)
            return
        while len(self.values) <= max(steps):
            shape = list(values.shape)
            shape[self.dim] = self.batch
            self.values += (values.new_zeros(shape),)
        for row, step, value in zip(rows, steps, values.unbind(self.dim), strict=True):
            self.values[step].select(self.dim, row).copy_(value)


class Records:
    """Collect the scores, logits and hidden states of each step; None for what the call does not return."""

    def __init__(self, batch: int, generation_config: GenerationConfig):
        self.batch = batch
        asked = generation_config.return_dict_in_generate
        self.scores = StepTensors(batch) if asked and generation_config.output_scores else None
        self.logits = StepTensors(batch) if asked and generation_config.output_logits else None
        self.hidden_states: list[StepTensors] | None = [] if asked and generation_config.output_hidden_states else None

    @property
    def empty(self) -> bool:
        """Whether the call returns none of them."""
        return self.scores is None and self.logits is None and self.hidden_states is None

    def put_hidden_states(self, rows: list[int], steps: list[int], layers: tuple[Tensor, ...]) -> None:
        """Store (…, R, length, hidden) of each layer for `rows` at their steps; length 1, but for a prompt."""
        if self.hidden_states is not None:
            self.hidden_states = self.hidden_states or [StepTensors(self.batch, dim=-3) for _ in layers]
            for record, states in zip(self.hidden_states, layers, strict=True):
                record.put(rows, steps, states)

    def as_dict(self, whole: bool = False) -> dict[str, Any]:
        """Return them as plain `generate` does; whole: hidden states of all tokens each step, as without a cache."""
        layers = None if self.hidden_states is None else [record.values for record in self.hidden_states]
        if layers is not None and whole:
            layers = [tuple(accumulate(steps, lambda text, new: torch.cat([text, new], dim=-2))) for steps in layers]
        return {
            "scores": None if self.scores is None else self.scores.values,
            "logits": None if self.logits is None else self.logits.values,
            "hidden_states": None if layers is None else tuple(zip(*layers, strict=True)),
        }


class PhaseClock:
    """Measure the seconds of each run of each phase of a call, if enabled.

    On a GPU by events in the stream, so that no phase waits for the device: a phase lasts from where the device comes
    to its beginning to where the device comes to its end, and the phases of a call make one line of time.
    """

    def __init__(self, enabled: bool, device: torch.device):
        self.enabled, self.device = enabled, device
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if not self.enabled:
            yield
            return
        began = self._now()
        try:
            yield
        finally:
            self._spans.append((phase, began, self._now()))

    def seconds(self) -> dict[str, list[float]]:
        """Return the seconds by phase, in the order of its runs. Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = defaultdict(list)
        for phase, began, ended in self._spans:
            seconds[phase].append(_between(began, ended))
        return dict(seconds)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def _between(began: Any, ended: Any) -> float:
    return began.elapsed_time(ended) / 1000 if isinstance(began, torch.cuda.Event) else ended - began
