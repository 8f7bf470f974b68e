"""The section `data` of a recipe: sources, weights, the held-out split, the rules for long and for bad documents.

Holds settings only; other modules read and apply the settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .fields import from_mapping

OF_TEXTS = ("text", "tokens")  # formats that hold texts; the others hold rows, which may be chats


@dataclass(frozen=True)
class Source:
    """One source of documents.

    path: Hub id (or a local folder that looks like a dataset repository) for `hub`; else a file, or a folder whose
        fitting files are read in path order.
    format: `hub`; `json` (JSON Lines, also .gz, .xz, .bz2); `parquet`; `text` (each file is a document); `tokens`
        (folders written by `hf-longspec pack` or `hf-longspec distill-data`).
    kind: what a row holds. `text`: the column `field`, a string. `chat`: the column `field`, a list of messages
        (`role`/`content`, or `from`/`value`), or a string, the user's turn, answered by the column `answer_field`.
    chat_template: Jinja template of chats, in place of the tokenizer's.
    loss: which tokens are learned: `all`, or the `assistant`'s turns (chats only).
    document: `row` (a row, or file, is a document), or `package`: the files of one top-level folder, in path order,
        are one document, which is how code gives long contexts. Files end with the separator either way; a BOS, where
        the tokenizer writes one, begins a document.
    weight: this source's share of the samples, in proportion to the other weights; `None` for all sources: by size.
    config, split, revision: configuration, split and revision of a dataset on the Hub.
    suffixes: names of `text` files end with one of these.
    longest_line: `text` files with longer lines are left out as generated files.
    limit: number of rows to read (documents for `tokens`); `None`: all.
    """

    path: str
    format: Literal["hub", "json", "parquet", "text", "tokens"]
    kind: Literal["text", "chat"] = "text"
    field: str | None = None  # default: "text", or "messages" for chats
    answer_field: str | None = None
    chat_template: str | None = None
    loss: Literal["all", "assistant"] = "all"
    document: Literal["row", "package"] = "row"
    weight: float | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    suffixes: tuple[str, ...] = (".py",)
    longest_line: int = 1000
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.loss == "assistant" and self.kind != "chat":
            raise ValueError(f"`loss: assistant` needs `kind: chat`, got `kind: {self.kind}`")
        if self.kind == "chat" and self.format in OF_TEXTS:
            raise ValueError(f"`kind: chat` needs rows (hub, json, parquet), got `format: {self.format}`")
        for name in ("answer_field", "chat_template"):
            if getattr(self, name) is not None and self.kind != "chat":
                raise ValueError(f"`{name}` needs `kind: chat`")
        if self.document == "package" and self.format not in OF_TEXTS:
            raise ValueError(f"`document: package` needs files (text, tokens), got `format: {self.format}`")
        if self.weight is not None and not self.weight > 0:
            raise ValueError(f"`weight` must be positive, got {self.weight}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"`limit` must be at least 1, got {self.limit}")

    @property
    def column(self) -> str:
        return self.field or ("messages" if self.kind == "chat" else "text")


@dataclass(frozen=True)
class HeldOut:
    """Documents that are never trained on: whole documents (packages), never windows of documents.

    share: share of the documents, chosen by a hash of the content (for a package: the name), so the choice never
        moves.
    names: documents with such a folder or file name in their path, wherever the name stands.
    windows: number of samples of held-out text to use at most, spread evenly over the text (of a stream, the first
        ones).
    """

    share: float = 0.0
    names: tuple[str, ...] = ()
    windows: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"`share` must be in [0, 1), got {self.share}")
        if self.windows < 1:
            raise ValueError(f"`windows` must be at least 1, got {self.windows}")


@dataclass(frozen=True)
class DataSection:
    """The section `data` of a recipe.

    long_documents: documents longer than a sample are `cut` into samples that are all used, cut to the `first` sample,
        or `drop`ped; shorter documents are never cut. `full`: documents are cut into full samples, the last of which
        may repeat some of the one before, and shorter documents are left out. So each sample is of one document and
        needs no mask.
    min_tokens: documents (packages) with fewer tokens are left out, which gives samples of real long context.
    max_bad_share: more unreadable rows than this share of a source's rows end the run with an error.
    streaming: read, tokenize and pack while training, without a copy on disk; samples are shuffled only within
        `shuffle_buffer` samples.
    separator: token that ends each text document and file; `None`: the tokenizer's `eos_token`.
    cache: folder for tokenized sources; `None`: `tokens` in `$HF_LONGSPEC_CACHE` (`~/.cache/hf_longspec`).
    """

    sources: tuple[Source, ...]
    held_out: HeldOut = HeldOut()
    long_documents: Literal["cut", "first", "drop", "full"] = "cut"
    min_tokens: int = 2
    max_bad_share: float = 0.01
    streaming: bool = False
    shuffle_buffer: int = 1024
    separator: str | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("`sources` must name at least one source, got none")
        weighted = sum(source.weight is not None for source in self.sources)
        if 0 < weighted < len(self.sources):
            raise ValueError("give all sources a `weight`, or none of them")
        if self.streaming and len(self.sources) > 1 and not weighted:
            raise ValueError("`streaming` of several sources needs a `weight` for each: their sizes are not known")
        if self.streaming and self.held_out.names and not self.held_out.share:
            raise ValueError("`streaming` holds out by `held_out.share`: give one beside the names")
        if self.min_tokens < 2:
            raise ValueError(f"`min_tokens` must be at least 2, got {self.min_tokens}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"`max_bad_share` must be in [0, 1], got {self.max_bad_share}")
        if self.shuffle_buffer < 1:
            raise ValueError(f"`shuffle_buffer` must be at least 1, got {self.shuffle_buffer}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "data") -> DataSection:
        """Make the section from a recipe's mapping. Raises `ValueError` with one line that names the key."""
        return from_mapping(cls, values, where)
