"""Criteria as numbers against the criteria themselves, and which of them are numbers."""

import random

import pytest
import torch
from tables import Recorder, make_text
from transformers import MaxLengthCriteria, MaxTimeCriteria, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, stopping_criteria

from hf_longspec.modeling.sampling_longspec import Stops


@pytest.mark.parametrize(
    "criteria",
    [
        [],
        [MaxLengthCriteria(7)],
        [EosTokenCriteria(3)],
        [EosTokenCriteria([3, 5])],
        [EosTokenCriteria(torch.tensor(4)), MaxLengthCriteria(9), MaxLengthCriteria(6)],
        [EosTokenCriteria(torch.tensor([2, 4])), EosTokenCriteria(5), MaxLengthCriteria(8, 4)],
    ],
)
@pytest.mark.parametrize("seed", range(20))
def test_numbers_say_what_criteria_say(criteria, seed):
    rng = random.Random(seed)
    stops = Stops.of(StoppingCriteriaList(criteria))
    for length in range(1, 12):
        ids = [rng.randrange(7) for _ in range(length)]
        assert stops.at(length, ids[-1]) is bool(StoppingCriteriaList(criteria)(torch.tensor([ids]), None))


def test_other_criteria_are_no_numbers():
    subclass = type("Sub", (EosTokenCriteria,), {})
    for other in (Recorder(), MaxTimeCriteria(9.0), subclass(3)):
        assert Stops.of([MaxLengthCriteria(7), other, EosTokenCriteria(3)]) is None


def test_a_text_asks_criteria_only_where_they_are_no_numbers(monkeypatch):
    asked = []
    monkeypatch.setattr(StoppingCriteriaList, "__call__", lambda *args, **kwargs: asked.append(args) or torch.ones(1))
    make_text(9, criteria=[EosTokenCriteria(3)]).write([0], [1])
    assert not asked
    make_text(9, criteria=[EosTokenCriteria(3), Recorder()]).write([0], [1])
    assert len(asked) == 1


def test_the_user_is_reminded_of_the_models_length_as_in_plain_decoding(monkeypatch):
    """By the criterion itself, at the length at which plain `generate` does it."""
    told = []
    monkeypatch.setattr(stopping_criteria.logger, "warning_once", told.append)
    text = make_text(99, criteria=[MaxLengthCriteria(50, max_position_embeddings=5)])
    for length in range(3, 9):
        text.write([0], [1])
        assert text.lengths == [length] and len(told) == (length > 5)
    assert "maximum length (5)" in told[0]
