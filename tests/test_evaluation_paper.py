"""The tasks of LongSpec's authors: wording, choice of rows, ends of texts, and one command from a Hub to their τ."""

import hashlib
import io
import json
import zipfile
from pathlib import Path

import pyarrow
import pytest
from helpers import tiny_draft, tiny_target
from hub_folders import connect, server
from hub_store import Blob, Repo
from pyarrow import parquet
from tiny_folders import tiny_folders
from transformers import AutoTokenizer
from typer.testing import CliRunner

from hf_longspec import cli
from hf_longspec.evaluation import runner
from hf_longspec.evaluation.paper import AIME_22_TO_24, LONGBENCH
from hf_longspec.evaluation.plan import chosen, plan
from hf_longspec.evaluation.task import Sample, Wanted
from hf_longspec.evaluation.tasks import TASKS

# SHA-256 of the templates in the authors' files at commit 15e4998; repobench-p leaves the row's `input` out, as lcc
WORDING = {
    "gov_report": "a0e6a2243e7f085978837907032c7d69684065d9e56de3a884b549deeefaac4f",
    "qmsum": "2dc65876d51e42ae561eb65f8d50de7204306f5f14f69d6f798b9e7661692ebc",
    "multi_news": "9bacf7220bb4a87588374f48bd102aa78e4ed309713731bcd157f8e642211951",
    "lcc": "d39f9a4294cb4260d4ff1759ec7dc8cf92dc7a7271efb73bd911d6b6aad55985",
    "repobench-p": "d39f9a4294cb4260d4ff1759ec7dc8cf92dc7a7271efb73bd911d6b6aad55985",
    "aime24": "0d69595381b1904d17ec51e26b4b492f03c1b9c018e1e6b5e93aca602e8735f3",
}
LONG = [name for name in WORDING if name != "aime24"]
POSITIONS = 3600  # of the tiny target: prompts of 1,201 to 1,600 tokens, a token a byte


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pair whose target has places for the shortest prompts of the paper."""
    folder = tiny_folders(tmp_path_factory.mktemp("pair"))
    target = tiny_target("llama", vocab_size=256, max_position_embeddings=POSITIONS)
    target.save_pretrained(folder / "target")
    tiny_draft(target).save_pretrained(folder / "draft")
    return folder


@pytest.fixture
def tokenizer(folders):
    return AutoTokenizer.from_pretrained(folders / "target")


@pytest.mark.parametrize("name", WORDING)
def test_wording_is_that_of_the_authors(name):
    task = TASKS[f"paper/{name}"]
    assert hashlib.sha256(task.instructions.encode()).hexdigest() == WORDING[name]
    assert task.max_new_tokens == (20_000 if name == "aime24" else 1024) and task.stops and task.long is None


def rows_of(name: str, *lengths: int) -> list[dict[str, str]]:
    """Rows whose prompts have these lengths."""
    rest = len(TASKS[f"paper/{name}"].instructions.format(context="", input=""))
    return [{"context": "c" * (length - rest), "input": "", "_id": str(length)} for length in lengths]


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("name", LONG)
def test_rows_are_taken_whole_or_left_out(name, tokenizer, tmp_path, monkeypatch):
    """More than 1,200 tokens, and 2,000 positions stay free, whatever `--contexts` says."""
    (tmp_path / f"{name}.jsonl").write_bytes(jsonl(rows_of(name, 1601, 1600, 1200, 1201, 1300)))
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages }}")  # their prompts are no chats
    task = TASKS[f"paper/{name}"]
    made = plan([(task, str(tmp_path))], Wanted(tokenizer, (10, 20), 0, POSITIONS), tmp_path)
    assert [(sample.id, sample.context, len(sample.ids)) for sample in made.samples] == [
        ("1600", 1600, 1600),
        ("1201", 1600, 1201),
        ("1300", 1600, 1300),
    ]
    assert {(sample.cut, sample.max_new_tokens, sample.stops, sample.end) for sample in made.samples} == {
        (0, 1024, True, None)
    }
    assert tokenizer.decode(made.samples[1].ids) == task.instructions.format(**rows_of(name, 1201)[0])
    assert made.left_out == {f"some of paper/{name}": "2 of 5 prompts are not of 1,201 to 1,600 tokens"}
    first = plan([(task, str(tmp_path))], Wanted(tokenizer, (10,), 2, POSITIONS), tmp_path)
    assert [sample.id for sample in first.samples] == ["1600", "1201"]


def test_other_tasks_have_four_prompts_if_nothing_is_said(tokenizer, tmp_path):
    (tmp_path / "lcc.jsonl").write_bytes(jsonl([{"context": "abc"}] * 6))
    made = plan([(TASKS["lcc"], str(tmp_path))], Wanted(tokenizer, (10,), 0, POSITIONS), tmp_path)
    assert len(made.samples) == 4


def problems(*years_ids: int) -> list[dict[str, object]]:
    return [{"id": number, "problem": f"Problem {number}?", "answer": "1"} for number in years_ids]


def as_parquet(rows) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def test_problems_of_2024(tokenizer, tmp_path):
    (tmp_path / "train.parquet").write_bytes(as_parquet(problems(0, 59, 60, 75, 89, 90)))
    wanted = Wanted(tokenizer, (10,), 9, 32_768)
    (task, place) = chosen(None, [f"paper/aime24={tmp_path / 'train.parquet'}"], None)[0]
    samples = task.make(task, Path(place), wanted).samples
    assert [(sample.id, sample.context) for sample in samples] == [(year, 12_768) for year in ("60", "75", "89")]
    assert "user\nProblem 60?<|im_end|>" in tokenizer.decode(samples[0].ids)
    (tmp_path / "aime24.jsonl").write_bytes(jsonl([{"problem": "?"}]))
    with pytest.raises(ValueError, match="aime24.jsonl: expected each row to have an `id`, a number"):
        task.make(task, tmp_path / "aime24.jsonl", wanted)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="broken.parquet is no Parquet file"):
        task.make(task, tmp_path / "broken.parquet", wanted)


@pytest.mark.parametrize("end", ["<|eot_id|>", "<|im_end|>"])
def test_texts_of_llama_3_and_qwq_end_at_one_token(end, tokenizer, tmp_path):
    tokenizer.add_tokens([end], special_tokens=True)
    (tmp_path / "lcc.jsonl").write_bytes(jsonl(rows_of("lcc", 1300)))
    (sample,) = plan([(TASKS["paper/lcc"], str(tmp_path))], Wanted(tokenizer, (9,), 0, POSITIONS), tmp_path).samples
    assert sample.end == tokenizer.convert_tokens_to_ids(end)
    assert runner.options_of(sample, 0.0)["eos_token_id"] == sample.end
    assert "eos_token_id" not in runner.options_of(Sample("t", "1", 9, [1], 4, stops=True), 0.0)
    assert runner.options_of(Sample("t", "1", 9, [1], 4, stops=False), 0.0)["eos_token_id"] is None


def test_one_command_makes_their_table(folders, tmp_path, monkeypatch):
    """From the places on the Hub where the rows lie, to their τ beside ours."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as written:
        for name in LONG:
            written.writestr(f"data/{name}.jsonl", jsonl(rows_of(name, 1250, 1300, 2000)))
    with server() as hub:
        for place, content in ((LONGBENCH, archive.getvalue()), (AIME_22_TO_24, as_parquet(problems(60, 61)))):
            owner, repo, file = place.removeprefix("hf://datasets/").split("/", 2)
            hub.store.repos[f"{owner}/{repo}"] = Repo("me", private=False)
            hub.store.repos[f"{owner}/{repo}"].commit("main", "rows", {file: Blob(content, large=False)})
        connect(monkeypatch, hub.url, tmp_path / "hub")
        words = ["evaluate", "--target", str(folders / "target"), "--draft", str(folders / "draft")]
        words += ["--suite", "paper", "--task", "paper/aime24", "--no-plot", "--max-new-tokens", "6", "--tree", "200"]
        words += ["--output", str(tmp_path / "out")]
        result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(bucket["task"], bucket["context"]) for bucket in report["buckets"]] == [
        *((f"paper/{name}", 1600) for name in LONG),
        ("paper/aime24", POSITIONS - 6),
        ("all", 1600),
        ("all", POSITIONS - 6),
    ]
    assert [source["name"] for source in report["sources"]] == [LONGBENCH] * 5 + [AIME_22_TO_24]
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()[1:]]
    for bucket in report["buckets"]:
        own = [record for record in records if record["context"] == bucket["context"]]
        own = [record for record in own if bucket["task"] in (record["task"], "all")]
        rounds = [record["longspec"]["accept_lengths"] for record in own]
        assert bucket["prompts"] == len(rounds) in (2, 10)
        accepted, count = sum(length - 1 for text in rounds for length in text), sum(map(len, rounds))
        counts, nums = accepted, count + len(rounds)  # as their code has them
        assert bucket["with_prefill"] == pytest.approx((counts + nums) / nums)
        assert bucket["with_prefill"] != bucket["accept_length"]
    assert "| τ | with prefill |" in (tmp_path / "out" / "report.md").read_text()
    assert "counts as one more forward" in (tmp_path / "out" / "report.md").read_text()
