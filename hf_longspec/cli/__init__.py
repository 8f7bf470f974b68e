"""The command `hf-longspec`: options and messages only. A command imports the modules that do its work as it runs."""

from __future__ import annotations

import typer

from .bench import app as benchmarks
from .convert import convert
from .distill_data import distill_data
from .evaluate import evaluate
from .export import export
from .options import TYPER
from .pack import pack
from .push import push
from .side_by_side import demo, generate
from .support import support
from .train import train
from .verify import verify

app = typer.Typer(**TYPER)
for command in (demo, generate, pack, distill_data, train, evaluate, convert, export, push, verify, support):
    app.command()(command)
app.add_typer(benchmarks, name="bench")


@app.callback()
def main_help() -> None:
    """Faster text from a transformers model, behind long contexts, and the same text.

    A draft is a small layer trained for one model, its target. It guesses tokens, and the target checks many guesses
    at a time. Try it: hf-longspec demo. Use it: target.generate(..., assistant_model=draft).
    """


def main() -> None:
    app()
