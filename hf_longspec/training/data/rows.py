"""Rows of JSON Lines, each with a name by which the row is found again.

This module reads files line by line. `datasets` would give up a whole file for one bad line and not say which line. A
broken file (cut off, not decompressible, not UTF-8) raises one `ValueError` that names the file.
"""

from __future__ import annotations

import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from .report import SourceReport
from .section import Source

JSON_SUFFIXES = tuple(name + packed for name in (".jsonl", ".json") for packed in ("", ".gz", ".xz", ".bz2"))
BROKEN = (OSError, EOFError, lzma.LZMAError, zlib.error)


class Row(NamedTuple):
    name: str  # file:line, file:row, or a file
    value: Any  # a text, or the columns by name


def json_rows(file: Path, name: str, source: Source, report: SourceReport) -> Iterator[Row]:
    """Read one JSON object a line. A line without an object is a bad row; blank lines are no rows."""
    number = 0
    try:
        with fsspec.open(str(file), "rb", compression="infer") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                report.rows += 1
                try:
                    value = json.loads(line.decode("utf-8").strip())
                except json.JSONDecodeError as error:
                    report.bad_row(f"{name}:{number}", f"no JSON: {error.msg} at column {error.colno}")
                    continue
                if isinstance(value, dict):
                    yield Row(f"{name}:{number}", value)
                else:
                    report.bad_row(f"{name}:{number}", f"expected an object, got {type(value).__name__}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: broken file: line {number} is not UTF-8 (byte {error.start})") from None
    except BROKEN as error:
        raise ValueError(f"{file}: broken file, behind line {number}: {one_line(error)}") from None


def one_line(error: BaseException, longest: int = 300) -> str:
    return " ".join(str(error).split())[:longest] or type(error).__name__
