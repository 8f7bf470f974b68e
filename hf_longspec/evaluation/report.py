"""The console output of a side-by-side run: texts as they are written, tables, and a sentence on their equality."""

from __future__ import annotations

from statistics import fmean, median

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase, TextStreamer

from .side_by_side import Run, Verdict


class ConsoleStreamer(TextStreamer):
    """A streamer that writes the generated text, without the prompt, to a rich console."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console, style: str):
        super().__init__(tokenizer, skip_prompt=True)
        self.console, self.style = console, style

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        end = "\n" if stream_end else ""
        self.console.print(Text(text, self.style), end=end, soft_wrap=True)


def table(plain: Run, speculative: Run, draft_bytes: int) -> Table:
    """Return a table of both runs, a column each."""
    rows = Table(box=None, header_style="bold", pad_edge=False)
    rows.add_column("")
    rows.add_column("plain generate", justify="right")
    rows.add_column("LongSpec", justify="right")
    for name, value in (
        ("new tokens", lambda run: f"{len(run.tokens)}"),
        ("prefill, s", lambda run: f"{run.prefill_seconds:.2f}"),
        ("decoding, s", lambda run: f"{run.decode_seconds:.2f}"),
        ("decoding, tokens/s", lambda run: f"{run.tokens_per_second:.1f}"),
        ("tokens per target forward (τ)", lambda run: f"{run.accept_length:.2f}"),
    ):
        rows.add_row(name, value(plain), value(speculative))
    if plain.tokens_per_second:
        rows.add_row("decoding speed-up", "", f"{speculative.tokens_per_second / plain.tokens_per_second:.2f}x")
    rows.add_row("draft state, bytes", "", f"{draft_bytes:,}")
    return rows


def phases(speculative: Run) -> Table:
    """Return a table of the time that each phase took in the run with the draft."""
    rows = Table(box=None, header_style="bold", pad_edge=False)
    rows.add_column("phase")
    rows.add_column("total, s", justify="right")
    rows.add_column("of a round, median, ms", justify="right")
    for name, seconds in speculative.phase_seconds.items():
        rows.add_row(name, f"{sum(seconds):.3f}", "" if name == "prefill" else f"{1000 * median(seconds):.1f}")
    return rows


def chosen(speculative: Run) -> str:
    """Return, in one line, how many rounds had which kind of tree, and what these wrote; empty without rounds."""
    kinds: dict[str, list[int]] = {}
    for form, tokens in zip(speculative.trees, speculative.accept_lengths, strict=True):
        levels = f"{len(form.shape)} level{'s' * (len(form.shape) > 1)}" if form.shape else ""
        parts = [part for part in (levels, "copies" if form.copies else "") if part]
        kinds.setdefault(" and ".join(parts) or "nothing", []).append(tokens)
    told = [
        f"{kind} in {len(written)} round{'s' * (len(written) > 1)} (τ {fmean(written):.2f})"
        for kind, written in sorted(kinds.items(), key=lambda item: -len(item[1]))
    ]
    why = ", by what rounds cost and write here" * (len(told) > 1)
    return f"guessed{why}: {', '.join(told)}" if told else ""


def sentence(verdict: Verdict, tokens: int, dtype: str) -> Text:
    """Return the outcome of the comparison as a sentence for a person to read."""
    if verdict.equal:
        return Text(f"The two texts are equal, token for token ({tokens} tokens, {dtype}).", "bold green")
    place = f"The two texts part at new token {verdict.position} ({dtype})"
    if verdict.noise is None:
        return Text(f"{place}; nothing here shows that rounding explains it. Try --dtype float32.", "bold red")
    measured = f"their logits are {verdict.gap:.4f} apart, rounding alone moves such gaps by up to {verdict.noise:.4f}"
    if verdict.tie:
        return Text(f"{place}, where two tokens tie within rounding: {measured}.", "bold yellow")
    return Text(f"{place}, where the two tokens do not tie: {measured}.", "bold red")
