"""Records of a run, and what is made of them: resuming, refusing, figures and pages."""

import json

import pytest
from reports import report as small_report

from hf_longspec.evaluation import page, summary
from hf_longspec.evaluation.records import Records

SETTINGS = {"draft": {"tree": [2, 2], "name": "d"}, "seed": 0}


def record(
    task="code", context=10, name="1", lengths=(3, 1, 2), plain=(7, 3.0), ours=(7, 1.5), outcome="equal", peak=None
):
    def engine(tokens, seconds):
        return {"new_tokens": tokens, "prefill_seconds": 0.5, "decode_seconds": seconds, "peak_bytes": peak}

    return {
        "task": task,
        "context": context,
        "id": name,
        "prompt_tokens": context,
        "cut": 0,
        "plain": engine(*plain),
        "longspec": engine(*ours) | {"accept_lengths": list(lengths)},
        "draft_state_bytes": 99,
        "load_average": 2.0,
        "outcome": outcome,
    }


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    path = tmp_path / "new" / "records.jsonl"
    Records(path, SETTINGS).add(record())
    with path.open("a") as file:
        file.write('{"task": "code", "context": 10, "id": "2", "prom')  # stopped while it wrote
    again = Records(path, SETTINGS)
    assert list(again.done) == [("code", 10, "1")]
    again.add(record(name="2"))
    assert list(Records(path, SETTINGS).done) == [("code", 10, "1"), ("code", 10, "2")]
    assert [json.loads(line).get("id") for line in path.read_text().splitlines()] == [None, "1", "2"]


def test_an_empty_file_is_a_new_run(tmp_path):
    (tmp_path / "records.jsonl").write_text('{"settings": {"dra')
    assert Records(tmp_path / "records.jsonl", SETTINGS).done == {}
    assert Records(tmp_path / "records.jsonl", SETTINGS).done == {}


def test_other_settings_are_refused_and_named(tmp_path):
    Records(tmp_path / "r.jsonl", SETTINGS)
    other = {"draft": {"tree": [4], "name": "d"}, "seed": 0, "new": 1}
    with pytest.raises(ValueError, match=r"\(draft.tree was \[2, 2\], is \[4\]; new was None, is 1\); choose another"):
        Records(tmp_path / "r.jsonl", other)


@pytest.mark.parametrize("damage", ["nonsense", "[]", "null", '{"task": "lcc"}'])
def test_a_damaged_file_is_refused(tmp_path, damage):
    Records(tmp_path / "r.jsonl", SETTINGS)
    with (tmp_path / "r.jsonl").open("a") as file:
        file.write(damage + "\n")
    with pytest.raises(ValueError, match="line 2 is damaged"):
        Records(tmp_path / "r.jsonl", SETTINGS)
    (tmp_path / "r.jsonl").write_text(damage + "\n")
    with pytest.raises(ValueError, match="line 1 is damaged"):
        Records(tmp_path / "r.jsonl", SETTINGS)


def test_acceptance_by_level_counts_whole_rounds_that_came_there():
    # whole rounds: 3 1 2 and 1; the last of each text is left out
    assert summary.acceptance_by_level([[3, 1, 2, 3], [1, 3]], 4) == [2 / 4, 1 / 2, 0.0, None]


def test_figures_of_a_bucket():
    records = [
        record(lengths=(3, 1, 2)),
        record(name="2", lengths=(4, 4), plain=(5, 1.0), ours=(5, 0.5), outcome="tie"),
        record(task="math", context=20, lengths=(1,), plain=(1, 0.0), ours=(1, 0.0), outcome="different", peak=5),
    ]
    found = {(bucket["task"], bucket["context"]): bucket for bucket in summary.buckets(records, 2)}
    assert list(found) == [("code", 10), ("math", 20), ("all", 10), ("all", 20)]
    code = found["code", 10]
    assert code["accept_length"] == 14 / 5 and (code["lowest"], code["highest"]) == (2, 4)
    assert code["plain_tokens_per_second"] == 10 / 4 and code["tokens_per_second"] == 10 / 2 and code["speed_up"] == 2
    assert (code["equal"], code["ties"], code["different"], code["peak_bytes"]) == (1, 1, 0, None)
    assert {**code, "task": "all"} == found["all", 10]
    assert found["math", 20]["speed_up"] is None and found["math", 20]["peak_bytes"] == 5


def test_a_page_shows_what_the_report_holds():
    told = small_report() | {"left_out": {"books": "no apt-get"}}
    text = page.page(told, picture=True)
    assert "| code | 4,096 | 4 | 3.25 | 3.0 – 4.0 | 10.0 | 15.0 | 1.50× | 3 / 1 / 0 |" in text
    assert "| 1,024 | 90% | 80% |" in text and "- books was left out: no apt-get" in text
    assert "![τ, speed-up" in text and "![" not in page.page(told, picture=False)
    assert "1.9 on 2 cores.\n" in text
    busy = told | {"machine": {"cores": 2, "load_average": 6.0}}
    assert "6.0 on 2 cores; **other programs disturbed the speeds**" in page.page(busy, picture=False)
    gpu = [bucket | {"plain_peak_bytes": 2**30, "peak_bytes": 2**31} for bucket in told["buckets"]]
    assert "| 3 / 1 / 0 | 1.00 | 2.00 |" in page.speed_table(told | {"buckets": gpu})


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from hf_longspec.evaluation.plots import draw

    draw(small_report(), tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
