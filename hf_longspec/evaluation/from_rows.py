"""Prompts made of rows, each in the bucket of the smallest context that holds the prompt."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .rows import Row, read_prompts, read_rows
from .task import Built, Task, Wanted, encode, encode_messages, fitted


class Buckets:
    """Prompts by context, up to so many in each; counts the prompts that are too long for all contexts."""

    def __init__(self, task: Task, wanted: Wanted):
        self.task, self.contexts = task, wanted.contexts
        self.room = Counter(dict.fromkeys(wanted.contexts, wanted.prompts))
        self.built, self.seen, self.too_long = Built([]), 0, 0

    def add(self, name: object, ids: list[int], cut: int = 0) -> None:
        self.seen += 1
        context = next((context for context in self.contexts if len(ids) <= context), None)
        self.too_long += context is None
        if context is not None and self.room[context]:
            self.room[context] -= 1
            self.built.samples.append(self.task.sample(name, context, ids, cut))

    def done(self) -> Built:
        if not self.too_long:
            return self.built
        told = f"{self.too_long} of {self.seen} prompts are longer than {self.contexts[-1]} tokens"
        return self.built._replace(left_out=told)


def of_rows(task: Task, path: Path, wanted: Wanted) -> Built:
    """Make a prompt of each row; one that is longer than all contexts loses the middle of the task's long field.

    LongBench cuts its prompts in this way. A task without a long field leaves such prompts out.
    """
    buckets = Buckets(task, wanted)
    for row in read_rows(path, task.name, task.fields):
        ids, cut = task.prompt(wanted.tokenizer, **row), 0
        if task.long is not None and len(ids) > wanted.contexts[-1]:
            whole = len(ids)
            ids = without_middle(task, task.long, row, wanted)
            cut = whole - len(ids)
        buckets.add(row["_id"], ids, cut)
    return buckets.done()


def without_middle(task: Task, field: str, row: Row, wanted: Wanted) -> list[int]:
    long = wanted.tokenizer(row[field], add_special_tokens=False, verbose=False)["input_ids"]
    render = partial(rendered, task, field, row, wanted.tokenizer, long)
    return fitted(render, len(long), wanted.contexts[-1], task.name)


def rendered(
    task: Task, field: str, row: Row, tokenizer: PreTrainedTokenizerBase, long: list[int], amount: int
) -> list[int]:
    """Return the prompt with only `amount` tokens of `long`, half from its beginning and half from its end."""
    halves = long[: amount - amount // 2], long[len(long) - amount // 2 :]
    return task.prompt(tokenizer, **row | {field: "".join(tokenizer.decode(half) for half in halves)})


def of_prompts(task: Task, path: Path, wanted: Wanted) -> Built:
    """Make prompts of texts as they are, and of conversations by the tokenizer's chat template."""
    buckets = Buckets(task, wanted)
    for row in read_prompts(path):
        if "messages" not in row:
            ids = encode(wanted.tokenizer, row["prompt"], chat=False)
        elif wanted.tokenizer.chat_template:
            ids = encode_messages(wanted.tokenizer, row["messages"])
        else:
            raise ValueError(f"{path}, row {row['_id']}: 'messages', but the target's tokenizer has no chat template")
        if not ids:
            raise ValueError(f"{path}, row {row['_id']}: the prompt is empty")
        buckets.add(row["_id"], ids)
    return buckets.done()
