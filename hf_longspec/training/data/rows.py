"""Rows of JSON Lines, of Parquet and of datasets on the Hub, each with a name that finds it again.

Local files are read line by line here, not by `datasets`, which gives up a whole file for one bad line and does not
say which. A broken file (cut off, not decompressible, not UTF-8) is one `ValueError` that names it.
"""

from __future__ import annotations

import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow
from datasets import DatasetDict, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from pyarrow import parquet

from .report import SourceReport
from .section import Source

JSON_SUFFIXES = tuple(name + packed for name in (".jsonl", ".json") for packed in ("", ".gz", ".xz", ".bz2"))
BROKEN = (OSError, EOFError, lzma.LZMAError, zlib.error, pyarrow.ArrowException)
FAILED = (DatasetsError, ValueError, *BROKEN)  # the network's failures are of OSError


class Row(NamedTuple):
    name: str  # file:line, file:row, or a file
    value: Any  # a text, or the columns by name


def json_rows(file: Path, name: str, source: Source, report: SourceReport) -> Iterator[Row]:
    """One JSON object a line. A line that is none is a bad row; blank lines are no rows."""
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


def parquet_rows(file: Path, name: str, source: Source, report: SourceReport) -> Iterator[Row]:
    number = -1
    try:
        with parquet.ParquetFile(file) as table:
            columns = wanted_columns(source)
            require_columns(str(file), columns, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for value in batch.to_pylist():
                    number += 1
                    report.rows += 1
                    yield Row(f"{name}:{number}", value)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: broken file: not UTF-8 behind row {number} (byte {error.start})") from None
    except BROKEN as error:
        raise ValueError(f"{file}: broken file: {one_line(error)}") from None


def hub_rows(source: Source, report: SourceReport, streaming: bool) -> Iterator[Row]:
    """Rows of a dataset on the Hub, or of a local folder that looks like one."""
    data = load_hub(source, streaming)
    if data.column_names is not None:  # streams of some formats do not know theirs
        require_columns(source.path, wanted_columns(source), data.column_names)
        data = data.select_columns(wanted_columns(source))
    number = -1
    try:
        for number, value in enumerate(data):
            report.rows += 1
            yield Row(f"{source.split}:{number}", value)
    except FAILED as error:
        raise ValueError(f"{source.path}: cannot be read behind row {number}: {one_line(root(error))}") from None


def load_hub(source: Source, streaming: bool) -> Any:
    """The split of a dataset; `datasets` logs which of its files is broken.

    Raises `ValueError` for one that does not exist or cannot be reached.
    """
    options: dict[str, Any] = {"split": source.split, "revision": source.revision, "streaming": streaming}
    try:
        data = load_dataset(source.path, source.config, **options)
    except FAILED as error:
        raise ValueError(f"{source.path}: cannot be loaded: {one_line(root(error))}") from None
    assert not isinstance(data, (DatasetDict, IterableDatasetDict)), "a split was named"
    return data


def wanted_columns(source: Source) -> list[str]:
    return [source.column] if source.answer_field is None else [source.column, source.answer_field]


def require_columns(where: str, wanted: list[str], columns: list[str]) -> None:
    for column in wanted:
        if column not in columns:
            raise ValueError(f"{where}: expected a column {column!r}, got {', '.join(columns)}; set `field`")


def root(error: BaseException) -> BaseException:
    """What made `datasets` fail, behind its own general messages."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def one_line(error: BaseException, longest: int = 300) -> str:
    return " ".join(str(error).split())[:longest] or type(error).__name__
