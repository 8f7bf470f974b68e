"""`hf-longspec evaluate` on a tiny pair: reports, going on after a stop, and answers to mistakes."""

import json
import sys

import pytest
from full_disk import full_disk
from helpers import is_one_line
from tiny_folders import tiny_folders
from typer.testing import CliRunner

from hf_longspec import cli
from hf_longspec.evaluation import runner as measuring
from hf_longspec.hub.card import About, card_faults, draft_card

runner = CliRunner()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tiny_folders(tmp_path_factory.mktemp("pair"))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    (folder / "mine.jsonl").write_text('{"prompt": "the quick"}\n{"prompt": "brown fox jumps over"}\n')
    return folder


def evaluate(folders, output, *arguments, **options):
    given = {"target": folders / "target", "draft": folders / "draft", "output": output, "contexts": "16,32"}
    given |= {"prompts": 2, "max_new_tokens": 8} | options
    words = ["evaluate", "--no-plot", *arguments]
    for name, value in given.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return runner.invoke(cli.app, words)


def two_tasks(folders):
    return ["--task", f"text={folders / 'text.txt'}", "--task", f"prompts={folders / 'mine.jsonl'}"]


def test_a_report_of_two_tasks(folders, tmp_path):
    result = evaluate(folders, tmp_path, *two_tasks(folders), tree="2,3")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["draft"]["tree"] == [2, 3] and report["target"]["dtype"] == "float32"
    figures = {(bucket["task"], bucket["context"]): bucket for bucket in report["buckets"]}
    assert list(figures) == [("text", 16), ("text", 32), ("prompts", 16), ("prompts", 32), ("all", 16), ("all", 32)]
    assert [bucket["prompts"] for bucket in figures.values()] == [2, 2, 1, 1, 3, 3]
    assert all(bucket["equal"] == bucket["prompts"] for bucket in figures.values())  # float32
    assert all(1 <= bucket["accept_length"] <= 3 and bucket["speed_up"] > 0 for bucket in figures.values())
    assert "| text | 16 | 2 |" in (tmp_path / "report.md").read_text()
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert (
        len(lines) == 1 + 6 and json.loads(lines[1])["tokens"]["plain"] == json.loads(lines[1])["tokens"]["longspec"]
    )


@pytest.mark.gpu
def test_peaks_of_memory_on_a_gpu(folders, tmp_path):
    result = evaluate(folders, tmp_path, *two_tasks(folders), dtype="bfloat16")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    weights = report["draft"]["weights_bytes"]
    assert all(bucket["peak_bytes"] > weights and bucket["plain_peak_bytes"] > weights for bucket in report["buckets"])
    assert "peak, GiB" in (tmp_path / "report.md").read_text()


def test_a_report_makes_a_complete_card(folders, tmp_path):
    from hf_longspec import LongSpecConfig

    assert evaluate(folders, tmp_path, *two_tasks(folders)).exit_code == 0
    about = About("A draft", "me/tiny", None, None, "mit", ["en"], [], [], None, "Random weights.", [])
    report = json.loads((tmp_path / "report.json").read_text())
    config = LongSpecConfig.from_pretrained(folders / "draft")
    assert card_faults(draft_card(config, about, [report])) == []


def test_a_stopped_run_goes_on_exactly_where_it_stopped(folders, tmp_path, monkeypatch):
    real, calls = measuring.measure, []

    def stopping(target, draft, sample, temperature, seed):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(sample.key)
        return real(target, draft, sample, temperature, seed)

    monkeypatch.setattr(measuring, "measure", stopping)
    stopped = evaluate(folders, tmp_path / "a", *two_tasks(folders))
    assert stopped.exit_code == 130 and "stopped after 2 of 6 prompts; the same command goes on" in stopped.stderr
    assert not (tmp_path / "a" / "report.json").exists()
    monkeypatch.setattr(measuring, "measure", real)
    resumed = evaluate(folders, tmp_path / "a", *two_tasks(folders))
    assert resumed.exit_code == 0 and "2 of 6 prompts were measured before" in resumed.stderr
    evaluate(folders, tmp_path / "b", *two_tasks(folders))
    both = [
        [json.loads(line) for line in (tmp_path / name / "records.jsonl").read_text().splitlines()] for name in "ab"
    ]
    assert both[0][0]["settings"] == both[1][0]["settings"]
    for one, other in zip(both[0][1:], both[1][1:], strict=True):
        assert (one["task"], one["id"], one["tokens"]) == (other["task"], other["id"], other["tokens"])
        assert one["longspec"]["accept_lengths"] == other["longspec"]["accept_lengths"]


