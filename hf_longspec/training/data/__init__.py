"""Training data: from sources to samples of packed documents. See `build_datasets`."""

from .build import build_datasets
from .sample import Sample
from .section import DataSection, HeldOut, Source

__all__ = ["DataSection", "HeldOut", "Sample", "Source", "build_datasets"]
