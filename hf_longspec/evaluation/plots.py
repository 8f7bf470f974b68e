"""A report as one picture (PNG). The picture needs matplotlib, which `pip install hf-longspec[bench]` brings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .summary import ALL


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw τ and speed-up by context, a line a task, and acceptance by level of the tree, a line a context."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    accept, speed, levels = figure.subplots(1, 3)
    by_context(accept, report, "accept_length", "τ, tokens per forward of the target")
    by_context(speed, report, "speed_up", "speed-up of decoding")
    for bucket in report["buckets"]:
        if bucket["task"] == ALL:
            shares = [share for share in bucket["acceptance_by_level"] if share is not None]
            levels.plot(range(1, len(shares) + 1), shares, marker="o", label=f"context {bucket['context']:,}")
    levels.set(title="guesses accepted, by level of the tree", xlabel="level", ylim=(0, 1))
    levels.set_xticks(range(1, len(report["draft"]["tree"]) + 1))
    for panel in (accept, speed, levels):
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def by_context(panel: Axes, report: Mapping[str, Any], figure: str, title: str) -> None:
    buckets = report["buckets"]
    contexts = sorted({bucket["context"] for bucket in buckets})
    for task in dict.fromkeys(bucket["task"] for bucket in buckets):
        own = [bucket for bucket in buckets if bucket["task"] == task and bucket[figure] is not None]
        style = {"color": "black", "linewidth": 2.5} if task == ALL else {"linewidth": 1.2}
        panel.plot(
            [bucket["context"] for bucket in own], [bucket[figure] for bucket in own], marker="o", label=task, **style
        )
    panel.set(title=title, xlabel="context, tokens", xscale="log")
    panel.set_xticks(contexts, [f"{context:,}" for context in contexts])
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
