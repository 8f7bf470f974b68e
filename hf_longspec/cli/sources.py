"""The options that name a source of documents, shared by all commands that read one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from dataclasses import field as dataclass_field
from enum import Enum
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

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


class Loss(str, Enum):
    all = "all"
    assistant = "assistant"


class Unit(str, Enum):
    row = "row"
    package = "package"


FormatOption = Annotated[
    Format,
    typer.Option(help="hub: dataset on the Hub; json: JSON Lines; text: a file a document; tokens: made by pack."),
]


@dataclass(frozen=True)
class SourceOptions:
    """The options of one source of documents, in the order of a command's help.

    Each becomes an option where `with_source_options` meets this class, or one derived from it, in a command. A
    derived class may give a field another default or help, or take it from the command line by `init=False`.
    """

    format: FormatOption = Format.text
    kind: Annotated[Kind | None, typer.Option(help="What a row holds: a text, or a chat.")] = Kind.text
    field: Annotated[
        str | None, typer.Option(help='Column of the text or messages.  [default: "text", "messages"]')
    ] = None
    answer_field: Annotated[
        str | None, typer.Option(help="Column of the answer, where --field is the user's turn.")
    ] = None
    loss: Annotated[Loss, typer.Option(help="Which tokens of a chat are to be learned.")] = Loss.all
    config: Annotated[str | None, typer.Option(help="Configuration of a dataset on the Hub.")] = None
    split: Annotated[str, typer.Option(help="Split of a dataset on the Hub.")] = "train"
    # not SUFFIX: typer 0.27 mistakes an option whose name is its metavar for an option in capitals
    suffixes: Annotated[
        list[str], typer.Option("--suffix", metavar=".EXT", help="Endings of the text files to read. Repeatable.")
    ] = dataclass_field(default_factory=lambda: [".py"])
    document: Annotated[Unit, typer.Option(help="package: the files of a top-level folder are one document.")] = (
        Unit.row
    )
    longest_line: Annotated[int, typer.Option(help="Leave out text files with longer lines.")] = 1000
    held_out: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="Leave out what lies in a folder, or file, of this name. Repeatable."),
    ] = dataclass_field(default_factory=list)
    limit: Annotated[int | None, typer.Option(min=1, help="Read only so many rows.")] = None
    max_bad_share: Annotated[
        float, typer.Option(min=0, max=1, help="Stop if a larger share of the rows is unreadable.")
    ] = 0.01
    separator: Annotated[
        str | None, typer.Option(help="Token that ends each text.  [default: the tokenizer's end-of-sequence token]")
    ] = None

    def section(self, path: str) -> DataSection:
        """Make a section of a recipe's data of the source at ``path``. Raises `ValueError` if options do not fit."""
        from ..training.data.section import OF_TEXTS, DataSection

        given = {name: value.value if isinstance(value, Enum) else value for name, value in asdict(self).items()}
        held_out, max_bad_share, separator = (given.pop(name) for name in ("held_out", "max_bad_share", "separator"))
        given["kind"] = given["kind"] or ("text" if self.format in OF_TEXTS else "chat")
        section = {"sources": [given | {"path": path}], "held_out": {"names": held_out}}
        return DataSection.from_dict(
            section | {"max_bad_share": max_bad_share, "separator": separator}, where="options"
        )


def with_source_options(command: Callable[..., None]) -> Callable[..., None]:
    """Show typer the fields of a command's parameter ``source``, a `SourceOptions`, as options in its place."""
    own = inspect.signature(command, eval_str=True).parameters
    options = own["source"].annotation
    shown = options_of(options)

    @wraps(command)
    def run(**given: Any) -> None:
        command(source=options(**{option.name: given.pop(option.name) for option in shown}), **given)

    # keyword-only, so that options without a default may follow options with a default
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own.values()]
    place = list(own).index("source")
    parameters[place : place + 1] = shown
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def options_of(options: type[SourceOptions]) -> list[inspect.Parameter]:
    """Turn the fields that ``options`` is made from into parameters with these types and defaults."""
    types = get_type_hints(options, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default if field.default_factory is MISSING else field.default_factory(),
            annotation=types[field.name],
        )
        for field in fields(options)
        if field.init
    ]
