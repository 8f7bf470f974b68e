"""The code files of every release of this package, by hash: `hf-longspec verify` compares a draft's code with them.

The hashes lie in `releases.json`. `python -m hf_longspec.hub.releases` writes the present version's entry, from the
files that this installation has; `make style` runs it. An entry whose `released` holds a date is never written again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .. import __version__

_TABLE = Path(__file__).with_name("releases.json")
_MODELING = Path(__file__).parents[1] / "modeling"


class Release(NamedTuple):
    """The code files of one release.

    released: the release's date, or None while its files may still change. files: SHA-256 by name.
    """

    released: str | None
    files: Mapping[str, str]


def known() -> dict[str, Release]:
    """Return the releases by version, oldest first."""
    return {version: Release(**entry) for version, entry in json.loads(_TABLE.read_text(encoding="utf-8")).items()}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def present_files() -> dict[str, str]:
    """Return the hashes of the code files that this installation puts into a draft's folder, by name."""
    return {path.name: sha256(path) for path in sorted(_MODELING.glob("*_longspec.py"))}


def write() -> list[str]:
    """Write the present files' hashes into the present version's entry; return the names that differed.

    Raises `ValueError` if files differ from a version that is out.
    """
    releases, files = known(), present_files()
    before = releases.pop(__version__, Release(None, {}))
    changed = sorted(name for name in {*files, *before.files} if files.get(name) != before.files.get(name))
    if changed and before.released is not None:
        raise ValueError(
            f"{__version__} was released on {before.released}, and {', '.join(changed)} differ from it: "
            "raise `__version__` and pyproject.toml's `version` first"
        )
    if changed:
        entries = releases | {__version__: Release(None, files)}
        told = {version: release._asdict() for version, release in entries.items()}
        _TABLE.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return changed


def main() -> None:
    try:
        changed = write()
    except ValueError as error:
        sys.exit(f"hf_longspec.hub.releases: {error}")
    print(f"{__version__}: {f'{len(changed)} files are new, changed or gone' if changed else 'as it was'}")


if __name__ == "__main__":
    main()
