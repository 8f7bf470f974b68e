"""The benchmarks' results as tables for people."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from rich.table import Table

from .attention import Case
from .children import Choice
from .latency import Latency
from .prefill import Prefill
from .sampling import in_words
from .text import Comparison


def _table(first: str, columns: Iterable[str], title: str | None = None) -> Table:
    rows = Table(box=None, header_style="bold", pad_edge=False, title=title, title_style="", title_justify="left")
    rows.add_column(first, no_wrap=True)
    for name in columns:
        rows.add_column(name, justify="right", no_wrap=True)
    return rows


def attention_table(cases: list[Case]) -> Table:
    """Tabulate milliseconds, a row for each context and number of nodes; the error is the largest under a mask."""
    names = [timed.name for timed in cases[0].timed]
    rows = _table("context", ("nodes", *names, "bytes floor", "arithmetic floor", "error"))
    for case in cases:
        times = [f"{timed.milliseconds:.3f}" for timed in case.timed]
        error = max(timed.error for timed in case.timed if timed.error is not None)
        floors = f"{case.bytes_floor:.3f}", f"{case.arithmetic_floor:.3f}"
        rows.add_row(f"{case.context:,}", str(case.nodes), *times, *floors, f"{error:.4f}")
    return rows


def children_table(choices: list[Choice]) -> Table:
    """Tabulate microseconds, a row for each shape of a level."""
    names = choices[0].milliseconds
    rows = _table("level, us", ("nodes", "width", *names, "bytes floor"))
    for choice in choices:
        spans = [f"{1000 * choice.milliseconds[name]:.1f}" for name in names]
        floor = f"{1000 * choice.floor:.1f}"
        rows.add_row(f"{choice.vocab:,} tokens", str(choice.nodes), str(choice.width), *spans, floor)
    return rows


def latency_table(results: list[Latency]) -> Table:
    """Tabulate milliseconds and floor of each step, two columns for each context, then the phases of a round.

    The title says how tokens are picked.
    """
    columns = [name for result in results for name in (f"{result.context:,}", "floor")]
    rows = _table("ms, median", columns, in_words(results[0].sampling))

    for alike in zip(*(result.steps for result in results), strict=True):
        cells = [(f"{step.milliseconds:.2f}", f"{step.floor:.2f}") for step in alike]
        rows.add_row(alike[0].name, *chain.from_iterable(cells))
    for phase in alike[0].phases:  # the last step is a whole round
        rows.add_row(f"  its {phase}", *chain.from_iterable((f"{step.phases[phase]:.2f}", "") for step in alike))
    for name, values in (
        ("  outside of graph replays", ["" if step.host is None else f"{step.host:.2f}" for step in alike]),
        ("  tokens accepted (τ)", [f"{step.accept_length:.2f}" for step in alike]),
        ("draft state, bytes", [f"{result.draft_state_bytes:,}" for result in results]),
        ("cache, GiB", [_gibibytes(result.cache_bytes) for result in results]),
        ("peak memory, GiB", [_gibibytes(result.peak_bytes) for result in results]),
    ):
        rows.add_row(name, *chain.from_iterable((value, "") for value in values))
    return rows


def prefill_table(results: list[Prefill]) -> Table:
    rows = _table("prefill", ("context", "seconds", "peak memory, GiB"))
    for result in results:
        rows.add_row(result.name, f"{result.context:,}", f"{result.seconds:.2f}", _gibibytes(result.peak_bytes))
    return rows


def text_table(results: list[Comparison]) -> Table:
    """Tabulate speed, a row for each batch size and engine; the title says how tokens are picked.

    A LongSpec engine has τ, and how many texts are equal / part at a tie / differ.
    """
    columns = ("batch", "prefill, s", "decode, s", "decode, tok/s", "x default", "x fastest", "τ", "= / ~ / ≠")
    rows = _table("engine", columns, in_words(results[0].sampling))
    for result in results:
        for engine in result.engines:
            fastest = " *" if engine is result.fastest_stock else ""
            cells = [f"{engine.name}{fastest}", str(result.batch)]
            cells += [f"{engine.prefill_seconds:.3f}", f"{engine.decode_seconds:.3f}"]
            cells += [f"{result.decoded_per_second(engine):.1f}"]
            cells += [f"{engine.over(result.default):.2f}", f"{engine.over(result.fastest_stock):.2f}"]
            if not engine.stock:
                cells += [f"{engine.accept_length:.2f}", f"{engine.equal} / {engine.ties} / {engine.different}"]
            rows.add_row(*cells)
    return rows


def phases_table(results: list[Comparison]) -> Table:
    """Tabulate the median milliseconds of a round's phases, a row for each batch size and LongSpec engine."""
    profiled = [(result.batch, engine) for result in results for engine in result.engines if engine.phases]
    rows = _table("phases, ms", ("batch", *(profiled[0][1].phases or {})))
    for batch, engine in profiled:
        rows.add_row(engine.name, str(batch), *(f"{span:.2f}" for span in (engine.phases or {}).values()))
    return rows


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.2f}" if count else ""
