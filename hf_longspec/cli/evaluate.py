"""`hf-longspec evaluate`: a draft's accept length, and the speed-up of its target, by length of context."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .one_line import fail, in_one_line
from .options import Draft, Dtype, Format, RemoteCode, Target, Tree, load_pair, numbers

if TYPE_CHECKING:
    from ..evaluation.plan import Plan
    from ..evaluation.records import Records

TASK_HELP = (
    "What to measure; repeatable. With PATH (file, folder, or hf://datasets/OWNER/NAME/FILE) from there. "
    "gov_report, qmsum, multi_news, lcc, repobench-p: rows as in LongBench, from the Hub by default. aime: problems. "
    "paper/gov_report, ..., paper/aime24: as LongSpec's authors measure. "
    "needle=PATH: a number hidden in a text. prompts=PATH: rows with `prompt` or `messages`, or text files. "
    "text=PATH: go on with a text. code, books, math: those of the suite, with other text."
)


def evaluate(
    target: Target,
    draft: Draft,
    suite: Annotated[
        str | None,
        typer.Option(
            help="held-out: code, books and mathematics from packages; needs no Hub. "
            "paper: the five tasks of the paper's table."
        ),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(metavar="NAME[=PATH]", help=TASK_HELP)] = None,
    contexts: Annotated[Any, numbers("Buckets of prompt lengths, in tokens.")] = "1024,4096,7168",
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts of each task and context.  [default: 4; all of paper/...]")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens to write.  [default: the task's]")] = None,
    tree: Tree = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; above 0 samples.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    dtype: Format = Dtype.auto,
    output: Annotated[Path, typer.Option(help="Folder of the report. A run that was stopped goes on there.")] = Path(
        "longspec-report"
    ),
    plot: Annotated[bool, typer.Option(help="Draw a picture too; needs matplotlib.")] = True,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Measure how well a draft guesses, and the speed-up.

    By length of context and kind of text. Plain generate and the draft write on from the same prompts. τ (tokens
    that one forward of the target brings; plain decoding has 1), acceptance by level of the tree, speed, memory
    and equality of the texts go into report.json, report.md and report.png; records.jsonl has a line for each
    prompt, and the same command goes on where it was stopped.

    Example: hf-longspec evaluate --target TARGET --draft DRAFT --suite held-out --contexts 1024,4096
    """
    if plot and find_spec("matplotlib") is None:
        fail("the picture needs matplotlib, which is not installed: pip install 'hf-longspec[bench]', or --no-plot")
    from transformers.utils import logging

    from ..demo.weights import cache_folder
    from ..evaluation import plan as planning
    from ..evaluation.records import Records
    from ..evaluation.room import check_room, positions_of
    from ..evaluation.settings import pair_settings, run_settings
    from ..evaluation.task import Wanted
    from ..provenance import provenance

    logging.disable_progress_bar()
    contexts = tuple(sorted(set(contexts)))
    with in_one_line():
        tasks = planning.chosen(suite, task or [], max_new_tokens)
        model, tokenizer, its_draft = load_pair(target, draft, dtype, trust_remote_code)
        if tree is not None:
            its_draft.config.tree_shape = tree
        its_draft.config.check()
        its_draft.bind(model)  # a pair that does not fit fails here, before anything is fetched or measured
        wanted = Wanted(tokenizer, contexts, prompts or 0, positions_of(model.config))
        for each, _ in tasks:
            check_room(model.config, each.longest(wanted), each.max_new_tokens, f"task {each.name}: ")
        made = planning.plan(tasks, wanted, cache_folder())
        for name, reason in made.left_out.items():
            typer.echo(f"hf-longspec: {name} left out: {reason}", err=True)
        setting = {
            "suite": suite,
            "contexts": list(contexts),
            "prompts": prompts,
            "max_new_tokens": {each.name: each.max_new_tokens for each, _ in tasks},
            "temperature": temperature,
            "seed": seed,
        }
        named = provenance(model.device)
        settings = pair_settings(target, draft, model, tokenizer, its_draft) | {"setting": setting}
        settings |= run_settings(made.samples, named)
        records = Records(output / "records.jsonl", settings)
        measure_all(model, its_draft, made, records, temperature, seed)
        write_report(records, settings, made, named, output, plot)


def measure_all(model: Any, draft: Any, made: Plan, records: Records, temperature: float, seed: int) -> None:
    """Measure the prompts that have no record yet, with a line for each and, on a terminal, a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..evaluation import runner

    todo = [sample for sample in made.samples if sample.key not in records.done]
    console = Console(highlight=False, stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    if len(todo) < len(made.samples):
        console.print(f"{len(made.samples) - len(todo)} of {len(made.samples)} prompts were measured before")
    warm = None
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("", total=len(made.samples), completed=len(made.samples) - len(todo))
            for sample in todo:
                progress.update(bar, description=f"{sample.task}, {sample.context:,} tokens")
                with in_one_line(f"at {sample.task}, context {sample.context}, prompt {sample.id}"):
                    if warm is None or (warm != sample.context and model.device.type != "cpu"):
                        runner.warm_up(model, draft, sample, temperature)
                        warm = sample.context
                    records.add(runner.measure(model, draft, sample, temperature, seed))
                progress.advance(bar)
                progress.console.print(line(records.done[sample.key]), markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        fail(f"stopped after {len(records.done)} of {len(made.samples)} prompts; the same command goes on", code=130)


def line(record: dict[str, Any]) -> str:
    """Describe the record of one prompt in one line, for people who watch."""
    from ..evaluation.summary import bucket

    figures = bucket(record["task"], record["context"], [record], levels=0)
    faster = f", decoding {figures.speed_up:.2f}x" if figures.speed_up else ""
    name = f"{record['task']}, {record['context']:,} tokens, {record['id']}"
    return f"{name}: τ = {figures.accept_length:.2f}{faster}, {record['outcome']}"


def write_report(
    records: Records, settings: dict[str, Any], made: Plan, provenance: Any, output: Path, plot: bool
) -> None:
    """Write report.json, report.md and report.png, and print the table of speeds."""
    from ..evaluation import page
    from ..evaluation.summary import report
    from ..writing import whole_file

    done = [records.done[sample.key] for sample in made.samples]
    told = report(done, settings, provenance, sources=made.sources, left_out=made.left_out)
    with whole_file(output / "report.json") as path:
        path.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with whole_file(output / "report.md") as path:
        path.write_text(page.page(told, plot), encoding="utf-8")
    if plot:
        from ..evaluation.plots import draw

        with whole_file(output / page.PICTURE) as path:
            draw(told, path)
    typer.echo(page.speed_table(told))
    typer.echo(f"\n{output / 'report.md'}")
