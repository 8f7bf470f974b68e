"""Rows of tasks: JSON lines in a file, a folder, a zip archive or a dataset repository on the Hub.

Every error names the file and the line. Knows no tokenizer and no model.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..writing import MachineError, first_line
from .text import text_files

Row = dict[str, Any]
# The form of fsspec and `datasets`: hf://datasets/OWNER/NAME[@REVISION]/FILE
HUB = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)")
TOLD = 3  # malformed lines that a message tells in full


def local_path(place: str) -> Path:
    """Return the file or folder that `place` names, downloaded first if it lies on the Hub.

    Raises `ValueError` if there is none, `MachineError` if the download failed.
    """
    if not place.startswith("hf://"):
        if not (path := Path(place).expanduser()).exists():
            raise ValueError(f"{place}: no such file or folder")
        return path
    match = HUB.fullmatch(place)
    if match is None:
        raise ValueError(f"expected hf://datasets/OWNER/NAME/FILE, got {place!r}")
    try:
        return Path(hf_hub_download(match["repo"], match["file"], repo_type="dataset", revision=match["revision"]))
    except GatedRepoError as error:
        raise ValueError(
            f"{place}: access is granted to some accounts only; ask for it on "
            f"https://huggingface.co/datasets/{match['repo']}, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{place}: no such dataset, or a private one: `hf auth login` if it is yours") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{place}: no such revision {match['revision']!r}") from error
    except LocalEntryNotFoundError as error:  # before its parent class; raised without a network too
        raise ValueError(f"{place}: not in the cache, and the Hub cannot be reached") from error
    except EntryNotFoundError as error:
        raise ValueError(f"{place}: no such file in the dataset") from error
    except (
        HTTPError,
        OSError,
    ) as error:  # of the connection or the answer; a file that is cut off, a full disk
        raise MachineError(f"{place}: {first_line(error)}") from error


def read_rows(path: Path, name: str, fields: Sequence[str]) -> list[Row]:
    """Read the rows of task `name` from the file `path`, or from `name`.jsonl in a folder or zip archive.

    A file has a JSON object a line, or is Parquet; it may lie anywhere in an archive. A row without an `_id` gets the
    number of its line. Raises `ValueError` for malformed rows, and for rows that lack one of `fields`, all texts.
    """
    if path.is_dir():
        path = path / f"{name}.jsonl"
        if not path.is_file():
            raise ValueError(f"{path}: no such file, where the rows of task {name} were expected")
    if path.suffix == ".zip":
        return parse_rows(*zip_member(path, f"{name}.jsonl"), partial(check_fields, fields))
    if path.suffix == ".parquet":
        return parse_rows(parquet_lines(path), str(path), partial(check_fields, fields))
    return parse_rows(path.read_bytes(), str(path), partial(check_fields, fields))


def read_prompts(path: Path) -> list[Row]:
    """Read prompts of a user's own: rows with a `prompt` or `messages`, or text files, a prompt each."""
    if path.suffix in (".jsonl", ".json"):
        return parse_rows(path.read_bytes(), str(path), check_prompt)
    return [
        {"_id": str(file.relative_to(path.parent)), "prompt": utf8(file.read_bytes(), str(file))}
        for file in text_files([path])
    ]


def zip_member(path: Path, name: str) -> tuple[bytes, str]:
    """Return the content of the one file `name` in an archive, and its place in words."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.namelist() if Path(member).name == name]
            if len(members) != 1:
                raise ValueError(f"{path}: expected one {name} in it, got {members}")
            return archive.read(members[0]), f"{path}, {members[0]}"
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no zip archive: {error}") from error


def parquet_lines(path: Path) -> bytes:
    """Return the rows of a Parquet file as JSON lines. Raises `ValueError` without pyarrow, and for any other file."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"{path}: rows in Parquet need pyarrow: pip install 'hf-longspec[train]'") from error
    try:
        found = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Parquet file: {first_line(error)}") from error
    return "\n".join(json.dumps(row, default=str) for row in found).encode()


def parse_rows(content: bytes, place: str, check: Callable[[Any], None]) -> list[Row]:
    rows, faults, lines = [], [], 0
    for number, line in enumerate(utf8(content, place).split("\n"), start=1):
        if not line.strip():
            continue
        lines += 1
        try:
            row = json.loads(line)
            check(row)
            json.dumps(row, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
        except ValueError as error:  # a `JSONDecodeError` is one too
            faults.append(f"line {number}: {error}")
        else:
            rows.append({"_id": str(number)} | row)
    if faults:
        more = f"; and {len(faults) - TOLD} more" if len(faults) > TOLD else ""
        raise ValueError(f"{place}: {len(faults)} of {lines} rows are malformed; {'; '.join(faults[:TOLD])}{more}")
    if not rows:
        raise ValueError(f"{place}: no rows in it")
    return rows


def utf8(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8-sig")  # some editors write a byte order mark in front
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is no UTF-8 text: {error}") from error


def check_fields(fields: Iterable[str], row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    for field in fields:
        if not isinstance(row.get(field), str):
            raise ValueError(f"expected a text {field!r}, got {row.get(field)!r:.60}")


def check_prompt(row: Any) -> None:
    check_fields((), row)
    if not isinstance(row.get("prompt"), str) and not is_conversation(row.get("messages")):
        raise ValueError("expected a text 'prompt', or 'messages' with a text 'role' and 'content' each")


def is_conversation(messages: Any) -> bool:
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        return False
    return all(isinstance(each.get(name), str) for each in messages for name in ("role", "content"))
