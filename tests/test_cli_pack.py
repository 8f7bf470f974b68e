"""`hf-longspec pack`: tokens in a folder, once, for a recipe's source."""

import json

import pytest
from byte_tokenizer import END, byte_tokenizer, ids
from full_disk import full_disk
from typer.testing import CliRunner

from hf_longspec import cli
from hf_longspec.training.data import DataSection, build_datasets
from hf_longspec.training.data.store import TokenStore


@pytest.fixture
def folder(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for name, text in {"p/a.py": "ab", "p/b.py": "cd", "celery/c.py": "ef", "q/d.py": "ab", "q/e.txt": "no"}.items():
        (tmp_path / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "code" / name).write_text(text)
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n" + '{"messages": []}\n')
    return tmp_path


def pack(folder, path, *options):
    fixed = ["pack", str(folder / path), "--tokenizer", str(folder / "tokenizer"), "--out", str(folder / "out")]
    return CliRunner().invoke(cli.app, [*fixed, *options])


def test_code_without_held_out_packages_and_copies(folder):
    result = pack(folder, "code", "--held-out", "celery")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["left_out"] == {"held out": 1, "duplicate": 1} and record["tokens"] == 6
    store = TokenStore.load(folder / "out")
    assert store.names == ("p/a.py", "p/b.py")
    assert store.tokens.tolist() == [*ids("ab"), END, *ids("cd"), END]
    section = DataSection.from_dict(
        {"sources": [{"path": str(folder / "out"), "format": "tokens", "document": "package"}]}
    )
    train, _ = build_datasets(section, byte_tokenizer(), 6, 0)
    assert train[0]["document_ids"].tolist() == [0] * 6


def test_chats(folder):
    arguments = ("--format", "json", "--kind", "chat", "--loss", "assistant")
    assert pack(folder, "chats.jsonl", *arguments, "--max-bad-share", "0.5").exit_code == 0
    store = TokenStore.load(folder / "out")
    assert store.tokens[store.loss_mask].tolist() == ids("a<end>")
    assert store.summary["bad_rows"] == ["chats.jsonl:2: expected a list of messages in 'messages', got none"]


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("tokenizer/..", ("--out", "."), "hf-longspec: . exists already; choose a new folder"),
        ("none", (), "none: no such file or folder"),
        ("code", ("--longest-line", "1"), "no documents are left of"),
        ("code", ("--suffix", ".c"), "expected files that end with .c, got none"),
        ("code", ("--format", "tokens"), "--format tokens is what pack writes"),
        ("code", ("--loss", "assistant"), "`loss: assistant` needs `kind: chat`"),
        ("code", ("--tokenizer", "./none"), "tokenizer ./none: no such folder"),
        (
            "chats.jsonl",
            ("--format", "json", "--kind", "chat"),
            "1 bad rows of 2 are more than `max_bad_share` (0.01)",
        ),
    ],
)
def test_mistakes(folder, path, options, message):
    result = pack(folder, path, *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and not (folder / "out").exists()
    assert not list(folder.glob(".out*"))


def test_a_disk_that_is_full(folder):
    with full_disk(100):
        result = pack(folder, "code")
    assert result.exit_code == 1 and "cannot be written: File too large" in result.stderr, result.output
    assert not list(folder.glob("*out*"))
