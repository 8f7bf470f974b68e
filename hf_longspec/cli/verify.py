"""`hf-longspec verify`: a check whether a draft's code is the code of a release."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from .one_line import in_one_line

if TYPE_CHECKING:
    from ..hub.releases import Release
    from ..hub.verify import CodeFile, Verified


def verify(
    source: Annotated[
        str, typer.Argument(metavar="REPO_OR_FOLDER", help="A draft, such as you/longspec-some-target.")
    ],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the repository.  [default: main]")
    ] = None,
) -> None:
    """Check that a draft's code is that of a release.

    Of a repository only code and configs are downloaded; none of it is run. Each .py file is compared, byte for
    byte, with those of the releases that this package knows. Configs that name code elsewhere are told too. Exit
    code 1 if there is any code that no release has. Weights are not checked: they are numbers.
    """
    from huggingface_hub.utils import disable_progress_bars

    from ..hub import releases
    from ..hub.listing import list_files
    from ..hub.verify import verify as compare

    disable_progress_bars()
    with in_one_line():
        listing = list_files(source, revision)
        known = releases.known()
        found = compare(listing, known)
    if listing.revision is not None:
        typer.echo(f"{source} at {listing.revision}")
    width = max((len(_printable(file.name)) for file in found.files), default=0)
    for file in found.files:
        typer.echo(f"{_printable(file.name):<{width}}  {_verdict(file, found.release)}")
    for note in found.notes:
        typer.echo(f"note: {_printable(note)}")
    for fault in _faults(found, known):
        typer.echo(f"hf-longspec: {_printable(fault)}", err=True)
    if found.good:
        typer.echo(_praise(found, known))
    result = {
        "source": source,
        "revision": listing.revision,
        "verified": found.good,
        "release": found.release,
        "released": None if found.release is None else known[found.release].released,
        "files": {file.name: list(file.releases) or file.verdict.value for file in found.files},
        "elsewhere": list(found.elsewhere),
        "notes": list(found.notes),
    }
    typer.echo(json.dumps(result))
    if not found.good:
        raise typer.Exit(1)


def _printable(text: str) -> str:
    """Escape characters that would move the cursor or end the line: names and configs are the stranger's."""
    return text if text.isprintable() else ascii(text)


def _verdict(file: CodeFile, release: str | None) -> str:
    if not file.releases:
        return file.verdict.value
    return str(release) if release in file.releases else ", ".join(file.releases)


def _faults(found: Verified, known: dict[str, Release]) -> list[str]:
    """List the reasons, a line each, why the code is not the code of a release."""
    strange = sum(not file.releases for file in found.files)
    faults = list(found.elsewhere)
    if found.mixed:
        faults.append("files of several releases; no release has them all")
    if strange:
        faults.append(
            f"{strange} of {len(found.files)} code files are not as a release has them "
            f"(known: {', '.join(known) or 'none'}; a newer hf-longspec may know more)"
        )
    return faults


def _praise(found: Verified, known: dict[str, Release]) -> str:
    release = str(found.release)
    date = known[release].released
    state = f"released {date}" if date else "not released yet: as in this installation, and may still change"
    return f"all {len(found.files)} code files are those of hf-longspec {release} ({state})"
