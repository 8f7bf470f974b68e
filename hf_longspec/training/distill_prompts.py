"""Prompts for self-distillation: chats up to the assistant's next turn, or beginnings of texts. Knows no model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from .data.chat import BadRow, ChatEncoder
from .data.documents import contents, read_documents, read_rows, unique
from .data.report import SourceReport
from .data.section import DataSection, Source
from .data.split import is_named
from .data.stream import one_side


class Prompt(NamedTuple):
    name: str
    ids: np.ndarray  # (L,) uint32


def read_prompts(
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    stride: int | None,
    report: SourceReport,
) -> list[Prompt]:
    """Read the prompts of the section's one source, except held-out ones. Counts into `report`.

    Chats longer than `max_prompt_tokens` are left out. Texts are cut to this length; with `stride`, a text gives a
    prompt at each multiple of `stride`. Raises `ValueError` as reading does, and if there are no prompts.
    """
    (source,) = section.sources
    if source.kind == "chat":
        found = chat_prompts(source, section, tokenizer, report)
        prompts = [prompt for prompt in found if fits(prompt, max_prompt_tokens, report)]
    else:
        prompts = list(text_prompts(source, section, tokenizer, max_prompt_tokens, stride, report))
    if not prompts:
        raise ValueError(f"{source.path}: expected prompts, got none: {report.as_dict()}")
    return prompts


def chat_prompts(
    source: Source, section: DataSection, tokenizer: PreTrainedTokenizerBase, report: SourceReport
) -> Iterator[Prompt]:
    encoder = ChatEncoder(tokenizer, source.chat_template)
    rows = islice(read_rows(source, section, report), source.limit)
    for row in unique(contents(rows, source, report), report):
        if is_named(row.name, section.held_out.names):
            report.left_out["held out"] += 1
            continue
        try:
            yield Prompt(row.name, np.array(encoder.prompt(row.value), dtype=np.uint32))
        except BadRow as error:
            report.bad_row(row.name, str(error))
    report.finish()


def fits(prompt: Prompt, max_prompt_tokens: int, report: SourceReport) -> bool:
    if len(prompt.ids) > max_prompt_tokens:
        report.left_out["longer than max_prompt_tokens"] += 1
        return False
    report.documents += 1
    report.tokens += len(prompt.ids)
    return True


def text_prompts(
    source: Source,
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    stride: int | None,
    report: SourceReport,
) -> Iterator[Prompt]:
    for document in one_side(read_documents(source, section, tokenizer, report), source, section, held_out=False):
        usable = len(document.ids) - 1  # without the separator
        for start in range(0, usable, stride or usable):
            if start == 0 or start + longest <= usable:
                ids = document.ids[start : min(start + longest, usable)]
                yield Prompt(f"{document.name}+{start}" if start else document.name, np.array(ids, dtype=np.uint32))


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """Return a digest that tells two lists of prompts apart."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.name}\t{len(prompt.ids)}\n".encode("utf-8", "surrogatepass"))
        digest.update(prompt.ids.astype("<u4").tobytes())
    return digest.hexdigest()
