"""`hf-longspec train`: a draft from a recipe."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Annotated

import typer

from .one_line import in_one_line


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file, as those in hub_configs.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Overrides the recipe: signal.offset=false. Repeatable."),
    ] = None,
    target: Annotated[str | None, typer.Option(help="Folder or Hub id of the target, for target.name.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="Folder of the run, for trainer.output_dir.")] = None,
    max_seconds: Annotated[
        float | None, typer.Option(help="Stop with a checkpoint after so long; the same command goes on.")
    ] = None,
) -> None:
    """Train a draft as a recipe says, or go on with its run.

    The run lies in the folder `trainer.output_dir`. Ends in one line of JSON.

    Several GPUs: accelerate launch -m hf_longspec.cli train RECIPE.
    """
    from accelerate import PartialState

    from ..training.recipe import Recipe
    from ..training.run import train as run

    flags = {"target.name": target, "trainer.output_dir": output_dir}
    given = [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    less = "a run of a smaller trainer.per_device_train_batch_size, or with trainer.gradient_checkpointing, takes less"
    with in_one_line(less):
        try:
            outcome = run(Recipe.load(recipe, [*(settings or []), *given]), max_seconds)
        except TypeError as error:  # transformers' way to refuse a name, in trainer.lr_scheduler_kwargs for example
            raise ValueError(error) from error
    if PartialState().is_main_process:
        typer.echo(json.dumps(outcome._asdict()))
    PartialState().destroy_process_group()  # if there is one: a process that just exits can break the others' exits
    gc.collect()  # frees the model that holds the group: gloo's threads must end before Python does, or they abort it
