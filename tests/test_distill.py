"""Self-distillation: the data is what the target writes, whole after a kill, and a source of training."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from byte_tokenizer import byte_tokenizer, ids
from full_disk import full_disk
from helpers import quick_or_slow, tiny_draft, tiny_target
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_longspec import cli
from hf_longspec.training.data import DataSection, build_datasets
from hf_longspec.training.data.store import TokenStore
from hf_longspec.training.data.stored import token_folders
from hf_longspec.training.distill import until_end

QUESTIONS = ["a", "bc", "def" * 9, "gh", "ij" * 5, "k" * 12, "lm", "n"]
SIZES = {"max_prompt_tokens": 60, "max_new_tokens": 20, "batch_size": 2, "shard_rows": 3, "dtype": "float32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target whose END comes up now and then, a draft for it, chats and a text as prompts."""
    folder = tmp_path_factory.mktemp("distill")
    target = tiny_target("llama", vocab_size=258, seed=3)
    prompt = torch.tensor([ids(prompt_of(QUESTIONS[0]))])
    often = target.generate(prompt, max_new_tokens=20, pad_token_id=0)[0, prompt.shape[1] + 5]
    target.generation_config.eos_token_id = [int(often), 256]
    target.save_pretrained(folder / "target")
    byte_tokenizer().save_pretrained(folder / "target")
    tiny_draft(target, tree_shape=(2, 2)).save_pretrained(folder / "draft")
    tiny_draft(tiny_target("llama", vocab_size=258, hidden_size=64)).save_pretrained(folder / "stranger")
    target.generation_config.num_beams = 4
    target.save_pretrained(folder / "beams")
    byte_tokenizer().save_pretrained(folder / "beams")
    rows = [{"messages": [{"role": "user", "content": question}]} for question in QUESTIONS]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.jsonl").write_text(json.dumps({"text": "0123456789" * 3}) + "\n")
    return folder


def prompt_of(question):
    return f"<turn>u:{question}<end>\n<turn>a:"


def command(folder, out, prompts="chats.jsonl", **options):
    given = {"target": folder / "target", "prompts": folder / prompts, "out": out} | SIZES | options
    return [
        "distill-data",
        *(str(word) for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)),
    ]


def run(folder, out, **options):
    result = CliRunner().invoke(cli.app, command(folder, out, **options))
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(folder):
    """(name, tokens, learned tokens) of each document, shard after shard."""
    for store in map(TokenStore.load, token_folders(folder)):
        for name, start, end in zip(store.names, store.offsets, store.offsets[1:], strict=False):
            yield name, store.tokens[start:end].tolist(), store.tokens[start:end][store.loss_mask[start:end]].tolist()


@pytest.fixture(scope="module")
def greedy(folder):
    out = folder / "greedy"
    return out, run(folder, out)


def test_answers_are_what_the_target_writes_alone(folder, greedy):
    """Prompt by prompt, without padding, by plain `generate`."""
    target = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)
    out, record = greedy
    rows = list(rows_of(out))
    lengths = []
    for (name, tokens, answer), number, question in zip(rows, range(1, 9), QUESTIONS, strict=True):
        prompt = torch.tensor([ids(prompt_of(question))])
        expected = target.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)[0].tolist()
        assert (name, tokens) == (f"chats.jsonl:{number}", expected)
        assert answer == expected[prompt.shape[1] :]
        lengths.append(len(answer))
    assert min(lengths) < 20, "no answer has ended: the test says nothing of ends"
    assert record["rows"] == 8 and record["answer_tokens"] == sum(lengths)
    assert record["ended"] == sum(row[2][-1] in target.generation_config.eos_token_id for row in rows)
    assert [path.name for path in token_folders(out)] == ["00000", "00001", "00002"]


def test_parts_share_the_prompts(folder, greedy, tmp_path):
    for part in ("1/2", "0/2"):
        run(folder, tmp_path / "out", shard=part)
    found = {name: tokens for name, tokens, _ in rows_of(tmp_path / "out")}
    assert found == {name: tokens for name, tokens, _ in rows_of(greedy[0])}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["distill.json", "part-0-of-2", "part-1-of-2"]


def test_a_draft_changes_nothing(folder, greedy, tmp_path):
    run(folder, tmp_path / "out", draft=folder / "draft")
    assert tree(tmp_path / "out") == tree(greedy[0])


