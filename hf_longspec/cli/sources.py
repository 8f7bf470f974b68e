"""Options that name a source of documents, for the commands that read one."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..training.data.section import DataSection


class Format(str, Enum):
    hub = "hub"
    json = "json"
    parquet = "parquet"
    text = "text"
    tokens = "tokens"


class Kind(str, Enum):
    text = "text"
    chat = "chat"


class Unit(str, Enum):
    row = "row"
    package = "package"


FormatOption = Annotated[
    Format,
    typer.Option(
        "--format", help="hub: dataset on the Hub; json: JSON Lines; text: a file a document; tokens: made by pack."
    ),
]
KindOption = Annotated[Kind, typer.Option(help="What a row holds: a text, or a chat.")]
Field = Annotated[str | None, typer.Option(help='Column of the text or messages.  [default: "text", "messages"]')]
AnswerField = Annotated[str | None, typer.Option(help="Column of the answer, where --field is the user's turn.")]
DocumentOption = Annotated[
    Unit, typer.Option("--document", help="package: the files of a top-level folder are one document.")
]
Config = Annotated[str | None, typer.Option(help="Configuration of a dataset on the Hub.")]
Split = Annotated[str, typer.Option(help="Split of a dataset on the Hub.")]
# not SUFFIX: typer 0.27 takes an option whose name is its metavar for one of capitals
Suffix = Annotated[list[str], typer.Option(metavar=".EXT", help="Endings of the text files to read. Repeatable.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Read only so many rows.")]
HeldOutNames = Annotated[
    list[str],
    typer.Option(
        "--held-out", metavar="NAME", help="Leave out what lies in a folder, or file, of this name. Repeatable."
    ),
]
MaxBadShare = Annotated[float, typer.Option(min=0, max=1, help="Stop if a larger share of the rows is unreadable.")]
Separator = Annotated[
    str | None, typer.Option(help="Token that ends each text.  [default: the tokenizer's end-of-sequence token]")
]


def one_source(held_out: list[str], max_bad_share: float, separator: str | None, **source: Any) -> DataSection:
    """A section with one source, from the options of a command. Raises `ValueError` where they do not fit together."""
    from ..training.data.section import DataSection

    values = {key: value.value if isinstance(value, Enum) else value for key, value in source.items()}
    section = {"sources": [values], "held_out": {"names": held_out}, "max_bad_share": max_bad_share}
    section["separator"] = separator
    return DataSection.from_dict(section, where="options")
