"""PhaseClock: where the time of a call goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseClock:
    """Seconds per phase of a call, if asked for: each phase then waits for the device at both ends.

    What passes between one phase and the next, waiting excepted, is "host".
    """

    def __init__(self, enabled: bool, device: torch.device):
        self.enabled, self.device = enabled, device
        self.seconds: dict[str, float] = defaultdict(float)
        self.restart()

    def restart(self) -> None:
        """Before the first round: what the host has done since the last phase was not for a round."""
        self.ended: float | None = None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if not self.enabled:
            yield
            return
        if self.ended is not None:
            self.seconds["host"] += time.perf_counter() - self.ended
        began = self._when_idle()
        try:
            yield
        finally:
            self.ended = self._when_idle()
            self.seconds[phase] += self.ended - began

    def _when_idle(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
