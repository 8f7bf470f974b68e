"""The tasks that LongSpec's authors measured: their wording, their choice of rows, their number of tokens.

The wording is data that must match, blanks and line ends included: the published drafts were trained on it. It is
from `longspec/test/inference_long-bench.py` and `inference_qwq.py` of https://github.com/sail-sg/LongSpec at commit
15e4998, which are under the MIT license in `LICENSE.longspec` beside this file. Nothing else here is.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from .rows import Row, read_rows
from .task import Built, Task, Wanted

LONGBENCH = "hf://datasets/THUDM/LongBench/data.zip"
AIME_22_TO_24 = "hf://datasets/AI-MO/aimo-validation-aime/data/train-00000-of-00001.parquet"
AIME24 = range(60, 90)  # the ids of its problems
LEAST = 1200  # prompts of LongBench have more tokens
ROOM = 2000  # positions of the target that they leave free; what is longer is left out, not cut
EVERY = sys.maxsize
# The target's end-of-sequence token in their runs of Llama-3 and QwQ; their other targets have one such token.
ENDS = ("<|eot_id|>", "<|im_end|>")

SYSTEM = "<s>system\nYou are a helpful assistant</s>\n<s>user\n"
SUMMARY, ANSWER, REST = (f"</s>\n<s>assistant\n{begins}" for begins in ("Summary:", "Answer:", ""))
GOV_REPORT = (
    "You are given a report by a government agency. Write a one-page summary of the report.\n\n"
    "Report:\n{context}\n\nNow, write a one-page summary of the report."
)
QMSUM = (
    "You are given a meeting transcript and a query containing a question or instruction. "
    "Answer the query in one or more sentences.\n\nTranscript:\n{context}\n\n"
    "Now, answer the query based on the above meeting transcript in one or more sentences.\n\nQuery: {input}"
)
MULTI_NEWS = (
    "You are given several news passages. Write a one-page summary of all news. \n\n"
    "News:\n{context}\n\nNow, write a one-page summary of all the news."
)
CODE = "Please complete the code given below. \n{context}Now, complete the code given."
AIME = (
    "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
    "<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
)


def of_all_rows(task: Task, path: Path, wanted: Wanted) -> Built:
    """Make a prompt of each row of LongBench that has more than 1,200 tokens and leaves 2,000 of the positions."""
    return whole(task, read_rows(path, task.stem, task.fields), wanted, LEAST)


def of_aime24(task: Task, path: Path, wanted: Wanted) -> Built:
    """Make a prompt of each problem of 2024. Raises `ValueError` for rows without an `id`."""
    rows = [row | {"_id": str(row.get("id"))} for row in read_rows(path, task.stem, task.fields)]
    if not all(row["_id"].isdecimal() for row in rows):
        raise ValueError(f"{path}: expected each row to have an `id`, a number that tells its year")
    return whole(task, [row for row in rows if int(row["_id"]) in AIME24], wanted, least=0)


def whole(task: Task, rows: list[Row], wanted: Wanted, least: int) -> Built:
    """Make prompts of rows as they are, all in one bucket."""
    longest, known = task.longest(wanted), wanted.tokenizer.get_vocab()
    end = next((known[name] for name in ENDS if name in known), None)
    prompts = [(row["_id"], task.prompt(wanted.tokenizer, **row)) for row in rows]
    kept = [(name, ids) for name, ids in prompts if least < len(ids) <= longest]
    others = len(rows) - len(kept)
    told = f"{others} of {len(rows)} prompts are not of {least + 1:,} to {longest:,} tokens" if others else ""
    return Built([task.sample(name, longest, ids)._replace(end=end) for name, ids in kept[: wanted.prompts]], told)


LONG = Task("", of_all_rows, 1024, chat=False, place=LONGBENCH, prompts=EVERY, room=ROOM)


def longbench(name: str, wording: str, answer: str, *fields: str) -> Task:
    return replace(LONG, name=f"paper/{name}", instructions=SYSTEM + wording + answer, fields=fields)


TABLE = (
    longbench("gov_report", GOV_REPORT, SUMMARY, "context"),
    longbench("qmsum", QMSUM, ANSWER, "context", "input"),
    longbench("multi_news", MULTI_NEWS, SUMMARY, "context"),
    longbench("lcc", CODE, REST, "context"),
    longbench("repobench-p", CODE, REST, "context"),
)
REASONING = replace(LONG, name="paper/aime24", make=of_aime24, max_new_tokens=20_000, instructions=AIME)
REASONING = replace(REASONING, fields=("problem",), place=AIME_22_TO_24, room=0)
