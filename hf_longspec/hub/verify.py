"""The comparison of the code in a draft's folder with this package's releases, byte for byte; no code is run.

Knows names, bytes and JSON; `listing.py` finds the files, in a folder or on the Hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from .listing import Listing, is_code, is_config
from .releases import Release, sha256

PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
PROGRAMS = (".dll", ".dylib", ".exe", ".ipynb", ".pyc", ".pyd", ".pyz", ".sh", ".so", ".whl")
# Keys, anywhere in a config, that make transformers run code: values of `CLASSES` name a class as "module.Class" or
# "owner/repo--module.Class"; values of `KERNELS` may name a repository of compiled kernels.
CLASSES = ("auto_map", "custom_pipelines")
KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


class Verdict(str, Enum):
    released = "as released"
    differs = "differs from every known release"
    unknown = "unknown file"
    missing = "missing"
    unreadable = "cannot be read"


class CodeFile(NamedTuple):
    """A code file and the verdict on it.

    releases: the versions that have these bytes under this name, oldest first; empty but for `Verdict.released`.
    """

    name: str
    verdict: Verdict
    releases: tuple[str, ...] = ()


class Verified(NamedTuple):
    """The result of `verify`.

    release: the version that has most of the files, the newest of several; None if no version has any. mixed: whether
    each file is of some release, but no release has all of them. elsewhere: code that the folder's configs name and
    that is not among the files, a line each. notes: what else could run if somebody opened it.
    """

    release: str | None
    files: tuple[CodeFile, ...]
    mixed: bool
    elsewhere: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Whether all code that loading the draft can run belongs to one release."""
        of_release = all(file.verdict is Verdict.released for file in self.files)
        return bool(self.files) and of_release and not self.mixed and not self.elsewhere


def verify(listing: Listing, releases: Mapping[str, Release]) -> Verified:
    """Compare the code of a draft's folder with `releases`.

    Raises `ValueError` if the folder neither holds nor names any code.
    """
    found = tuple(_code_file(listing, name, releases) for name in listing.names if is_code(name))
    elsewhere = tuple(_elsewhere(listing))
    if not found and not elsewhere:
        raise ValueError(
            f"{listing.source} holds no .py files: there is no code to verify, and it loads with hf-longspec only"
        )
    release = _closest(found, releases)
    named = {file.name for file in found}
    lacking = releases[release].files.keys() - named if release is not None else ()
    files = sorted((*found, *(CodeFile(name, Verdict.missing) for name in lacking)))
    return Verified(release, tuple(files), _is_mixed(found, release), elsewhere, tuple(_notes(listing)))


def _code_file(listing: Listing, name: str, releases: Mapping[str, Release]) -> CodeFile:
    path = listing.folder / name
    if not path.is_file():  # a link to nowhere, a pipe
        return CodeFile(name, Verdict.unreadable)
    digest = sha256(path)
    having = tuple(version for version, release in releases.items() if release.files.get(name) == digest)
    if having:
        return CodeFile(name, Verdict.released, having)
    is_known = any(name in release.files for release in releases.values())
    return CodeFile(name, Verdict.differs if is_known else Verdict.unknown)


def _closest(found: tuple[CodeFile, ...], releases: Mapping[str, Release]) -> str | None:
    """Return the version that has most of the files, the newest of several; None if no version has any."""
    counts = {version: sum(version in file.releases for file in found) for version in releases}
    most = max(counts.values(), default=0)
    return [version for version, count in counts.items() if count == most][-1] if most else None


def _is_mixed(found: tuple[CodeFile, ...], release: str | None) -> bool:
    return any(file.verdict is Verdict.released and release not in file.releases for file in found)


def _elsewhere(listing: Listing) -> Iterator[str]:
    """Yield a line for code that configs name outside of the folder's files, and for unreadable configs."""
    for name in (name for name in listing.names if is_config(name)):
        try:
            config = json.loads((listing.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            yield f"{name} is no JSON that can be read, so that it is not known what code it names"
            continue
        for key, value in _entries(config):
            if key in CLASSES:
                yield from _classes(listing, f"{name}, {key}", value)
            elif key in KERNELS:
                yield from (
                    f"{name}, {key}: {text}: kernels of another repository" for text in _texts(value) if "/" in text
                )
        if PurePosixPath(name).name == "adapter_config.json":
            yield f"{name}: with peft installed, what it names as base model is loaded in the draft's place"
    yield from (f"{name} is a link to a folder, which was not looked into" for name in listing.linked_folders)


def _classes(listing: Listing, place: str, value: Any) -> Iterator[str]:
    """Yield a line for each class under `value` of another repository, or of a file that does not exist."""
    for text in _texts(value):
        if "--" in text:
            yield f"{place}: {text}: code of another repository"
        elif re.search(r"\.\w+$", text) and f"{text.rpartition('.')[0]}.py" not in listing.names:
            yield f"{place}: {text}: there is no such file here"


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield keys and values of all objects in a JSON value, at any depth."""
    if isinstance(value, dict):
        yield from value.items()
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _entries(part)


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a JSON value, at any depth."""
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(part)


def _notes(listing: Listing) -> Iterator[str]:
    yield from (f"{name} is a link out of the folder: what it leads to now was read" for name in listing.linked_out)
    for name in listing.names:
        if name.lower().endswith(PICKLES):
            yield f"{name} may be a pickle, which runs code when it is read; transformers reads tensors alone from it"
        elif name.lower().endswith(PROGRAMS):
            yield f"{name} is a program; loading a draft does not run it"
