"""`hf-longspec push`: a folder that `hf-longspec export` wrote, sent to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .export import Generate, report, show
from .one_line import fail, in_one_line


def push(
    folder: Annotated[Path, typer.Argument(help="Folder that `hf-longspec export` wrote.")],
    repo_id: Annotated[str, typer.Argument(help="Repository, such as you/longspec-some-target.")],
    revision: Annotated[str | None, typer.Option(help="Branch; made if there is none.  [default: main]")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    target: Annotated[str | None, typer.Option(help="Folder or Hub id of the target, to try the draft with.")] = None,
    generate: Generate = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List and check all files; send nothing.")] = False,
) -> None:
    """Send a draft's folder to the Hub, checked first.

    In one commit: all files arrive or none does. Run it again after whatever went wrong; large files that have
    arrived are not sent again.
    """
    from huggingface_hub.utils import validate_repo_id

    from ..hub.faults import hub_faults

    with in_one_line():
        validate_repo_id(repo_id)
        faults = hub_faults(folder, target=target, generate=generate)
    show(folder, sorted(path for path in folder.rglob("*") if path.is_file()))
    report(faults)
    if target is None:
        typer.echo("not tried with its target; name it by --target")
    if dry_run:
        typer.echo(f"nothing was sent to {repo_id}")
        return

    from ..hub import push as pushing

    try:
        commit = pushing.push(folder, repo_id, revision=revision, private=private)
    except pushing.HubError as error:
        fail(str(error), code=1)
    except KeyboardInterrupt:
        fail(f"interrupted; {repo_id} has all files or none of them: run the same command again", code=130)
    typer.echo(commit.commit_url)
