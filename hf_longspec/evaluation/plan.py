"""The plan of a run: the prompts of all tasks, where they come from, and what was left out and why."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..packages import PackageError
from . import held_out, paper
from .rows import local_path
from .task import Sample, Task, Wanted
from .tasks import TASKS, parse_task

SUITES = {held_out.FOLDER: held_out.TASKS, "paper": tuple(task.name for task in paper.TABLE)}


@dataclass
class Plan:
    """The prompts of a run.

    samples: prompts by context, then by task. sources: where the text of each task is from. left_out: reasons by task.
    """

    samples: list[Sample] = field(default_factory=list)
    sources: list[dict[str, str]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def chosen(suite: str | None, specs: Sequence[str], max_new_tokens: int | None) -> list[tuple[Task, str | None]]:
    """Return tasks and the places where their rows or texts lie; None is the place of a task of the suite.

    Raises `ValueError` for unknown names.
    """
    if suite is not None and suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; known are {', '.join(SUITES)}")
    tasks = [(TASKS[name], TASKS[name].place) for name in SUITES[suite]] if suite is not None else []
    tasks += [parse_task(spec) for spec in specs]
    if not tasks:
        raise ValueError("nothing to measure: expected --suite held-out, or --task NAME or NAME=PATH")
    if twice := [name for name, count in Counter(task.name for task, _ in tasks).items() if count > 1]:
        raise ValueError(f"each task can be measured once in a run, got {', '.join(twice)} more than once")
    if max_new_tokens is None:
        return tasks
    return [(replace(task, max_new_tokens=max_new_tokens), place) for task, place in tasks]


def plan(tasks: Sequence[tuple[Task, str | None]], wanted: Wanted, cache: Path) -> Plan:
    """Return the prompts of all tasks.

    A task of the suite whose packages cannot be downloaded here is left out, and `Plan.left_out` gives the reason.
    Raises `ValueError` for whatever is wrong with a place or its rows, and if no prompt is left.
    """
    made = Plan()
    for task, place in tasks:
        if place is None:
            try:
                path, sources = held_out.fetch(task.name, cache)
            except PackageError as error:
                made.left_out[task.name] = str(error)
                continue
        else:
            path = local_path(place)
            sources = [source(task, place, path)]
        built = task.make(task, path, wanted if wanted.prompts else replace(wanted, prompts=task.prompts))
        made.samples += built.samples
        made.sources += sources
        if built.left_out:
            made.left_out[f"some of {task.name}" if built.samples else task.name] = built.left_out
    if not made.samples:
        raise ValueError("no prompts: " + "; ".join(f"{task}: {reason}" for task, reason in made.left_out.items()))
    if twice := [key for key, count in Counter(sample.key for sample in made.samples).items() if count > 1]:
        raise ValueError(f"task {twice[0][0]}: expected each row to have an _id of its own, got {twice[0][2]!r} twice")
    made.samples.sort(key=lambda sample: sample.context)
    return made


def source(task: Task, place: str, path: Path) -> dict[str, str]:
    """Return where the rows or text of a task come from.

    Adds the commit if they come from the Hub, and the checksum of a single file.
    """
    told = {"task": task.name, "name": place}
    if place.startswith("hf://"):
        told["version"] = path.parts[path.parts.index("snapshots") + 1]
    if path.is_file():
        told["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return told
