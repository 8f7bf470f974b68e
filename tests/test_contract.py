"""Every option of `generate` with a draft: the same as plain `generate` in all that can be seen, or refused."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from contract import LIMITS, PAGE, Line, lines, put, read_table, summary, table
from contract_cell import Case, Row, models, observe, once, prompts, run
from contract_rows import all_rows
from helpers import CACHE
from observation import differences
from transformers.generation import stopping_criteria

CELLS = [(row, batch) for row in all_rows() for batch in row.batches]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("row, batch", CELLS, ids=lambda value: getattr(value, "name", value))
def test_equal_or_refused(row: Row, batch: int):
    if row.module is not None:
        pytest.importorskip(row.module)
    done = run(row, batch)
    if row.refused is not None:
        assert done.ours.error is not None, f"served, with these differences: {differences(done.plain, done.ours)}"
        with pytest.raises(ValueError, match=row.refused):
            raise done.ours.error
        return
    assert done.plain.error is None, f"plain `generate` does not serve this row: {done.plain.error!r}"
    assert not differences(done.plain, done.ours)
    if row.long_paths:
        longest = max(max(accepted, default=0) for accepted in done.ours.accept_lengths)
        # rows of a batch that must go together advance by the shortest of their paths
        assert longest >= (3 if batch == 1 else 2), f"too little to prove anything: {done.ours.accept_lengths}"


def test_rows_have_names_of_their_own():
    names = [row.name for row in all_rows()]
    assert len(set(names)) == len(names)


def test_the_table():
    rows = [Row("greedy", "none", once({})), Row("beams", "num_beams", once({"num_beams": 2}), refused="num_beams")]
    equal, refused = made = list(lines(rows))
    assert equal == Line("greedy", "none", "equal", "equal", "equal")
    assert refused == Line("beams", "num_beams", "refused", "refused", "equal")
    again = Line("beams", "sampled", "refused", "–", "other text")
    assert read_table("# Page\n\n" + table([*made, again])) == [*made, again]
    assert "| beams | 3 refused | 1 equal, 1 other | other text: sampled |\n" in summary([*made, again])


def test_the_committed_table():
    """Every row of the contract, in its order, and in docs/LIMITS.md what the rows come to."""
    page = PAGE.read_text(encoding="utf-8")
    made = read_table(page)
    assert [(line.group, line.name) for line in made] == [(row.group, row.name) for row in all_rows()]
    for line, row in zip(made, all_rows(), strict=True):
        if f"transformers {transformers.__version__}," in page:
            expected = ["equal"] if row.refused is None else ["refused", "ValueError, like plain"]
            assert line.one in expected and line.four in (expected if 4 in row.batches else "–")
    limits = LIMITS.read_text(encoding="utf-8")
    assert put(limits, made) == limits, "run python tests/contract.py"


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("limit", [0.0, 0.02, 0.05])
def test_max_time_by_the_clock(limit, batch):
    """The text is a prefix of plain `generate`'s; each row ends with its first token that came after the limit."""
    target, draft, _ = models("llama")
    ids, mask = prompts(batch)
    looks = []

    def look() -> float:
        looks.append(stopping_criteria_clock())
        return looks[-1]

    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 300, "pad_token_id": 0, "eos_token_id": 99}
    plain = target.generate(**options)
    stopping_criteria_clock = stopping_criteria.time.time
    with mock.patch.object(stopping_criteria, "time", SimpleNamespace(time=look)):
        ours = target.generate(**options, max_time=limit, assistant_model=draft)
    start, *asked = looks
    length = ids.shape[1]
    late = [moment - start > limit for moment in asked]
    assert 1 <= sum(late) <= batch and late[-1], "a row goes on no further when it is late for the first time"
    for text, expected in zip(ours.tolist(), plain.tolist(), strict=True):
        # behind the end of a row is padding
        ends = [end for end in range(length + 1, len(text) + 1) if text == expected[:end] + [0] * (len(text) - end)]
        assert ends, (text, expected)
    if batch == 1:
        assert len(asked) == ours.shape[1] - length < 300 and late == [False] * (len(late) - 1) + [True]


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
    for path in (["scores", 3], [CACHE, "layers", 2, "keys"], [CACHE, "layers", 0, "values"]):
        other = look()
        holder = other.calls[0]["output"]
        for step in path:
            holder = holder[step]
        holder += 1e-2
        assert str(path[0]) in differences(plain, other)[0]
