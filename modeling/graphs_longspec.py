"""CUDA graphs: a phase of a round is launched at once, when its first round has shown that it works.

A round of a small model is some thousand kernels, each of which costs the host more than the device. Knows functions
of tensors, not models.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .rope_switch_longspec import last_short_length

logger = logging.get_logger(__name__)


class Captured(NamedTuple):
    """A phase as a graph, the inputs it works on and the result it leaves."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Any, ...]
    result: Any


class Graphs:
    """The phases of a round as CUDA graphs: all of them are captured, or none.

    A phase is a function whose work is all on the device. Its first argument is what all rounds of a call have in
    common, its other ones are tensors and tuples of them. Those it was captured on are its graph's from then on: a
    replay copies others into them. What a replay returns is overwritten by the next one. The function must not ask the
    host for anything that changes between rounds.
    """

    def __init__(self) -> None:
        self.captures = False
        self.forget()

    def forget(self) -> None:
        """Capture anew: something that the graphs work on has moved or changed."""
        self.warm: set[Callable[..., Any]] = set()
        self.captured: dict[Callable[..., Any], Captured] = {}

    def run(self, phase: Callable[..., Any], call: Any, *inputs: Any) -> Any:
        if not self.captures or phase not in self.warm:  # libraries set themselves up in a first run
            self.warm.add(phase)
            return phase(call, *inputs)
        if phase not in self.captured and not self._capture(phase, call, inputs):
            return phase(call, *inputs)
        graph, own, result = self.captured[phase]
        overwrite(own, inputs)
        graph.replay()
        return result

    def _capture(self, phase: Callable[..., Any], call: Any, inputs: tuple[Any, ...]) -> bool:
        """Record a phase. Whether that was possible."""
        graph = torch.cuda.CUDAGraph()
        try:
            with capturing(graph):
                result = phase(call, *inputs)
        except RuntimeError as error:  # torch's way to say that something in it cannot be captured
            self.captures = False
            reason = str(error).strip().splitlines()[0]
            logger.warning_once(f"LongSpec goes on without CUDA graphs, a round cannot be captured: {reason}")
            return False
        self.captured[phase] = Captured(graph, inputs, result)
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


def may_capture(wanted: str | bool, target: PreTrainedModel, device: torch.device, synced_gpus: bool = False) -> bool:
    """`config.cuda_graphs` for a call: "auto" captures where it can. Raises `ValueError` where True cannot be had."""
    reason = "ranks wait for each other in every forward" if synced_gpus else misfit(target, device)
    if wanted is True and reason:
        raise ValueError(f"cuda_graphs=True cannot be had here: {reason}; use 'auto' or False")
    if wanted == "auto" and reason and device.type == "cuda":
        logger.warning_once(f"LongSpec runs without CUDA graphs: {reason}")
    return wanted is not False and reason is None


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
