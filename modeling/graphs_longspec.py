"""CUDA graphs: a phase of a round is launched at once, when its first round has shown that it works.

A round of a small model is some thousand kernels, each of which costs the host more than the device. Knows functions
of tensors, not models.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .rope_switch_longspec import last_short_length

logger = logging.get_logger(__name__)


class Graphs:
    """The graphs of one call: all of its phases are captured, or none."""

    def __init__(self, captures: bool):
        self.captures = captures
        self.phases: list[Phase] = []

    def phase(self, run: Callable[..., Any]) -> Phase:
        self.phases.append(Phase(run, self))
        return self.phases[-1]

    def forget(self) -> None:
        """Capture anew: memory that the phases work on has moved."""
        for phase in self.phases:
            phase.forget()

    def free(self) -> None:
        """The end of the call: whatever its phases hold is given back, and not only when Python looks for cycles."""
        self.forget()
        self.phases.clear()


class Phase:
    """A function whose work is all on the device; from its second call on it is replayed as a CUDA graph.

    Its first argument is what all rounds of a call have in common, its other ones are tensors and tuples of them.
    Those it was captured on are its own from then on: a replay copies others into them. What a replay returns is
    overwritten by the next one. The function must not ask the host for anything that changes between calls.
    """

    def __init__(self, run: Callable[..., Any], graphs: Graphs):
        self.run, self.graphs = run, graphs
        self.forget()

    def forget(self) -> None:
        self.called = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Any, ...] = ()
        self.result: Any = None

    def __call__(self, call: Any, *inputs: Any) -> Any:
        if not self.graphs.captures or not self.called:  # libraries set themselves up in a first call
            self.called = True
            return self.run(call, *inputs)
        if self.graph is None and not self._capture(call, inputs):
            return self.run(call, *inputs)
        assert self.graph is not None
        overwrite(self.inputs, inputs)
        self.graph.replay()
        return self.result

    def _capture(self, call: Any, inputs: tuple[Any, ...]) -> bool:
        """Record the function. Whether that was possible."""
        graph = torch.cuda.CUDAGraph()
        try:
            with capturing(graph):
                self.result = self.run(call, *inputs)
        except RuntimeError as error:  # torch's way to say that something in it cannot be captured
            self.graphs.captures = False
            reason = str(error).strip().splitlines()[0]
            logger.warning_once(f"LongSpec goes on without CUDA graphs, a round cannot be captured: {reason}")
            return False
        self.graph, self.inputs = graph, inputs
        return True


def overwrite(ours: Any, theirs: Any) -> None:
    """Copy tensors into tensors, or tuples of them into such; most are the same ones and need no copy."""
    if ours is theirs:
        return
    if isinstance(ours, Tensor):
        ours.copy_(theirs, non_blocking=True)
    elif isinstance(ours, tuple):
        for mine, other in zip(ours, theirs, strict=True):
            overwrite(mine, other)
    else:
        assert ours == theirs, "a graph is replayed with what it was captured with"


_LOCK = threading.Lock()


@functools.lru_cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for all: each stream's libraries keep memory of their own


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """What this thread launches within it goes into `graph`. Other threads go on: one thread captures at a time.

    While a capture runs, and for ever if it fails, torch refuses to draw random numbers from the generator that was
    the device's default when it began. So it is a copy for that moment: no phase draws any.
    """
    device = torch.cuda.current_device()
    generator, stream = torch.cuda.default_generators[device], _capture_stream(device)
    with _LOCK:
        torch.cuda.synchronize(device)
        with torch.cuda.stream(stream):
            state = generator.graphsafe_get_state()
            generator.graphsafe_set_state(generator.clone_state())
            try:
                graph.capture_begin(capture_error_mode="thread_local")
            finally:
                generator.graphsafe_set_state(state)
            try:
                yield
            finally:
                graph.capture_end()
        torch.cuda.synchronize(device)


def resolve_graphs(
    wanted: str | bool, target: PreTrainedModel, device: torch.device, synced_gpus: bool = False
) -> Graphs:
    """`config.cuda_graphs` for a call: "auto" captures where it can. Raises `ValueError` where True cannot be had."""
    reason = "ranks wait for each other in every forward" if synced_gpus else misfit(target, device)
    if wanted is True and reason:
        raise ValueError(f"cuda_graphs=True cannot be had here: {reason}; use 'auto' or False")
    if wanted == "auto" and reason and device.type == "cuda":
        logger.warning_once(f"LongSpec runs without CUDA graphs: {reason}")
    return Graphs(wanted is not False and reason is None)


def misfit(target: PreTrainedModel, device: torch.device) -> str | None:
    """Why rounds over this target cannot be captured, or None."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, got {device.type}"
    if any(hasattr(module, "_hf_hook") for module in target.modules()):
        return "accelerate's hooks move data in every forward"
    if hasattr(target, "unshard"):
        return "FSDP gathers weights in every forward"
    if torch.is_autocast_enabled(device.type):
        return "autocast keeps copies of the weights"
    if last_short_length(target) is not None:
        return "the frequencies of longrope depend on the length"
    return None
