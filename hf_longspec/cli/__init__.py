"""The command `hf-longspec`. Options and messages only; what does the work is imported when a command needs it."""

from __future__ import annotations

import typer

from .bench import app as benchmarks
from .distill_data import distill_data
from .evaluate import evaluate
from .options import TYPER
from .pack import pack
from .side_by_side import demo, generate
from .support import support
from .train import train

app = typer.Typer(**TYPER)
for command in (demo, generate, evaluate, support, train, pack, distill_data):
    app.command()(command)
app.add_typer(benchmarks, name="bench")


@app.callback()
def main_help() -> None:
    """Lossless LongSpec decoding: the text of plain `generate`, faster."""


def main() -> None:
    app()
