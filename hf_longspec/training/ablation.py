"""`python -m hf_longspec.training.ablation RUN RUN ...` compares runs of one recipe with different settings.

Each ablation of the paper is a setting of `hf-longspec train`, with an output folder of its own:

    --set signal.offset=false                                   without Anchor-Offset
    --set signal.max_lag=1                                      without lags
    --set signal.kl_weight=0 --set signal.ce_weight=1           cross-entropy for KL

KL is taken over the tokens that a draft guesses among: compare runs with different `draft.vocab` by accept length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .checkpoints import last_complete
from .learning_curve import ACCEPT_LENGTH, Log, curve, draw, read_log


def steps_to(log: Log, value: float, name: str = "eval_kl") -> int | None:
    """Return the first evaluated step whose held-out `name` is at most `value`, or None."""
    return next((step for step, found in zip(*curve(log, name), strict=True) if found <= value), None)


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; the others are held against the first.")],
    output: Annotated[Path, typer.Option(help="The picture.")] = Path("ablation.png"),
) -> None:
    """Steps until each run has the first one's last held-out KL, accept lengths of its last evaluation, a picture."""
    logs = {}
    for run in runs:
        checkpoint = last_complete(run)
        if checkpoint is None:
            raise typer.BadParameter(f"expected the folder of a run with a checkpoint, got {run}")
        logs[run.name] = read_log(checkpoint)
    goals = curve(logs[runs[0].name], "eval_kl")[1]
    if not goals:
        raise typer.BadParameter(f"expected a run with evaluations, got {runs[0]}")
    for name, log in logs.items():
        measured = [record for record in log if "eval_accept_length" in record][-1:]
        lengths = {key: value for record in measured for key, value in record.items() if key.startswith(ACCEPT_LENGTH)}
        found = ", ".join(f"τ {value:.2f} at {key.removeprefix(ACCEPT_LENGTH)}" for key, value in lengths.items())
        typer.echo(f"{name}: KL {goals[-1]:.4f} after {steps_to(log, goals[-1]) or 'no'} steps; {found}")
    draw(logs, output)


if __name__ == "__main__":
    typer.run(main)
