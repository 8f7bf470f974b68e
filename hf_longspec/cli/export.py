"""`hf-longspec export`: a draft as a folder that is ready for the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .one_line import in_one_line
from .options import Draft, Target

Generate = Annotated[
    bool, typer.Option("--generate/--no-generate", help="Write a few tokens with a target that is a folder.")
]


def export(
    draft: Draft,
    target: Target,
    out: Annotated[Path, typer.Option(help="Folder to write; a new or empty one.")],
    card: Annotated[
        Path | None,
        typer.Option(help="card.json: what the model card tells of the draft.  [default: the one beside the draft]"),
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="report.json of `hf-longspec evaluate`, for the card. Repeatable."),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="How the draft was trained, YAML or JSON, for the card.")] = None,
    repo_id: Annotated[
        str | None, typer.Option(help="Repository it will lie in, for the card's lines of use.")
    ] = None,
    generate: Generate = True,
) -> None:
    """Write a folder that is ready for the Hub, and check it.

    It holds weights, config, code, the target's tokenizer, model card and license. The check loads the folder in a
    process without this package. Exit code 1 if the folder is written but something keeps it from being pushed.
    """
    from transformers.utils import logging

    from ..hub import export as exporting
    from ..hub.card import About
    from ..hub.faults import hub_faults

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with in_one_line():
        about = About.load(card or _beside(draft))
        model = exporting.load_draft(draft)
        files = exporting.export(
            model,
            out,
            target_folder_or_id=target,
            about=about,
            results=[_mapping(path) for path in results or []],
            recipe=None if recipe is None else _mapping(recipe),
            repo_id=repo_id,
        )
    show(out, files)
    with in_one_line():
        faults = hub_faults(out, target=target, generate=generate)
    report(faults)


def _beside(draft: str) -> Path:
    path = Path(draft) / "card.json"
    if not path.is_file():
        raise ValueError(f"expected a card.json beside the draft {draft}, or one named by --card")
    return path


def _mapping(path: Path) -> Any:
    """Read a file of JSON or YAML. Raises `ValueError` unless it holds an object with keys."""
    import yaml

    text = path.read_text(encoding="utf-8")
    try:
        read = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no {path.suffix.lstrip('.') or 'YAML'}: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{path}: expected an object with keys, got {type(read).__name__}")
    return read


def show(folder: Path, files: list[Path]) -> None:
    """Print the size of each file in bytes, and their sum."""
    sizes = [path.stat().st_size for path in files]
    for path, size in zip(files, sizes, strict=True):
        typer.echo(f"{size:>14,}  {path.relative_to(folder).as_posix()}")
    typer.echo(f"{sum(sizes):>14,}  bytes in {len(files)} files")


def report(faults: list[str]) -> None:
    """Print faults on standard error and exit with code 1, if there are any."""
    for fault in faults:
        typer.echo(f"hf-longspec: {fault}", err=True)
    if faults:
        raise typer.Exit(1)
    typer.echo("checked: loads as remote code without this package; all files accounted for; card complete")
