"""Which pieces share a sample, and the sample they make."""

from collections import Counter

import numpy as np
import pytest

from hf_longspec.training.data.packing import OPEN_SAMPLES, Packer, Piece, pieces_of
from hf_longspec.training.data.sample import make_sample
from hf_longspec.training.data.section import DataSection, Source


def pack(sizes, length):
    packer, samples = Packer(length), []
    for number, size in enumerate(sizes):
        samples += packer.add(Piece(number, 0, size))
    return [[piece.document for piece in sample] for sample in [*samples, *packer.flush()]]


def test_a_piece_goes_where_it_leaves_the_least_room():
    # 0 leaves 4, 1 leaves 3, 2 fits into both and fills 1; 3 fills 0
    assert pack([6, 7, 3, 4, 10, 1], 10) == [[1, 2], [0, 3], [4], [5]]


def test_the_fullest_is_given_out_when_too_many_are_open():
    sizes = [6 + number % 3 for number in range(OPEN_SAMPLES + 1)]  # no two fit into 10
    samples = pack(sizes, 10)
    assert samples[0] == [2]  # the first of those with 8
    assert sorted(sum(samples, [])) == list(range(OPEN_SAMPLES + 1))


@pytest.mark.parametrize("seed", range(3))
def test_every_piece_is_packed_once_and_samples_are_filled(seed):
    sizes = np.random.RandomState(seed).randint(1, 101, 3000)
    samples = pack(sizes.tolist(), 100)
    assert sorted(sum(samples, [])) == list(range(3000))
    totals = np.array([sum(sizes[number] for number in sample) for sample in samples])
    assert totals.max() <= 100
    assert totals.mean() > 95


def cut(tokens, mask=None, **rules):
    left_out = Counter()
    section = DataSection((Source("x", "text"),), **rules)
    mask = None if mask is None else np.array(mask, dtype=bool)
    pieces = [(piece.start, piece.end) for piece in pieces_of("x", tokens, mask, section, 4, left_out)]
    return pieces, dict(left_out)


@pytest.mark.parametrize(
    ("tokens", "rules", "expected"),
    [
        (4, {}, ([(0, 4)], {})),
        (10, {}, ([(0, 4), (4, 8), (8, 10)], {})),
        (10, {"long_documents": "first"}, ([(0, 4)], {})),
        (10, {"long_documents": "drop"}, ([], {"longer than a sample": 1})),
        (4, {"long_documents": "drop"}, ([(0, 4)], {})),
        (10, {"long_documents": "full"}, ([(0, 4), (4, 8), (6, 10)], {})),
        (5, {"long_documents": "full"}, ([(0, 4), (1, 5)], {})),
        (4, {"long_documents": "full"}, ([(0, 4)], {})),
        (8, {"long_documents": "full"}, ([(0, 4), (4, 8)], {})),
        (3, {"long_documents": "full"}, ([], {"shorter than a sample": 1})),
        (4, {"min_tokens": 5}, ([], {"shorter than min_tokens": 1})),
        (5, {"min_tokens": 5}, ([(0, 4), (4, 5)], {})),
        (10, {"mask": [0] * 5 + [1, 1] + [0] * 3}, ([(4, 8)], {"pieces with no token to learn": 2})),
        # the first token of a piece has nothing before it to be predicted from
        (8, {"mask": [0] * 4 + [1] + [0] * 3}, ([], {"pieces with no token to learn": 2})),
    ],
)
def test_rules_for_long_and_short_documents(tokens, rules, expected):
    assert cut(tokens, **rules) == expected


def test_a_sample_by_hand():
    pieces = [(np.array([5, 6, 7]), None), (np.array([8, 9]), np.array([True, False])), (np.array([3]), None)]
    found = make_sample([*pieces, (np.array([1, 2, 3]), np.array([False, False, True]))], 11)
    assert found["input_ids"].tolist() == [5, 6, 7, 8, 9, 3, 1, 2, 3, 0, 0]
    assert found["document_ids"].tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 4, 4]
    assert found["positions"].tolist() == [0, 1, 2, 0, 1, 0, 0, 1, 2, 0, 1]
    assert found["loss_mask"].tolist() == [x == "1" for x in "01100000100"]
    full = make_sample(pieces[:1], 3)
    assert full["document_ids"].tolist() == [0, 0, 0]
    assert {value.dtype for value in full.values()} == {full["input_ids"].dtype, full["loss_mask"].dtype}
