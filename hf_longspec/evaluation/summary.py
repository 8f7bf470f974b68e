"""Figures of records, by task and length of context, for reports, cards and pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from .records import Record

FORMAT, VERSION = "hf-longspec evaluation", 1
ALL = "all"


@dataclass(frozen=True)
class Bucket:
    """The figures of one task and context.

    accept_length: τ, tokens per round over all prompts; lowest, highest: τ of a single prompt. with_prefill: τ as
    LongSpec's authors count it, with each prompt's prefill as a round of one token. acceptance_by_level:
    the share of the rounds that came to a level of the tree in which a guess of the level was accepted; None where no
    round came. tokens_per_second: the speed of decoding, all tokens over all time; speed_up: the ratio of the two
    speeds; both are None where every text ended at its first token. prefill_seconds: means. peak_bytes: the
    largest peak; None on a CPU.
    """

    task: str
    context: int
    prompts: int
    prompt_tokens: float
    cut: int
    accept_length: float
    with_prefill: float
    lowest: float
    highest: float
    acceptance_by_level: list[float | None]
    plain_prefill_seconds: float
    prefill_seconds: float
    plain_tokens_per_second: float | None
    tokens_per_second: float | None
    speed_up: float | None
    equal: int
    ties: int
    different: int
    plain_peak_bytes: int | None
    peak_bytes: int | None


def buckets(records: Sequence[Record], levels: int) -> list[dict[str, Any]]:
    """Return a bucket for each task and context, then one for all tasks of each context.

    levels: the number of levels of the trees.
    """
    tasks = list(dict.fromkeys(record["task"] for record in records))
    contexts = sorted({record["context"] for record in records})
    found = []
    for task in [*tasks, ALL]:
        for context in contexts:
            own = [record for record in records if record["context"] == context and task in (record["task"], ALL)]
            if own:
                found.append(asdict(bucket(task, context, own, levels)))
    return found


def bucket(task: str, context: int, records: Sequence[Record], levels: int) -> Bucket:
    rounds = [record["longspec"]["accept_lengths"] for record in records]
    own = [fmean(lengths) for lengths in rounds if lengths] or [1.0]
    plain, ours = speed(records, "plain"), speed(records, "longspec")
    outcomes = [record["outcome"] for record in records]
    return Bucket(
        task=task,
        context=context,
        prompts=len(records),
        prompt_tokens=fmean(record["prompt_tokens"] for record in records),
        cut=sum(record["cut"] > 0 for record in records),
        accept_length=fmean([length for lengths in rounds for length in lengths] or [1.0]),
        with_prefill=fmean([length for lengths in rounds for length in (1, *lengths)]),
        lowest=min(own),
        highest=max(own),
        acceptance_by_level=acceptance_by_level(rounds, levels),
        plain_prefill_seconds=fmean(record["plain"]["prefill_seconds"] for record in records),
        prefill_seconds=fmean(record["longspec"]["prefill_seconds"] for record in records),
        plain_tokens_per_second=plain,
        tokens_per_second=ours,
        speed_up=ours / plain if ours and plain else None,
        equal=outcomes.count("equal"),
        ties=outcomes.count("tie"),
        different=outcomes.count("different"),
        plain_peak_bytes=peak(records, "plain"),
        peak_bytes=peak(records, "longspec"),
    )


def acceptance_by_level(rounds: Sequence[Sequence[int]], levels: int) -> list[float | None]:
    """Return, for each level, the share of the rounds that came to it in which a guess was accepted.

    The last round of a text may be cut short by the text's end, which says nothing of guesses: it is left out.
    """
    lengths = [length for text in rounds for length in text[:-1]]
    shares: list[float | None] = []
    for level in range(1, levels + 1):
        came = sum(length >= level for length in lengths)
        shares.append(sum(length > level for length in lengths) / came if came else None)
    return shares


def speed(records: Sequence[Record], engine: str) -> float | None:
    """Return the tokens per second of decoding; the first token of a text belongs to its prefill."""
    tokens = sum(record[engine]["new_tokens"] - 1 for record in records)
    seconds = sum(record[engine]["decode_seconds"] for record in records)
    return tokens / seconds if seconds else None


def peak(records: Sequence[Record], engine: str) -> int | None:
    found = [record[engine]["peak_bytes"] for record in records if record[engine]["peak_bytes"] is not None]
    return max(found) if found else None


def report(
    records: Sequence[Record], settings: dict[str, Any], provenance: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """Return what `report.json` holds.

    settings: the settings of the records, with `target`, `draft` and `setting`. The report's `machine` holds the
    number of cores, and how many programs wanted one during the measurement; above the number of cores, speeds are
    disturbed.
    """
    told = {name: settings[name] for name in ("target", "draft", "setting")}
    state = max(record["draft_state_bytes"] for record in records)
    told["draft"] = told["draft"] | {"state_bytes": state}
    loads = [record["load_average"] for record in records if record["load_average"] is not None]
    machine = {"cores": os.cpu_count(), "load_average": fmean(loads) if loads else None}
    figures = {
        "provenance": provenance,
        "machine": machine,
        **more,
        "buckets": buckets(records, len(told["draft"]["tree"])),
    }
    return {"format": FORMAT, "version": VERSION, **told, **figures}
