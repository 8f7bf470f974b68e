"""One cell of the contract: an option of `generate`, tried plainly, with a LongSpec draft and with another LM.

`contract_rows.py` has the rows, `contract.py` prints the table, `test_contract.py` holds LongSpec to the table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import transformers
from helpers import CACHE, VOCAB, tiny_draft, tiny_target
from observation import Play, Seen, differences, observe
from packaging import version
from torch import Tensor
from transformers import PreTrainedModel

# Before 5.21 a chunked prefill reads a prompt again although the cache holds its first tokens.
OLD = version.parse(transformers.__version__) < version.parse("5.21")
LONGROPE = {
    "head_dim": 8,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 5.0, 9.0],
    },
}
# By batch size. Both trees hold every next token, and most or half of the pairs, so long paths are accepted from a
# random draft. Rows that must go together advance by the shortest of their paths: a smaller tree is enough for them.
TREES = {1: (13, 120, 40), 4: (13, 70)}
LENGTHS = (9, 4, 7, 2)  # tokens of each prompt in a batch; a single sequence has the first one
NEW_TOKENS = 24
PAD, EOS = 0, [3, 11]  # rows of a batch write one of these at different times


class Case(NamedTuple):
    """What a row works with in one run: ids (B, L), padded on the left, mask (B, L) or None, and the log."""

    target: PreTrainedModel
    ids: Tensor
    mask: Tensor | None
    log: list

    def defaults(self) -> dict[str, Any]:
        """Return the options of every call; rows finish at different times in a batch."""
        batch = {"attention_mask": self.mask, "eos_token_id": EOS} if len(self.ids) > 1 else {}
        return {"input_ids": self.ids, **batch, "max_new_tokens": NEW_TOKENS, "pad_token_id": PAD} | {
            "return_dict_in_generate": True
        }


class Row(NamedTuple):
    """An option of `generate`, or several options together, as a row of the contract.

    play: makes the calls; batches: the columns that apply; refused: words of LongSpec's message if it refuses the row
    by decision; module: a package that the row needs; draws: whether tokens are drawn at random; long_paths: whether
    several tokens must be accepted at once somewhere, or the row proves little.
    """

    group: str
    name: str
    play: Play
    batches: tuple[int, ...] = (1, 4)
    refused: str | None = None
    module: str | None = None
    family: str = "llama"
    draws: bool = False
    long_paths: bool = True


Options = dict[str, Any] | Callable[[Case], dict[str, Any]]


def once(options: Options) -> Play:
    """Make a play of one call with the defaults and these options, made anew for each run; None removes a default."""

    def play(generate: Callable, case: Case) -> None:
        own = options(case) if callable(options) else copy.deepcopy(options)
        generate(**{name: value for name, value in (case.defaults() | own).items() if value is not None})

    return play


def group(name: str, options: dict[str, Options], **fields: Any) -> list[Row]:
    """Make rows of one call each."""
    return [Row(name, row, once(own), **fields) for row, own in options.items()]


def prompts(batch: int) -> tuple[Tensor, Tensor | None]:
    lengths = LENGTHS[:batch]
    random = torch.Generator().manual_seed(0)
    ids = torch.full((batch, max(lengths)), PAD)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(2, VOCAB, (length,), generator=random)
    return ids, (ids != PAD).long() if batch > 1 else None


@cache
def target_of(family: str) -> PreTrainedModel:
    """Make a tiny target; "phi3 with longrope" changes its frequencies and drops its cache at 16 tokens."""
    name, *longrope = family.split(" with ")
    return tiny_target(name, **(LONGROPE if longrope else {}))


@cache
def models(family: str, batch: int = 1) -> tuple[PreTrainedModel, Any, PreTrainedModel]:
    """Return target, draft, and an LM for stock assisted decoding that agrees with the target about most tokens."""
    target = target_of(family)
    small = copy.deepcopy(target)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for parameter in small.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    return target, tiny_draft(target, tree_shape=TREES[batch]), small


class Cell(NamedTuple):
    """One row and column: what was seen of plain `generate`, of LongSpec and of stock assisted decoding."""

    plain: Seen
    ours: Seen
    stock: Seen | None

    @property
    def our_differences(self) -> list[str]:
        return differences(self.plain, self.ours)


def run(row: Row, batch: int, *, stock: bool = False) -> Cell:
    target, draft, small = models(row.family, batch)

    def see(**assistant: Any) -> Seen:
        return observe(target, row.play, Case(target, *prompts(batch), log=[]), **assistant)

    other = see(assistant_model=copy.deepcopy(small)) if stock else None
    return Cell(see(), see(assistant_model=draft), other)


def verdict(plain: Seen, other: Seen | None, draws: bool = False) -> str:
    """Return a cell of the table in a few words; draws: whether the row draws tokens at random."""
    if other is None:
        return "–"
    if other.error is not None:
        same = repr(other.error) == repr(plain.error)
        name = type(other.error).__name__
        return f"{name}, like plain" if same else "refused" if name == "ValueError" else f"raises {name}"
    found = differences(plain, other)
    if not found:
        return "equal"
    if "sequences" in found[0]:
        return "other random draws" if draws else "other text"
    parts = [(CACHE, "cache"), ("cache", "cache"), ("log", "calls"), ("random", "random state")]
    named = [name for word, name in parts if any(word in line for line in found)]
    return "other " + " and ".join(dict.fromkeys(named) or ["outputs"])
