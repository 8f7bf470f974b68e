"""The picture of a run: the loss by steps, and the accept length by steps for each length of context.

Reads the records that `Trainer` logs (`log_history` of `trainer_state.json`). Several runs share one picture, which is
how ablations are compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..writing import whole_file

ACCEPT_LENGTH = "eval_accept_length_"

Log = Sequence[Mapping[str, Any]]


def read_log(checkpoint: Path) -> Log:
    """Read the records of a run up to one of its checkpoint folders."""
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


def curve(log: Log, name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of all records that have `name`."""
    found = [(record["step"], record[name]) for record in log if name in record]
    return [step for step, _ in found], [value for _, value in found]


def draw(runs: Mapping[str, Log], path: Path) -> None:
    """Draw one picture of all `runs`, by name; the suffix of `path` sets the format."""
    from matplotlib.figure import Figure  # matplotlib is heavy; without `pyplot` no display is looked for

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    losses, lengths = figure.subplots(1, 2)
    for run, log in runs.items():
        prefix = f"{run}: " if len(runs) > 1 else ""
        losses.plot(*curve(log, "loss"), label=f"{prefix}training", alpha=0.6, linewidth=1)
        losses.plot(*curve(log, "eval_loss"), label=f"{prefix}held out", marker="o", markersize=3)
        contexts = {name for record in log for name in record if name.startswith(ACCEPT_LENGTH)}
        for name in sorted(contexts, key=lambda name: int(name.removeprefix(ACCEPT_LENGTH))):
            context = int(name.removeprefix(ACCEPT_LENGTH))
            lengths.plot(*curve(log, name), label=f"{prefix}context {context:,}", marker="o", markersize=3)
    losses.set(xlabel="step", ylabel="loss", yscale="log")
    lengths.set(xlabel="step", ylabel="accept length τ")
    for axes in (losses, lengths):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=120)


class LearningCurve(TrainerCallback):
    """Draw `learning_curve.png` in the folder of the run after each evaluation and at the end."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._draw(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._draw(args, state)

    def _draw(self, args: TrainingArguments, state: TrainerState) -> None:
        if state.is_world_process_zero:
            draw({"": state.log_history}, Path(str(args.output_dir)) / "learning_curve.png")
