"""Texts as tokens: files and folders read in order, and evenly spaced places where prompts end.

The same places serve every length of context, so that lengths are compared on the same continuations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

SUFFIXES = (".py", ".txt", ".md", ".rst")


def text_files(paths: Sequence[Path]) -> list[Path]:
    """Return files as they are named, and the text files below folders, in the order of their paths.

    Raises `ValueError` if there are none.
    """
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    files = [file for file in files if file.is_file() and (file in paths or file.suffix in SUFFIXES)]
    if not files:
        raise ValueError(f"expected files, or folders with {', '.join(SUFFIXES)} files, got {[str(p) for p in paths]}")
    return files


def read_tokens(paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the tokens (N,) of all text files of `paths`, one file after the other.

    Raises `ValueError` if nothing is found.
    """
    tokens: list[int] = []
    for file in text_files(paths):
        tokens += tokenizer(file.read_text(encoding="utf-8", errors="replace"), verbose=False)["input_ids"]
    if not tokens:
        raise ValueError(f"expected text, got empty files in {[str(path) for path in paths]}")
    return torch.tensor(tokens)


def places(tokens: Tensor, longest: int, count: int) -> list[int]:
    """Return `count` places in tokens (N,) with at least `longest` tokens before each.

    Raises `ValueError` if N < longest.
    """
    if len(tokens) < longest:
        raise ValueError(f"expected a text of at least {longest} tokens, got {len(tokens)}")
    return torch.linspace(longest, len(tokens), count, dtype=torch.float64).long().tolist()
