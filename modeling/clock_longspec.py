"""PhaseClock: where the time of a call goes.

On a GPU it is told by events in the stream, so that no phase waits for the device: a phase lasts from where the device
comes to its beginning to where it comes to its end, and the phases of a call are one line of time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class PhaseClock:
    """Seconds of each run of each phase of a call, if asked for."""

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
        """By phase, in the order of its runs. Waits for the device."""
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
