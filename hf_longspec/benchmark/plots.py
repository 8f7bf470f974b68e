"""The benchmarks' results as pictures (PNG). Needs matplotlib, which `pip install hf-longspec[bench]` brings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..writing import whole_file
from .attention import Case
from .latency import Latency
from .sampling import in_words
from .text import Comparison


def plot_attention(cases: list[Case], path: Path) -> None:
    """Plot milliseconds against context, a panel for each number of nodes."""
    counts = list(dict.fromkeys(case.nodes for case in cases))
    figure, panels = _panels(len(counts))
    for nodes, panel in zip(counts, panels, strict=True):
        own = [case for case in cases if case.nodes == nodes]
        contexts = [case.context for case in own]
        for index, timed in enumerate(own[0].timed):
            panel.plot(contexts, [case.timed[index].milliseconds for case in own], marker="o", label=timed.name)
        floors = [max(case.bytes_floor, case.arithmetic_floor) for case in own]
        panel.plot(contexts, floors, "k--", label="floor")
        _axes(panel, f"{nodes} nodes", contexts)
    _save(figure, panels, path)


def plot_latency(results: list[Latency], path: Path) -> None:
    """Plot steps against context with their floors in the first panel, and the phases of a round in the second."""
    figure, panels = _panels(2)
    contexts = [result.context for result in results]
    for index, step in enumerate(results[0].steps):
        if step.name.startswith("level"):
            continue
        (line,) = panels[0].plot(
            contexts, [result.steps[index].milliseconds for result in results], marker="o", label=step.name
        )
        floors = [result.steps[index].floor for result in results]
        panels[0].plot(contexts, floors, "--", color=line.get_color(), linewidth=0.8)
    _axes(panels[0], f"steps, {in_words(results[0].sampling)}; dashed their floors", contexts)
    rounds = [result.steps[-1] for result in results]
    bottom = [0.0] * len(rounds)
    for phase in rounds[0].phases:
        heights = [step.phases[phase] for step in rounds]
        panels[1].bar([f"{context:,}" for context in contexts], heights, bottom=bottom, label=phase)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    panels[1].set(title="phases of a round", xlabel="context", ylabel="ms")
    _save(figure, panels, path)


def plot_text(results: list[Comparison], path: Path) -> None:
    """Plot decoded tokens per second of each engine, a panel for each batch size."""
    figure, panels = _panels(len(results))
    for result, panel in zip(results, panels, strict=True):
        names = [engine.name for engine in result.engines]
        panel.barh(names, [result.decoded_per_second(engine) for engine in result.engines])
        panel.invert_yaxis()
        title = f"batch {result.batch}, context {result.context:,}\n{in_words(result.sampling)}"
        panel.set(title=title, xlabel="tokens/s, decoding")
    _save(figure, [], path)


PICTURES: dict[str, Callable[[Any, Path], None]] = {  # by the command that measures
    "attention": plot_attention,
    "latency": plot_latency,
    "text": plot_text,
}


def _panels(count: int) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(6 * count, 4.5), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _axes(panel: Any, title: str, contexts: list[int]) -> None:
    panel.set(title=title, xlabel="context", ylabel="ms", xscale="log", yscale="log")
    panel.set_xticks(contexts, [f"{context:,}" for context in contexts])
    panel.minorticks_off()


def _save(figure: Figure, legends: list[Any], path: Path) -> None:
    for panel in legends:
        panel.legend(fontsize="small")
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=120)
