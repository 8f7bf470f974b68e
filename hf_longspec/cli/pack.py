"""`hf-longspec pack`: tokenizes documents once, for machines without network or much time."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .one_line import fail, in_one_line
from .options import RemoteCode, load_tokenizer
from .sources import (
    AnswerField,
    Config,
    DocumentOption,
    Field,
    Format,
    FormatOption,
    HeldOutNames,
    Kind,
    KindOption,
    Limit,
    MaxBadShare,
    Separator,
    Split,
    Suffix,
    Unit,
    one_source,
)


class Loss(str, Enum):
    all = "all"
    assistant = "assistant"


def pack(
    path: Annotated[str, typer.Argument(help="File, folder, or Hub id of the documents.")],
    tokenizer: Annotated[str, typer.Option(help="Folder or Hub id of the target, or of its tokenizer.")],
    out: Annotated[Path, typer.Option(help="New folder for the tokens.")],
    format: FormatOption = Format.text,
    kind: KindOption = Kind.text,
    field: Field = None,
    answer_field: AnswerField = None,
    loss: Annotated[Loss, typer.Option(help="Which tokens of a chat are to be learned.")] = Loss.all,
    config: Config = None,
    split: Split = "train",
    suffix: Suffix = [".py"],  # noqa: B006 (typer copies it)
    document: DocumentOption = Unit.row,
    longest_line: Annotated[int, typer.Option(help="Leave out text files with longer lines.")] = 1000,
    held_out: HeldOutNames = [],  # noqa: B006
    limit: Limit = None,
    max_bad_share: MaxBadShare = 0.01,
    separator: Separator = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Turn documents into token ids, once, for training.

    The folder is a source of `format: tokens` in a recipe.
    """
    from ..training.data.tokenized import write_store

    if out.exists():
        fail(f"{out} exists already; choose a new folder")
    if format is Format.tokens:
        fail("--format tokens is what pack writes; choose what to read: hub, json, parquet or text")
    with in_one_line():
        section = one_source(
            held_out,
            max_bad_share,
            separator,
            path=path,
            format=format,
            kind=kind,
            field=field,
            answer_field=answer_field,
            loss=loss,
            config=config,
            split=split,
            suffixes=suffix,
            document=document,
            longest_line=longest_line,
            limit=limit,
        )
        (source,) = section.sources
        its_tokenizer = load_tokenizer("tokenizer", tokenizer, trust_remote_code)
        store = write_store(out, source, section, its_tokenizer, with_held_out=False)
    typer.echo(json.dumps({"out": str(out)} | store.summary))