def test_sampling_has_a_seed(folder, greedy, tmp_path):
    first, second, other = (tmp_path / name for name in "abc")
    for out, seed in ((first, 1), (second, 1), (other, 2)):
        run(folder, out, temperature=1.5, top_k=50, top_p=0.9, seed=seed)
    assert tree(first) == tree(second)
    assert list(rows_of(first)) != list(rows_of(other)) != list(rows_of(greedy[0]))


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(folder, tmp_path):
    options = {"max_new_tokens": 60, "batch_size": 1, "shard_rows": 2, "temperature": 1.0}
    run(folder, tmp_path / "whole", **options)
    cut = tmp_path / "cut"
    killed = subprocess.Popen(
        [sys.executable, "-m", "hf_longspec.cli", *command(folder, cut, **options)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (cut / "part-0-of-1/00000").exists():
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    finished = {path: path.stat().st_mtime_ns for path in cut.rglob("0*/*")}
    assert 0 < len(token_folders(cut)) < 4
    (cut / "part-0-of-1/.00003.1.tmp").mkdir()  # what a kill while a shard is written leaves
    record = run(folder, cut, **options)
    assert tree(cut) == tree(tmp_path / "whole")
    assert not (cut / "part-0-of-1/.00003.1.tmp").exists()
    assert all(path.stat().st_mtime_ns == changed for path, changed in finished.items())
    assert record["new_tokens"] < record["answer_tokens"]
    assert run(folder, cut, **options)["new_tokens"] == 0


def test_the_data_is_a_source(folder, greedy):
    section = DataSection.from_dict(
        {"sources": [{"path": str(greedy[0]), "format": "tokens"}], "held_out": {"share": 0.4}}
    )
    train, held_out = build_datasets(section, byte_tokenizer(), 64, 0)
    samples = [data[index] for data in (train, held_out) for index in range(len(data))]
    learned = sorted(sample["input_ids"][sample["loss_mask"]].tolist() for sample in samples)
    assert sum(map(len, learned)) == greedy[1]["answer_tokens"]
    assert len(train) and len(held_out)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_target_of_nan_writes_no_data(folder, tmp_path, temperature):
    target = AutoModelForCausalLM.from_pretrained(folder / "target")
    torch.nn.init.constant_(target.model.norm.weight, float("nan"))
    target.save_pretrained(tmp_path / "target")
    byte_tokenizer().save_pretrained(tmp_path / "target")
    options = {"target": tmp_path / "target", "temperature": temperature}
    result = CliRunner().invoke(cli.app, command(folder, tmp_path / "out", **options))
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert "the target cannot answer: expected logits that are numbers in torch.float32, got NaN" in result.stderr


def test_texts_go_on_from_their_beginnings(folder, tmp_path):
    run(folder, tmp_path / "one", prompts="texts.jsonl", kind="text", max_prompt_tokens=8)
    run(folder, tmp_path / "more", prompts="texts.jsonl", kind="text", max_prompt_tokens=8, stride=10)
    text = ids("0123456789" * 3)
    ((name, tokens, answer),) = rows_of(tmp_path / "one")
    assert (name, tokens) == ("texts.jsonl:1", text[:8] + answer)
    found = [(name, tokens[: len(tokens) - len(answer)]) for name, tokens, answer in rows_of(tmp_path / "more")]
    assert found == [("texts.jsonl:1", text[:8]), ("texts.jsonl:1+10", text[:8]), ("texts.jsonl:1+20", text[:8])]


def test_packed_tokens_are_texts(folder, greedy, tmp_path):
    run(folder, tmp_path / "on", prompts=greedy[0], format="tokens", max_prompt_tokens=8)
    assert [name for name, *_ in rows_of(tmp_path / "on")] == [name for name, *_ in rows_of(greedy[0])]


def test_long_chats_and_held_out_files_are_left_out_and_counted(folder, tmp_path):
    record = run(folder, tmp_path / "short", max_prompt_tokens=20)
    long = sum(len(ids(prompt_of(question))) > 20 for question in QUESTIONS)
    assert record["rows"] == 8 - long and record["prompts"]["left_out"] == {"longer than max_prompt_tokens": long}
    result = CliRunner().invoke(cli.app, command(folder, tmp_path / "none", held_out="chats"))
    assert result.exit_code == 2 and "expected prompts, got none" in result.stderr and "'held out': 8" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_new_tokens": 21},
            "holds data of other settings: max_new_tokens: 20 there, 21 now. Choose another folder",
        ),
        ({"seed": 1, "shard": "0/2"}, "parts: 1 there, 2 now; seed: 0 there, 1 now"),
        ({"prompts": "texts.jsonl", "kind": "text"}, "prompts: 8 there, 1 now; prompts_sha256: "),
        ({"shard": "2/2"}, "expected I/N with I from 0 to N-1, such as 0/4, got '2/2'"),
        ({"shard": "1"}, "expected I/N with I from 0 to N-1, such as 0/4, got '1'"),
        ({"max_new_tokens": 500}, "a context of 60 and 500 new tokens are more than the target's 512 positions"),
        ({"prompts": "none.jsonl"}, "none.jsonl: no such file or folder"),
        ({"field": "conversation"}, "expected a list of messages in 'conversation', got none"),
        ({"draft": "./none"}, "draft ./none: no such folder"),
    ],
)
def test_mistakes(folder, greedy, options, message):
    before = tree(greedy[0])
    result = CliRunner().invoke(cli.app, command(folder, greedy[0], **options))
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert tree(greedy[0]) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "stranger"}, "hidden_size: draft has 64, target has 32"),
        ({"target": "beams"}, "LongSpec needs num_beams=1, got num_beams=4"),
        ({"target": "beams", "draft": "draft"}, "LongSpec needs num_beams=1, got num_beams=4"),
    ],
)
def test_what_generate_refuses_leaves_nothing(folder, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(cli.app, command(folder, tmp_path / "out", **options))
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("size", quick_or_slow([0, 2000], [0]))
def test_a_disk_that_is_full(folder, tmp_path, size):
    """At the settings; and at the first shard, where the same command goes on when there is room."""
    out, options = tmp_path / "out", {"max_new_tokens": 200, "shard_rows": 8}
    with full_disk(size):
        result = CliRunner().invoke(cli.app, command(folder, out, **options))
    assert result.exit_code == 1 and "cannot be written: File too large" in result.stderr, result.output
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["distill.json"] * (size > 0)
    assert run(folder, out, **options)["rows"] == 8


def test_a_folder_of_something_else(folder):
    result = CliRunner().invoke(cli.app, command(folder, folder / "target"))
    assert result.exit_code == 2
    assert "target: expected an empty folder or one with distill.json, got chat_template.jinja" in result.stderr


def test_padding_behind_the_end():
    assert until_end(np.array([5, 9, 7, 7, 0]), [7, 8]).tolist() == [5, 9, 7]
    assert until_end(np.array([5, 9]), [7]).tolist() == until_end(np.array([5, 9]), []).tolist() == [5, 9]
