"""`hf-longspec convert`: the published LongSpec drafts in our format."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .one_line import in_one_line


class WeightFormat(str, Enum):
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


def convert(
    source: Annotated[
        str, typer.Argument(metavar="REPO_OR_FOLDER", help="A published draft, such as sail/longspec-QwQ-32B-Preview.")
    ],
    target: Annotated[str, typer.Option(help="Folder or Hub id of its target; only the config is read.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="New folder for the draft.")],
    dtype: Annotated[
        WeightFormat, typer.Option(help="Number format of the new weights. A call casts them to the target's.")
    ] = WeightFormat.float16,
) -> None:
    """A published LongSpec draft as one that `generate` takes.

    Six are published, for example: hf-longspec convert sail/longspec-QwQ-32B-Preview --target Qwen/QwQ-32B-Preview
    --out draft. Files may be safetensors or .bin, whole or in shards; all is checked against the target first.
    """
    from transformers.utils import logging

    from ..hub import convert as conversion
    from ..hub.published import published_draft

    logging.disable_progress_bar()
    with in_one_line():
        record = conversion.convert(source, target, out, dtype.value)
    origin = source if record.source_revision is None else f"{source} at {record.source_revision}"
    typer.echo(
        f"{origin}: {', '.join(record.files)}, {record.parameters:,} parameters, {', '.join(record.source_dtypes)}"
    )
    typer.echo(f"not used: {', '.join(record.unused) or 'nothing'}")
    known = published_draft(source)
    if known is not None and target != known.target and not Path(target).is_dir():
        typer.echo(f"note: {source} was trained for {known.target}; it guesses worse for other models of that shape")
    typer.echo(f"written: {out}, {record.dtype}, for {target}; {out / conversion.RECORD} tells where it comes from")
