"""Text files of a folder as rows, in path order: which files are read, and which teach nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .report import SourceReport
from .rows import Row
from .section import Source


def find_files(root: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return `root` if it is a file, else the files below it whose names end with one of `suffixes`, in path order.

    Raises `ValueError` if there are no such files.
    """
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ValueError(f"{root}: no such file or folder")
    files = sorted(path for path in root.rglob("*") if path.name.endswith(tuple(suffixes)) and path.is_file())
    if not files:
        raise ValueError(f"{root}: expected files that end with {', '.join(suffixes)}, got none")
    return files


def name_of(file: Path, root: Path) -> str:
    """Return a file's name in documents and reports: its path below `root`."""
    return file.name if file == root else file.relative_to(root).as_posix()


def text_rows(source: Source, report: SourceReport, first: Callable[[str], bool]) -> Iterator[Row]:
    """Read one row a file: first the files for whose names `first` holds, then all others, each part in path order."""
    root = Path(source.path)
    files = find_files(root, source.suffixes)
    for file in sorted(files, key=lambda file: (not first(name_of(file, root)), file)):
        name = name_of(file, root)
        report.rows += 1
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            report.bad_row(name, f"not UTF-8 (byte {error.start})")
            continue
        except OSError as error:
            raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
        if reason := reason_to_leave_out(text, source.longest_line):
            report.left_out[reason] += 1
        else:
            yield Row(name, text)


def reason_to_leave_out(text: str, longest_line: int, most_digits: float = 0.3) -> str | None:
    """Return why a file's text teaches nothing (generated tables, encoded data), or None where the text is good."""
    if not text.strip():
        return "empty"
    if "\0" in text:
        return "binary"
    if max(map(len, text.splitlines())) > longest_line:
        return "long lines"
    dense = "".join(text.split())
    if sum(map(dense.count, "0123456789")) > most_digits * len(dense):
        return "mostly digits"
    return None
