"""Every option of `generate` with a draft: the same as plain `generate` in all that can be seen, or refused."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from contract import lines
from contract_cell import NOT_YET, WRONG_TODAY, Case, Row, models, observe, once, prompts, run
from contract_rows import all_rows
from observation import differences
from transformers.generation import stopping_criteria


def cell(row: Row, batch: int):
    waits = batch > 1 and "batch" in NOT_YET
    wrong = row.name in WRONG_TODAY and not waits
    marks = [pytest.mark.xfail(strict=True, reason="the core gets it wrong")] if wrong else []
    return pytest.param(row, batch, id=f"{row.name}, batch {batch}", marks=marks)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("row, batch", [cell(row, batch) for row in all_rows() for batch in row.batches])
def test_equal_or_refused(row: Row, batch: int):
    if row.module is not None:
        pytest.importorskip(row.module)
    done = run(row, batch)
    if (refusal := row.expected_refusal(batch)) is not None:
        found = differences(done.plain, done.ours)
        assert done.ours.error is not None, f"served now, with these differences: {found}; see NOT_YET"
        with pytest.raises(ValueError, match=refusal):
            raise done.ours.error
        return
    assert done.plain.error is None, f"plain `generate` does not serve this row: {done.plain.error!r}"
    assert not differences(done.plain, done.ours)
    if row.long_paths:
        longest = max(max(accepted, default=0) for accepted in done.ours.accept_lengths)
        assert longest >= 3, f"too little was accepted: the row would prove nothing, got {done.ours.accept_lengths}"


def test_rows_have_names_of_their_own():
    names = [row.name for row in all_rows()]
    assert len(set(names)) == len(names)


def test_the_table():
    rows = [Row("greedy", "none", once({})), Row("beams", "num_beams", once({"num_beams": 2}), refused="num_beams")]
    *_, equal, refused = lines(rows)
    batch = "refused" if "batch" in NOT_YET else "equal"
    assert equal == f"| greedy | none | equal | {batch} | equal | refused |"
    assert refused == "| beams | num_beams | refused | refused | equal | equal |"


@pytest.mark.parametrize("limit", [0.0, 0.02, 0.05])
def test_max_time_by_the_clock(limit):
    """The text is a prefix of plain `generate`'s and ends with the first token that came after the limit."""
    target, draft, _ = models("llama")
    case = Case(target, *prompts(1), log=[])
    looks = []

    def look() -> float:
        looks.append(stopping_criteria_clock())
        return looks[-1]

    options = {"input_ids": case.ids, "max_new_tokens": 300, "pad_token_id": 0}
    plain = target.generate(**options)
    stopping_criteria_clock = stopping_criteria.time.time
    with mock.patch.object(stopping_criteria, "time", SimpleNamespace(time=look)):
        ours = target.generate(**options, max_time=limit, assistant_model=draft)
    start, *asked = looks
    assert ours[0].tolist() == plain[0, : ours.shape[1]].tolist()
    assert len(asked) == ours.shape[1] - case.ids.shape[1] < 300
    assert asked[-1] - start > limit and all(moment - start <= limit for moment in asked[:-1])


def test_a_sight_of_a_call_shows_every_difference():
    """The harness itself: one change of anything that is compared is found."""
    target, draft, _ = models("llama")

    def look(assistant=None, **options):
        row = once({"output_scores": True, "do_sample": True, "max_new_tokens": 6} | options)
        return observe(target, row, Case(target, *prompts(1), log=[["called"]]), **(assistant or {}))

    plain = look()
    assert not differences(plain, look()) and not differences(plain, look({"assistant_model": draft}))
    assert "sequences" in differences(plain, look(max_new_tokens=7))[0]
    assert differences(plain, plain._replace(log=[["called"], ["called"]])) == ["log: 1 entries, not 2"]
    assert differences(plain, plain._replace(random=torch.get_rng_state() + 1))
    assert differences(plain, plain._replace(error=ValueError()))
    for path in (["scores", 3], ["past_key_values", "layers", 2, "keys"], ["past_key_values", "layers", 0, "values"]):
        other = look()
        holder = other.calls[0]["output"]
        for step in path:
            holder = holder[step]
        holder += 1e-2
        assert str(path[0]) in differences(plain, other)[0]
