"""`hf-longspec support`: the table of served model families."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .one_line import fail, in_one_line


def support(
    families: Annotated[
        str, typer.Option(metavar="NAME,NAME,...", help="Model types to try.  [default: all that transformers has]")
    ] = "",
    output: Annotated[Path | None, typer.Option(help="Markdown file for the table; else it is printed.")] = None,
) -> None:
    """Which model families are served.

    Each is tried on a tiny random model. Exit code 1 if any is WRONG.
    """
    import torch
    from rich.console import Console
    from transformers.utils import logging

    from ..evaluation import families as trials_of
    from ..evaluation import support_table, tiny_models
    from ..writing import whole_file

    if output is not None and not output.parent.is_dir():
        fail(f"cannot write {output}: no such folder")
    known = tiny_models.families()
    chosen = [name.strip() for name in families.split(",") if name.strip()]
    if unknown := [name for name in chosen if name not in known]:
        fail(f"transformers has no causal language model of the type {', '.join(unknown)}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # tiny models are no faster on more threads
    console, trials = Console(highlight=False, stderr=output is None), []
    for trial in trials_of.try_families(chosen or known):
        trials.append(trial)
        console.print(f"{trial.family}: {trial.result.value}", trial.reason, markup=False, soft_wrap=True)
    command = "hf-longspec support" + (f" --families {','.join(chosen)}" if chosen else "")
    page = support_table.support_table(trials, command + (f" --output {output}" if output else ""))
    if output is None:
        typer.echo(page)
    else:
        with in_one_line(), whole_file(output) as unfinished:
            unfinished.write_text(page, encoding="utf-8")
    if any(trial.result is trials_of.Result.wrong for trial in trials):
        raise typer.Exit(1)