def test_other_settings_are_not_mixed(folders, tmp_path):
    assert evaluate(folders, tmp_path, *two_tasks(folders)).exit_code == 0
    again = evaluate(folders, tmp_path, *two_tasks(folders), seed=1, tree="2")
    assert again.exit_code == 2 and is_one_line(again.stderr)
    assert "draft.tree was [4, 8, 8], is [2]; setting.seed was 0, is 1" in again.stderr


def test_sampled_texts_are_equal_under_a_seed(folders, tmp_path):
    result = evaluate(folders, tmp_path, *two_tasks(folders), temperature=1.0, seed=3)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["setting"]["temperature"] == 1.0
    assert all(bucket["equal"] == bucket["prompts"] for bucket in report["buckets"])


@pytest.mark.parametrize(
    "task, options, message",
    [
        (None, {}, "nothing to measure: expected --suite held-out, or --task"),
        ("texts=x", {}, "unknown task 'texts'; known are gov_report"),
        ("text=nowhere", {}, "nowhere: no such file or folder"),
        (
            "text={folder}/text.txt",
            {"contexts": "2048"},
            "task text: a context of 2048 and 8 new tokens are more than",
        ),
        ("text={folder}/prompt.txt", {"contexts": "100"}, "expected a text of at least 100 tokens, got 40"),
        ("lcc={folder}/mine.jsonl", {}, "2 of 2 rows are malformed; line 1: expected a text 'context', got None"),
        ("text={folder}/text.txt", {"tree": "100000"}, "`tree_shape` level 1 can have at most"),
        ("text={folder}/text.txt", {"target": "./missing"}, "target ./missing: no such folder"),
        ("text={folder}/text.txt", {"output": "{folder}/text.txt"}, "text.txt"),
        ("text={folder}/text.txt", {"suite": "other"}, "unknown suite 'other'"),
    ],
)
def test_mistakes_are_one_line(folders, tmp_path, task, options, message):
    options = {name: value.format(folder=folders) for name, value in options.items()}
    arguments = ["--task", task.format(folder=folders)] if task else []
    result = evaluate(folders, options.pop("output", tmp_path), *arguments, **options)
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert is_one_line(result.stderr) and "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


def test_a_draft_for_another_target_is_told_first(folders, tmp_path):
    result = evaluate(folders, tmp_path / "new", *two_tasks(folders), draft=folders / "stranger")
    assert result.exit_code == 2 and "hidden_size: draft has 64, target has 32" in result.stderr
    assert not (tmp_path / "new").exists()


def test_no_space_is_one_line(folders, tmp_path):
    """While it measures; and, all being measured, for the report, which stays as it was."""
    report, reports = tmp_path / "report.json", []
    for file in ("records.jsonl", "report.json"):
        with full_disk(1000):
            result = evaluate(folders, tmp_path, *two_tasks(folders))
        last = result.stderr.splitlines()[-1]
        assert last == f"hf-longspec: {tmp_path / file} cannot be written: File too large"
        assert result.exit_code == 1 and [path.read_bytes() for path in tmp_path.glob("*report.json")] == reports
        assert evaluate(folders, tmp_path, *two_tasks(folders)).exit_code == 0
        reports = [report.read_bytes()]


def test_a_picture_needs_matplotlib(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["hf_longspec.cli.evaluate"], "find_spec", lambda name: None)
    words = ["evaluate", "--target", "x", "--draft", "y", "--output", str(tmp_path)]
    result = runner.invoke(cli.app, words)
    assert result.exit_code == 2 and "pip install 'hf-longspec[bench]', or --no-plot" in result.stderr
