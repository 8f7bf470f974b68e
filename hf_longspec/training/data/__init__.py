"""Training data: from sources to samples of packed documents. See `build_datasets`."""

from .build import build_datasets
from .packed import PackedTokens, TokenWindows, concatenate, find_files, is_held_out, pack, read_documents
from .sample import Sample
from .section import DataSection, HeldOut, Source

__all__ = [
    "DataSection",
    "HeldOut",
    "PackedTokens",
    "Sample",
    "Source",
    "TokenWindows",
    "build_datasets",
    "concatenate",
    "find_files",
    "is_held_out",
    "pack",
    "read_documents",
]
