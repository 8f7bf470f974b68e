"""Stops: stopping criteria that look at lengths and newest tokens only, asked on the host without any tensor."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .sampling_longspec import is_of


class Stops(NamedTuple):
    """What transformers' `EosTokenCriteria` and `MaxLengthCriteria` say, as numbers.

    ends: the tokens behind which a text ends; longest: its largest length; reminds: the length beyond which a
    criterion has something to say to the user, and is therefore to be asked itself.
    """

    ends: frozenset[int]
    longest: float
    reminds: float

    @classmethod
    def of(cls, criteria: list) -> Stops | None:
        """None if there are other criteria, subclasses of these two included."""
        ends: set[int] = set()
        lengths, reminds = [math.inf], [math.inf]
        for criterion in criteria:
            if is_of(criterion, "stopping_criteria", {"EosTokenCriteria"}):
                ends.update(criterion.eos_token_id.flatten().tolist())
            elif is_of(criterion, "stopping_criteria", {"MaxLengthCriteria"}):
                lengths.append(criterion.max_length)
                reminds.append(_or_inf(criterion.max_position_embeddings))
            else:
                return None
        return cls(frozenset(ends), min(lengths), min(reminds))

    def at(self, length: int, newest: int) -> bool:
        """Whether a text of that length ends with its newest token."""
        return newest in self.ends or length >= self.longest


def _or_inf(value: Any) -> float:
    return math.inf if value is None else value
