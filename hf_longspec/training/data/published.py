"""The training data of LongSpec's authors (sail/longspec-data, MIT) as rows for the recipes in `hub_configs`.

    hf download sail/longspec-data --repo-type dataset --local-dir data/published
    python -m hf_longspec.training.data.published data/published data/longspec

writes, for targets of the Llama family and, in `qwen/`, for QwQ, whatever of these the folder has rows for:

    long.jsonl          `text`: stage 2, books, code, articles with abstracts, chats
    instructions.jsonl  `prompt` and `answer`: stage 3 of the Llama family, in the wording of the evaluation's prompts
    reasoning.jsonl     `prompt` and `answer`: stage 3 of QwQ, its own long chains of thought

Which columns a row has, and the wording around them, is from `longspec/test/data.py` of
https://github.com/sail-sg/LongSpec at commit 15e4998 (MIT: `hf_longspec/evaluation/LICENSE.longspec`).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from hf_longspec.evaluation.paper import GOV_REPORT, MULTI_NEWS

from .files import find_files, name_of
from .report import SourceReport
from .rows import JSON_SUFFIXES, json_rows
from .section import Source

MEETING = (
    "You are given a meeting transcript. Write a summary of the transcript. \n\n"
    "Transcript:\n{context}\n\nNow, write a summary of the transcript."
)
CODE = "Please complete the code given below. \n\nCode:\n{context}\n\nNow, complete the code given."
ARTICLE = "Please summarize the following article: {context}"
# By the row's `source`: the user's words, the columns of text and answer, what the answer begins with.
ASKED = {
    "gov-report": (GOV_REPORT, "report", "summary", "Summary:"),
    "multi-news": (MULTI_NEWS, "document", "summary", "Summary:"),
    "meetingbank": (MEETING, "transcript", "summary", "Summary:"),
}
MARKS = {"": ("<s>", "</s>"), "qwen": ("<|im_start|>", "<|im_end|>")}  # of a turn, by folder


class Made(NamedTuple):
    """A row to write: the file's name, and user's turns with answers, or a text without turns."""

    file: str
    turns: list[tuple[str, str]]
    text: str = ""


def made_of(row: Mapping[str, Any]) -> Made:
    """Return what a published row becomes. Raises `KeyError` for rows of another kind."""
    kind = row.get("source")
    if kind is None:
        return Made("reasoning", [(row["problem"], row["qwq"])])
    if kind in ASKED:
        words, text, answer, begins = ASKED[kind]
        return Made("instructions", [(words.format(context=row[text]), begins + row[answer])])
    if kind == "code" and "prefix" in row:
        return Made("instructions", [(CODE.format(context=row["prefix"]), row["suffix"])])
    if kind in ("code", "book"):
        return Made("long", [], row["text"])
    if kind == "arxiv":
        articles, abstracts = (listed(row[name]) for name in ("article", "abstract"))
        asked = [ARTICLE.format(context=article) for article in articles]
        return Made("long", list(zip(asked, abstracts, strict=False)))
    if kind == "tulu-v2":
        said = [turn["content"] for turn in row["conversation"] if turn["role"] in ("user", "assistant")]
        return Made("long", list(zip(said[::2], said[1::2], strict=False)))
    raise KeyError(kind)


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def written(made: Made, begin: str, end: str) -> dict[str, str]:
    """Return the row for our recipes; begin, end: the marks of a turn."""
    system = f"{begin}system\nYou are a helpful assistant{end}\n"
    asked = [f"{begin}user\n{user}{end}\n{begin}assistant\n" for user, _ in made.turns]
    if made.file == "long":
        turns = "".join(head + answer + f"{end}\n" for head, (_, answer) in zip(asked, made.turns, strict=True))
        return {"text": made.text or system + turns}
    return {"prompt": system + asked[0], "answer": made.turns[0][1] + f"{end}\n"}


def rows_below(folder: Path, report: SourceReport) -> Iterator[Mapping[str, Any]]:
    source = Source(str(folder), "json")
    for file in find_files(folder, JSON_SUFFIXES):
        yield from (row.value for row in json_rows(file, name_of(file, folder), source, report))


def main(folder: Path, out: Path) -> Counter[str]:
    """Write the files; returns their numbers of rows, and under "left out" how many rows were of no known kind.

    Raises `ValueError` for a folder without JSON Lines, and for broken files.
    """
    counts, report = Counter[str](), SourceReport(str(folder), max_bad_share=1)
    with ExitStack() as files:
        open_files: dict[tuple[str, str], Any] = {}
        for row in rows_below(folder, report):
            try:
                made = made_of(row)
                lines = {marks: json.dumps(written(made, *MARKS[marks])) for marks in MARKS}
            except (KeyError, TypeError, IndexError):
                counts["left out"] += 1
                continue
            counts[made.file] += 1
            for marks, line in lines.items():
                if (marks, made.file) not in open_files:
                    place = out / marks / f"{made.file}.jsonl"
                    place.parent.mkdir(parents=True, exist_ok=True)
                    open_files[marks, made.file] = files.enter_context(place.open("w", encoding="utf-8"))
                open_files[marks, made.file].write(line + "\n")
    counts["left out"] += report.bad
    return counts


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    for name, number in main(Path(sys.argv[1]), Path(sys.argv[2])).items():
        print(f"{name}: {number:,} rows")
