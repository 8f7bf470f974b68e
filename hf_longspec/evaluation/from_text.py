"""Prompts made of long text that fills each context: to continue, with a needle in it, or of solved problems."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .rows import Row, read_rows
from .task import Built, Task, Wanted, fitted
from .text import places, read_tokens

NEEDLE = "The number to remember is {}."


def of_text(task: Task, path: Path, wanted: Wanted) -> Built:
    """Make prompts of a text that the target continues, at the same places for every context."""
    tokens = read_tokens([path], wanted.tokenizer)
    ends = places(tokens, wanted.contexts[-1], wanted.prompts)
    pairs = [(context, end) for context in wanted.contexts for end in ends]
    return Built([task.sample(end, context, tokens[end - context : end].tolist()) for context, end in pairs])


def of_haystack(task: Task, path: Path, wanted: Wanted) -> Built:
    """Make prompts of a long text with a number in one sentence, and a question for the number.

    The sentence stands a little further down in each prompt.
    """
    tokens, random = read_tokens([path], wanted.tokenizer), torch.Generator().manual_seed(0)
    samples = []
    for place, end in enumerate(places(tokens, wanted.contexts[-1], wanted.prompts), start=1):
        depth = place / (wanted.prompts + 1)
        needle = NEEDLE.format(int(torch.randint(10**6, 10**7, (), generator=random)))
        render = partial(haystack, task, wanted.tokenizer, tokens[:end], depth, needle)
        for context in wanted.contexts:
            ids = fitted(render, context, context, task.name)
            samples.append(task.sample(f"{end}, {depth:.2f} down", context, ids))
    return Built(samples)


def haystack(
    task: Task, tokenizer: PreTrainedTokenizerBase, tokens: Tensor, depth: float, needle: str, amount: int
) -> list[int]:
    """Return the prompt over the last `amount` of tokens (N,), with the needle at `depth` in 0..1 of them."""
    above = int(depth * amount)
    parts = tokens[-amount:].split([above, amount - above])
    text = f"\n{needle}\n".join(tokenizer.decode(part) for part in parts)
    return task.prompt(tokenizer, context=text)


def of_worked(task: Task, path: Path, wanted: Wanted) -> Built:
    """Make prompts of a problem behind as many solved problems as the context has place for."""
    rows, tokenizer = read_rows(path, task.name, task.fields), wanted.tokenizer
    solved = [f"Problem: {row['problem']}\nSolution: {row['solution']}\n\n" for row in rows]
    lengths = [len(tokenizer(text, verbose=False)["input_ids"]) for text in solved]
    samples = []
    for asked in range(0, len(rows), max(len(rows) // wanted.prompts, 1))[: wanted.prompts]:
        others = [*range(asked + 1, len(rows)), *range(asked)]
        ends = list(accumulate(lengths[other] for other in others))
        render = partial(worked, task, tokenizer, rows[asked], [solved[other] for other in others], ends)
        for context in wanted.contexts:
            samples.append(task.sample(rows[asked]["_id"], context, fitted(render, context, context, task.name)))
    return Built(samples)


def worked(
    task: Task, tokenizer: PreTrainedTokenizerBase, row: Row, solved: Sequence[str], ends: Sequence[int], amount: int
) -> list[int]:
    """Return the prompt with the first of `solved` that have no more than `amount` tokens together."""
    shown = solved[: sum(end <= amount for end in ends)]
    return task.prompt(tokenizer, context="".join(shown), problem=row["problem"])
