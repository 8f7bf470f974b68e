"""Rows of Parquet files and of datasets on the Hub, each with a name by which the row is found again.

Imported only where there are such sources: machines that train on packed tokens need neither pyarrow nor datasets.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
from datasets import DatasetDict, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from pyarrow import parquet

from .report import SourceReport
from .rows import BROKEN, Row, one_line
from .section import Source

FAILED = (DatasetsError, ValueError, pyarrow.ArrowException, *BROKEN)  # the network's failures are `OSError`


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
    except (*BROKEN, pyarrow.ArrowException) as error:
        raise ValueError(f"{file}: broken file: {one_line(error)}") from None


def hub_rows(source: Source, report: SourceReport, streaming: bool) -> Iterator[Row]:
    """Read the rows of a dataset on the Hub, or of a local folder that looks like one."""
    data = load_hub(source, streaming)
    if data.column_names is not None:  # streams of some formats do not know their columns
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
    """Load the split of a dataset; `datasets` logs which of its files is broken.

    Raises `ValueError` for a dataset that does not exist or cannot be reached.
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
    """Return the error that made `datasets` fail, behind its own general messages."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
