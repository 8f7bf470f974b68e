"""The time that work of the device takes, and the best that the device can do, measured in the same process.

On a GPU calls are captured in one CUDA graph, so that the host's launches are not part of the time.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch

Calls = Sequence[Callable[[], Any]]


@torch.no_grad()
def milliseconds(calls: Calls, device: torch.device, repeats: int) -> float:
    """Return the milliseconds of one call, where `calls` run one after the other: the median over `repeats`."""
    for call in calls:  # the first calls set libraries up and compile kernels
        call()
    spans = _replayed(calls, repeats) if device.type == "cuda" else _by_the_clock(calls, repeats)
    return median(spans) / len(calls)


def _replayed(calls: Calls, repeats: int) -> list[float]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for mark in marks:  # the host is ahead: between two marks the device does nothing but one replay
        mark.record()
        if mark is not marks[-1]:
            graph.replay()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in zip(marks, marks[1:], strict=False)]


def _by_the_clock(calls: Calls, repeats: int) -> list[float]:
    spans = []
    for _ in range(repeats):
        began = time.perf_counter()
        for call in calls:
            call()
        spans.append(1000 * (time.perf_counter() - began))
    return spans


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep Python from looking for cycles of garbage within the context.

    A search through all objects that torch's compiler keeps takes 0.3 s.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Speed(NamedTuple):
    """The best that the device does.

    bandwidth: bytes per second of a large copy, reads and writes both counted; operations: operations per second of a
    large matrix product, two for each multiplication.
    """

    bandwidth: float
    operations: float

    def floor(self, read: float, operations: float = 0.0) -> float:
        """Return the least milliseconds of any work that reads `read` bytes and does `operations` operations."""
        return 1000 * max(read / self.bandwidth, operations / self.operations)


def measure_speed(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> Speed:
    large = device.type == "cuda"
    source = torch.randn(2**30 if large else 2**24, device=device)
    copy = torch.empty_like(source)
    # a kernel copies: in a CUDA graph a plain copy is left to a slower unit
    copying = milliseconds([lambda: torch.neg(source, out=copy)] * 4, device, repeats)
    size = 8192 if large else 1024
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    multiplying = milliseconds([lambda: left @ right] * 4, device, repeats)
    return Speed(2 * source.nbytes / copying * 1000, 2 * size**3 / multiplying * 1000)


class Replay(NamedTuple):
    """One replay of a CUDA graph: the time at which the host launched it, and the events before and after it."""

    at: float
    begin: torch.cuda.Event
    end: torch.cuda.Event


@contextmanager
def noting_replays(enabled: bool) -> Iterator[list[Replay]]:
    """Note every replay of a CUDA graph by any code within the context, if enabled."""
    replays: list[Replay] = []
    if not enabled:
        yield replays
        return
    replay = torch.cuda.CUDAGraph.replay

    def noted(graph: torch.cuda.CUDAGraph) -> None:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        replays.append(Replay(time.perf_counter(), *events))
        replay(graph)
        events[1].record()

    with mock.patch.object(torch.cuda.CUDAGraph, "replay", noted):
        yield replays
