"""The known tasks, as data.

Quality of answers is not measured: with and without a draft, the text is the target's own. The five tasks of LongBench
are read in LongBench's format, with `context`, `input` and more fields; the wording is ours, but for `paper.py`.
"""

from __future__ import annotations

from .from_rows import of_prompts, of_rows
from .from_text import of_haystack, of_text, of_worked
from .paper import LONGBENCH, REASONING, TABLE
from .task import Task

AIME = "hf://datasets/math-ai/aime25/test.jsonl"
BOTH = ("context", "input")

GOV_REPORT = """\
A report of a government agency:

{context}

Summarise this report in one page: what was examined, what was found, and what is recommended."""
QMSUM = """\
The transcript of a meeting:

{context}

Answer this question about the meeting in a few sentences, from the transcript alone.
Question: {input}"""
MULTI_NEWS = """\
Several articles about one event:

{context}

Write one summary of all of them, without repeating what they share."""
AIME_PROBLEM = """\
Solve this problem step by step. Its answer is a whole number from 0 to 999: write it last, as \\boxed{{answer}}.

{problem}"""
NEEDLE = """\
A long text, with one sentence in it that tells a number to remember:

{context}

Which number is to be remembered? Quote the sentence that tells it."""
MATH = """\
Solved problems, as examples:

{context}Solve this one in the same way, step by step.
Problem: {problem}"""

KNOWN = (
    Task("gov_report", of_rows, 512, GOV_REPORT, ("context",), "context", place=LONGBENCH),
    Task("qmsum", of_rows, 512, QMSUM, BOTH, "context", place=LONGBENCH),
    Task("multi_news", of_rows, 512, MULTI_NEWS, ("context",), "context", place=LONGBENCH),
    Task("lcc", of_rows, 64, "{context}", ("context",), "context", chat=False, stops=False, place=LONGBENCH),
    Task("repobench-p", of_rows, 64, "{context}{input}", BOTH, "context", chat=False, stops=False, place=LONGBENCH),
    Task("aime", of_rows, 2048, AIME_PROBLEM, ("problem",), place=AIME),
    Task("needle", of_haystack, 64, NEEDLE),
    Task("prompts", of_prompts, 256),
    Task("text", of_text, 128, stops=False),
    Task("code", of_text, 128, stops=False),
    Task("books", of_text, 128, stops=False),
    Task("math", of_worked, 128, MATH, ("problem", "solution")),
    *TABLE,
    REASONING,
)
TASKS = {task.name: task for task in KNOWN}


def parse_task(spec: str) -> tuple[Task, str]:
    """Return the task and the place of `NAME` or `NAME=PLACE`.

    Raises `ValueError` for an unknown task, and for a missing place.
    """
    name, _, place = spec.partition("=")
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known are {', '.join(TASKS)}")
    task = TASKS[name]
    if not place and task.place is None:
        raise ValueError(f"task {name} needs a file or folder: --task {name}=PATH")
    return task, place or str(task.place)
