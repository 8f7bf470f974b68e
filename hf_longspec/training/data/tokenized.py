"""Sources tokenized into a folder by `hf-longspec pack`, or into a cache where they are found again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hf_longspec.demo.weights import cache_folder
from hf_longspec.vocabulary import vocabulary_sha256

from .documents import read_documents, separator_id
from .files import find_files, name_of
from .report import SourceReport
from .rows import JSON_SUFFIXES
from .section import DataSection, Source
from .split import is_held_out
from .store import StoreWriter, TokenStore
from .stored import open_stores, vocabulary_size

FORMAT = 1  # raise this number when the same source would give other tokens


def write_store(
    folder: Path,
    source: Source,
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    with_held_out: bool = True,
) -> TokenStore:
    """Tokenize a source into `folder`, which appears when it is whole, and show a progress bar.

    `with_held_out=False` leaves out, and counts, what the section holds out. Raises `ValueError` if nothing is left.
    """
    report = SourceReport(source.path, section.max_bad_share)
    with StoreWriter(folder, vocabulary_size(tokenizer), masked=source.loss == "assistant") as writer:
        documents = read_documents(source, section, tokenizer, report)
        for document in tqdm(documents, unit=" documents", desc=source.path, mininterval=1, dynamic_ncols=True):
            if with_held_out or not is_held_out(document, source, section.held_out):
                writer.add(document)
            else:
                report.held_out(len(document.ids))
        if not report.documents:
            reasons = ", ".join(f"{count} {reason}" for reason, count in report.left_out.items())
            raise ValueError(f"{source.path}: no documents are left of {report.rows} rows ({reasons or 'all bad'})")
        writer.summary = report.as_dict() | origin(tokenizer)
    return TokenStore.load(folder)


def origin(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return what a store's summary says of its tokens, so that `open_stores` can refuse another target's tokens."""
    return {"tokenizer": tokenizer.name_or_path, "vocabulary_sha256": vocabulary_sha256(tokenizer)}


def stores_of(source: Source, section: DataSection, tokenizer: PreTrainedTokenizerBase) -> list[TokenStore]:
    """Return the source's tokens on disk; make them now if they are not there yet."""
    if source.format == "tokens":
        return open_stores(source, tokenizer)
    cache = Path(section.cache).expanduser() if section.cache else cache_folder() / "tokens"
    folder = cache / fingerprint(source, section, tokenizer)
    if folder.exists():
        return [TokenStore.load(folder)]
    return [write_store(folder, source, section, tokenizer)]


def fingerprint(source: Source, section: DataSection, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of all that the tokens depend on: source and files, tokenizer, the settings that matter."""
    fields = dataclasses.asdict(source)
    del fields["weight"]
    parts: dict[str, Any] = {"format": FORMAT, "source": fields, "max_bad_share": section.max_bad_share}
    parts["separator"] = None if source.kind == "chat" else separator_id(section, tokenizer)
    parts["tokenizer"] = [tokenizer.chat_template, vocabulary_sha256(tokenizer)]
    if tokenizer.is_fast:
        parts["tokenizer"].append(tokenizer.backend_tokenizer.to_str())
    if source.format == "text":  # the order of files depends on the split
        parts["held_out"] = [section.held_out.share, section.held_out.names]
    if source.format == "hub":
        from .tables import load_hub

        parts["files"] = load_hub(source, streaming=False)._fingerprint
    else:
        parts["files"] = file_marks(source)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def file_marks(source: Source) -> list[Any]:
    """Return name, size and time of each file of a local source."""
    root = Path(source.path)
    suffixes = {"json": JSON_SUFFIXES, "parquet": (".parquet",), "text": source.suffixes}[source.format]
    return [[name_of(file, root), *mark(file)] for file in find_files(root, suffixes)]


def mark(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
