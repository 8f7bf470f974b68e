"""The authors' training data as rows for our recipes: a row of each kind, and what the recipes make of the files."""

import dataclasses
import json
import subprocess
import sys

import pytest
from byte_tokenizer import byte_tokenizer, ids
from published_format import DRAFTS, HUB_CONFIGS

from hf_longspec.evaluation.tasks import TASKS
from hf_longspec.training.data import published
from hf_longspec.training.data.documents import read_documents
from hf_longspec.training.data.report import SourceReport
from hf_longspec.training.recipe import Recipe

ROWS = [
    {"source": "gov-report", "report": "R {x}", "summary": "S"},
    {"source": "multi-news", "document": "D", "summary": "S"},
    {"source": "meetingbank", "transcript": "T", "summary": "S"},
    {"source": "code", "prefix": "def f(", "suffix": "):"},
    {"source": "code", "text": "import os"},
    {"source": "book", "text": "Once."},
    {"source": "arxiv", "article": ["A", "B"], "abstract": ["a", "b"]},
    {"source": "arxiv", "article": "C", "abstract": "c"},
    {"source": "tulu-v2", "conversation": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]},
    {"problem": "1 + 1?", "qwq": "Hmm. 2"},
    {"source": "other"},
    {"source": "gov-report", "report": "no summary"},
]
SYSTEM = "<s>system\nYou are a helpful assistant</s>\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "published").mkdir()
    for name, rows in (("a", ROWS[:5]), ("b", ROWS[5:])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "published" / f"{name}.jsonl").write_text(lines + "nonsense\n")
    return tmp_path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_of_each_kind(folder):
    counts = published.main(folder / "published", folder / "out")
    assert counts == {"instructions": 4, "long": 5, "reasoning": 1, "left out": 4}
    long = [row["text"] for row in read(folder / "out" / "long.jsonl")]
    ask = "<s>user\nPlease summarize the following article: "
    assert long == [
        "import os",
        "Once.",
        f"{SYSTEM}{ask}A</s>\n<s>assistant\na</s>\n{ask}B</s>\n<s>assistant\nb</s>\n",
        f"{SYSTEM}{ask}C</s>\n<s>assistant\nc</s>\n",
        f"{SYSTEM}<s>user\nu</s>\n<s>assistant\nv</s>\n",
    ]
    instructions = read(folder / "out" / "instructions.jsonl")
    assert [row["answer"] for row in instructions] == ["Summary:S</s>\n"] * 3 + ["):</s>\n"]
    assert instructions[3]["prompt"] == (
        f"{SYSTEM}<s>user\nPlease complete the code given below. \n\n"
        "Code:\ndef f(\n\nNow, complete the code given.</s>\n<s>assistant\n"
    )
    (reasoning,) = read(folder / "out" / "qwen" / "reasoning.jsonl")
    assert reasoning["answer"] == "Hmm. 2<|im_end|>\n"
    assert "<s>" not in (folder / "out" / "qwen" / "long.jsonl").read_text()


def test_a_draft_is_trained_and_measured_on_one_wording(folder):
    """But for the first words of the answer, which training learns and the evaluation gives."""
    published.main(folder / "published", folder / "out")
    instructions = read(folder / "out" / "instructions.jsonl")
    for row, name, text in ((0, "gov_report", "R {x}"), (1, "multi_news", "D")):
        asked = TASKS[f"paper/{name}"].instructions.format(context=text)
        assert instructions[row]["prompt"] + "Summary:" == asked
    (reasoning,) = read(folder / "out" / "qwen" / "reasoning.jsonl")
    assert reasoning["prompt"] == TASKS["paper/aime24"].instructions.format(problem="1 + 1?")


@pytest.mark.parametrize("name", DRAFTS)
def test_recipes_read_the_files(name, folder, monkeypatch):
    """By the targets' tokenizers, which have no chat template, or another one; only answers are learned in stage 3."""
    published.main(folder / "published", folder / "data" / "longspec")
    monkeypatch.chdir(folder)
    for path in sorted((HUB_CONFIGS / name).glob("recipe-*.yaml")):
        data = dataclasses.replace(Recipe.load(path).data, min_tokens=2)
        report = SourceReport("x", max_bad_share=0)
        tokenizer = byte_tokenizer(None)
        documents = list(read_documents(data.sources[0], data, tokenizer, report))
        assert len(documents) == {"recipe-long": 5, "recipe-instructions": 4, "recipe-reasoning": 1}[path.stem]
        if path.stem != "recipe-long":
            answer = read(folder / data.sources[0].path)[0]["answer"].rstrip()
            first = documents[0]
            assert first.ids[first.loss_mask].tolist() == ids(answer)


def test_as_a_command(folder):
    command = [sys.executable, "-m", "hf_longspec.training.data.published"]
    done = subprocess.run([*command, folder / "published", folder / "out"], capture_output=True, text=True)
    assert done.returncode == 0 and "instructions: 4 rows" in done.stdout, done.stderr
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "hf download sail/longspec-data" in done.stderr
