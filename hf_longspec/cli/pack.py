"""`hf-longspec pack`: documents as token ids, made once, for machines without network or much time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .one_line import fail, in_one_line
from .options import RemoteCode, load_tokenizer
from .sources import Format, SourceOptions, with_source_options


@with_source_options
def pack(
    path: Annotated[str, typer.Argument(help="File, folder, or Hub id of the documents.")],
    tokenizer: Annotated[str, typer.Option(help="Folder or Hub id of the target, or of its tokenizer.")],
    out: Annotated[Path, typer.Option(help="New folder for the tokens.")],
    source: SourceOptions,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Turn documents into token ids, once, for training.

    The folder is a source of `format: tokens` in a recipe.
    """
    from ..training.data.tokenized import write_store

    if out.exists():
        fail(f"{out} exists already; choose a new folder")
    if source.format is Format.tokens:
        fail("--format tokens is what pack writes; choose what to read: hub, json, parquet or text")
    with in_one_line():
        section = source.section(path)
        its_tokenizer = load_tokenizer("tokenizer", tokenizer, trust_remote_code)
        store = write_store(out, section.sources[0], section, its_tokenizer, with_held_out=False)
    typer.echo(json.dumps({"out": str(out)} | store.summary))
