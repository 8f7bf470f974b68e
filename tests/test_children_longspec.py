"""The best children of a level by torch's operations, against sorting everything."""

import pytest
from level_cases import DTYPES, LEVELS, check, check_draft_vocabulary, check_impossible_tokens, check_rounding

from hf_longspec.modeling.tree_longspec import best_children


@pytest.mark.parametrize("nodes, vocab, width", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_best_children_against_sorting_everything(nodes, vocab, width, dtype):
    check(best_children, nodes, vocab, width, dtype)


def test_impossible_tokens_come_last():
    check_impossible_tokens(best_children)


def test_rounding_never_lifts_a_child_above_its_parent():
    check_rounding(best_children)


def test_tokens_of_a_draft_vocabulary():
    check_draft_vocabulary(best_children)
