"""Samples of training and of the held-out split, made from the section `data` of a recipe."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from .mix import HeldOutSamples, MixedSamples
from .report import SHOWN, SourceReport
from .section import DataSection
from .store import TokenStore
from .stored import StoredSamples, pack_stores
from .stream import StreamedSamples, nothing_to_train_on, sample_of, streamed
from .tokenized import stores_of


def build_datasets(
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
    held_out_length: int | None = None,
) -> tuple[MixedSamples | StreamedSamples, HeldOutSamples]:
    """Return (train, held_out): samples of `length` tokens, and held-out ones of `held_out_length` (None: the same).

    `train` is a map-style dataset (`len`, `[i]`, reads memory-mapped tokens only), or an endless `IterableDataset`
    with `streaming`. The samples are already shuffled and mixed: take them in order,
    `train_sampling_strategy="sequential"`. Sample i of epoch e is a function of (section, seed, e, i) alone, for any
    number of workers, so skipping resumes exactly. `train.set_epoch(e)` chooses the epoch; accelerate's data loaders
    call this method. An epoch has as many samples as the sources hold; a source that its weight makes rarer continues
    in the next epoch where it stopped. Streams skip by reading, and are refused with more than one worker.

    `held_out` is a map-style dataset in a fixed order, the same for any seed, and empty where nothing is held out.
    Both have a `summary`: a dict for JSON with the counts of rows, documents and tokens, what was left out and why,
    and the bad rows by name.

    With several processes, let one go first (`TrainingArguments.main_process_first`) and write the cache.
    Raises `ValueError` with one line that names the file, row or key at fault.
    """
    lengths = length, length if held_out_length is None else held_out_length
    if min(lengths) < 2:
        raise ValueError(f"expected samples of at least 2 tokens, got {min(lengths)}")
    if section.streaming:
        return StreamedSamples(section, tokenizer, length, seed), read_held_out(section, tokenizer, lengths[1])
    train, held_out, records = [], [], []
    for source in section.sources:
        left_out: Counter[str] = Counter()
        stores = stores_of(source, section, tokenizer)
        sides = pack_stores(stores, source, section, lengths, left_out)
        record = summarized(source.path, stores, left_out, sides)
        if not len(sides[0]):
            raise ValueError(nothing_to_train_on(length, record))
        train.append(sides[0])
        held_out.append(sides[1])
        records.append(record)
    weights = [source.weight or len(side) for source, side in zip(section.sources, train, strict=True)]
    ours, theirs = ({"length": each, "sources": records} for each in lengths)
    return MixedSamples(train, weights, seed, ours), HeldOutSamples(held_out, section.held_out.windows, theirs)


def read_held_out(section: DataSection, tokenizer: PreTrainedTokenizerBase, length: int) -> HeldOutSamples:
    """Read at once the first held-out samples of each source of a stream."""
    sources, records = [], []
    held_out = section.held_out
    each = -(-held_out.windows // len(section.sources)) if held_out.share else 0
    for number, source in enumerate(section.sources):
        report = SourceReport(source.path, section.max_bad_share)
        found = islice(streamed(section, number, tokenizer, length, True, report), each)
        sources.append([sample_of(pieces, length) for pieces in found])
        records.append(report.as_dict() | {"held_out_samples": len(sources[-1])})
    return HeldOutSamples(sources, held_out.windows, {"length": length, "sources": records})


def summarized(
    path: str,
    stores: list[TokenStore],
    left_out: Counter[str],
    sides: tuple[StoredSamples, StoredSamples],
) -> dict[str, Any]:
    """Return what became of a source: the counts of reading (which old packed folders lack), and of packing."""
    read = [store.summary for store in stores]
    record: dict[str, Any] = {"path": path, "documents": sum(len(store.names) for store in stores)}
    record["tokens"] = sum(len(store.tokens) for store in stores)
    record |= {name: sum(store.get(name, 0) for store in read) for name in ("rows", "bad")}
    record["bad_rows"] = [row for store in read for row in store.get("bad_rows", ())][:SHOWN]
    total = sum((Counter(store.get("left_out", {})) for store in read), left_out)
    train, held_out = sides
    return record | {"left_out": dict(total), "samples": len(train), "held_out_samples": len(held_out)}
