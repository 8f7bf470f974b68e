"""Tokenized documents of a source: rows or files are encoded; copies and empty texts are left out and counted.

The special tokens are the ones that the tokenizer adds to a prompt (a BOS, say), so that documents begin as prompts do
in `generate`; texts end with the separator. Each kind of source gives the same documents in the same order, streamed
or not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .chat import BadRow, ChatEncoder, messages_of
from .files import find_files, name_of, text_rows
from .report import SourceReport
from .rows import JSON_SUFFIXES, Row, json_rows
from .section import DataSection, HeldOut, Source
from .split import is_held_out_package, is_named, package_of
from .store import Document
from .stored import numbered_documents, open_stores

BATCH = 256  # texts that are tokenized at a time


def read_documents(
    source: Source, section: DataSection, tokenizer: PreTrainedTokenizerBase, report: SourceReport
) -> Iterator[Document]:
    """Read all documents of a source, held out or not; each file is one document. Counts into `report`.

    Raises `ValueError` for a broken file and for too many bad rows.
    """
    if source.format == "tokens":
        documents = stored_tokens(source, tokenizer, report)
    else:
        documents = encoded(source, section, tokenizer, report)
    for document in documents:
        learned = len(document.ids) - 1 if document.loss_mask is None else int(document.loss_mask[1:].sum())
        if learned < 1:
            report.left_out["no token to learn"] += 1
            continue
        report.documents += 1
        report.tokens += len(document.ids)
        yield document
    report.finish()


def stored_tokens(source: Source, tokenizer: PreTrainedTokenizerBase, report: SourceReport) -> Iterator[Document]:
    for _, document in islice(numbered_documents(open_stores(source, tokenizer)), source.limit):
        report.rows += 1
        yield document


def encoded(
    source: Source, section: DataSection, tokenizer: PreTrainedTokenizerBase, report: SourceReport
) -> Iterator[Document]:
    rows = unique(contents(islice(read_rows(source, section, report), source.limit), source, report), report)
    if source.kind == "chat":
        return chats(rows, source, tokenizer, report)
    return texts(rows, source, section, tokenizer)


def read_rows(source: Source, section: DataSection, report: SourceReport) -> Iterator[Row]:
    if source.format == "text":
        return text_rows(source, report, lambda name: comes_first(name, source, section.held_out))
    root, read, suffixes = Path(source.path), json_rows, JSON_SUFFIXES
    if source.format in ("hub", "parquet"):
        from .tables import hub_rows, parquet_rows

        if source.format == "hub":
            return hub_rows(source, report, section.streaming)
        read, suffixes = parquet_rows, (".parquet",)
    files = find_files(root, suffixes)
    return chain.from_iterable(read(file, name_of(file, root), source, report) for file in files)


def comes_first(name: str, source: Source, held_out: HeldOut) -> bool:
    """Tell whether a file is held out, and so read first: of a file and its copies, the held-out one is kept."""
    if source.document == "package":
        return is_held_out_package(name, held_out)
    return is_named(name, held_out.names)


def contents(rows: Iterable[Row], source: Source, report: SourceReport) -> Iterator[Row]:
    """Reduce rows to the text or the messages. Counts bad rows into `report`."""
    for row in rows:
        if source.format == "text":
            yield row
            continue
        try:
            if source.kind == "chat":
                yield Row(row.name, messages_of(row.value, source.column, source.answer_field))
            else:
                yield Row(row.name, text_of(row.value, source.column))
        except BadRow as error:
            report.bad_row(row.name, str(error))


def text_of(value: dict[str, Any], field: str) -> str:
    if field not in value:
        raise BadRow(f"no {field!r}, only {', '.join(value) or 'nothing'}")
    if not isinstance(value[field], str):
        raise BadRow(f"expected a string in {field!r}, got {type(value[field]).__name__}")
    return value[field]


def unique(rows: Iterable[Row], report: SourceReport) -> Iterator[Row]:
    """Leave out empty texts, and copies of earlier texts of this source."""
    seen: set[bytes] = set()
    for row in rows:
        text = row.value if isinstance(row.value, str) else json.dumps(row.value, ensure_ascii=False)
        try:
            digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        except UnicodeEncodeError as error:
            report.bad_row(row.name, f"half of a surrogate pair at character {error.start}, which is no text")
            continue
        if not text.strip() or digest in seen:
            report.left_out["duplicate" if text.strip() else "empty"] += 1
            continue
        seen.add(digest)
        yield row


def texts(
    rows: Iterator[Row], source: Source, section: DataSection, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Document]:
    separator, package = separator_id(section, tokenizer), None
    while batch := list(islice(rows, BATCH)):
        encoded = tokenizer([row.value for row in batch], verbose=False)["input_ids"]
        for row, ids in zip(batch, encoded, strict=True):
            if source.document == "package":
                before, package = package, (comes_first(row.name, source, section.held_out), package_of(row.name))
                if package == before and ids[0] == tokenizer.bos_token_id:
                    ids = ids[1:]  # no BOS within a document
            ends = ids and ids[-1] == separator  # some tokenizers write the separator themselves
            yield Document(row.name, np.array(ids if ends else [*ids, separator], dtype=np.uint32))


def chats(
    rows: Iterator[Row], source: Source, tokenizer: PreTrainedTokenizerBase, report: SourceReport
) -> Iterator[Document]:
    encoder = ChatEncoder(tokenizer, source.chat_template)
    for row in rows:
        try:
            if source.loss == "assistant":
                ids, mask = encoder.encode_with_mask(row.value)
                yield Document(row.name, np.array(ids, dtype=np.uint32), mask)
            else:
                yield Document(row.name, np.array(encoder.encode(row.value), dtype=np.uint32))
        except BadRow as error:
            report.bad_row(row.name, str(error))


def separator_id(section: DataSection, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends a text. Raises `ValueError` if the tokenizer has no such token."""
    if section.separator is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no `eos_token` to end a text with; name another token as `separator`")
        return tokenizer.eos_token_id
    vocabulary = tokenizer.get_vocab()
    if section.separator not in vocabulary:
        raise ValueError(f"`separator`: the tokenizer has no token {section.separator!r}")
    return vocabulary[section.separator]
