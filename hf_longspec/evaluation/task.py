"""A task, the prompts that the task is measured on, and how a prompt is made to fit a context.

Knows tokenizers and their chat templates; loads nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase


class Sample(NamedTuple):
    """One prompt.

    context: the bucket of the prompt in reports. stops: whether the text ends where the target ends it, or only at
    `max_new_tokens`. cut: number of tokens that were taken out of the prompt's middle. end: the one token that ends
    the text, in place of the target's own.
    """

    task: str
    id: str
    context: int
    ids: list[int]
    max_new_tokens: int
    stops: bool
    cut: int = 0
    end: int | None = None

    @property
    def key(self) -> tuple[str, int, str]:
        return self.task, self.context, self.id


@dataclass(frozen=True)
class Wanted:
    """The prompts wanted of every task: contexts in rising order, and so many prompts for each.

    prompts: 0 where each task's own number is wanted. positions: the target's number of positions, None where that is
    not known.
    """

    tokenizer: PreTrainedTokenizerBase
    contexts: tuple[int, ...]
    prompts: int
    positions: int | None = None


class Built(NamedTuple):
    """The prompts of a task, and what was left out of the task, in words; empty if nothing was left out."""

    samples: list[Sample]
    left_out: str = ""


@dataclass(frozen=True)
class Task:
    """One task.

    instructions: a template with fields of a row in braces. fields: the fields that a row must have. long: the field
    whose middle may be cut out. chat: whether the prompt is a user's message, where the tokenizer has a template.
    stops: see `Sample`. place: where the rows lie if nothing else is said. prompts: how many of each context if
    nothing else is said. room: positions that a prompt leaves free at least; with it, there is one bucket only.
    """

    name: str
    make: Callable[[Task, Path, Wanted], Built]
    max_new_tokens: int
    instructions: str = ""
    fields: tuple[str, ...] = ()
    long: str | None = None
    chat: bool = True
    stops: bool = True
    place: str | None = None
    prompts: int = 4
    room: int | None = None

    @property
    def stem(self) -> str:
        """The name of the file of this task's rows, without its ending."""
        return self.name.rpartition("/")[2]

    def longest(self, wanted: Wanted) -> int:
        """Return the number of tokens that a prompt of this task may have."""
        if self.room is None or wanted.positions is None:
            return wanted.contexts[-1]
        return max(wanted.positions - max(self.room, self.max_new_tokens), 0)

    def sample(self, name: object, context: int, ids: list[int], cut: int = 0) -> Sample:
        return Sample(self.name, str(name), context, ids, self.max_new_tokens, self.stops, cut)

    def prompt(self, tokenizer: PreTrainedTokenizerBase, **fields: str) -> list[int]:
        """Return the token ids of the instructions with these fields."""
        return encode(tokenizer, self.instructions.format(**fields), self.chat)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool) -> list[int]:
    """Return the token ids of a prompt, as a user's message if `chat` holds and the tokenizer has a template."""
    if chat and tokenizer.chat_template:
        return encode_messages(tokenizer, [{"role": "user", "content": text}])
    return tokenizer(text, verbose=False)["input_ids"]


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Return the token ids of a conversation that the assistant goes on with.

    The template writes all special tokens.
    """
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def fitted(render: Callable[[int], list[int]], amount: int, limit: int, name: str) -> list[int]:
    """Return `render(amount)`, with `amount` lowered as far as is needed to keep within `limit` tokens.

    amount: number of tokens of the part that may be shortened; text that is cut and read again may come out a little
    longer. Raises `ValueError` if nothing of that part can be left.
    """
    while len(ids := render(amount)) > limit:
        amount -= len(ids) - limit
        if amount <= 0:
            raise ValueError(f"task {name}: a context of {limit} tokens has no place for more than the instructions")
    return ids
